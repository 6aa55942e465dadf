"""Words for keys, values and problems: types, defaults, and which name was probably meant."""

import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import SequenceMatcher
from itertools import chain, islice
from pathlib import Path
from typing import Any

from quietstar.config.yaml import YamlProblem, parse

SIMILAR = 75.0  # least similarity, of 100, of a "did you mean": lets through one or two typos
SIMILAR_NAME = 60.0  # the same for names of files and tasks, which are mistaken more freely
MOST_NAMES = 1000  # of a folder or of a record's fields that are looked at for a suggestion
LONGEST_NAME = 100  # nobody mistypes a longer one, and to compare it would take long

_TYPES = {
    bool: "boolean", int: "integer", float: "number", str: "string", list: "array",
    dict: "object", type(None): "null",
}  # fmt: skip
"""Types as YAML gives them, by the names of JSON schemas."""
_WORDS = {"boolean": "true or false", "string": "text", "array": "list", "object": "mapping"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def closest(
    name: str, candidates: Sequence[str], least: float = SIMILAR, by_leaf: bool = False
) -> str | None:
    """Return the candidate that was probably meant, if one is similar enough (of 100).

    If ``by_leaf``, dotted names are compared by their last part too: `--lenght` lacks the section
    of its key, and `training.learning_rate` has the wrong one.
    """

    def similarity(candidate: str) -> float:
        pairs = [(name, candidate)]
        if by_leaf:
            pairs.append((name.rpartition(".")[2], candidate.rpartition(".")[2]))
        return max(100 * SequenceMatcher(None, *pair).ratio() for pair in pairs)

    if len(name) > LONGEST_NAME:
        return None
    best = max(candidates, key=similarity, default=None)
    return best if best is not None and similarity(best) >= least else None


def did_you_mean(meant: str | None) -> str:
    """Return the end of an error message; empty without a candidate."""
    return "" if meant is None else f"; did you mean {meant}?"


def did_you_mean_file(path: Path) -> str:
    """Return the end of an error message: the file next to a missing one that is most like it.

    Names are compared without their suffixes, which would make any two JSONL files alike.
    """
    names: list[str] = []
    with suppress(OSError), os.scandir(path.parent) as entries:
        names = sorted(entry.name for entry in islice(entries, MOST_NAMES))
    if path.suffix:  # a folder is not meant
        names = [name for name in names if Path(name).suffix]
    stem = closest(path.stem, [Path(name).stem for name in names], SIMILAR_NAME)
    return did_you_mean(closest(path.name, [n for n in names if Path(n).stem == stem], 0.0))


Field = Mapping[str, Any]
"""The JSON schema of a key or an option."""


def _members(field: Field) -> Sequence[Field]:
    return field.get("anyOf", [field])


def words_of(field: Field) -> list[str]:
    """Return the words that a key takes, if it takes certain ones."""
    constants = [m.get("enum", [m["const"]] if "const" in m else []) for m in _members(field)]
    return [str(word) for words in constants for word in words]


def types_of(field: Field) -> set[str]:
    """Return the types that a key takes in addition to its words, as JSON schemas name them."""
    return {m.get("type", "object") for m in _members(field) if not {"enum", "const"} & m.keys()}


def type_text(field: Field) -> str:
    """Word the type and the bounds of a key: ``integer >= 1 or null``."""
    types = types_of(field)
    words = words_of(field) + ["null"] * ("null" in types)
    if types <= {"null"}:
        return " | ".join(words)
    limits = [
        f"{sign} {member[bound]:{'d' if isinstance(member[bound], int) else 'g'}}"
        for member in _members(field)
        for bound, sign in _BOUNDS.items()
        if bound in member
    ]
    name = next(name for name in _TYPES.values() if name in types)
    return " or ".join([f"{_WORDS.get(name, name)} {' and '.join(limits)}".rstrip(), *words])


def fits(text: str, types: set[str]) -> bool:
    """Tell whether YAML reads a text as a value of one of these types."""
    try:
        return _TYPES[type(parse(text).data)] in types
    except YamlProblem:
        return False


def shown_value(value: Any) -> str:
    """Return a value on one line, as YAML writes it, cut when long."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, float):
        return f"{value:g}"  # 1e-05, not 1.0e-05
    return shortened(repr(value) if isinstance(value, str) else reprlib.repr(value))


def shortened(text: str, most: int = 60) -> str:
    """Return a text on one line, cut when long."""
    text = " ".join(text[: 2 * most].split()) if len(text) > 2 * most else " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def default_text(field: Field) -> str:
    """Return the default of a key."""
    return shown_value(field.get("default")).strip("'")


def field_message(field: Field, error: Mapping[str, Any]) -> str:
    """Word value, rule and remedy for what pydantic says about one field."""
    value, types, words = error["input"], types_of(field), words_of(field)
    rule = re.sub(r"^\w+ should( be)?", r"must\1", error["msg"].removeprefix("Value error, "))
    if words and types & {"integer", "number"}:  # pydantic complains of each type on its own
        rule = f"must be {type_text(field)}"
    message = f"{shown_value(value)} {rule}"
    of_items = [member.get("items", {}).get("enum", []) for member in _members(field)]
    if not field:
        return message
    if meant := closest(str(value), [*words, *chain.from_iterable(of_items)]):
        return message + did_you_mean(meant)
    if value is None and "null" not in types:
        return f"{message}; leave the key out to get its default, {default_text(field)}"
    if isinstance(value, str) and types & {"integer", "number", "boolean"} and fits(value, types):
        return f"{message}; write it without quotes"
    if error["type"] == "list_type":
        return f"{message}; write it as [a, b]"
    description = " ".join(field.get("description", "").split()).rstrip(".")
    return f"{message}; default {default_text(field)} ({description})"
