"""The config files that come with the package."""

from pathlib import Path

from quietstar.config.keys import closest, did_you_mean
from quietstar.config.reader import COMMAND_LINE
from quietstar.errors import ConfigError


def _shipped_folder() -> Path | None:
    package = Path(__file__).resolve().parents[1]
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
