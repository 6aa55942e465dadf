"""What a run folder may hold beside its metrics: results, samples and controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from quietstar.errors import UserError
from quietstar.reports.records import finite


def interval(value: object) -> tuple[float, float] | None:
    """Two finite numbers in order, or None."""
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
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # Runs of earlier versions called swapped thoughts exchanged.
        present = {key: value for key, value in data.items() if value is not None}
        return {str(key).replace("exchanged", "swapped"): value for key, value in present.items()}


class Accuracy(Part):
    """Shares of ``n`` held-out problems that come out right."""

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
    """What was predicted, and the probability of the truth."""

    prediction: str = ""
    probability: Figure = None


class Sample(Part):
    """One held-out problem, or one place in a text."""

    before: str = ""
    thought: str = ""
    truth: str = ""
    without_thoughts: Answer = Answer()
    with_thoughts: Answer = Answer()
    mixing_weight: Figure = None
    right_thought: bool | None = None
    correct: bool | None = None


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
        """How the variant is called on the page."""
        return self.label or self.name


class Difference(Part):
    """Between two variants, paired by seed."""

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
    """The content of a file; all defaults if there is no such file.

    Raises:
        UserError: The file is no JSON, or not of this form.
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
    raise UserError(f"{path}: {problem}; mend the file, or remove it to leave that section out")
