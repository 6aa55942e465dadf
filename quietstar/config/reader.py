"""Settings of a YAML file and of the command line, each with the place that it comes from."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from quietstar.config.keys import FIELDS, closest, did_you_mean, field_types, keys_of
from quietstar.config.messages import fits, shown_value
from quietstar.config.schema import SECTIONS, Config, is_stage_key
from quietstar.config.yaml12 import Loader, key_lines, repeated_keys, yaml_problem
from quietstar.errors import ConfigError

COMMAND_LINE = "command line"
_OPTIONS = ("config", "resume", "controls", "help")  # flags of the command line beside the keys
_FLAG = re.compile(r"--[A-Za-z_][^=\s]*(=.*)?", re.DOTALL)  # `---` and `-1` are values


class Setting(NamedTuple):
    """A value, and where it comes from.

    Attributes:
        value: As YAML gives it.
        source: ``configs/x.yaml:4`` or COMMAND_LINE.
        prefix: ``stages.think.`` before the key of a stage.
    """

    value: Any
    source: str
    prefix: str = ""


def _read_yaml(path: Path, shown: str) -> tuple[Any, dict[str, int], list[str]]:
    """The data of a YAML file, the lines of its sections and keys, and a problem per repeated key.

    Raises:
        ConfigError: If the file cannot be read at all; messages call it ``shown``.
    """
    try:
        loader = Loader(path.read_text(encoding="utf-8-sig"))
        root = loader.get_single_node()
        repeated = [] if root is None else list(repeated_keys(root))
        data = None if root is None else loader.construct_document(root)
    except OSError as error:
        raise ConfigError([f"{shown}: cannot be read: {error.strerror}"]) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        source = shown if mark is None else f"{shown}:{mark.line + 1}"
        raise ConfigError([f"{source}: no valid YAML: {yaml_problem(error)}"]) from error
    if data is None:  # an empty file sets nothing
        return {}, {}, []
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(data, list) else shown_value(data)
        message = "must be a mapping of sections; write `thoughts:` with `length: 8` below it"
        raise ConfigError([f"{shown}: {kind} {message}"])
    problems = [f"{shown}:{line}: {key}: stands twice; remove one" for key, line in repeated]
    return data, key_lines(root), problems


class Reader:
    """Gathers the settings of a file and of the command line, and what is wrong with them.

    Attributes:
        settings: The value of each key, and where it comes from.
        stages: The same for the keys that each stage changes.
        problems: One line each.
        misspelt: Keys that were probably meant by unknown ones: they are not "not set".
    """

    def __init__(self) -> None:
        self.settings: dict[str, Setting] = {}
        self.stages: dict[str, dict[str, Setting]] = {}
        self.problems: list[str] = []
        self.misspelt: set[str] = set()

    def read_file(self, path: Path, shown: str) -> None:
        """Takes over the settings of a YAML file, which messages call ``shown``."""
        data, lines, problems = _read_yaml(path, shown)
        self.problems += problems
        stages = data.pop("stages", None) or {}
        self._read_sections(data, lines, shown, self.settings)
        if not isinstance(stages, dict):
            message = "must be a mapping of stages; write `stages:` with `think:` below it"
            where = f"{shown}:{lines['stages']}"
            self.problems.append(f"{where}: stages: {shown_value(stages)} {message}")
            return
        for stage, sections in stages.items():
            self.stages[str(stage)] = {}
            if isinstance(sections, dict):
                prefix = f"stages.{stage}."
                self._read_sections(sections, lines, shown, self.stages[str(stage)], prefix)
            elif sections is not None:
                message = "must be a mapping of sections, such as thoughts"
                where = f"{shown}:{lines[f'stages.{stage}']}"
                self.problems.append(f"{where}: stages.{stage}: {shown_value(sections)} {message}")

    def _read_sections(
        self,
        data: Mapping[Any, Any],
        lines: Mapping[str, int],
        shown: str,
        settings: dict[str, Setting],
        prefix: str = "",
    ) -> None:
        for section, body in data.items():
            line = lines.get(f"{prefix}{section}")
            source = f"{shown}:{line}" if line else shown
            if section not in SECTIONS:
                self._unknown_section(str(section), source)
            elif isinstance(body, dict):
                for name, value in body.items():
                    key = f"{section}.{name}"
                    line = lines.get(f"{prefix}{key}", line)
                    self._take(key, Setting(value, f"{shown}:{line}", prefix), settings)
            elif body is not None:  # a section whose keys are all commented out sets nothing
                message = f"must be a mapping of keys, such as {keys_of(section)[0]}"
                self.problems.append(f"{source}: {prefix}{section}: {shown_value(body)} {message}")

    def _unknown_section(self, section: str, source: str) -> None:
        if section in FIELDS:
            parent, _, name = section.partition(".")
            self.misspelt.add(section)
            message = f"unknown section; write `{parent}:` and `{name}:` below it"
        else:
            meant = closest(section, list(Config.model_fields))
            self.misspelt.update(keys_of(meant) if meant else ())
            message = f"unknown section{did_you_mean(meant)}"
        self.problems.append(f"{source}: {section}: {message}")

    def _take(self, key: str, setting: Setting, settings: dict[str, Setting]) -> None:
        shown = f"{setting.source}: {setting.prefix}{key}"
        if key not in FIELDS:
            meant = closest(key, list(FIELDS))
            self.misspelt.update([meant] if meant else [])
            self.problems.append(f"{shown}: unknown key{did_you_mean(meant)}")
        elif setting.prefix and not is_stage_key(key):
            message = f"holds for the whole run; set {key} outside of stages"
            self.problems.append(f"{shown}: {message}")
        else:
            settings[key] = setting

    def read_overrides(self, arguments: Sequence[str]) -> None:
        """Takes over ``--key value``, ``--key=value`` and bare ``--flag``; the last one wins."""
        for name, text in self._split_flags(arguments):
            prefix, rest, settings = self._of_stage(name)
            key = ".".join(rest.split(".")[:2])
            path = rest.split(".")[2:]
            if prefix and key in FIELDS and not is_stage_key(key):
                self._command_line_problem(name, f"holds for the whole run; write --{key} VALUE")
            elif key not in FIELDS or (path and not (all(path) and dict in field_types(key))):
                self._unknown_flag(name)
            elif text is not None:
                self._override(key, path, text, settings, prefix)
            elif bool in field_types(key):
                settings[key] = Setting(True, COMMAND_LINE, prefix)
            else:
                self._command_line_problem(name, f"has no value; write --{name} VALUE")

    def _of_stage(self, name: str) -> tuple[str, str, dict[str, Setting]]:
        """Prefix, rest and settings of ``stages.think.thoughts.length``; no prefix for others."""
        for stage, settings in self.stages.items():
            prefix = f"stages.{stage}."
            if name.startswith(prefix):
                return prefix, name.removeprefix(prefix), settings
        return "", name, self.settings

    def _command_line_problem(self, name: str, message: str) -> None:
        self.problems.append(f"{COMMAND_LINE}: {name}: {message}")

    def _split_flags(self, arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        rest = list(arguments)
        while rest:
            argument = rest.pop(0)
            if _FLAG.fullmatch(argument):
                name, equals, value = argument[2:].partition("=")
                if not equals:
                    value = rest.pop(0) if rest and not _FLAG.fullmatch(rest[0]) else None
                yield name, value
            else:
                is_file = argument.endswith((".yaml", ".yml"))
                form = f"--config {argument}" if is_file else "--key value"
                self._command_line_problem(argument, f"belongs to no key; write {form}")

    def _unknown_flag(self, name: str) -> None:
        prefix, rest, _ = self._of_stage(name)
        if prefix:
            meant = closest(rest, [key for key in FIELDS if is_stage_key(key)])
            message = "unknown key" + did_you_mean(meant and f"--{prefix}{meant}")
        elif name.split(".")[0] == "stages":
            stages = ", ".join(self.stages) or "none in this config"
            message = f"names no stage (stages: {stages}); write --stages.NAME.KEY VALUE"
        elif name in SECTIONS:
            message = f"is a section; set one of its keys, such as --{keys_of(name)[0]}"
        else:
            meant = closest(name, [*FIELDS, *_OPTIONS])
            self.misspelt.update([meant] if meant else [])
            message = "unknown key" + did_you_mean(meant if meant is None else f"--{meant}")
        self._command_line_problem(f"--{name}", message)

    def _override(
        self, key: str, path: list[str], text: str, settings: dict[str, Setting], prefix: str
    ) -> None:
        name = prefix + ".".join([key, *path])
        try:
            value = yaml.load(text, Loader=Loader) if path else _parse_text(key, text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            self._command_line_problem(name, f"{text!r} is no valid YAML: {yaml_problem(error)}")
            return
        if value is None and not text.strip():
            self._command_line_problem(name, f"has no value; write --{name} VALUE, or null")
            return
        if path:
            before = settings.get(key) or self.settings.get(key)
            value = _with_entry(before.value if before else None, path, value)
        settings[key] = Setting(value, COMMAND_LINE, prefix)


def _parse_text(key: str, text: str) -> Any:
    """The value of an override: YAML, except that text needs no quotes whatever it looks like."""
    types = field_types(key)
    if types <= {bool, int, float, list, dict, type(None)}:
        return yaml.load(text, Loader=Loader)
    if type(None) in types and text in ("null", "~"):
        return None
    if fits(text, types & {int, float}):  # beside a word such as auto
        return yaml.load(text, Loader=Loader)
    if text[:1] in ("'", '"'):
        quoted = yaml.load(text, Loader=Loader)
        return quoted if isinstance(quoted, str) else text
    return text


def _with_entry(mapping: Any, path: list[str], value: Any) -> dict[str, Any]:
    """A copy of a nested mapping (what is none counts as empty) with one entry set."""
    mapping = mapping if isinstance(mapping, dict) else {}
    if len(path) > 1:
        value = _with_entry(mapping.get(path[0]), path[1:], value)
    return {**mapping, path[0]: value}
