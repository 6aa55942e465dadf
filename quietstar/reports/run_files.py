"""The files of a run folder, read tolerantly: what is damaged in part is used in part."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from quietstar.config.loading import load_config
from quietstar.errors import ConfigError, UserError, reading, reason_of
from quietstar.registry import trusting
from quietstar.training.reporter import THOUGHTS_FILE
from quietstar.training.stages import plan_stages

RENAMED = {
    "accuracy_exchanged": "accuracy_swapped",
    "exchanged_thoughts": "swapped_thoughts",
    "gain_ahead": "gain_beyond_next",
    "reward_spread": "reward_std",
    "alike": "identical_fraction",
    "distinct": "distinct_token_ratio",
}
"""Keys of runs of earlier versions, and what they are called now."""
LARGEST = 1e100
"""A larger number is no measurement, and sums of such ones are not finite."""
MOST_STEPS = 2**53
MOST_CONFIG_BYTES = 2**20


def _current(entry: dict[str, Any]) -> dict[str, Any]:
    """Give keys of earlier versions their names of today, and leave out what is null."""
    return {RENAMED.get(key, key): value for key, value in entry.items() if value is not None}


def finite(value: object) -> float | None:
    """Return ``value`` if it is a number that can be drawn; NaN, text and booleans give None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= LARGEST else None


# --- metrics.jsonl --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Record:
    """One line of ``metrics.jsonl``: its finite numbers by key, and when they were measured."""

    kind: str  # train or eval
    stage: str  # empty in runs without stages
    step: int  # optimizer steps done, over all stages
    metrics: Mapping[str, float]


def _entries(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield records with their steps, passing over lines that are half written or no record."""
    for line in text.split("\n"):
        with suppress(ValueError, RecursionError):
            entry = json.loads(line, object_hook=_current)
            step = finite(entry.get("step")) if isinstance(entry, dict) else None
            if step is not None and 0 <= step <= MOST_STEPS:
                yield int(step), entry


def parse_metrics(text: str) -> list[Record]:
    """Parse the metrics of ``metrics.jsonl``.

    Records are in order of steps, and the last of several for one step wins. Of two stages that
    meet at a step, the one that was written first comes first.
    """
    records = {}
    for step, entry in _entries(text):
        if (kind := entry.get("kind")) in ("train", "eval"):
            stage = str(entry.get("stage", ""))
            numbers = {key: finite(x) for key, x in entry.items() if key not in ("step", "stage")}
            metrics = {key: value for key, value in numbers.items() if value is not None}
            records[kind, stage, step] = Record(kind, stage, step, metrics)
    return sorted(records.values(), key=lambda record: record.step)


def find_stages(records: Iterable[Record]) -> list[str]:
    """Return the names of the stages in the order of their first steps."""
    return list(dict.fromkeys(record.stage for record in records))


def series(records: Iterable[Record], kind: str, key: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a metric was measured, and its values there."""
    pairs = [(r.step, r.metrics[key]) for r in records if r.kind == kind and key in r.metrics]
    return [step for step, _ in pairs], [value for _, value in pairs]


# --- results.json, samples.json, controls.json ----------------------------------------------------
def _finite_pair(value: object) -> tuple[float, float] | None:
    """Return two finite numbers in order, or None."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = map(finite, value)
    return None if low is None or high is None else (min(low, high), max(low, high))


Number = Annotated[float | None, BeforeValidator(finite)]
Interval = Annotated[tuple[float, float] | None, BeforeValidator(_finite_pair)]


class Part(BaseModel):
    """Part of a file; what is missing has its default, and unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, coerce_numbers_to_str=True)


class Results(Part):
    """``results.json``: the measurement at the end."""

    accuracy: dict[str, Number] = {}  # by kind of thoughts, of n held-out problems
    right_thoughts: dict[str, Number] = {}  # share of correct ones before and after training
    seconds: Number = None


class Answer(Part):
    """A prediction, and the probability of the correct answer."""

    prediction: str = ""
    probability: Number = None


class Swapped(Answer):
    """What the model predicts with another text's thought."""

    thought: str = ""


class Sample(Part):
    """One held-out problem, or one position in a text."""

    before: str = ""
    thought: str = ""
    truth: str = ""
    without_thoughts: Answer = Answer()
    with_thoughts: Answer = Answer()
    swapped: Swapped | None = None
    mixing_weight: Number = None
    right_thought: bool | None = None
    correct: bool | None = None

    def is_right(self, answer: Answer) -> bool:
        """Return True if an answer is the correct one."""
        return answer.prediction.strip() == self.truth.strip()

    @property
    def correct_with(self) -> bool:
        """True if the answer with thoughts is correct, by comparison if the file does not say."""
        return self.is_right(self.with_thoughts) if self.correct is None else self.correct


class Samples(Part):
    """``samples.json``, or a line of ``thoughts.jsonl``: texts that are the same at each step."""

    stage: str = ""
    step: int = 0
    samples: tuple[Sample, ...] = ()


class Fired(Part):
    """A guard that fired, as ``metrics.jsonl`` has it."""

    kind: str = ""
    step: int
    name: str = ""
    stage: str = ""
    message: str = ""


class SeedMean(Part):
    """A mean over seeds: of a variant, or of a difference between two that is paired by seed."""

    label: str = Field("", validation_alias=AliasChoices("label", "name"))
    accuracy: tuple[Number, ...] = ()
    mean: Number = None
    ci95: Interval = None
    right_thoughts: tuple[Number, ...] = ()


class Controls(Part):
    """``controls.json``: variants of the method compared over seeds."""

    seeds: tuple[int, ...] = ()
    variants: tuple[SeedMean, ...] = ()
    differences: tuple[SeedMean, ...] = ()


Parts = TypeVar("Parts", bound=Part)


def read_part(path: Path, kind: type[Parts]) -> Parts:
    """Read a file; all defaults if there is no such file.

    Raises:
        UserError: The file is not JSON, or not of this form.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
        return kind.model_validate(json.loads(text, object_hook=_current))
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"
    except (ValueError, RecursionError, OSError) as error:
        problem = f"not valid JSON ({reason_of(error)})"
    raise UserError(f"{path}: {problem}; fix the file, or remove it to leave that section out")


def read_lines(text: str, kind: type[Parts]) -> list[Parts]:
    """Parse the lines of a file, passing over those that are damaged."""
    found = []
    for step, entry in _entries(text):
        with suppress(ValidationError):
            found.append(kind.model_validate(entry | {"step": step}))
    return found


class RunFiles:
    """The contents of a run folder; what is missing is empty.

    Raises:
        UserError: It holds no metrics, or one of its files is damaged.
    """

    def __init__(self, folder: Path) -> None:
        metrics, controls = folder / "metrics.jsonl", folder / "controls.json"

        def read(path: Path) -> str:
            with reading(str(path), "Give the folder of a run."):
                is_there = path.is_file()  # a pipe could be waited for without end
                return path.read_text(encoding="utf-8", errors="replace") if is_there else ""

        self.name, self.config = folder.resolve().name, read(folder / "config.yaml")
        lines = read(metrics)
        self.records = parse_metrics(lines)
        if not self.records and not controls.exists():
            lack = "no complete record yet" if metrics.exists() else f"no {metrics.name}"
            raise UserError(
                f"{folder}: {lack} and no {controls.name}, so there is nothing to report; give the "
                "folder of a run (training.output_dir)"
            )
        self.fired = [one for one in read_lines(lines, Fired) if one.kind == "guard"]
        self.followed = [one for one in read_lines(read(folder / THOUGHTS_FILE), Samples)
                         if one.samples]  # fmt: skip
        self.stages, self.plan = find_stages(self.records), []
        with suppress(ConfigError, UserError), trusting(False):  # a report can do without
            self.plan = plan_stages(load_config(folder / "config.yaml"))
        self.results = read_part(folder / "results.json", Results)
        self.samples = read_part(folder / "samples.json", Samples).samples
        self.controls = read_part(controls, Controls)
