"""YAML 1.2 to plain data and back (`ruamel.yaml`): ``1e-4`` is a number, ``no`` and dates are text.

What a config cannot use is refused: tags, lists as keys, and aliases that expand without measure.
"""

import io
import re
import warnings
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter

from quietstar.errors import reason_of

MOST_VALUES = 10_000  # with every alias written out; shipped configs have fewer than 100
MOST_LEVELS = 50  # of values inside each other
MOST_CHARACTERS = 200_000  # a second or two of parsing; shipped configs have fewer than 4,000

_TAG = "tag:yaml.org,2002:"
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_READ_AS_TEXT = ("timestamp", "value", "merge")
# Plain text that YAML 1.1, which PyYAML reads, takes for a boolean, a date or a number.
_OTHERWISE_IN_YAML_1_1 = re.compile(r"(?i:y|yes|n|no|on|off)|[-+.\d][-+.:_\d]*")


class YamlProblem(ValueError):
    """What is wrong with a text, in one line, and the line of the text, if it is known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.line = line


class Document(NamedTuple):
    """Plain data (None for an empty text), the line of each dotted key, and the repeated keys."""

    data: Any
    lines: dict[str, int]
    repeated: list[tuple[str, int]]

    def text(self, key: str) -> str:
        """Returns the text at a dotted key; empty where there is none."""
        value = self.data
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value if isinstance(value, str) else ""


def _construct_int(constructor: SafeConstructor, node: ScalarNode) -> int:
    line = node.start_mark.line + 1
    if len(node.value) > 100:  # Python refuses to read, or to print, numbers of many digits
        raise YamlProblem("a whole number of more than 100 digits; write a smaller one", line)
    try:
        return SafeConstructor.construct_yaml_int(constructor, node)
    except ValueError as error:
        raise YamlProblem(f"{node.value} is no whole number", line) from error


class _Constructor(SafeConstructor):  # makes plain data only; dates stay text
    yaml_constructors = {  # noqa: RUF012  (ruamel's own attribute)
        None: SafeConstructor.construct_undefined,
        **{_TAG + name: getattr(SafeConstructor, f"construct_yaml_{name}") for name in _PLAIN},
        **{_TAG + name: SafeConstructor.construct_yaml_str for name in _READ_AS_TEXT},
        _TAG + "int": _construct_int,
    }


class _Representer(SafeRepresenter):
    """Writes what `parse` and readers of YAML 1.1 understand alike."""

    def ignore_aliases(self, data: Any) -> bool:
        """Writes out a value that stands twice twice."""
        return True


def _represent_text(representer: _Representer, data: str) -> ScalarNode:
    style = "'" if _OTHERWISE_IN_YAML_1_1.fullmatch(data) else None
    return representer.represent_scalar(_TAG + "str", data, style=style)


def _represent_number(representer: _Representer, data: float) -> ScalarNode:
    node = representer.represent_float(data)
    if "." not in node.value:  # YAML 1.1 takes 1e-7 for text, and 1.0e-7 for a number
        node.value = node.value.replace("e", ".0e", 1)
    return node


_Representer.add_representer(str, _represent_text)
_Representer.add_representer(float, _represent_number)


def parse(text: str) -> Document:
    """Reads one YAML document.

    Raises:
        YamlProblem: If it is no valid YAML, or holds what a config cannot use.
    """
    if len(text) > MOST_CHARACTERS:
        raise YamlProblem(
            f"more than {MOST_CHARACTERS:,} characters, and no config has as many; is it data?"
        )
    loader = YAML(typ="safe", pure=True)
    loader.Constructor = _Constructor
    loader.allow_duplicate_keys = True  # `repeated` reports all of them, not only the first
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as about an anchor that is defined again
            root = loader.compose(text)
            if root is None:
                return Document(None, {}, [])
            lines, repeated = _keys(root)
            return Document(loader.constructor.construct_document(root), lines, repeated)
    except MarkedYAMLError as error:
        message = ": ".join(part for part in (error.context, error.problem) if part)
        line = None if error.problem_mark is None else error.problem_mark.line + 1
        raise YamlProblem(message, line) from error
    except YamlProblem:
        raise
    except YAMLError as error:
        raise YamlProblem(str(error)) from error
    except Exception as error:  # ruamel fails in many ways over what is hardly YAML
        raise YamlProblem(reason_of(error)) from error


def _keys(root: Node) -> tuple[dict[str, int], list[tuple[str, int]]]:
    """Finds the line of each key, and repeated keys; refuses what cannot be a config."""
    lines: dict[str, int] = {}
    repeated: list[tuple[str, int]] = []
    nodes, visited = [("", root, 1)], 0
    while nodes:  # no recursion: an alias may stand inside the very value that it names
        prefix, node, level = nodes.pop()
        visited += 1
        if visited > MOST_VALUES:
            raise YamlProblem(
                f"more than {MOST_VALUES} values with its aliases written out; use fewer aliases"
            )
        if level > MOST_LEVELS:
            line = node.start_mark.line + 1
            raise YamlProblem(f"values inside each other on more than {MOST_LEVELS} levels", line)
        children: list[tuple[str, Node]] = []
        if isinstance(node, SequenceNode):
            children = [(f"{prefix}{index}.", item) for index, item in enumerate(node.value)]
        elif isinstance(node, MappingNode):
            seen = set()
            for key, value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, ScalarNode):
                    kind = "a list" if isinstance(key, SequenceNode) else "a mapping"
                    raise YamlProblem(f"{kind} cannot be a key; write a name before the :", line)
                name = f"{prefix}{key.value}"
                if key.value in seen:
                    repeated.append((name, line))
                seen.add(key.value)
                lines[name] = line
                children.append((f"{name}.", value))
        nodes += [(name, child, level + 1) for name, child in reversed(children)]
    return lines, repeated


def dump(data: Any, one_line: bool = False) -> str:
    """Writes data as YAML, in the order of its keys."""
    dumper = YAML(typ="safe", pure=True)
    dumper.Representer = _Representer
    dumper.default_flow_style = one_line
    dumper.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    dumper.width = 2**20 if one_line else 100
    stream = io.StringIO()
    dumper.dump(data, stream)
    return stream.getvalue()
