"""The files of a run folder, read tolerantly: what is damaged in part is used in part."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from quietstar.errors import UserError

RENAMED = {
    "accuracy_exchanged": "accuracy_swapped",
    "exchanged_thoughts": "swapped_thoughts",
    "gain_ahead": "gain_beyond_next",
    "reward_spread": "reward_std",
    "alike": "identical_fraction",
    "distinct": "distinct_token_ratio",
}
"""Keys of runs of earlier versions, and what they are called now."""


def finite(value: object) -> float | None:
    """Return ``value`` if it is a finite number; NaN, infinity, text and booleans give None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


# --- metrics.jsonl --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One line of ``metrics.jsonl``.

    Attributes:
        kind: ``train`` or ``eval``.
        stage: Name of the stage; empty in runs without stages.
        step: Optimizer steps done, over all stages.
        figures: Finite numbers of the line, by key.
    """

    kind: str
    stage: str
    step: int
    figures: Mapping[str, float]


def read_records(path: Path) -> list[Record]:
    """Read the complete records in order of steps; the last of several for one step wins.

    Of two stages that meet at a step, the one that was written first comes first.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = {(r.kind, r.stage, r.step): r for r in map(parse_record, lines) if r}
    return sorted(records.values(), key=lambda record: record.step)


def parse_record(line: str) -> Record | None:
    """Parse a line; None for one that is half written or something else."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.get("kind") not in ("train", "eval"):
        return None
    step, stage = finite(entry.pop("step", None)), entry.pop("stage", None)
    if step is None:
        return None
    numbers = {RENAMED.get(str(key), str(key)): finite(value) for key, value in entry.items()}
    figures = {key: value for key, value in numbers.items() if value is not None}
    return Record(entry["kind"], "" if stage is None else str(stage), int(step), figures)


def find_stages(records: Iterable[Record]) -> list[str]:
    """Return the names of the stages in the order of their first steps."""
    return list(dict.fromkeys(record.stage for record in records))


def series(records: Iterable[Record], kind: str, key: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a figure was measured, and its values there."""
    pairs = [(r.step, r.figures[key]) for r in records if r.kind == kind and key in r.figures]
    return [step for step, _ in pairs], [value for _, value in pairs]


# --- results.json, samples.json, controls.json ----------------------------------------------------


def interval(value: object) -> tuple[float, float] | None:
    """Return two finite numbers in order, or None."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = map(finite, value)
    return None if low is None or high is None else (min(low, high), max(low, high))


Figure = Annotated[float | None, BeforeValidator(finite)]
Interval = Annotated[tuple[float, float] | None, BeforeValidator(interval)]


class Part(BaseModel):
    """Part of a file: a null counts as missing, an unknown key as absent."""

    model_config = ConfigDict(extra="ignore", frozen=True, coerce_numbers_to_str=True)

    @model_validator(mode="before")
    @classmethod
    def _present(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {RENAMED.get(key, key): value for key, value in data.items() if value is not None}


class Accuracy(Part):
    """Shares of ``n`` held-out problems that are answered correctly."""

    with_thoughts: Figure = None
    without_thoughts: Figure = None
    swapped_thoughts: Figure = None
    pause_thoughts: Figure = None
    n: Figure = None


class BeforeAfter(Part):
    """A figure before and after training."""

    before: Figure = None
    after: Figure = None


class Results(Part):
    """``results.json``: the measurement at the end."""

    accuracy: Accuracy = Accuracy()
    right_thoughts: BeforeAfter = BeforeAfter()
    seconds: Figure = None


class Answer(Part):
    """A prediction, and the probability of the correct answer."""

    prediction: str = ""
    probability: Figure = None


class Sample(Part):
    """One held-out problem, or one position in a text."""

    before: str = ""
    thought: str = ""
    truth: str = ""
    without_thoughts: Answer = Answer()
    with_thoughts: Answer = Answer()
    mixing_weight: Figure = None
    right_thought: bool | None = None
    correct: bool | None = None

    @property
    def correct_with(self) -> bool:
        """True if the answer with thoughts is correct, by comparison if the file does not say."""
        if self.correct is not None:
            return self.correct
        return self.with_thoughts.prediction.strip() == self.truth.strip()

    @property
    def correct_without(self) -> bool:
        """True if the answer without thoughts is the correct one."""
        return self.without_thoughts.prediction.strip() == self.truth.strip()


class Samples(Part):
    """``samples.json``."""

    samples: tuple[Sample, ...] = ()


class Variant(Part):
    """One variant of the method, over its seeds."""

    name: str = ""
    label: str = ""
    accuracy: tuple[Figure, ...] = ()
    mean: Figure = None
    ci95: Interval = None
    right_thoughts: tuple[Figure, ...] = ()

    @property
    def title(self) -> str:
        """Name of the variant on the page."""
        return self.label or self.name

    @property
    def mean_right_thoughts(self) -> float | None:
        """Mean share of correct thoughts over the seeds that have one."""
        shares = [share for share in self.right_thoughts if share is not None]
        return sum(shares) / len(shares) if shares else None


class Difference(Part):
    """A difference between two variants, paired by seed."""

    label: str = ""
    mean: Figure = None
    ci95: Interval = None


class Controls(Part):
    """``controls.json``: variants of the method compared over seeds."""

    seeds: tuple[int, ...] = ()
    variants: tuple[Variant, ...] = ()
    differences: tuple[Difference, ...] = ()


Parts = TypeVar("Parts", bound=Part)


def read_part(path: Path, kind: type[Parts]) -> Parts:
    """Read a file; all defaults if there is no such file.

    Raises:
        UserError: The file is not JSON, or not of this form.
    """
    if not path.exists():
        return kind()
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"
    except (ValueError, RecursionError) as error:
        problem = f"not valid JSON ({error})"
    raise UserError(f"{path}: {problem}; fix the file, or remove it to leave that section out")


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run folder; what is missing is empty."""

    name: str
    config: str
    records: list[Record]
    stages: list[str]
    results: Results
    samples: Samples
    controls: Controls


def read_run(folder: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        UserError: It holds no figures, or one of its files is damaged.
    """
    metrics, controls = folder / "metrics.jsonl", folder / "controls.json"
    config = folder / "config.yaml"
    records = read_records(metrics) if metrics.exists() else []
    if not records and not controls.exists():
        lack = "no complete record yet" if metrics.exists() else f"no {metrics.name}"
        raise UserError(
            f"{folder}: {lack} and no {controls.name}, so there is nothing to report; give the "
            "folder of a run (training.output_dir)"
        )
    return RunFiles(
        name=folder.resolve().name,
        config=config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
        records=records,
        stages=find_stages(records),
        results=read_part(folder / "results.json", Results),
        samples=read_part(folder / "samples.json", Samples),
        controls=read_part(controls, Controls),
    )
