"""Options of a command, which are the arguments of its Python function: declared once, as a model.

A class of options has a field with a text below it for each; `Options.of` checks values whoever
gives them, and words what is wrong with the first one:

    --limit (0): must be a whole number of at least 1 and at most 10000000. Give another value.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from quietstar.config.messages import SIMILAR_NAME, closest, did_you_mean, words_of
from quietstar.errors import UserError, visible
from quietstar.system.files import PARTIAL

Kind = TypeVar("Kind", bound="Options")


class Options(BaseModel):
    """Base of all classes of options: text is converted, as the command line gives nothing else."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def of(cls: type[Kind], values: Mapping[str, Any], dashes: bool = False) -> Kind:
        """Make them of values by name.

        Args:
            values: By name, as in Python.
            dashes: Whether messages name them as the command line does.

        Raises:
            UserError: One of them is wrong.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            details = error.errors(include_url=False)
        names = [option_of(str(d["loc"][0])) if dashes else str(d["loc"][0]) for d in details]
        wrong = [pair for pair in zip(names, details, strict=True) if pair[1]["type"] != "missing"]
        if not wrong:
            raise UserError(f"{', '.join(names)}: must be given")
        option, detail = wrong[0]
        name = str(detail["loc"][0])
        field = cls.model_json_schema()["properties"].get(name, {})
        if detail["type"] == "extra_forbidden":
            meant = did_you_mean(closest(name, [*cls.model_fields], SIMILAR_NAME))
            raise UserError(f"{option}: unknown option{meant or '; leave it out'}")
        if detail["type"] == "value_error":
            rule = str(detail.get("ctx", {})["error"])
        elif words := words_of(field):
            rule = f"must be one of {', '.join(words)}"
        else:
            rule = f"must be {_bounded(field)}"
        end = "" if rule.endswith("?") else ". Give another value."
        raise UserError(f"{option} ({visible(str(detail['input']))}): {rule}{end}")


def _bounded(field: Mapping[str, Any]) -> str:
    """Word the type of an option, such as ``a whole number of at least 1 and at most 1000``."""
    member = next(m for m in field.get("anyOf", [field]) if m.get("type") != "null")
    names = {"integer": "a whole number", "number": "a number", "string": "text"}
    bounds = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most"}
    limits = [f"{words} {member[key]:.15g}" for key, words in bounds.items() if key in member]
    return f"{names.get(member.get('type'), 'true or false')} {' and '.join(limits)}".strip()


def option_of(name: str) -> str:
    """Return the option of the command line for an argument of Python."""
    return f"--{name.replace('_', '-')}"


def _name_of_something(text: str) -> str:
    """Accept the name of a folder or file here, or of something on the hub; expand ``~``."""
    try:
        if not text.strip():
            raise ValueError("must not be empty")
        Path(text).expanduser().exists()
    except (OSError, RuntimeError) as problem:
        raise ValueError(f"is no name of a model or file ({problem})") from None
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _folder(text: str) -> str:
    if not Path(text).is_dir():
        raise ValueError("there is no such folder")
    return text


def _unicode(text: str) -> str:
    """Refuse halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise ValueError(f"character {problem.start} is half of a surrogate pair") from None
    return text


def _pattern(text: str) -> str:
    import regex

    try:
        regex.compile(text)
    except regex.error as problem:
        raise ValueError(f"must be a regular expression ({problem})") from None
    return text


def _temperature(value: float) -> float:
    if 0 < value < 0.001:
        raise ValueError("must be at least 0.001, or 0 for the most likely tokens")
    return value


def shown(metavar: str, **more: Any) -> Any:
    """Say how the command line shows an option: by which metavar, and other words of argparse."""
    return Field(json_schema_extra={"cli": {"metavar": metavar, **more}})


Name = Annotated[str, AfterValidator(_name_of_something), shown("NAME")]
"""Of a folder or file here, or of a model on the hub."""
Folder = Annotated[Name, AfterValidator(_folder), shown("DIR")]
UnicodeText = Annotated[str, AfterValidator(_unicode), shown("TEXT")]
Pattern = Annotated[UnicodeText, AfterValidator(_pattern), shown("REGEX")]
Temperature = Annotated[float, Field(ge=0, le=1000), AfterValidator(_temperature)]
"""Of a sampler; 0 takes the most likely tokens."""
Probability = Annotated[float, Field(gt=0, le=1)]
BatchSize = Annotated[int, Field(ge=1, le=2**16)]
Tokens = Annotated[int, Field(ge=1, le=10**6)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Thoughts = Annotated[int, Field(ge=1, le=1000)]
"""Thoughts per position, or chains per item."""


def _file_name(text: str) -> str:
    if not text.strip():
        raise ValueError("names no file")
    if text.endswith((PARTIAL, ".lock")):
        raise ValueError(f"must not end in {PARTIAL} or .lock, as files of this program do")
    return text


FileName = Annotated[str, AfterValidator(_file_name), shown("FILE")]
"""Of a file to write."""


class ModelOptions(Options):
    """Which model a command loads, and onto what."""

    model: Annotated[Name, shown("DIR")]
    """Folder of a saved Quiet-STaR model, or of the run that trained it."""
    ema: bool = False
    """DIR is a run's folder, of which the moving average of the weights is taken."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights."""
    device: Annotated[str | None, shown("NAME")] = None
    """Default: a GPU if there is one."""
    trust_remote_code: bool = False
    """Run Python code that the model or its base names."""
    device_map: Literal["auto"] | None = None
    """auto: layers that do not fit on the device wait in memory, or on disk, until needed."""
