"""Reading and writing the config: a YAML file, then dotted overrides of the command line.

`load_config` reports everything that is wrong at once, one line per problem:

    configs/x.yaml:4: thoughts.lenght: unknown key; did you mean thoughts.length?
    command line: thoughts.length: -1 must be greater than or equal to 1; ...
"""

from collections.abc import Sequence
from pathlib import Path

import yaml

from quietstar.config import Config
from quietstar.config.keys import FIELDS
from quietstar.config.presets import resolve_config_file
from quietstar.config.reader import Reader
from quietstar.config.validation import validate
from quietstar.config.yaml12 import Dumper
from quietstar.errors import ConfigError


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
    reader = Reader()
    shown = "defaults"
    try:
        if config_file is not None:
            path, shown = resolve_config_file(config_file)
            reader.read_file(path, shown)
    except ConfigError as error:  # nothing is known of the file: no key counts as not set
        reader.problems += error.problems
        reader.misspelt.update(FIELDS)
    reader.read_overrides(overrides)
    config, problems = validate(reader, shown)
    if reader.problems or problems or config is None:
        raise ConfigError([*reader.problems, *problems])
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Writes a config as YAML; `load_config` reads an equal one from it."""
    text = yaml.dump(
        config.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100
    )
    Path(path).write_text(text, encoding="utf-8")
