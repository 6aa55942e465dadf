"""The keys of the config by dotted name, and which one a misspelt name probably means."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rapidfuzz import fuzz

from quietstar.config.tree import SECTIONS, Config

SIMILAR = 75  # least similarity, of 100, of a "did you mean": lets through one or two typos


def _config_fields() -> dict[str, FieldInfo]:
    fields = {}
    for section in SECTIONS:
        kind = Config.model_fields[section].annotation
        assert isinstance(kind, type), section
        assert issubclass(kind, BaseModel), section
        for name, field in kind.model_fields.items():
            fields[f"{section}.{name}"] = field
    return fields


FIELDS: Mapping[str, FieldInfo] = _config_fields()
"""Every key of the config, such as ``thoughts.length``, with its field."""


def keys_of(section: str) -> list[str]:
    """The keys of a section, with its name before them."""
    return [key for key in FIELDS if key.startswith(f"{section}.")]


def field_types(key: str) -> set[Any]:
    """The types that a key takes: ``int | None`` gives int and NoneType, ``list[str]`` list."""
    annotation = FIELDS[key].annotation
    members = get_args(annotation)
    if type(None) not in members:
        members = (annotation,)
    return {get_origin(member) or member for member in members}


def closest(name: str, candidates: Sequence[str]) -> str | None:
    """The candidate that was probably meant, if one is similar."""

    def similarity(candidate: str) -> float:
        # `--lenght` and `training.lr` name a key without its section, or with another one
        leaf = fuzz.ratio(name.rpartition(".")[2], candidate.rpartition(".")[2])
        return max(fuzz.ratio(name, candidate), leaf)

    best = max(candidates, key=similarity, default=None)
    return best if best is not None and similarity(best) >= SIMILAR else None


def did_you_mean(meant: str | None) -> str:
    """The end of an error message; empty without a candidate."""
    return "" if meant is None else f"; did you mean {meant}?"
