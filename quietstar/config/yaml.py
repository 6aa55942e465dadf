"""YAML 1.2 to plain data and back (`ruamel.yaml`): ``1e-4`` is a number, ``no`` and dates are text.

What a config cannot use is refused: tags, lists as keys, and aliases that expand without measure.
"""

import io
import re
import warnings
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from quietstar.errors import reason_of

MOST_VALUES = 10_000  # with every alias written out; shipped configs have fewer than 100
MOST_LEVELS = 50  # of values inside each other
MOST_CHARACTERS = 200_000  # a second or two of parsing; shipped configs have fewer than 4,000

_TAG = "tag:yaml.org,2002:"
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
# Plain text that YAML 1.1, which PyYAML reads, takes for a boolean, a date or a number.
_OTHERWISE_IN_YAML_1_1 = re.compile(r"(?i:y|yes|n|no|on|off)|[-+.\d][-+.:_\d]*")


class YamlProblem(ValueError):
    """What is wrong with a text, in one line, and the line of the text, if it is known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.line = line


class Document(NamedTuple):
    """Plain data (None for an empty text), and the line of each dotted key."""

    data: Any
    lines: dict[str, int]

    def text(self, key: str) -> str:
        """Return the text at a dotted key; empty where there is none."""
        value = self.data
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value if isinstance(value, str) else ""


class _Constructor(SafeConstructor):  # makes plain data only; dates stay text
    yaml_constructors = {  # noqa: RUF012  (ruamel's own attribute)
        None: SafeConstructor.construct_undefined,
        **{_TAG + name: getattr(SafeConstructor, f"construct_yaml_{name}") for name in _PLAIN},
        **dict.fromkeys(
            (_TAG + name for name in ("timestamp", "value", "merge")),
            SafeConstructor.construct_yaml_str,
        ),
    }


class _Representer(SafeRepresenter):
    """Writes what `parse` and readers of YAML 1.1 understand alike."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write out a value that stands twice twice."""
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
    """Read one YAML document.

    Raises:
        YamlProblem: It is no valid YAML, or holds what a config cannot use.
    """
    if len(text) > MOST_CHARACTERS:
        raise YamlProblem(
            f"more than {MOST_CHARACTERS:,} characters, and no config has as many; is it data?"
        )
    loader = YAML(typ="safe", pure=True)
    loader.Constructor = _Constructor
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as about an anchor that is defined again
            root = loader.compose(text)
            if root is None:
                return Document(None, {})
            lines = _lines(root)
            return Document(loader.constructor.construct_document(root), lines)
    except MarkedYAMLError as error:
        message = ": ".join(part for part in (error.context, error.problem) if part)
        line = None if error.problem_mark is None else error.problem_mark.line + 1
        raise YamlProblem(message, line) from error
    except YamlProblem:
        raise
    except Exception as error:  # ruamel fails in many ways over what is hardly YAML
        raise YamlProblem(reason_of(error)) from error


def _lines(root: Node) -> dict[str, int]:
    """Find the line of each key; refuse what cannot be a config."""
    lines: dict[str, int] = {}
    nodes, visited = [("", root, 1)], 0
    while nodes:  # no recursion: an alias may stand inside the very value that it names
        prefix, node, level = nodes.pop()
        visited += 1
        if visited > MOST_VALUES or level > MOST_LEVELS:
            raise YamlProblem(
                f"more than {MOST_VALUES:,} values, aliases written out, or more than {MOST_LEVELS}"
                " levels of them; no config has as many", node.start_mark.line + 1,
            )  # fmt: skip
        pairs = node.value if isinstance(node, MappingNode) else []
        for key, value in pairs:
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode):
                raise YamlProblem("a key must be a name; write one before the :", line)
            name = f"{prefix}{key.value}"
            if lines.setdefault(name, line) != line:
                raise YamlProblem(f"{name} stands twice; remove one", line)
            nodes.append((f"{name}.", value, level + 1))
        if not pairs and isinstance(node.value, list):
            nodes += [(f"{prefix}{n}.", item, level + 1) for n, item in enumerate(node.value)]
    return lines


def dump(data: Any) -> str:
    """Write data as YAML, in the order of its keys."""
    dumper = YAML(typ="safe", pure=True)
    dumper.Representer = _Representer
    dumper.default_flow_style = False
    dumper.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    dumper.width = 100
    stream = io.StringIO()
    dumper.dump(data, stream)
    return stream.getvalue()
