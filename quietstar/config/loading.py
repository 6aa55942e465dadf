"""Reading and writing a config: a YAML file, then dotted overrides from the command line.

`load_config` reports everything that is wrong at once, one line per problem:

    configs/x.yaml:4: thoughts.lenght: unknown key; did you mean thoughts.length?
    command line: thoughts.length: -1 must be greater than or equal to 1; ...

Keys of earlier versions are errors that name the new key; only the config of a run folder, which
such a version wrote, is translated (`migrate`).
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from quietstar.config.messages import (
    COMMAND_LINE,
    closest,
    did_you_mean,
    field_message,
    field_types,
    fits,
    is_mixed,
    shown_value,
)
from quietstar.config.presets import resolve_config_file
from quietstar.config.rules import GYM, SYNTHETIC
from quietstar.config.schema import (
    FIELDS,
    SECTIONS,
    Config,
    CrossFieldError,
    CrossFieldProblem,
    is_stage_key,
    keys_of,
    loss_class,
)
from quietstar.config.yaml import YamlProblem, dump, parse
from quietstar.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

RUN_CONTENTS = ("checkpoints", "final", "metrics.jsonl")
"""What lies beside the config of a run; any of it marks a run folder."""

_OPTIONS = ("config", "resume", "controls", "help")  # flags of the command line beside the keys
_FLAG = re.compile(r"--[A-Za-z_][^=\s]*(=.*)?", re.DOTALL)  # `---` and `-1` are values

RENAMED: Mapping[str, str] = {
    "training.objective": "loss.objective",
    "tuning.lora_rank": "tuning.lora_r",
    "tuning.lora_targets": "tuning.lora_target_modules",
    "tuning.virtual_tokens": "tuning.num_virtual_tokens",
    "tuning.galore_update_every": "tuning.galore_update_proj_gap",
    "thoughts.source": "thoughts.sampler",
    "thoughts.share": "thoughts.position_fraction",
    "data.steps_field": "data.rationale_field",
    "optim.lr": "optim.learning_rate",
    "optim.mixing_head_lr": "optim.mixing_head_learning_rate",
    "optim.embedding_lr": "optim.embedding_learning_rate",
    "optim.beta1": "optim.adam_beta1",
    "optim.beta2": "optim.adam_beta2",
    "optim.eps": "optim.adam_epsilon",
    "optim.schedule": "optim.lr_scheduler_type",
    "optim.clip_norm": "optim.max_grad_norm",
    "training.steps": "training.max_steps",
    "training.batch_size": "training.global_batch_size",
    "training.precision": "training.mixed_precision",
    "training.block_tokens": "training.learn_chunk_tokens",
    "training.activation_checkpointing": "training.gradient_checkpointing",
    "training.compile": "training.torch_compile",
    "training.eval_every": "training.eval_steps",
    "training.save_every": "training.save_steps",
    "training.keep_checkpoints": "training.save_total_limit",
    "training.overwrite": "training.overwrite_output_dir",
    "logging.trackers": "logging.report_to",
    "logging.log_every": "logging.logging_steps",
    "logging.thought_every": "logging.thought_steps",
}
"""Keys of earlier versions, and their names of today."""

RENAMED_VALUES = {("thoughts.sampler", "sampled"): "rollout"}
"""Values of earlier versions by today's key, and what they are called today."""


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
        ConfigError: With every problem of the file, the overrides and the rules between keys.
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
    Path(path).write_text(dump(config.model_dump()), encoding="utf-8")


def migrate(tree: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[str, str]]:
    """Translates the keys that an earlier version wrote.

    Args:
        tree: Sections, such as ``{"optim": {"lr": 0.1}}``, and perhaps stages of such.

    Returns:
        The tree by today's names, and the old and new name of each key that was renamed.
    """
    renamed: dict[str, str] = {}
    result = _translate({name: body for name, body in tree.items() if name != "stages"}, renamed)
    stages = tree.get("stages")
    if isinstance(stages, dict):
        stages = {name: _translate(sections, renamed) for name, sections in stages.items()}
    parts = [result, *(stages.values() if isinstance(stages, dict) else ())]
    data = [p["data"] for p in parts if isinstance(p, dict) and isinstance(p.get("data"), dict)]
    if any(str(part.get("train")).startswith((GYM, SYNTHETIC)) for part in data):
        for part in data:  # generated problems called their reasoning `steps`
            if part.get("rationale_field") == "steps":
                part["rationale_field"] = "rationale"
    return result if stages is None else {**result, "stages": stages}, renamed


def _translate(sections: Any, renamed: dict[str, str]) -> Any:
    """Renames the keys of sections, and notes in ``renamed`` which."""
    if not isinstance(sections, dict):
        return sections
    result = {section: {} if isinstance(v, dict) else v for section, v in sections.items()}
    values = [(s, name, v) for s in sections if isinstance(sections[s], dict)
              for name, v in sections[s].items()]  # fmt: skip
    for section, name, value in values:
        old = f"{section}.{name}"
        if old in RENAMED:
            renamed[old] = RENAMED[old]
            section, _, name = RENAMED[old].partition(".")
        if isinstance(value, str):
            value = RENAMED_VALUES.get((f"{section}.{name}", value), value)
        result.setdefault(section, {})[name] = value
    return result


class Setting(NamedTuple):
    """A value, and where it comes from.

    Attributes:
        value: Plain data, as YAML gives it.
        source: ``configs/x.yaml:4`` or COMMAND_LINE.
        prefix: ``stages.think.`` before the key of a stage.
    """

    value: Any
    source: str
    prefix: str = ""


Settings = dict[str, Setting]


def _read_yaml(path: Path, shown: str) -> tuple[dict[Any, Any], dict[str, int], list[str]]:
    """Reads a YAML file: its data, the line of each key, and a problem per repeated key.

    Raises:
        ConfigError: If the file cannot be read at all; messages call it ``shown``.
    """
    try:
        data, lines, repeated = parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError([f"{shown}: cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{shown}: no valid YAML: is not UTF-8 text"]) from error
    except YamlProblem as error:
        source = shown if error.line is None else f"{shown}:{error.line}"
        raise ConfigError([f"{source}: no valid YAML: {error}"]) from error
    if data is None:  # an empty file sets nothing
        return {}, {}, []
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else shown_value(data)
        message = "must be a mapping of sections; write `thoughts:` with `length: 8` below it"
        raise ConfigError([f"{shown}: {kind} {message}"])
    if path.name == "config.yaml" and any((path.parent / name).exists() for name in RUN_CONTENTS):
        data, renamed = migrate(data)
        lines |= {new: lines[old] for old, new in renamed.items() if old in lines}
        if renamed:
            names = ", ".join(f"{old} -> {new}" for old, new in renamed.items())
            logger.warning(
                "%s: translated %d keys of an earlier version: %s", shown, len(renamed), names
            )
    problems = [f"{shown}:{line}: {key}: stands twice; remove one" for key, line in repeated]
    return data, lines, problems


class _Reader:
    """Gathers the settings of a file and of the command line, and what is wrong with them.

    Attributes:
        settings: The value of each key, and where it comes from.
        stages: The same for the keys that each stage changes.
        problems: One line each.
        misspelt: Keys that were probably meant by unknown ones: they are not "not set".
    """

    def __init__(self) -> None:
        self.settings: Settings = {}
        self.stages: dict[str, Settings] = {}
        self.problems: list[str] = []
        self.misspelt: set[str] = set()

    def read_file(self, path: Path, shown: str) -> None:
        """Takes over the settings of a YAML file, which messages call ``shown``."""
        data, lines, problems = _read_yaml(path, shown)
        self.problems += problems
        stages = data.pop("stages", None) or {}
        for sections in (data, *(stages.values() if isinstance(stages, dict) else ())):
            loss = sections.get("loss") if isinstance(sections, dict) else None
            if isinstance(loss, dict):
                _add_settings(loss.get("objective"))
        self._read_sections(data, lines, shown, self.settings)
        if not isinstance(stages, dict):
            message = "must be a mapping of stages; write `stages:` with `think:` below it"
            where = f"{shown}:{lines['stages']}"
            self._report("stages", f"{shown_value(stages)} {message}", where)
            return
        for stage, sections in stages.items():
            self.stages[str(stage)] = {}
            if isinstance(sections, dict):
                prefix = f"stages.{stage}."
                self._read_sections(sections, lines, shown, self.stages[str(stage)], prefix)
            elif sections is not None:
                message = f"{shown_value(sections)} must be a mapping of sections, such as thoughts"
                self._report(f"stages.{stage}", message, f"{shown}:{lines[f'stages.{stage}']}")

    def _read_sections(
        self,
        data: Mapping[Any, Any],
        lines: Mapping[str, int],
        shown: str,
        settings: Settings,
        prefix: str = "",
    ) -> None:
        for section, body in data.items():
            line = lines.get(f"{prefix}{section}")
            source = f"{shown}:{line}" if line else shown
            if section in SECTIONS and isinstance(body, dict):
                for name, value in body.items():
                    key = f"{section}.{name}"
                    source = f"{shown}:{lines.get(f'{prefix}{key}', line)}"
                    if key not in FIELDS:
                        self._report(f"{prefix}{key}", self._unknown(key), source)
                    elif prefix and not is_stage_key(key):
                        message = f"holds for the whole run; set {key} outside of stages"
                        self._report(f"{prefix}{key}", message, source)
                    else:
                        settings[key] = Setting(value, source, prefix)
            elif section in SECTIONS and body is not None:  # an empty section sets nothing
                message = f"must be a mapping of keys, such as {keys_of(section)[0]}"
                self._report(f"{prefix}{section}", f"{shown_value(body)} {message}", source)
            elif section in FIELDS:
                parent, _, name = section.partition(".")
                self.misspelt.add(section)
                message = f"unknown section; write `{parent}:` and `{name}:` below it"
                self._report(section, message, source)
            elif section not in SECTIONS:
                meant = closest(str(section), list(Config.model_fields))
                self.misspelt.update(keys_of(meant) if meant else ())
                self._report(section, f"unknown section{did_you_mean(meant)}", source)

    def _unknown(self, name: str, before: str = "", candidates: Sequence[str] | None = None) -> str:
        """Says which key replaces an unknown one, or which was probably meant."""
        renamed = RENAMED.get(name)
        meant = renamed or closest(
            name, [*(FIELDS if candidates is None else candidates), *RENAMED], by_leaf=True
        )
        meant = RENAMED.get(meant, meant) if meant else None
        self.misspelt.update([meant] if meant else [])
        if renamed:
            return f"renamed; write {before}{renamed}"
        return "unknown key" + did_you_mean(meant and f"{before}{meant}")

    def read_overrides(self, arguments: Sequence[str]) -> None:
        """Takes over ``--key value``, ``--key=value`` and bare ``--flag``; the last one wins."""
        flags = list(self._split_flags(arguments))
        for name, text in flags:
            if name.endswith("loss.objective"):
                _add_settings(text)
        for name, text in flags:
            prefix, rest, settings = self._of_stage(name)
            key = ".".join(rest.split(".")[:2])
            path = rest.split(".")[2:]
            if prefix and key in FIELDS and not is_stage_key(key):
                self._report(name, f"holds for the whole run; write --{key} VALUE")
            elif key not in FIELDS or (path and not (all(path) and dict in field_types(key))):
                self._unknown_flag(name, prefix, rest)
            elif text is not None:
                self._override(key, path, text, settings, prefix)
            elif bool in field_types(key):
                settings[key] = Setting(True, COMMAND_LINE, prefix)
            else:
                self._report(name, f"has no value; write --{name} VALUE")

    def _of_stage(self, name: str) -> tuple[str, str, Settings]:
        """Splits ``stages.think.thoughts.length`` into prefix and rest; no prefix for others."""
        for stage, settings in self.stages.items():
            prefix = f"stages.{stage}."
            if name.startswith(prefix):
                return prefix, name.removeprefix(prefix), settings
        return "", name, self.settings

    def _report(self, name: str, message: str, source: str = COMMAND_LINE) -> None:
        self.problems.append(f"{source}: {name}: {message}")

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
                self._report(argument, f"belongs to no key; write {form}")

    def _unknown_flag(self, name: str, prefix: str, rest: str) -> None:
        if prefix:
            stage_keys = [key for key in FIELDS if is_stage_key(key)]
            message = self._unknown(rest, f"--{prefix}", stage_keys)
        elif name.split(".")[0] == "stages":
            stages = ", ".join(self.stages) or "none in this config"
            message = f"names no stage (stages: {stages}); write --stages.NAME.KEY VALUE"
        elif name in SECTIONS:
            message = f"is a section; set one of its keys, such as --{keys_of(name)[0]}"
        else:
            message = self._unknown(name, "--", [*FIELDS, *_OPTIONS])
        self._report(f"--{name}", message)

    def _override(
        self, key: str, path: list[str], text: str, settings: Settings, prefix: str
    ) -> None:
        name = prefix + ".".join([key, *path])
        try:
            value = parse(text).data if path else _parse_text(key, text)
        except YamlProblem as error:
            self._report(name, f"{text!r} is no valid YAML: {error}")
            return
        if value is None and not text.strip():
            self._report(name, f"has no value; write --{name} VALUE, or null")
            return
        if path:
            before = settings.get(key) or self.settings.get(key)
            value = _with_entry(before.value if before else None, path, value)
        settings[key] = Setting(value, COMMAND_LINE, prefix)


def _add_settings(objective: Any) -> None:
    """Makes the settings of an objective of the user's own known as keys."""
    if isinstance(objective, str) and ":" in objective:
        with suppress(UserError):  # a rule reports it with the others
            loss_class(objective)


def _parse_text(key: str, text: str) -> Any:
    """Reads the value of an override: YAML, except that text needs no quotes."""
    types = field_types(key)
    if types <= {bool, int, float, list, dict, type(None)} or fits(text, types & {int, float}):
        return parse(text).data
    if type(None) in types and text in ("null", "~"):
        return None
    quoted = parse(text).data if text[:1] in ("'", '"') else None
    return quoted if isinstance(quoted, str) else text


def _with_entry(mapping: Any, path: list[str], value: Any) -> dict[str, Any]:
    """Copies a nested mapping (what is none counts as empty) with one entry set."""
    mapping = mapping if isinstance(mapping, dict) else {}
    if len(path) > 1:
        value = _with_entry(mapping.get(path[0]), path[1:], value)
    return {**mapping, path[0]: value}


def _validate(reader: _Reader, file: str) -> tuple[Config | None, list[str]]:
    """Makes the config, or lists what is wrong with its keys and between them, in every stage."""
    if not reader.stages:
        return _validate_settings(reader.settings, reader.misspelt, file)
    problems: list[str] = []
    in_stages: dict[str, Settings] = {}
    for name, stage in reader.stages.items():
        merged = {**reader.settings, **stage}
        for key, setting in reader.settings.items():  # the command line goes over any file
            if setting.source == COMMAND_LINE and merged[key].source != COMMAND_LINE:
                merged[key] = setting
        in_stages[name] = merged
        _, in_stage = _validate_settings(merged, reader.misspelt, file)
        problems += [problem for problem in in_stage if problem not in problems]
    if problems:
        return None, problems
    tree: dict[str, Any] = _nested(reader.settings)
    tree["stages"] = {
        name: _nested({key: setting for key, setting in merged.items() if setting.prefix})
        for name, merged in in_stages.items()
    }
    return Config.model_validate(tree), []


def _validate_settings(
    settings: Mapping[str, Setting], misspelt: set[str], file: str
) -> tuple[Config | None, list[str]]:
    """Makes the config of these settings, or lists its problems.

    pydantic looks at cross-field rules only when all fields are valid. So a second pass leaves the
    invalid fields out, and what it says about rules without such a field is reported as well.
    """
    config, field_errors, broken_rules = _try(settings)
    problems = []
    invalid = set(misspelt)
    for error in field_errors:
        key = ".".join(str(part) for part in error["loc"][:2])
        if key in invalid and is_mixed(key):  # an error for every type that it might have
            continue
        invalid.add(key)
        parts = error["loc"][:2] if is_mixed(key) else error["loc"]
        shown = ".".join(str(part) for part in parts if part != "[key]")
        where = f"{settings[key].source}: {settings[key].prefix}{shown}"
        problems.append(f"{where}: {field_message(key, error)}")
    if field_errors:
        valid = {key: setting for key, setting in settings.items() if key not in invalid}
        _, _, broken_rules = _try(valid)
    for keys, message in broken_rules:
        if invalid.isdisjoint(keys):
            given = [(key, settings[key]) for key in keys if key in settings]
            # Blame the key from the command line, if there is one, else the one to change.
            at_fault = [(key, one) for key, one in given if one.source == COMMAND_LINE]
            first = (keys[0], settings.get(keys[0], Setting(None, file)))
            key, setting = (at_fault or [first])[0]
            shown = f"{setting.prefix}{key}"
            problems.append(f"{setting.source}: {shown}: {message.removeprefix(f'{shown}: ')}")
    return config, problems


def _nested(settings: Mapping[str, Setting]) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {}
    for key, setting in settings.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = setting.value
    return tree


def _try(
    settings: Mapping[str, Setting],
) -> tuple[Config | None, list[Any], list[CrossFieldProblem]]:
    try:
        return Config.model_validate(_nested(settings)), [], []
    except ValidationError as error:
        details = error.errors(include_url=False)
        problem = details[0].get("ctx", {}).get("error")
        if isinstance(problem, CrossFieldError):
            return None, [], problem.problems
        return None, details, []
