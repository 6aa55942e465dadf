"""Which figures are drawn over the steps, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quietstar.reports.formats import percent, plain, signed
from quietstar.reports.records import Record, series

INK, BLUE, GREEN = "var(--plot-ink)", "var(--plot-blue)", "var(--plot-green)"
VERMILLION, PURPLE = "var(--plot-vermillion)", "var(--plot-purple)"


@dataclass(frozen=True)
class Line:
    """A figure in a chart: what was held out as marked points, training as a thin line.

    Attributes:
        key: Of the figure in ``metrics.jsonl``.
        name: In the legend.
        color: A colour of ``style.css``; the script puts its value for light or dark.
        symbol: Of the held-out points, so that colour is not all that tells lines apart.
    """

    key: str
    name: str
    color: str
    symbol: str = "circle"


@dataclass(frozen=True)
class Chart:
    """Lines on one pair of axes.

    Attributes:
        name: Of the element in the page.
        title: Above the chart.
        caption: What is to be seen, in one or two sentences.
        unit: Of the vertical axis.
        lines: What is drawn, if it was measured.
        is_share: The unit is a share of one, shown in per cent.
        cut_spikes: The highest training values may leave the axes.
        show_zero: The axis takes in zero.
    """

    name: str
    title: str
    caption: str
    unit: str
    lines: tuple[Line, ...]
    is_share: bool = False
    cut_spikes: bool = False
    show_zero: bool = False


CHARTS = (
    Chart(
        "accuracy",
        "Accuracy",
        "Held-out problems whose answer comes out right. Exchanged: each problem gets the thought "
        "of another one. Pause: one constant token in place of every thought token.",
        "right answers",
        (
            Line("accuracy_with_thoughts", "with thoughts", BLUE),
            Line("accuracy_without_thoughts", "without", INK, "square"),
            Line("accuracy_swapped", "swapped", VERMILLION, "diamond"),
            Line("accuracy_pause", "pause tokens", PURPLE, "triangle-down"),
        ),
        is_share=True,
        show_zero=True,
    ),
    Chart(
        "right-thoughts",
        "Right thoughts",
        "Share of the sampled thoughts that are right.",
        "right thoughts",
        (Line("right_thoughts", "right thoughts", GREEN, "triangle-up"),),
        is_share=True,
        show_zero=True,
    ),
    Chart(
        "nll",
        "Negative log-likelihood of the next token",
        "Base: without a thought. Mixed: base and thought together. Thought: its prediction alone. "
        "Lower is better.",
        "nats a token",
        (
            Line("base_nll", "base", INK, "square"),
            Line("mixed_nll", "mixed", BLUE),
            Line("thought_nll", "thought", GREEN, "triangle-up"),
        ),
        cut_spikes=True,
    ),
    Chart(
        "gain",
        "Gain of thinking, and how much of it is content",
        "Gain: base minus mixed. Of content: what is lost when the thoughts are swapped; only "
        "this part is thinking.",
        "nats a token",
        (
            Line("gain", "gain", BLUE),
            Line("gain_of_content", "gain of content", GREEN, "triangle-up"),
            Line("gain_over_pause", "gain over pause tokens", PURPLE, "diamond"),
        ),
        show_zero=True,
    ),
    Chart(
        "mixing-weight",
        "Mixing weight",
        "Mean share of the thought in the prediction. Near zero, the gate is shut.",
        "share of the thought",
        (Line("mixing_weight", "mixing weight", BLUE),),
        show_zero=True,
    ),
    Chart(
        "reward",
        "Reward",
        "What a thought adds to the log-probability of its targets, and the spread among the "
        "thoughts of one position: without spread, REINFORCE has no signal.",
        "nats a thought",
        (
            Line("reward", "reward", GREEN, "triangle-up"),
            Line("reward_spread", "spread", PURPLE, "diamond"),
        ),
        show_zero=True,
    ),
    Chart(
        "entropy",
        "Entropy of thoughts",
        "Of the distributions that thought tokens come from. Held-out thoughts are greedy.",
        "nats a token",
        (Line("entropy", "entropy", PURPLE, "diamond"),),
        show_zero=True,
    ),
    Chart(
        "variety",
        "Variety of thoughts",
        "Distinct: distinct tokens of a thought over its length. Alike: positions whose thoughts "
        "are all the same.",
        "share",
        (
            Line("distinct", "distinct", BLUE),
            Line("alike", "alike", VERMILLION, "square"),
        ),
        is_share=True,
        show_zero=True,
    ),
)


def has_data(chart: Chart, records: Sequence[Record]) -> bool:
    """Whether any figure of the chart was measured."""
    return any(line.key in record.figures for record in records for line in chart.lines)


def describe(chart: Chart, records: Sequence[Record]) -> str:
    """The newest value of every line as one text, for those who cannot see the chart."""
    show = percent if chart.is_share else plain
    parts = [chart.title + " over the steps"]
    for line in chart.lines:
        kind = "eval" if series(records, "eval", line.key)[1] else "train"
        steps, values = series(records, kind, line.key)
        if values:
            where = "held out" if kind == "eval" else "in training"
            parts.append(f"{line.name} {show(values[-1])} {where} at step {steps[-1]}")
    return "; ".join(parts) + "."


def explain(chart: Chart, records: Sequence[Record]) -> str:
    """The caption, with what is missing for reading the chart."""
    figures: set[str] = set().union(*(record.figures for record in records))
    if chart.name == "gain" and "gain_of_content" not in figures:
        return chart.caption + " The gain of content was not measured here."
    return chart.caption


COLUMNS: Mapping[str, str] = {
    "accuracy_with_thoughts": "accuracy with thoughts",
    "accuracy_without_thoughts": "without thoughts",
    "accuracy_swapped": "swapped",
    "accuracy_pause": "pause",
    "right_thoughts": "right thoughts",
    "base_nll": "base NLL",
    "mixed_nll": "mixed NLL",
    "thought_nll": "thought NLL",
    "gain": "gain",
    "gain_of_content": "gain of content",
    "gain_over_pause": "gain over pause",
    "mixing_weight": "mixing weight",
}
"""Figures in the table of held-out evaluations."""


@dataclass(frozen=True)
class Evaluations:
    """The table of held-out evaluations: headings, and the cells of each row."""

    headings: list[str]
    rows: list[list[str]]


def evaluation_rows(records: Sequence[Record], stages: Sequence[str]) -> Evaluations:
    """Every held-out evaluation, with the columns that any of them has."""
    evaluations = [record for record in records if record.kind == "eval"]
    keys = [key for key in COLUMNS if any(key in record.figures for record in evaluations)]
    lead = ["step", "stage"] if any(stages) else ["step"]
    rows = []
    for record in evaluations:
        cells = [str(record.step), record.stage][: len(lead)]
        rows.append(cells + [cell(key, record.figures.get(key)) for key in keys])
    return Evaluations(lead + [COLUMNS[key] for key in keys], rows)


def cell(key: str, value: float | None) -> str:
    """A figure in the notation of its kind."""
    if key.startswith("gain"):
        return signed(value)
    return percent(value) if key.startswith(("accuracy", "right")) else plain(value)
