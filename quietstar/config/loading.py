"""Reading and writing a config: a YAML file, then dotted overrides from the command line.

`load_config` reports everything that is wrong at once, one line per problem:

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
from typing import Any, NamedTuple

from pydantic import ValidationError

from quietstar import registry
from quietstar.config import messages
from quietstar.config.earlier import DROPPED, RENAMED, REPLACED, migrate
from quietstar.config.effects import keys_without_effect
from quietstar.config.messages import (
    closest,
    did_you_mean,
    did_you_mean_file,
    key_types,
    shortened,
    shown_value,
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
)
from quietstar.config.yaml import MOST_CHARACTERS, YamlProblem, dump, parse
from quietstar.errors import ConfigError, UserError, reason_of, visible
from quietstar.system.files import write_whole
from quietstar.system.inputs import open_input

logger = logging.getLogger(__name__)

RUN_CONTENTS = ("checkpoints", "final", "metrics.jsonl")
"""What lies beside the config of a run; any of it marks a run folder."""

LONGEST_PROBLEM = 1000  # characters of its line, for values may be long
MOST_STAGES = 100
MOST_SUGGESTIONS = 20  # problems with a "did you mean", which takes a while to find

COMMAND_LINE, PYTHON = "command line", "QuietStarConfig"
"""Sources of a problem, in the place of a file and its line."""
GIVEN = (COMMAND_LINE, PYTHON)

_OPTIONS = (
    "config",
    "preset",
    "resume",
    "controls",
    "help",
)  # flags of the command line beside the keys
_FLAG = re.compile(r"--[A-Za-z_][^=\s]*(=.*)?", re.DOTALL)  # `---` and `-1` are values

_FOREIGN = {
    "training.max_steps": "num_train_epochs num_epochs epochs",
    "training.global_batch_size": "gradient_accumulation_steps generation_batch_size"
    " steps_per_generation train_batch_size per_gpu_batch_size",
    "training.micro_batch_size": "per_device_train_batch_size per_device_eval_batch_size",
    "training.mixed_precision": "bf16 fp16",
    "training.inner_epochs": "num_iterations num_ppo_epochs",
    "training.eval_steps": "eval_strategy evaluation_strategy",
    "training.save_steps": "save_strategy",
    "optim.warmup_steps": "warmup_ratio",
    "thoughts.num_thoughts": "num_generations",
    "thoughts.length": "max_completion_length max_new_tokens",
    "data.seq_len": "max_seq_length max_length max_prompt_length block_size",
    "data.train": "train_file train_dataset dataset dataset_name",
    "data.eval": "validation_file eval_dataset",
    "loss.reward": "reward_func reward_funcs",
    "loss.kl_weight": "beta kl_coef",
    "loss.clip_low": "epsilon cliprange",
    "loss.clip_high": "epsilon_high",
    "loss.scaling": "scale_rewards",
    "loss.token_weighting": "loss_type",
    "tuning.method": "use_peft load_in_4bit",
    "tuning.lora_target_modules": "target_modules",
    "model.dtype": "torch_dtype",
    "resume": "resume_from_checkpoint",
}
FOREIGN = {name: key for key, names in _FOREIGN.items() for name in names.split()}
"""Names of transformers, TRL and PEFT, and the key that decides the same here."""
_UNLIKE = {
    "training.max_steps": "runs are counted in steps of training.global_batch_size texts",
    "training.global_batch_size": "all texts of a step, in as many passes of at most"
    " training.micro_batch_size as it takes",
    "training.mixed_precision": "bf16 or no; there is no fp16",
    "optim.warmup_steps": "a number of steps",
    "training.eval_steps": "0 evaluates only at start and end",
    "training.save_steps": "0 saves only the final model",
}
"""What a foreign name's key means, where its name alone does not tell."""


def load_config(
    config_file: str | Path | None,
    overrides: Sequence[str] = (),
    preset: str | Path | None = None,
    given: Mapping[str, Any] | None = None,
) -> Config:
    """Reads a config file (see `resolve_config_file`; None for the defaults), then overrides.

    A preset is the file of an objective, with a ``loss`` section and what belongs to it. Its loss
    takes the place of that of all stages that think; its other keys go over those of the config.

    Overrides are arguments of the command line, such as ``["--thoughts.length", "8"]``; they
    replace what the file says, and below a mapping they set single entries
    (``--model.config.hidden_size 64``). Values by key that Python code gives go the same way as
    ``given``. Settings that change nothing are warned of, but not those
    of a run folder, whose config has all keys.

    The config in the folder of a run may be anybody's: what it says lets no code run, unless the
    command line sets ``--model.trust_remote_code true``.

    Raises:
        ConfigError: With every problem of the file, the overrides and the rules between keys.
    """
    if registry.code_is_trusted() and not registry.code_is_trusted(is_of_run(config_file)):
        own = _Reader()
        own.read_overrides(overrides)
        own.read_given(given or {})
        trust = own.settings[""].get("model.trust_remote_code")
        if trust is None or trust.value is not True:
            with registry.trusting(False):
                config = load_config(config_file, overrides, preset, given)
                for key, name in _named_parts(config):
                    if not any(key in settings for settings in own.settings.values()):
                        registry.find(key, name)
            return config
    reader = _Reader()
    if config_file is not None:
        try:
            reader.read_file(config_file)
        except ConfigError as error:  # nothing is known of the file: no key counts as not set
            reader.problems += error.problems
            reader.misspelt.update(fields())
    if preset is not None:
        reader.read_preset(preset)
    reader.read_overrides(overrides)
    reader.read_given(given or {})
    base, *stages = reader.settings
    merged: dict[str, Settings] = {}
    for prefix in stages or [base]:
        settings = merged[prefix] = {**reader.settings[base], **reader.settings[prefix]}
        for key, setting in reader.settings[base].items():  # the command line goes over any file
            if setting.source in GIVEN and settings[key].source not in GIVEN:
                settings[key] = setting
        problems = _find_problems(settings, reader.misspelt, reader.file)
        reader.problems += [problem for problem in problems if problem not in reader.problems]
    if reader.problems:
        raise ConfigError(shortened(problem, LONGEST_PROBLEM) for problem in reader.problems)
    if not reader.in_run:
        reader.warnings += _find_idle(merged)
    for warning in reader.warnings:
        logger.warning("%s", visible(shortened(warning, LONGEST_PROBLEM)))
    tree: dict[str, Any] = _nested(reader.settings[base])
    tree["stages"] = {
        prefix.removeprefix("stages.")[:-1]: _nested(
            {key: setting for key, setting in merged[prefix].items() if setting.prefix}
        )
        for prefix in stages
    }
    for name, sections in tree["stages"].items():
        objective = sections.get("loss", {}).get("objective")
        if objective not in (None, tree.get("loss", {}).get("objective")):
            # In full: a file that is read again has all keys of the other objective outside.
            given = {k: s.value for k, s in merged[f"stages.{name}."].items()}
            known = loss_class(objective).model_fields
            keys = {k.partition(".")[2]: v for k, v in given.items() if k.startswith("loss.")}
            own = {key: value for key, value in keys.items() if key in known}
            sections["loss"] = loss_config(**own).model_dump()
    if not registry.code_is_trusted():
        tree.setdefault("model", {})["trust_remote_code"] = False
    return Config.model_validate(tree)


def is_of_run(config_file: str | Path | None) -> bool:
    """Tell whether a config lies in the folder of a run, which wrote it."""
    path = Path(os.path.expanduser(config_file or ""))
    beside = any((path.parent / name).exists() for name in RUN_CONTENTS)
    return path.name == "config.yaml" and beside


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
    """Validates sections of a config that Python code gives, as those of a file.

    Args:
        source: What messages begin with, such as the name of a function.
        sections: By name, an instance, a mapping of keys (``{"length": 4}``), or None for defaults.
        unknown: Arguments beside them that the function does not take.

    Raises:
        ConfigError: With everything that is wrong with the mappings.
    """
    reader, kinds = _Reader(), {name: Config.model_fields[name].annotation for name in sections}
    reader.file = source
    mappings = {name: {} if given is None else given for name, given in sections.items()}
    for name in unknown:
        keys = [key for section in sections for key in keys_of(section)]
        reader.problems.append(
            f"{source}: {name}: {reader._unknown(name, candidates=keys, kind='argument')}"
        )
    for name, given in [*mappings.items()]:
        if isinstance(given, Mapping):
            reader._read_section("", name, dict(given))
            continue
        del mappings[name]
        if not isinstance(given, kinds[name]):  # pyright: ignore[reportArgumentType]
            reader.problems.append(
                f"{source}: {name}: must be a mapping of keys, such as {keys_of(name)[0]}, or a "
                f"{kinds[name].__name__} of quietstar.config, but is a {type(given).__name__}"  # pyright: ignore
            )
    # Rules between keys hold for those of the mappings.
    others = {key for key in fields() if key.partition(".")[0] not in mappings}
    reader.problems += _find_problems(reader.settings[""], reader.misspelt | others, source)
    if reader.problems:
        raise ConfigError(shortened(problem, LONGEST_PROBLEM) for problem in reader.problems)
    trees, make = _nested(reader.settings[""]), {**kinds, "loss": loss_config}
    return {
        name: make[name](**trees.get(name, {})) if name in mappings else given  # pyright: ignore
        for name, given in sections.items()
    }


def save_config(config: Config, path: str | Path) -> None:
    """Writes a config as YAML, as a whole; `load_config` reads an equal one from it.

    Raises:
        UserError: It cannot be written.
    """
    write_whole(Path(path), dump(config.model_dump()))


def shipped_configs(subfolder: str = "") -> dict[str, Path]:
    """Returns the config files that come with the package: ``tiny`` is ``configs/tiny.yaml``."""
    package = Path(__file__).resolve().parents[1]
    folder = package / "configs"  # of an installed wheel
    if not folder.is_dir() and (package.parent / "pyproject.toml").is_file():
        folder = package.parent / "configs"  # of a checkout
    files = sorted((folder / subfolder).glob("*.yaml"))  # launchers' lie below
    return {file.stem: file for file in files}


def resolve_config_file(
    name: str | Path, option: str = "--config", subfolder: str = ""
) -> tuple[Path, str]:
    """Finds a config file; returns its path, and the name that messages give it.

    The name is an existing path, or a shipped config as ``configs/x.yaml``, ``x.yaml`` or ``x``;
    with a ``subfolder`` one of those there.

    Raises:
        ConfigError: If there is no such file.
    """
    given, path, kind = f"{COMMAND_LINE}: {option}", Path(os.path.expanduser(name)), None
    if not str(name).strip():
        raise ConfigError([f"{given}: has no value; write {option} FILE"])
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        pass
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


class Setting(NamedTuple):
    """A value of plain data, and where it comes from."""

    value: Any
    source: str  # configs/x.yaml:4, or COMMAND_LINE
    prefix: str = ""  # stages.think. before the key of a stage


Settings = dict[str, Setting]


class _Reader:
    """Gathers the settings of a file and of the command line, and what is wrong with them.

    Attributes:
        settings: By prefix ("" outside of stages), the value of each key and where it comes from.
        problems: One line each.
        warnings: One line each, for what is allowed but probably not meant.
        misspelt: Keys that were probably meant by unknown ones: they are not "not set".
        file: Name of the file in messages.
        in_run: Whether the file lies in the folder of a run, which wrote it.
        lines: Line of each key of the file.
    """

    def __init__(self) -> None:
        self.settings: dict[str, Settings] = {"": {}}
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.misspelt: set[str] = set()
        self.file = "defaults"
        self.in_run = False
        self.lines: dict[str, int] = {}

    def read_preset(self, name: str | Path) -> None:
        """Takes over the settings of an objective, for all stages that think."""
        preset = _Reader()
        try:
            preset.read_file(name, "--preset", "objectives")
        except ConfigError as error:
            self.problems += error.problems
            return
        self.problems += preset.problems
        self.misspelt |= preset.misspelt
        base, *stages = self.settings
        if not any(key.startswith("loss.") for key in preset.settings[""]):
            self.problems.append(
                f"{preset.file}: loss: a preset is of an objective, but this one has no such "
                "section. Write `loss:` with `objective: rlp` below it."
            )
            return
        if len(preset.settings) > 1:
            self.problems.append(
                f"{preset.file}: stages: a preset has none, but holds for all stages that think. "
                "Write its sections without them."
            )
        thinking = [stage for stage in stages or [base] if self._thinks(stage)]
        if not thinking:
            self.problems.append(
                f"{COMMAND_LINE}: --preset ({name}): no stage of {self.file} thinks, so nothing "
                "would learn by it. Leave it out, or give another --config."
            )
        common = {k: s for k, s in self.settings[base].items() if k.startswith("loss.")}
        for prefix in (base, *thinking):
            for key in [key for key in self.settings[prefix] if key.startswith("loss.")]:
                del self.settings[prefix][key]
        for prefix in set(stages) - set(thinking):
            self.settings[prefix] = {**common, **self.settings[prefix]}
        for key, setting in preset.settings[""].items():
            for prefix in thinking if is_stage_key(key) else [base]:
                self.settings[prefix][key] = setting._replace(prefix=prefix)

    def _thinks(self, prefix: str) -> bool:
        """Tells whether a stage thinks; what cannot be told is a problem of its own."""
        settings = {**self.settings[""], **self.settings[prefix]}
        name = settings.get("loss.objective")
        with suppress(UserError):
            return name is None or registry.find("loss.objective", str(name.value)).thinks
        return True

    def read_file(
        self, config_file: str | Path, option: str = "--config", subfolder: str = ""
    ) -> None:
        """Takes over the settings of a YAML file.

        Raises:
            ConfigError: If the file cannot be read at all.
        """
        path, self.file = resolve_config_file(config_file, option, subfolder)
        try:
            with open_input(path) as file:
                # One byte more than the longest text could have says that there is too much.
                text = file.read(4 * MOST_CHARACTERS + 1)
            data, self.lines, repeated = parse(text.decode("utf-8-sig"))
        except (OSError, MemoryError) as error:
            raise ConfigError([f"{self.file}: cannot be read: {reason_of(error)}"]) from error
        except UnicodeDecodeError as error:
            raise ConfigError([f"{self.file}: no valid YAML: is not UTF-8 text"]) from error
        except YamlProblem as error:
            source = self.file if error.line is None else f"{self.file}:{error.line}"
            raise ConfigError([f"{source}: no valid YAML: {error}"]) from error
        data = {} if data is None else data  # an empty file sets nothing
        if not isinstance(data, dict):
            kind = "a list" if isinstance(data, list) else shown_value(data)
            message = "must be a mapping of sections; write `thoughts:` with `length: 8` below it"
            raise ConfigError([f"{self.file}: {kind} {message}"])
        for key, line in repeated:
            self._report(key, "stands twice; remove one", f"{self.file}:{line}")
        stages = data.pop("stages", None) or {}
        parts = {"": data}
        if isinstance(stages, dict) and len(stages) > MOST_STAGES:
            message = f"{len(stages)} stages are more than {MOST_STAGES}, and no run has as many"
            self._report("stages", message)
        elif isinstance(stages, dict):
            for name in stages:
                if not re.fullmatch(r"[\w-]{1,100}", str(name)):
                    rule = "a stage's name is made of letters, digits, - and _; rename it"
                    self._report(f"stages.{name}", rule)
            parts |= {f"stages.{name}.": sections for name, sections in stages.items()}
        self.in_run = is_of_run(path)
        if self.in_run:
            renamed, lost = migrate(parts.values())
            self.lines |= {new: self.lines[o] for o, new in renamed.items() if o in self.lines}
            self.warnings += [f"{self.file}: {line}" for line in lost]
            if renamed:
                names = ", ".join(f"{old} -> {new}" for old, new in renamed.items())
                self.warnings.append(
                    f"{self.file}: translated {len(renamed)} keys of an earlier version: {names}"
                )
        losses = [part.get("loss") for part in parts.values() if isinstance(part, dict)]
        _add_settings(loss.get("objective") for loss in losses if isinstance(loss, dict))
        for prefix, sections in parts.items():
            self.settings[prefix] = {}
            if isinstance(sections, dict):
                for section, body in sections.items():
                    self._read_section(prefix, section, body)
            elif sections is not None:
                message = f"{shown_value(sections)} must be a mapping of sections, such as thoughts"
                self._report(prefix[:-1], message)
        if not isinstance(stages, dict):
            message = "must be a mapping of stages; write `stages:` with `think:` below it"
            self._report("stages", f"{shown_value(stages)} {message}")

    def _read_section(self, prefix: str, section: Any, body: Any) -> None:
        """Takes over the keys of one section of the file."""
        shown = f"{prefix}{section}"
        if section in SECTIONS and isinstance(body, dict):
            for name, value in body.items():
                key = f"{section}.{name}"
                if key not in fields():
                    self._report(f"{prefix}{key}", self._unknown(key))
                elif prefix and not is_stage_key(key):
                    message = f"holds for the whole run; set {key} outside of stages"
                    self._report(f"{prefix}{key}", message)
                else:
                    source = self._source(f"{prefix}{key}")
                    self.settings[prefix][key] = Setting(value, source, prefix)
        elif section in SECTIONS and body is not None:  # an empty section sets nothing
            message = f"must be a mapping of keys, such as {keys_of(section)[0]}"
            self._report(shown, f"{shown_value(body)} {message}")
        elif section in fields():
            parent, _, name = section.partition(".")
            self.misspelt.add(section)
            self._report(shown, f"unknown section; write `{parent}:` and `{name}:` below it")
        elif section not in SECTIONS:
            names = [*Config.model_fields, *fields()]
            self._report(shown, self._unknown(str(section), candidates=names, kind="section"))

    def _source(self, key: str) -> str:
        """Returns file and line of a key, or of the section that it stands in."""
        line = self.lines.get(key, self.lines.get(key.rpartition(".")[0]))
        return f"{self.file}:{line}" if line else self.file

    def _report(self, name: str, message: str, source: str | None = None) -> None:
        self.problems.append(f"{source or self._source(name)}: {shortened(name, 100)}: {message}")

    def _unknown(
        self, name: str, before: str = "", candidates: Iterable[str] = (), kind: str = "key"
    ) -> str:
        """Says which key replaces an unknown one, or which of the candidates was meant."""
        known = [*(candidates or fields())]
        renamed, foreign = RENAMED.get(name), FOREIGN.get(name.rpartition(".")[2])
        meant = renamed or (foreign := foreign if foreign in known else None)
        is_gone = name in REPLACED or name in DROPPED
        if not meant and not is_gone and len(self.problems) < MOST_SUGGESTIONS:
            meant = closest(name, [*known, *RENAMED], by_leaf=True)
        meant = RENAMED.get(meant, meant) if meant else None
        self.misspelt.update((keys_of(meant) or [meant]) if meant else [])
        if renamed:
            return f"renamed; write {before}{renamed}"
        if name in REPLACED:
            return f"is gone; write {REPLACED[name]}"
        if name in DROPPED:
            return f"is gone: {DROPPED[name][1]}; leave it out"
        if foreign:
            note = f" ({_UNLIKE[foreign]})" if foreign in _UNLIKE else ""
            return f"unknown {kind}; here it is {before}{foreign}{note}"
        if not meant:
            lists = "quietstar train --help lists all" if kind != "argument" else "leave it out"
            return f"unknown {kind}; {lists}"
        return f"unknown {kind}{did_you_mean(f'{before}{meant}')}"

    def read_overrides(self, arguments: Sequence[str]) -> None:
        """Takes over ``--key value``, ``--key=value`` and bare ``--flag``; the last one counts."""
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
                self._report(argument, f"belongs to no key; write {form}", COMMAND_LINE)
        _add_settings(text for name, text in flags if name.endswith("loss.objective"))
        texts: dict[str, str | None] = {}
        for name, text in flags:
            if problem := self._override(name, text):
                self.problems.append(f"{COMMAND_LINE}: {problem}")
            elif texts.setdefault(name, text) != text:
                self.warnings.append(
                    f"{COMMAND_LINE}: {name}: is given more than once; the last value counts"
                )
            texts[name] = text

    def read_given(self, given: Mapping[str, Any]) -> None:
        """Takes over values by key."""
        _add_settings(value for key, value in given.items() if key == "loss.objective")
        for key, value in given.items():
            if key in fields():
                self.settings[""][key] = Setting(value, PYTHON)
            else:
                self._report(key, self._unknown(key), PYTHON)

    def _override(self, name: str, text: str | None) -> str | None:
        """Takes over one flag, or says what is wrong with it."""
        prefix = next((p for p in self.settings if p and name.startswith(p)), "")
        rest = name.removeprefix(prefix)
        key, path = ".".join(rest.split(".")[:2]), rest.split(".")[2:]
        if prefix and key in fields() and not is_stage_key(key):
            return f"{name}: holds for the whole run; write --{key} VALUE"
        if len(path) > MOST_LEVELS:
            return f"--{shortened(name)}: has more than {MOST_LEVELS} dots; no mapping is as deep"
        if key not in fields() or (path and not (all(path) and "object" in key_types(key))):
            if prefix:
                stage_keys = [key for key in fields() if is_stage_key(key)]
                message = self._unknown(rest, f"--{prefix}", stage_keys)
            elif name.split(".")[0] == "stages":
                stages = ", ".join(p.split(".", 1)[1][:-1] for p in self.settings if p)
                message = f"names no stage (stages: {stages or 'none in this config'}); "
                message += "write --stages.NAME.KEY VALUE"
            elif name in SECTIONS:
                message = f"is a section; set one of its keys, such as --{keys_of(name)[0]}"
            else:
                message = self._unknown(name, "--", [*fields(), *_OPTIONS])
            return f"--{shortened(name, 100)}: {message}"
        if text is None:
            if "boolean" not in key_types(key):
                return f"{name}: has no value; write --{name} VALUE"
            text = "true"
        try:
            value = parse(text).data if path else _parse_text(key, text)
        except YamlProblem as error:
            return f"{name}: {shortened(repr(text))} is no valid YAML: {error}"
        if not text.strip() and (value is None or not text):
            null = ", or null" if "null" in key_types(key) else ""
            return f"{name}: has no value; write --{name} VALUE{null}"
        prefixes = [prefix]
        if path and not prefix:  # an entry of a mapping is one of those of the stages, too
            prefixes += [stage for stage, own in self.settings.items() if stage and key in own]
        for one in prefixes:
            before = self.settings[one].get(key) or self.settings[""].get(key)
            new = _with_entry(before.value if before else None, path, value) if path else value
            self.settings[one][key] = Setting(new, COMMAND_LINE, one)
        return None


def _add_settings(objectives: Iterable[Any]) -> None:
    """Makes the settings of objectives of the user's own known as keys."""
    for objective in objectives:
        if isinstance(objective, str) and ":" in objective:
            with suppress(UserError):  # a rule reports it with the others
                loss_class(objective)


def _parse_text(key: str, text: str) -> Any:
    """Reads the value of an override: YAML, except that text needs no quotes."""
    types = key_types(key)
    takes_text = messages.key_words(key) or "string" in types
    if not takes_text or messages.fits(text, types & {"integer", "number"}):
        return parse(text).data
    if "null" in types and text in ("null", "~"):
        return None
    quoted = parse(text).data if text[:1] in ("'", '"') else None
    return quoted if isinstance(quoted, str) else text


def _with_entry(mapping: Any, path: list[str], value: Any) -> dict[str, Any]:
    """Copies a nested mapping (what is none counts as empty) with one entry set."""
    mapping = mapping if isinstance(mapping, dict) else {}
    if len(path) > 1:
        value = _with_entry(mapping.get(path[0]), path[1:], value)
    return {**mapping, path[0]: value}


def _nested(settings: Settings) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {}
    for key, setting in settings.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = setting.value
    return tree


def _find_problems(settings: Settings, misspelt: set[str], file: str) -> list[str]:
    """Lists what is wrong with settings, and between them.

    pydantic looks at cross-field rules only when all fields are valid. So a second pass leaves the
    invalid fields out, and what it says about rules without such a field is reported as well.
    """
    problems: list[str] = []
    invalid: set[str] = set()
    while True:
        valid = {key: setting for key, setting in settings.items() if key not in invalid}
        try:
            Config.model_validate(_nested(valid))
            return problems
        except ValidationError as error:
            details = error.errors(include_url=False)
        between = details[0].get("ctx", {}).get("error")
        if isinstance(between, CrossFieldError):
            break
        for detail in details:
            key = ".".join(str(part) for part in detail["loc"][:2])
            is_mixed = messages.is_mixed(key)  # then pydantic reports an error for every type
            if key in invalid and is_mixed:
                continue
            invalid.add(key)
            parts = detail["loc"][:2] if is_mixed else detail["loc"]
            shown = ".".join(str(part) for part in parts if part != "[key]")
            where = f"{settings[key].source}: {settings[key].prefix}{shown}"
            problems.append(f"{where}: {messages.field_message(key, detail)}")
    for keys, message in between.problems:
        if (invalid | misspelt).isdisjoint(keys):
            # Blame the key from the command line, if there is one, else the one to change.
            given = [k for k in keys if k in settings and settings[k].source in GIVEN]
            key = (given or keys)[0]
            setting = settings.get(key, Setting(None, file))
            shown = f"{setting.prefix}{key}"
            problems.append(f"{setting.source}: {shown}: {message.removeprefix(f'{shown}: ')}")
    return problems


def _find_idle(merged: dict[str, Settings]) -> list[str]:
    """Lists settings that change nothing in any of the stages for which they were made."""
    reasons: dict[tuple[str, str], list[str | None]] = {}
    for settings in merged.values():
        idle = keys_without_effect(Config.model_validate(_nested(settings)))
        for key, setting in settings.items():
            reasons.setdefault((setting.prefix, key), []).append(idle.get(key))
    settings = {(one.prefix, key): one for part in merged.values() for key, one in part.items()}
    return [
        f"{setting.source}: {setting.prefix}{key}: {shown_value(setting.value)} has no effect"
        f" {reasons[prefix, key][0]}; leave it out"
        for (prefix, key), setting in settings.items()
        if all(reasons[prefix, key]) and setting.value != fields()[key].get("default")
    ]
