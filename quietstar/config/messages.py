"""What messages say of a key's value, and of what is wrong with it."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from quietstar.config.keys import FIELDS, choices, closest, did_you_mean, field_types, type_text
from quietstar.config.yaml12 import Dumper, Loader

_PLAIN_WORDS = {
    "a valid dictionary": "a mapping",
    "a valid string": "text",
    "a valid boolean": "true or false",
}


def field_message(key: str, error: Mapping[str, Any]) -> str:
    """Value, rule and remedy for what pydantic says about one field."""
    value, rule = error["input"], error["msg"]
    if is_mixed(key):
        rule = f"must be {type_text(key)}"
    rule = re.sub(r"^(Input|Keys|List|String|Dictionary) should( be)?", r"must\2", rule)
    rule = rule.removesuffix(" after validation, not 0")
    for name, plain in _PLAIN_WORDS.items():
        rule = rule.replace(name, plain)
    message = f"{shown_value(value)} {rule}"
    types = field_types(key)
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


def is_mixed(key: str) -> bool:
    """Whether a key takes a number or a word."""
    return bool(choices(key) and field_types(key) & {int, float})


def fits(text: str, types: set[Any]) -> bool:
    """Whether YAML reads a text as a value of one of these types."""
    try:
        return type(yaml.load(text, Loader=Loader)) in types
    except (yaml.YAMLError, ValueError):
        return False


def shown_value(value: Any) -> str:
    """A value as YAML would write it on one line, cut when long."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=float("inf"))
    text = " ".join(text.removesuffix("...\n").split())
    if isinstance(value, str) and not text.startswith(("'", '"')):
        text = f"'{text}'"
    return text if len(text) <= 60 else f"{text[:57]}..."


def default_text(key: str) -> str:
    """The default of a key as YAML would write it."""
    value = FIELDS[key].get_default(call_default_factory=True, validated_data={})
    if isinstance(value, float):
        return f"{value:g}"  # 1e-05, not 1.0e-05
    return shown_value(value).strip("'") if isinstance(value, str) else shown_value(value)
