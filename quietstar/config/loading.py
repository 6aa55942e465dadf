"""Reading and writing a config: a YAML file, then dotted overrides from the command line.

`load_config` reports all wrong names and values at once, one line each, and then the broken rules
between keys:

    configs/x.yaml:4: thoughts.lenght: unknown key; did you mean thoughts.length?
    command line: thoughts.length: -1 must be greater than or equal to 1; ...

Keys of earlier versions are errors that name the new key; only the config of a run folder, which
such a version wrote, is translated.
"""

import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quietstar import registry
from quietstar.config.earlier import RENAMED, explained, migrate
from quietstar.config.effects import keys_without_effect
from quietstar.config.messages import (
    closest,
    did_you_mean,
    did_you_mean_file,
    field_message,
    fits,
    shortened,
    shown_value,
    types_of,
    words_of,
)
from quietstar.config.schema import MOST_LEVELS
from quietstar.config.tree import (
    SECTIONS,
    Config,
    CrossFieldError,
    fields,
    is_stage_key,
    keys_of,
    loss_class,
    loss_config,
    stages_of,
)
from quietstar.config.yaml import MOST_CHARACTERS, Document, YamlProblem, dump, parse
from quietstar.errors import ConfigError, UserError, reason_of, visible
from quietstar.system.files import write_whole
from quietstar.system.inputs import open_input

logger = logging.getLogger(__name__)

RUN_CONTENTS = ("checkpoints", "final", "metrics.jsonl")
"""What lies next to the config of a run; any of it marks a run folder."""

LONGEST_PROBLEM = 1000  # characters of its line, for values may be long
MOST_SUGGESTIONS = 20  # problems with a "did you mean", which takes a while to find

COMMAND_LINE, PYTHON = "command line", "QuietStarConfig"
"""Sources of a problem, in the place of a file and its line."""

_OPTIONS = ("config", "preset", "resume", "controls", "help")
"""Flags of the command line that are no keys."""
_FLAG = re.compile(r"--[A-Za-z_][^=\s]*(=.*)?", re.DOTALL)  # `---` and `-1` are values


def load_config(
    config_file: str | Path | None,
    overrides: Sequence[str] = (),
    preset: str | Path | None = None,
    given: Mapping[str, Any] | None = None,
) -> Config:
    """Read a config file (see `resolve_config_file`; None for the defaults), then overrides.

    A preset is the file of an objective, with a ``loss`` section and what belongs to it. Its loss
    takes the place of that of all stages that think; its other keys go over those of the config.

    Overrides are arguments of the command line, such as ``["--thoughts.length", "8"]``; they
    replace what the file says, and below a mapping they set single entries
    (``--model.config.hidden_size 64``). Values by key that Python code gives go the same way as
    ``given``. Settings that change nothing are warned of, but not those of a run folder, whose
    config has all keys.

    The config in the folder of a run may be anybody's: what it says lets no code run, unless the
    command line sets ``--model.trust_remote_code true``.

    Raises:
        ConfigError: With every wrong name and value, or else every broken rule between keys.
    """
    if registry.code_is_trusted() and not registry.code_is_trusted(is_of_run(config_file)):
        own = _Reader()
        own.read_overrides(overrides)
        own.read_given(given or {})
        if own.tree.get("model", {}).get("trust_remote_code") is not True:
            with registry.trusting(False):
                config = load_config(config_file, overrides, preset, given)
                for key, name in _named_parts(config):
                    if not any(path.endswith(key) for path in own.sources):
                        registry.find(key, name)
            return config
    reader = _Reader()
    for read, source in ((reader.read_file, config_file), (reader.read_preset, preset)):
        try:
            if source is not None:
                read(source)
        except ConfigError as error:  # hides no problem of the others
            reader.problems += error.problems
    reader.read_overrides(overrides)
    reader.read_given(given or {})
    reader.check()
    tree = reader.tree
    if not reader.in_run:
        reader.warn_idle()
    for warning in reader.warnings:
        logger.warning("%s", visible(shortened(warning, LONGEST_PROBLEM)))
    if not registry.code_is_trusted():
        tree.setdefault("model", {})["trust_remote_code"] = False
    config = Config.model_validate(tree)
    for name, stage in config.stage_configs().items():
        if stage.loss.objective != config.loss.objective:
            # In full: a file that is read again has all keys of the other objective outside.
            tree["stages"][name]["loss"] = stage.loss.model_dump()
    return Config.model_validate(tree)


def is_of_run(config_file: str | Path | None) -> bool:
    """Tell whether a config lies in the folder of a run, which wrote it."""
    path = Path(os.path.expanduser(config_file or ""))
    in_run = any((path.parent / name).exists() for name in RUN_CONTENTS)
    return path.name == "config.yaml" and in_run


def _named_parts(config: Config) -> Iterator[tuple[str, str]]:
    """List the parts of the user's own, module:name, that the stages of a config use."""
    for stage in config.stage_configs().values():
        named = [
            ("loss.objective", stage.loss.objective),
            ("thoughts.sampler", stage.thoughts.sampler),
        ]
        named += [("loss.reward", part) for _, part in registry.weighted_parts(stage.loss.reward)]
        yield from ((key, name) for key, name in named if ":" in name)


def read_sections(
    source: str, sections: Mapping[str, Any], unknown: Iterable[str] = ()
) -> dict[str, Any]:
    """Validate sections of a config that Python code gives, as those of a file.

    Args:
        source: What messages begin with, such as the name of a function.
        sections: By name, an instance, a mapping of keys (``{"length": 4}``), or None for defaults.
        unknown: Other arguments, which the function does not take.

    Raises:
        ConfigError: With everything that is wrong with the mappings.
    """
    reader = _Reader(source)
    kinds: dict[str, Any] = {name: Config.model_fields[name].annotation for name in sections}
    keys = [key for section in sections for key in keys_of(section)]
    for name in unknown:
        reader.report(name, reader.unknown(name, keys, kind="argument"))
    for name, given in sections.items():
        if isinstance(given, Mapping | None):
            reader.tree[name] = dict(given or {})
        elif not isinstance(given, kinds[name]):
            reader.report(
                name,
                f"must be a mapping of keys, such as {keys_of(name)[0]}, or a "
                f"{kinds[name].__name__} of quietstar.config, but is a {type(given).__name__}",
            )
    reader.check(within=reader.tree)  # rules between keys hold for those of the mappings
    made = {name: loss_config if name == "loss" else kinds[name] for name in reader.tree}
    return {**sections, **{name: make(**reader.tree[name]) for name, make in made.items()}}


def save_config(config: Config, path: str | Path) -> None:
    """Write a config as YAML, as a whole; `load_config` reads an equal one from it.

    Raises:
        UserError: It cannot be written.
    """
    write_whole(Path(path), dump(config.model_dump()))


def shipped_configs(subfolder: str = "") -> dict[str, Path]:
    """Return the config files that come with the package: ``tiny`` is ``configs/tiny.yaml``."""
    package = Path(__file__).resolve().parents[1]
    folder = package / "configs"  # of an installed wheel
    if not folder.is_dir() and (package.parent / "pyproject.toml").is_file():
        folder = package.parent / "configs"  # of a checkout
    files = sorted((folder / subfolder).glob("*.yaml"))  # launchers' lie below
    return {file.stem: file for file in files}


def resolve_config_file(
    name: str | Path, option: str = "--config", subfolder: str = ""
) -> tuple[Path, str]:
    """Find a config file; return its path, and the name that messages give it.

    The name is an existing path, or a shipped config as ``configs/x.yaml``, ``x.yaml`` or ``x``;
    with a ``subfolder`` one of those there.

    Raises:
        ConfigError: There is no such file.
    """
    given, path = f"{COMMAND_LINE}: {option}", Path(os.path.expanduser(name))
    if not str(name).strip():
        raise ConfigError([f"{given}: has no value; write {option} FILE"])
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        kind = None
    except (OSError, ValueError) as error:
        shown = shortened(str(name))
        raise ConfigError([f"{given}: {shown} cannot be read: {reason_of(error)}"]) from error
    if kind == stat.S_IFREG:
        return path, str(name)
    shipped, folder = shipped_configs(subfolder), (Path("configs") / subfolder).as_posix()
    short = Path(name).as_posix().removeprefix(f"{folder}/").removesuffix(".yaml")
    if short in shipped:
        return shipped[short], f"{folder}/{short}.yaml"
    if kind == stat.S_IFDIR:
        inside = path / "config.yaml"
        hint = f"; did you mean {inside}?" if inside.is_file() else "; give a YAML file"
        raise ConfigError([f"{given}: {name} is a folder{hint}"])
    if kind is not None:
        raise ConfigError([f"{given}: {name} is a pipe, a socket or a device; give a YAML file"])
    hint = did_you_mean(closest(short, list(shipped))) or did_you_mean_file(path)
    names = ", ".join(shipped) or "none"
    message = f"there is no file {shortened(str(name), 200)}"
    raise ConfigError([f"{given}: {message}{hint or f'; shipped configs: {names}'}"])


class _Reader:
    """Gathers what a file and the command line say, and what is wrong with it.

    Attributes:
        file: Name of the file in messages.
        lines: Line of each key of the file.
        in_run: Whether the file lies in the folder of a run, which wrote it.
        tree: The sections, and ``stages`` with those of each stage.
        sources: Where a key comes from that the file does not say.
        problems: One line each.
        warnings: One line each, for what is allowed but probably not meant.
    """

    def __init__(self, file: str = "defaults") -> None:
        self.file, self.lines, self.in_run = file, dict[str, int](), False
        self.tree: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def report(self, key: str, message: str, source: str | None = None) -> None:
        """Add a problem of a key."""
        self.problems.append(f"{source or self.source_of(key)}: {shortened(key, 100)}: {message}")

    def source_of(self, key: str) -> str:
        """Return file and line of a key, or of what it stands in, or what else says it."""
        while key:
            if key in self.sources:
                return self.sources[key]
            if key in self.lines:
                return f"{self.file}:{self.lines[key]}"
            key = key.rpartition(".")[0]
        return self.file

    def unknown(
        self, name: str, known: Sequence[str] = (), dashes: str = "", kind: str = "key"
    ) -> str:
        """Say which key replaces an unknown one, or which of the known ones was meant."""
        known = known or [*fields()]
        if told := explained(name, known, dashes, kind):
            return told
        meant = None
        if len(self.problems) < MOST_SUGGESTIONS:
            meant = closest(name, [*known, *RENAMED], by_leaf=True)
        lists = "leave it out" if kind == "argument" else "quietstar train --help lists all"
        hint = f"{dashes}{RENAMED.get(meant, meant)}" if meant else None
        return f"unknown {kind}{did_you_mean(hint) or f'; {lists}'}"

    # --- Sources ----------------------------------------------------------------------------------
    def read_file(
        self, config_file: str | Path, option: str = "--config", subfolder: str = ""
    ) -> None:
        """Take over a YAML file.

        Raises:
            ConfigError: The file cannot be read.
        """
        path, self.file = resolve_config_file(config_file, option, subfolder)
        tree, self.lines = _read_yaml(path, self.file)
        if not isinstance(tree, dict | None):
            message = "must be a mapping of sections; write `thoughts:` with `length: 8` below it"
            raise ConfigError([f"{self.file}: {shown_value(tree)} {message}"])
        self.tree = tree or {}  # an empty file sets nothing
        self.tree["stages"] = self.tree.get("stages") or {}
        self.in_run = is_of_run(path)
        stages = self.tree["stages"]
        parts = [self.tree, *(stages.values() if isinstance(stages, dict) else ())]
        if self.in_run:
            renamed, lost = migrate(parts)
            self.lines |= {new: self.lines[o] for o, new in renamed.items() if o in self.lines}
            self.warnings += [f"{self.file}: {line}" for line in lost]
            if renamed:
                names = ", ".join(f"{old} -> {new}" for old, new in renamed.items())
                self.warnings.append(
                    f"{self.file}: translated {len(renamed)} keys of an earlier version: {names}"
                )
        for part in (part for part in parts if isinstance(part, dict)):
            for section in [name for name, body in part.items() if body is None]:
                del part[section]  # an empty section sets nothing
            loss = part.get("loss")
            _add_settings(loss.get("objective") if isinstance(loss, dict) else None)

    def read_preset(self, name: str | Path) -> None:
        """Take over an objective, for all stages that think.

        Raises:
            ConfigError: It is no preset, or no stage thinks.
        """
        preset = _Reader()
        preset.read_file(name, "--preset", "objectives")
        if preset.tree.pop("stages"):
            raise ConfigError([
                f"{preset.file}: stages: a preset has none, but holds for all stages that think. "
                "Write its sections without them."
            ])  # fmt: skip
        if "loss" not in preset.tree:
            raise ConfigError([
                f"{preset.file}: loss: a preset is of an objective, but this one has no such "
                "section. Write `loss:` with `objective: rlp` below it."
            ])  # fmt: skip
        try:
            stages = stages_of(self.tree)
        except ValidationError:  # `check` says so
            return
        thinking = [stage for stage, sections in stages.items() if _thinks(sections)]
        if not thinking:
            raise ConfigError([
                f"{COMMAND_LINE}: --preset ({name}): no stage of {self.file} thinks, so nothing "
                "would learn by it. Leave it out, or give another --config."
            ])  # fmt: skip
        loss = self.tree.pop("loss", {})
        loss = loss if isinstance(loss, dict) else {}
        for stage, changes in self.tree.get("stages", {}).items():
            changes["loss"] = {} if stage in thinking else {**loss, **changes.get("loss", {})}
        for section, body in preset.tree.items():
            if not isinstance(body, dict):
                self._set([section], body, preset.source_of(section))
                continue
            for name, value in body.items():
                key = f"{section}.{name}"
                in_stages = is_stage_key(key) and "" not in stages
                for prefix in [f"stages.{stage}." for stage in thinking] if in_stages else [""]:
                    self._set(f"{prefix}{key}".split("."), value, preset.source_of(key))

    def read_overrides(self, arguments: Sequence[str]) -> None:
        """Take over ``--key value``, ``--key=value`` and bare ``--flag``; the last one counts."""
        flags: list[tuple[str, str | None]] = []
        rest = list(arguments)
        while rest:
            argument = rest.pop(0)
            if _FLAG.fullmatch(argument):
                name, equals, value = argument[2:].partition("=")
                if not equals:
                    value = rest.pop(0) if rest and not _FLAG.fullmatch(rest[0]) else None
                flags.append((name, value))
            else:
                is_file = argument.endswith((".yaml", ".yml"))
                form = f"--config {shortened(argument)}" if is_file else "--key value"
                self.report(argument, f"belongs to no key; write {form}", COMMAND_LINE)
        for name, text in flags:
            if name.endswith("loss.objective"):
                _add_settings(text)
        texts: dict[str, str | None] = {}
        for name, text in flags:
            if problem := self._override(name, text):
                self.problems.append(f"{COMMAND_LINE}: {problem}")
            elif texts.setdefault(name, text) != text:
                self.warnings.append(
                    f"{COMMAND_LINE}: {name}: is given more than once; the last value counts"
                )
            texts[name] = text

    def _override(self, name: str, text: str | None) -> str | None:
        """Take over one flag, or say what is wrong with it."""
        path, stages = name.split("."), self.tree.get("stages")
        stages = stages if isinstance(stages, dict) else {}
        depth = 2 if path[0] == "stages" else 0
        key, entry = ".".join(path[depth : depth + 2]), path[depth + 2 :]
        types = types_of(fields()[key]) if key in fields() else set[str]()
        if depth and (len(path) < depth or path[1] not in stages):
            names = ", ".join(stages) or "none in this config"
            return f"--{name}: names no stage (stages: {names}); write --stages.NAME.KEY VALUE"
        if depth and key in fields() and not is_stage_key(key):
            return f"{name}: holds for the whole run; write --{key} VALUE"
        if len(entry) > MOST_LEVELS:
            return f"--{shortened(name)}: has more than {MOST_LEVELS} dots; no mapping is as deep"
        if name in SECTIONS:
            return f"--{name}: is a section; set one of its keys, such as --{keys_of(name)[0]}"
        if key not in fields() or (entry and not (all(entry) and "object" in types)):
            known = (
                [key for key in fields() if is_stage_key(key)] if depth else [*fields(), *_OPTIONS]
            )
            dashes = f"--{'.'.join(path[:depth])}." if depth else "--"
            return (
                f"--{shortened(name, 100)}: {self.unknown('.'.join(path[depth:]), known, dashes)}"
            )
        if text is None and "boolean" in types:
            text = "true"
        if text is None or not (text if "string" in types and not entry else text.strip()):
            null = ", or null" if "null" in types else ""
            return f"{name}: has no value; write --{name} VALUE{null}"
        try:
            value = parse(text).data if entry else _parse_text(key, text)
        except YamlProblem as error:
            return f"{name}: {shortened(repr(text))} is no valid YAML: {error}"
        self._set(path, value, COMMAND_LINE)
        return None

    def read_given(self, given: Mapping[str, Any]) -> None:
        """Take over values by key."""
        _add_settings(given.get("loss.objective"))
        for key, value in given.items():
            if key in fields():
                self._set(key.split("."), value, PYTHON)
            else:
                self.report(key, self.unknown(key), PYTHON)

    def _set(self, path: list[str], value: Any, source: str) -> None:
        """Set a key, or an entry of its mapping; outside of stages it holds for all of them."""
        _put(self.tree, path, value)
        self.sources[".".join(path)] = source
        stages = self.tree.get("stages")
        for changes in stages.values() if isinstance(stages, dict) and path[0] != "stages" else ():
            body = changes.get(path[0]) if isinstance(changes, dict) else None
            if isinstance(body, dict) and path[1] in body:
                if path[2:]:
                    _put(body, path[1:], value)
                else:
                    del body[path[1]]

    # --- Checks -----------------------------------------------------------------------------------
    def check(self, within: Iterable[str] = SECTIONS) -> None:
        """Check names and values, and then the rules between keys of some sections.

        Raises:
            ConfigError: With what is wrong.
        """
        rules: list[str] = []
        try:
            stages = stages_of(self.tree)
            common = {name: body for name, body in self.tree.items() if name != "stages"}
            for stage, sections in {"": common, **stages}.items():
                found = self._check_stage(f"stages.{stage}." if stage else "", sections, within)
                rules += found if stage in stages else []
        except ValidationError as error:  # of the stages as such
            for detail in error.errors(include_url=False):
                self._report_value("", {**detail, "loc": ("stages", *detail["loc"])})
        if problems := self.problems or rules:
            unique = dict.fromkeys(problems)  # what stands outside of stages is wrong in each
            raise ConfigError(shortened(problem, LONGEST_PROBLEM) for problem in unique)

    def _check_stage(
        self, prefix: str, sections: dict[str, Any], within: Iterable[str]
    ) -> list[str]:
        """Report wrong names and values; return the broken rules between keys."""
        changes = self.tree["stages"][prefix.split(".")[1]] if prefix else {}
        for key in (f"{section}.{name}" for section in changes for name in changes[section]):
            if key in fields() and not is_stage_key(key):
                message = f"holds for the whole run; set {key} outside of stages"
                self.report(f"{prefix}{key}", message)
        try:
            Config.model_validate(sections)
            return []
        except ValidationError as error:
            details = error.errors(include_url=False)
        between = details[0].get("ctx", {}).get("error")
        if not isinstance(between, CrossFieldError):
            for detail in details:
                self._report_value(prefix, detail)
            return []
        rules = []
        for keys, message in between.problems:
            if {key.partition(".")[0] for key in keys} <= set(within):
                # Blame the key that was given last, if there is one, else the one to change.
                placed = [self._placed(prefix, key) for key in keys]
                given = [key for key in placed if self.source_of(key) in (COMMAND_LINE, PYTHON)]
                key = (given or placed)[0]
                rules.append(f"{self.source_of(key)}: {key}: {message.removeprefix(f'{key}: ')}")
        return rules

    def _placed(self, prefix: str, key: str) -> str:
        """Return a key with the stage that says it, if one does."""
        value: Any = self.tree
        for name in f"{prefix}{key}".split("."):
            if not isinstance(value, dict) or name not in value:
                return key
            value = value[name]
        return f"{prefix}{key}"

    def _report_value(self, prefix: str, detail: Any) -> None:
        """Report what pydantic says of a name or a value."""
        parts = [str(part) for part in detail["loc"] if part != "[key]"]
        key = ".".join(parts[:2])
        field = fields().get(key, {})
        if detail["type"] == "extra_forbidden" and key in fields():
            section, _, name = key.partition(".")
            message = f"unknown section; write `{section}:` and `{name}:` below it"
        elif detail["type"] == "extra_forbidden":
            names = [*fields(), *(SECTIONS if len(parts) == 1 else ())]
            message = self.unknown(key, names, kind="key" if len(parts) > 1 else "section")
        elif "[key]" in detail["loc"] and parts[0] == "stages":
            message = "a stage's name is made of letters, digits, - and _; rename it"
        elif detail["type"] in ("model_type", "dict_type") and not field:
            example = f", such as {keys_of(key)[0]}" if key in SECTIONS else ""
            message = f"{shown_value(detail['input'])} must be a mapping of keys{example}"
        else:
            message = field_message(field, detail)
        if words_of(field) and types_of(field) & {"integer", "number"}:
            parts = parts[:2]  # pydantic reports an error for every type
        self.report(self._placed(prefix, ".".join(parts)), message)

    def warn_idle(self) -> None:
        """Warn of settings that change nothing in any of the stages for which they were made."""
        reasons: dict[str, list[str | None]] = {}
        values: dict[str, Any] = {}
        for stage, sections in stages_of(self.tree).items():
            idle = keys_without_effect(Config.model_validate(sections))
            pairs = ((f"{section}.{name}", value) for section, body in sections.items()
                     for name, value in body.items())  # fmt: skip
            for key, value in pairs:
                placed = self._placed(f"stages.{stage}.", key)
                values[placed] = value
                if value != fields()[key].get("default"):
                    reasons.setdefault(placed, []).append(idle.get(key))
        self.warnings += [
            f"{self.source_of(key)}: {key}: {shown_value(values[key])} has no effect {told[0]};"
            " leave it out"
            for key, told in reasons.items()
            if all(told)
        ]


def _read_yaml(path: Path, name: str) -> Document:
    try:
        with open_input(path) as file:
            # One byte more than the longest text could have says that there is too much.
            return parse(file.read(4 * MOST_CHARACTERS + 1).decode("utf-8-sig"))
    except (OSError, MemoryError) as error:
        raise ConfigError([f"{name}: cannot be read: {reason_of(error)}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{name}: no valid YAML: is not UTF-8 text"]) from error
    except YamlProblem as error:
        source = name if error.line is None else f"{name}:{error.line}"
        raise ConfigError([f"{source}: no valid YAML: {error}"]) from error


def _add_settings(objective: Any) -> None:
    """Make the settings of an objective of the user's own known as keys."""
    if isinstance(objective, str) and ":" in objective:
        with suppress(UserError):  # a rule reports it with the others
            loss_class(objective)


def _thinks(sections: Mapping[str, Any]) -> bool:
    """Tell whether a stage thinks; what cannot be told is a problem of its own."""
    with suppress(UserError, AttributeError):
        name = sections.get("loss", {}).get("objective")
        return name is None or registry.find("loss.objective", str(name)).thinks
    return True


def _parse_text(key: str, text: str) -> Any:
    """Read the value of an override: YAML, except that text needs no quotes."""
    types = types_of(fields()[key])
    takes_text = words_of(fields()[key]) or "string" in types
    if not takes_text or fits(text, types & {"integer", "number"}):
        return parse(text).data
    if "null" in types and text in ("null", "~"):
        return None
    quoted = parse(text).data if text[:1] in ("'", '"') else None
    return quoted if isinstance(quoted, str) else text


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set an entry of nested mappings; what is none on the way is replaced."""
    for name in path[:-1]:
        inner = tree.get(name)
        tree[name] = dict(inner) if isinstance(inner, dict) else {}  # others may share it
        tree = tree[name]
    tree[path[-1]] = value
