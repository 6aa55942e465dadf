"""Words for keys, values and problems: types, defaults, and which name was probably meant."""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import SequenceMatcher
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ruamel.yaml.error import YAMLError

from quietstar.config.tree import fields
from quietstar.config.yaml import YamlProblem, dump, parse

SIMILAR = 75.0  # least similarity, of 100, of a "did you mean": lets through one or two typos
SIMILAR_NAME = 60.0  # the same for names of files and tasks, which are mistaken more freely
MOST_NAMES = 1000  # of a folder or of a record's fields that are looked at for a suggestion
LONGEST_NAME = 100  # nobody mistypes a longer one, and to compare it would take long

# Types as YAML gives them: their names in JSON schemas, and in messages.
_TYPES: dict[type, tuple[str, str]] = {
    bool: ("boolean", "true or false"),
    int: ("integer", "integer"),
    float: ("number", "number"),
    str: ("string", "text"),
    list: ("array", "list of texts"),
    dict: ("object", "mapping"),
    type(None): ("null", "null"),
}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_PLAIN_WORDS = {
    "a valid dictionary": "a mapping",
    "a valid string": "text",
    "a valid boolean": "true or false",
}


def closest(
    name: str, candidates: Sequence[str], least: float = SIMILAR, by_leaf: bool = False
) -> str | None:
    """Returns the candidate that was probably meant, if one is similar enough (of 100).

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
    """Returns the end of an error message; empty without a candidate."""
    return "" if meant is None else f"; did you mean {meant}?"


def did_you_mean_file(path: Path) -> str:
    """Returns the end of an error message: the file beside a missing one that is most like it.

    Names are compared without their suffixes, which would make any two JSONL files alike.
    """
    names: list[str] = []
    with suppress(OSError), os.scandir(path.parent) as entries:
        names = sorted(entry.name for entry in islice(entries, MOST_NAMES))
    if path.suffix:  # a folder is not meant
        names = [name for name in names if Path(name).suffix]
    stem = closest(path.stem, [Path(name).stem for name in names], SIMILAR_NAME)
    return did_you_mean(closest(path.name, [n for n in names if Path(n).stem == stem], 0.0))


def _members(key: str) -> list[dict[str, Any]]:
    """Returns the schema of each type that a key takes."""
    return fields()[key].get("anyOf", [fields()[key]])


def key_words(key: str) -> list[str]:
    """Returns the words that a key takes, if it takes certain ones."""
    constants = [m.get("enum", [m["const"]] if "const" in m else []) for m in _members(key)]
    return [str(word) for words in constants for word in words]


def key_types(key: str) -> set[str]:
    """Returns the types that a key takes beside certain words, as JSON schemas name them."""
    return {m.get("type", "object") for m in _members(key) if not {"enum", "const"} & m.keys()}


def is_mixed(key: str) -> bool:
    """Tells whether a key takes a number or a word."""
    return bool(key_words(key) and key_types(key) & {"integer", "number"})


def type_text(key: str) -> str:
    """Words the type and the bounds of a key: ``integer >= 1 or null``."""
    types = key_types(key)
    words = key_words(key) + ["null"] * ("null" in types)
    if types <= {"null"}:
        return " | ".join(words)
    limits = [
        f"{sign} {member[bound]:{'d' if isinstance(member[bound], int) else 'g'}}"
        for member in _members(key)
        for bound, sign in _BOUNDS.items()
        if bound in member
    ]
    name = next(name for kind, name in _TYPES.values() if kind in types)
    if any(member.get("items", {}).get("type") == "object" for member in _members(key)):
        name = "list of mappings"
    return " or ".join([f"{name} {' and '.join(limits)}".rstrip(), *words])


def fits(text: str, types: set[str]) -> bool:
    """Tells whether YAML reads a text as a value of one of these types."""
    try:
        return _TYPES[type(parse(text).data)][0] in types
    except YamlProblem:
        return False


def shown_value(value: Any) -> str:
    """Returns a value as YAML on one line, cut when long."""
    try:
        text = " ".join(dump(value, one_line=True).removesuffix("...\n").split())
    except YAMLError:  # Python code may give any object
        text = repr(value)
    if isinstance(value, str) and not text.startswith(("'", '"')):
        text = f"'{text}'"
    return shortened(text)


def shortened(text: str, most: int = 60) -> str:
    """Returns a text on one line, cut when long."""
    text = " ".join(text[: 2 * most].split()) if len(text) > 2 * most else " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def default_text(field: Mapping[str, Any]) -> str:
    """Returns the default of a key, given its JSON schema, as YAML."""
    value = field.get("default")
    if isinstance(value, float):
        return f"{value:g}"  # 1e-05, not 1.0e-05
    return shown_value(value).strip("'") if isinstance(value, str) else shown_value(value)


def field_message(key: str, error: Mapping[str, Any]) -> str:
    """Words value, rule and remedy for what pydantic says about one field."""
    value, types = error["input"], key_types(key)
    rule = f"must be {type_text(key)}" if is_mixed(key) else error["msg"]
    rule = re.sub(r"^(Input|Keys|List|String|Dictionary) should( be)?", r"must\2", rule)
    rule = rule.removesuffix(" after validation, not 0")
    rule = rule.removeprefix("Value error, ")  # of our own checks
    for name, plain in _PLAIN_WORDS.items():
        rule = rule.replace(name, plain)
    if error["type"] == "string_unicode":
        rule = "must be text without half a surrogate pair; is it UTF-8?"
    if why := _reason_of_bound(key, value):
        rule = f"{rule}: {why}"
    message = f"{shown_value(value)} {rule}"
    of_items = [m.get("items", {}).get("enum", []) for m in _members(key)]
    if meant := closest(str(value), [*key_words(key), *chain.from_iterable(of_items)]):
        return message + did_you_mean(meant)
    if value is None and "null" not in types:
        return f"{message}; leave the key out to get its default, {default_text(fields()[key])}"
    if isinstance(value, str) and types & {"integer", "number", "boolean"} and fits(value, types):
        return f"{message}; write it without quotes"
    if error["type"] == "list_type":
        return f"{message}; write it as [a, b]"
    description = " ".join(fields()[key].get("description", "").split()).rstrip(".")
    return f"{message}; default {default_text(fields()[key])} ({description})"


def _reason_of_bound(key: str, value: Any) -> str | None:
    """Says why a number that is above the upper bound of a key cannot be so large."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    for member in _members(key):
        most, below = member.get("maximum"), member.get("exclusiveMaximum")
        if (most is not None and value > most) or (below is not None and value >= below):
            return member.get("why")
    return None
