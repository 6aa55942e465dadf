"""The YAML of config files: safe, and that of version 1.2 where PyYAML's differs.

``1e-4`` is a number and ``no`` is text.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """Safe YAML with the numbers and booleans of YAML 1.2."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (PyYAML's own attribute)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A decimal or hexadecimal integer; ``010`` is ten, not octal."""
        text = self.construct_scalar(node).replace("_", "")
        return int(text, 16) if "x" in text else int(text)


class Dumper(yaml.SafeDumper):
    """Safe YAML that quotes whatever `Loader` or another YAML reader takes for no text."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value that stands twice out twice."""
        return True


_NUMBER_STARTS = list("-+.0123456789")
_RESOLVERS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+(_[0-9]+)*|0x[0-9a-fA-F]+", _NUMBER_STARTS),
    (
        "float",
        r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        _NUMBER_STARTS,
    ),
    ("merge", r"<<", ["<"]),
)
for _tag, _pattern, _starts in _RESOLVERS:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _starts
        )
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


def yaml_problem(error: Exception) -> str:
    """What is wrong, in one line."""
    if isinstance(error, yaml.MarkedYAMLError):
        parts = [part for part in (error.context, error.problem) if part]
        return ": ".join(parts)
    return " ".join(str(error).split())


def repeated_keys(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """The dotted name and the line of each key that stands twice in one mapping."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from repeated_keys(item, f"{prefix}{index}.")
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                yield f"{prefix}{key.value}", key.start_mark.line + 1
            seen.add(key.value)
            yield from repeated_keys(value, f"{prefix}{key.value}.")


def key_lines(root: yaml.MappingNode, prefix: str = "") -> dict[str, int]:
    """The line of each section, of each key in it, and of the keys of stages, by dotted name."""
    lines = {}
    for key, body in root.value:
        name = f"{prefix}{key.value}"
        lines[name] = key.start_mark.line + 1
        if isinstance(body, yaml.MappingNode):
            lines.update(key_lines(body, f"{name}."))
    return lines
