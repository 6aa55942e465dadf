"""What lies in a checkpoint and that it is whole: names, sizes and checksums of its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

MANIFEST_FILE = "manifest.json"
_ALGORITHM = "sha256"
_BLOCK = 2**20


def write_manifest(folder: Path) -> None:
    """Write ``manifest.json``: size and SHA-256 of every file below ``folder``."""
    files = {name: _entry(folder / name) for name in _files(folder)}
    text = json.dumps({"algorithm": _ALGORITHM, "files": files}, indent=2) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file is as it was written."""
    path = folder / MANIFEST_FILE
    if not path.exists():
        return f"{MANIFEST_FILE} is missing"
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        wanted = {name: (entry["size"], entry[_ALGORITHM]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} cannot be read"
    for name, (size, digest) in wanted.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if _digest(file) != digest:
            return f"{name} is not what was written (its {_ALGORITHM} differs)"
    return None


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(name for name in names if name != MANIFEST_FILE)


def _entry(file: Path) -> dict[str, int | str]:
    return {"size": file.stat().st_size, _ALGORITHM: _digest(file)}


def _digest(file: Path) -> str:
    digest = hashlib.new(_ALGORITHM)
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
