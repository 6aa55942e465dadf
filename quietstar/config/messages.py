"""Words for keys, values and problems: types, defaults, and which name was probably meant."""

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Annotated, Any, Literal, get_args, get_origin

from quietstar.config.schema import FIELDS
from quietstar.config.yaml import YamlProblem, dump, parse

COMMAND_LINE = "command line"
"""Source of a problem, in the place of a file and its line."""

SIMILAR = 75.0  # least similarity, of 100, of a "did you mean": lets through one or two typos

_TYPE_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    list: "list of texts",
    dict: "mapping",
    type(None): "null",
}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_PLAIN_WORDS = {
    "a valid dictionary": "a mapping",
    "a valid string": "text",
    "a valid boolean": "true or false",
}


def closest(
    name: str, candidates: Sequence[str], least: float = SIMILAR, by_leaf: bool = False
) -> str | None:
    """Returns the candidate that was probably meant, if one is similar enough.

    Args:
        name: Unknown name.
        candidates: Known names.
        least: Least similarity, of 100.
        by_leaf: Compares dotted names by their last part too: `--lenght` lacks the section of its
            key, and `training.learning_rate` has the wrong one.
    """

    def similarity(candidate: str) -> float:
        pairs = [(name, candidate)]
        if by_leaf:
            pairs.append((name.rpartition(".")[2], candidate.rpartition(".")[2]))
        return max(100 * SequenceMatcher(None, *pair).ratio() for pair in pairs)

    best = max(candidates, key=similarity, default=None)
    return best if best is not None and similarity(best) >= least else None


def did_you_mean(meant: str | None) -> str:
    """Returns the end of an error message; empty without a candidate."""
    return "" if meant is None else f"; did you mean {meant}?"


def _members(key: str) -> list[Any]:
    """Returns the members of a key's union type, bounds and all."""
    annotation = FIELDS[key].annotation
    return list(get_args(annotation)) if type(None) in get_args(annotation) else [annotation]


def field_types(key: str) -> set[Any]:
    """Returns the types that a key takes: ``int | None`` gives int and NoneType."""
    plain = [get_args(m)[0] if get_origin(m) is Annotated else m for m in _members(key)]
    return {get_origin(member) or member for member in plain}


def choices(key: str) -> list[str]:
    """Returns the words that a key takes, if it takes certain ones."""
    literals = [member for member in _members(key) if get_origin(member) is Literal]
    return [str(choice) for literal in literals for choice in get_args(literal)]


def is_mixed(key: str) -> bool:
    """Tells whether a key takes a number or a word."""
    return bool(choices(key) and field_types(key) & {int, float})


def type_text(key: str) -> str:
    """Words the type and the bounds of a key: ``integer >= 1 or null``."""
    types, words = field_types(key), choices(key)
    null = ["null"] if type(None) in types else []
    if types <= {Literal, type(None)}:
        return " | ".join([*words, *null])
    annotated = [m for m in _members(key) if get_origin(m) is Annotated]
    inside = [
        rule for member in annotated for info in get_args(member)[1:] for rule in info.metadata
    ]
    limits = [
        f"{sign} {limit:g}"
        for rule in (*FIELDS[key].metadata, *inside)
        for name, sign in _BOUNDS.items()
        if (limit := getattr(rule, name, None)) is not None
    ]
    name = next(_TYPE_NAMES[kind] for kind in _TYPE_NAMES if kind in types)
    return " or ".join([" ".join([name, " and ".join(limits)]).rstrip(), *words, *null])


def fits(text: str, types: set[Any]) -> bool:
    """Tells whether YAML reads a text as a value of one of these types."""
    try:
        return type(parse(text).data) in types
    except YamlProblem:
        return False


def shown_value(value: Any) -> str:
    """Returns a value as YAML on one line, cut when long."""
    text = " ".join(dump(value, one_line=True).removesuffix("...\n").split())
    if isinstance(value, str) and not text.startswith(("'", '"')):
        text = f"'{text}'"
    return text if len(text) <= 60 else f"{text[:57]}..."


def default_text(key: str) -> str:
    """Returns the default of a key as YAML."""
    value = FIELDS[key].get_default(call_default_factory=True, validated_data={})
    if isinstance(value, float):
        return f"{value:g}"  # 1e-05, not 1.0e-05
    return shown_value(value).strip("'") if isinstance(value, str) else shown_value(value)


def field_message(key: str, error: Mapping[str, Any]) -> str:
    """Words value, rule and remedy for what pydantic says about one field."""
    value, types = error["input"], field_types(key)
    rule = f"must be {type_text(key)}" if is_mixed(key) else error["msg"]
    rule = re.sub(r"^(Input|Keys|List|String|Dictionary) should( be)?", r"must\2", rule)
    rule = rule.removesuffix(" after validation, not 0")
    for name, plain in _PLAIN_WORDS.items():
        rule = rule.replace(name, plain)
    message = f"{shown_value(value)} {rule}"
    if error["type"] == "literal_error" or is_mixed(key):
        meant = closest(str(value), choices(key))
        if meant:
            return message + did_you_mean(meant)
    if value is None and type(None) not in types:
        return f"{message}; leave the key out to get its default, {default_text(key)}"
    if isinstance(value, str) and types & {int, float, bool} and fits(value, types):
        return f"{message}; write it without quotes"
    if error["type"] == "list_type":
        return f"{message}; write it as [a, b]"
    description = (FIELDS[key].description or "").rstrip(".")
    return f"{message}; default {default_text(key)} ({description})"
