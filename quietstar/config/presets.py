"""The config files that come with the package."""

from pathlib import Path

from quietstar.config.messages import COMMAND_LINE, closest, did_you_mean
from quietstar.errors import ConfigError


def shipped_configs() -> dict[str, Path]:
    """Returns the shipped config files by name: ``tiny`` is ``configs/tiny.yaml``."""
    package = Path(__file__).resolve().parents[1]
    folder = package / "configs"  # of an installed wheel
    if not folder.is_dir() and (package.parent / "pyproject.toml").is_file():
        folder = package.parent / "configs"  # of a checkout
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}  # launchers' lie below


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
