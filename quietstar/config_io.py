"""Reading and writing the config: a YAML file, then dotted overrides of the command line.

`load_config` reports everything that is wrong at once, one line per problem:

    configs/x.yaml:4: thoughts.lenght: unknown key; did you mean thoughts.length?
    command line: thoughts.length: -1 must be greater than or equal to 1; ...
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from quietstar.config import (
    CROSS_FIELD_ERROR,
    SECTIONS,
    Config,
    CrossFieldProblem,
    is_stage_key,
)
from quietstar.config.keys import (
    FIELDS,
    choices,
    closest,
    did_you_mean,
    field_types,
    keys_of,
    type_text,
)
from quietstar.config.yaml12 import Dumper, Loader, key_lines, repeated_keys, yaml_problem
from quietstar.errors import ConfigError

COMMAND_LINE = "command line"
OPTIONS = ("config", "resume", "controls", "help")  # flags of the command line beside the keys
FLAG = re.compile(r"--[A-Za-z_][^=\s]*(=.*)?", re.DOTALL)  # `---` and `-1` are values

# ---------------------------------------------------------------------------------------------
# Settings: where each value comes from


class _Setting(NamedTuple):
    value: Any
    source: str  # "configs/x.yaml:4" or COMMAND_LINE
    prefix: str = ""  # "stages.think." before the key of a stage


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
        kind = "a list" if isinstance(data, list) else _shown_value(data)
        message = "must be a mapping of sections; write `thoughts:` with `length: 8` below it"
        raise ConfigError([f"{shown}: {kind} {message}"])
    problems = [f"{shown}:{line}: {key}: stands twice; remove one" for key, line in repeated]
    return data, key_lines(root), problems


class _Reader:
    """Gathers the settings of a file and of the command line, and what is wrong with them.

    Attributes:
        settings: The value of each key, and where it comes from.
        stages: The same for the keys that each stage changes.
        problems: One line each.
        misspelt: Keys that were probably meant by unknown ones: they are not "not set".
    """

    def __init__(self) -> None:
        self.settings: dict[str, _Setting] = {}
        self.stages: dict[str, dict[str, _Setting]] = {}
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
            self.problems.append(f"{where}: stages: {_shown_value(stages)} {message}")
            return
        for stage, sections in stages.items():
            self.stages[str(stage)] = {}
            if isinstance(sections, dict):
                prefix = f"stages.{stage}."
                self._read_sections(sections, lines, shown, self.stages[str(stage)], prefix)
            elif sections is not None:
                message = "must be a mapping of sections, such as thoughts"
                where = f"{shown}:{lines[f'stages.{stage}']}"
                self.problems.append(f"{where}: stages.{stage}: {_shown_value(sections)} {message}")

    def _read_sections(
        self,
        data: Mapping[Any, Any],
        lines: Mapping[str, int],
        shown: str,
        settings: dict[str, _Setting],
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
                    self._take(key, _Setting(value, f"{shown}:{line}", prefix), settings)
            elif body is not None:  # a section whose keys are all commented out sets nothing
                message = f"must be a mapping of keys, such as {keys_of(section)[0]}"
                self.problems.append(f"{source}: {prefix}{section}: {_shown_value(body)} {message}")

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

    def _take(self, key: str, setting: _Setting, settings: dict[str, _Setting]) -> None:
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
                settings[key] = _Setting(True, COMMAND_LINE, prefix)
            else:
                self._command_line_problem(name, f"has no value; write --{name} VALUE")

    def _of_stage(self, name: str) -> tuple[str, str, dict[str, _Setting]]:
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
            if FLAG.fullmatch(argument):
                name, equals, value = argument[2:].partition("=")
                if not equals:
                    value = rest.pop(0) if rest and not FLAG.fullmatch(rest[0]) else None
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
            meant = closest(name, [*FIELDS, *OPTIONS])
            self.misspelt.update([meant] if meant else [])
            message = "unknown key" + did_you_mean(meant if meant is None else f"--{meant}")
        self._command_line_problem(f"--{name}", message)

    def _override(
        self, key: str, path: list[str], text: str, settings: dict[str, _Setting], prefix: str
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
        settings[key] = _Setting(value, COMMAND_LINE, prefix)


def _parse_text(key: str, text: str) -> Any:
    """The value of an override: YAML, except that text needs no quotes whatever it looks like."""
    types = field_types(key)
    if types <= {bool, int, float, list, dict, type(None)}:
        return yaml.load(text, Loader=Loader)
    if type(None) in types and text in ("null", "~"):
        return None
    if _fits(text, types & {int, float}):  # beside a word such as auto
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


# ---------------------------------------------------------------------------------------------
# Validation


def _nested(settings: Mapping[str, _Setting]) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {}
    for key, setting in settings.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = setting.value
    return tree


def _validate(reader: _Reader, file: str) -> tuple[Config | None, list[str]]:
    """The config, or all that is wrong with its fields and between them, in every stage."""
    if not reader.stages:
        return _validate_settings(reader.settings, reader.misspelt, file)
    problems: list[str] = []
    for settings in reader.stages.values():
        _, found = _validate_settings(_in_stage(reader, settings), reader.misspelt, file)
        problems += [problem for problem in found if problem not in problems]
    if problems:
        return None, problems
    tree: dict[str, Any] = _nested(reader.settings)
    tree["stages"] = {
        name: _nested({k: s for k, s in _in_stage(reader, settings).items() if s.prefix})
        for name, settings in reader.stages.items()
    }
    return Config.model_validate(tree), []


def _in_stage(reader: _Reader, stage: Mapping[str, _Setting]) -> dict[str, _Setting]:
    """What holds in a stage: its keys over those of the run; the command line over any file."""
    merged = {**reader.settings, **stage}
    for key, setting in reader.settings.items():
        if setting.source == COMMAND_LINE and merged[key].source != COMMAND_LINE:
            merged[key] = setting
    return merged


def _validate_settings(
    settings: Mapping[str, _Setting], misspelt: set[str], file: str
) -> tuple[Config | None, list[str]]:
    """The config of these settings, or its problems.

    pydantic looks at cross-field rules only when all fields are valid. So a second pass leaves the
    invalid fields out, and what it says about rules without such a field is reported as well.
    """
    config, field_errors, broken_rules = _try(settings)
    problems = []
    invalid = set(misspelt)
    for error in field_errors:
        key = ".".join(str(part) for part in error["loc"][:2])
        if key in invalid and _is_mixed(key):  # an error for every type that it might have
            continue
        invalid.add(key)
        parts = error["loc"][:2] if _is_mixed(key) else error["loc"]
        shown = ".".join(str(part) for part in parts if part != "[key]")
        where = f"{settings[key].source}: {settings[key].prefix}{shown}"
        problems.append(f"{where}: {_field_message(key, error)}")
    if field_errors:
        valid = {key: setting for key, setting in settings.items() if key not in invalid}
        _, _, broken_rules = _try(valid)
    for keys, message in broken_rules:
        if invalid.isdisjoint(keys):
            where = _where(keys, settings, file)
            shown = where.rpartition(": ")[2]
            problems.append(f"{where}: {message.removeprefix(f'{shown}: ')}")
    return config, problems


def _where(keys: Sequence[str], settings: Mapping[str, _Setting], file: str) -> str:
    """Source and name of the key of a broken rule: one from the command line if there is one."""
    given = {key: settings[key] for key in keys if key in settings}
    key = next((k for k, setting in given.items() if setting.source == COMMAND_LINE), keys[0])
    setting = given.get(key, _Setting(None, file))
    return f"{setting.source}: {setting.prefix}{key}"


def _try(
    settings: Mapping[str, _Setting],
) -> tuple[Config | None, list[Any], list[CrossFieldProblem]]:
    try:
        return Config.model_validate(_nested(settings)), [], []
    except ValidationError as error:
        details = error.errors(include_url=False)
        if details[0]["type"] == CROSS_FIELD_ERROR:
            return None, [], details[0].get("ctx", {})["problems"]
        return None, details, []


PLAIN_WORDS = {
    "a valid dictionary": "a mapping",
    "a valid string": "text",
    "a valid boolean": "true or false",
}


def _field_message(key: str, error: Mapping[str, Any]) -> str:
    """Value, rule and remedy for what pydantic says about one field."""
    value, rule = error["input"], error["msg"]
    if _is_mixed(key):
        rule = f"must be {type_text(key)}"
    rule = re.sub(r"^(Input|Keys|List|String|Dictionary) should( be)?", r"must\2", rule)
    rule = rule.removesuffix(" after validation, not 0")
    for name, plain in PLAIN_WORDS.items():
        rule = rule.replace(name, plain)
    message = f"{_shown_value(value)} {rule}"
    types = field_types(key)
    if error["type"] == "literal_error" or _is_mixed(key):
        meant = closest(str(value), choices(key))
        if meant:
            return message + did_you_mean(meant)
    if value is None and type(None) not in types:
        return f"{message}; leave the key out to get its default, {default_text(key)}"
    if isinstance(value, str) and types & {int, float, bool} and _fits(value, types):
        return f"{message}; write it without quotes"
    if error["type"] == "list_type":
        return f"{message}; write it as [a, b]"
    description = (FIELDS[key].description or "").rstrip(".")
    return f"{message}; default {default_text(key)} ({description})"


def _is_mixed(key: str) -> bool:
    """Whether a key takes a number or a word."""
    return bool(choices(key) and field_types(key) & {int, float})


def _fits(text: str, types: set[Any]) -> bool:
    try:
        return type(yaml.load(text, Loader=Loader)) in types
    except (yaml.YAMLError, ValueError):
        return False


def _shown_value(value: Any) -> str:
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
    return _shown_value(value).strip("'") if isinstance(value, str) else _shown_value(value)


# ---------------------------------------------------------------------------------------------
# Files


def _shipped_folder() -> Path | None:
    package = Path(__file__).resolve().parent
    if (package / "configs").is_dir():  # an installed wheel
        return package / "configs"
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "configs").is_dir():
        return checkout / "configs"
    return None


def shipped_configs() -> dict[str, Path]:
    """The config files that come with the package, by name: ``tiny`` is ``configs/tiny.yaml``."""
    folder = _shipped_folder()
    if folder is None:
        return {}
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}  # below lie launchers' files


def resolve_config_file(name: str | Path) -> tuple[Path, str]:
    """Finds a config file.

    Args:
        name: An existing path, or a shipped config as ``configs/x.yaml``, ``x.yaml`` or ``x``.

    Returns:
        The path, and the name that messages give it.

    Raises:
        ConfigError: If there is no such file.
    """
    if Path(name).is_file():
        return Path(name), str(name)
    shipped = shipped_configs()
    short = Path(name).as_posix().removeprefix("configs/").removesuffix(".yaml")
    if short in shipped:
        return shipped[short], f"configs/{short}.yaml"
    if Path(name).is_dir():
        inside = Path(name) / "config.yaml"
        hint = f"; did you mean {inside}?" if inside.is_file() else "; give a YAML file"
        raise ConfigError([f"{COMMAND_LINE}: --config: {name} is a folder{hint}"])
    hint = did_you_mean(closest(short, list(shipped)))
    names = ", ".join(shipped) or "none"
    message = f"there is no file {name}{hint or f'; shipped configs: {names}'}"
    raise ConfigError([f"{COMMAND_LINE}: --config: {message}"])


def load_config(config_file: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a config.

    Args:
        config_file: What `resolve_config_file` takes, or None for the defaults alone.
        overrides: Arguments of the command line, such as ``["--thoughts.length", "8"]``; they
            replace what the file says, and below a mapping they set single entries
            (``--model.config.hidden_size 64``).

    Returns:
        The valid config.

    Raises:
        ConfigError: With every problem of the file, the overrides and the rules between fields.
    """
    reader = _Reader()
    shown = "defaults"
    try:
        if config_file is not None:
            path, shown = resolve_config_file(config_file)
            reader.read_file(path, shown)
    except ConfigError as error:  # nothing is known of the file: no key counts as not set
        reader.problems += error.problems
        reader.misspelt.update(FIELDS)
    reader.read_overrides(overrides)
    config, problems = _validate(reader, shown)
    if reader.problems or problems or config is None:
        raise ConfigError([*reader.problems, *problems])
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Writes a config as YAML; `load_config` reads an equal one from it."""
    text = yaml.dump(
        config.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100
    )
    Path(path).write_text(text, encoding="utf-8")
