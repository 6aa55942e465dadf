"""The tables of controls and of sample problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quietstar.reports.artifacts import Answer, Controls, Difference, Sample, Variant
from quietstar.reports.formats import (
    MISSING,
    percent,
    percents,
    plain,
    point_bounds,
    signed_points,
)

_LONGEST = 170  # characters of a text before a sample that are shown unfolded


@dataclass(frozen=True)
class VariantRow:
    """A variant in the table of controls."""

    label: str
    accuracy: str
    bounds: str
    seeds: str
    right_thoughts: str


@dataclass(frozen=True)
class DifferenceRow:
    """A difference in the table of controls."""

    label: str
    difference: str
    bounds: str
    verdict: str


@dataclass(frozen=True)
class AnswerCell:
    """A predicted answer: its text, whether it is right, and the probability of the truth."""

    prediction: str
    is_right: bool
    probability: str
    width: str


@dataclass(frozen=True)
class SampleRow:
    """A sample: the text before it (its end, and all of it if that was cut) and what came."""

    before: str
    whole: str
    thought: str
    right_thought: bool | None
    truth: str
    without_thoughts: AnswerCell
    with_thoughts: AnswerCell
    mixing_weight: str


def variant_table(controls: Controls) -> list[VariantRow]:
    """All variants."""
    return [variant_row(variant) for variant in controls.variants]


def variant_row(variant: Variant) -> VariantRow:
    """A variant as texts."""
    right = [share for share in variant.right_thoughts if share is not None]
    return VariantRow(
        label=variant.title,
        accuracy=percent(variant.mean),
        bounds=percents(variant.ci95),
        seeds=" · ".join(percent(share) for share in variant.accuracy) or MISSING,
        right_thoughts=percent(sum(right) / len(right)) if right else MISSING,
    )


def difference_table(controls: Controls) -> list[DifferenceRow]:
    """All differences."""
    return [difference_row(difference) for difference in controls.differences]


def difference_row(difference: Difference) -> DifferenceRow:
    """A difference as texts."""
    bounds = difference.ci95
    verdict = MISSING
    if bounds is not None:
        verdict = "inside" if bounds[0] <= 0 <= bounds[1] else "outside"
    shown = signed_points(difference.mean)
    return DifferenceRow(difference.label, shown, point_bounds(bounds), verdict)


def sample_table(samples: Sequence[Sample]) -> list[SampleRow]:
    """All samples."""
    return [sample_row(sample) for sample in samples]


def sample_row(sample: Sample) -> SampleRow:
    """A sample as texts and marks."""
    before = visible(sample.before)
    is_cut = len(before) > _LONGEST
    return SampleRow(
        before="…" + before[-_LONGEST:] if is_cut else before,
        whole=before if is_cut else "",
        thought=visible(sample.thought),
        right_thought=sample.right_thought,
        truth=visible(sample.truth),
        without_thoughts=answer_cell(sample.without_thoughts, sample.truth, None),
        with_thoughts=answer_cell(sample.with_thoughts, sample.truth, sample.correct),
        mixing_weight=plain(sample.mixing_weight, 2),
    )


def answer_cell(answer: Answer, truth: str, correct: bool | None) -> AnswerCell:
    """A prediction; compared with the truth if nobody says whether it is right."""
    is_right = answer.prediction.strip() == truth.strip() if correct is None else correct
    share = answer.probability
    width = "" if share is None else f"{100 * min(max(share, 0.0), 1.0):.1f}%"
    return AnswerCell(visible(answer.prediction), is_right, percent(share), width)


def visible(text: str) -> str:
    """A text without the space around it; signs for nothing and for nothing but space."""
    return text.strip() or ("␣" if text else MISSING)


def tally(rows: Sequence[SampleRow]) -> str:
    """How many of the samples come out right."""
    parts = [
        f"{sum(row.with_thoughts.is_right for row in rows)} of {len(rows)} right with thoughts",
        f"{sum(row.without_thoughts.is_right for row in rows)} without",
    ]
    judged = [row.right_thought for row in rows if row.right_thought is not None]
    if judged:
        parts.append(f"{sum(judged)} of {len(judged)} thoughts right")
    return ", ".join(parts) + "."
