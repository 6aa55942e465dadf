"""Settings made a config, or all that is wrong with them."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from quietstar.config.messages import field_message, is_mixed
from quietstar.config.reader import COMMAND_LINE, Reader, Setting
from quietstar.config.rules import CrossFieldProblem
from quietstar.config.schema import CROSS_FIELD_ERROR, Config


def _nested(settings: Mapping[str, Setting]) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {}
    for key, setting in settings.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = setting.value
    return tree


def validate(reader: Reader, file: str) -> tuple[Config | None, list[str]]:
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


def _in_stage(reader: Reader, stage: Mapping[str, Setting]) -> dict[str, Setting]:
    """What holds in a stage: its keys over those of the run; the command line over any file."""
    merged = {**reader.settings, **stage}
    for key, setting in reader.settings.items():
        if setting.source == COMMAND_LINE and merged[key].source != COMMAND_LINE:
            merged[key] = setting
    return merged


def _validate_settings(
    settings: Mapping[str, Setting], misspelt: set[str], file: str
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
            where = _where(keys, settings, file)
            shown = where.rpartition(": ")[2]
            problems.append(f"{where}: {message.removeprefix(f'{shown}: ')}")
    return config, problems


def _where(keys: Sequence[str], settings: Mapping[str, Setting], file: str) -> str:
    """Source and name of the key of a broken rule: one from the command line if there is one."""
    given = {key: settings[key] for key in keys if key in settings}
    key = next((k for k, setting in given.items() if setting.source == COMMAND_LINE), keys[0])
    setting = given.get(key, Setting(None, file))
    return f"{setting.source}: {setting.prefix}{key}"


def _try(
    settings: Mapping[str, Setting],
) -> tuple[Config | None, list[Any], list[CrossFieldProblem]]:
    try:
        return Config.model_validate(_nested(settings)), [], []
    except ValidationError as error:
        details = error.errors(include_url=False)
        if details[0]["type"] == CROSS_FIELD_ERROR:
            return None, [], details[0].get("ctx", {})["problems"]
        return None, details, []
