"""Files that are whole or not there: checked before the work, written next to it, synced, renamed.

A run or an evaluation may take days. So a place that cannot be written is refused before it begins,
and what is written is complete under its own name, or that name still stands for what it stood for.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quietstar.errors import UserError, reason_of

PARTIAL = ".partial"
"""Ending of what is still being written. Others use it too: it alone makes nothing ours."""


def check_output(path: str | Path, label: str, *, force: bool = False) -> Path:
    """Refuse a file that cannot be written once the work is done; makes its folder.

    Args:
        path: The file; ``~`` is expanded.
        label: What named it, to begin the message with, such as ``--out``.
        force: Whether a regular file that exists may be replaced.

    Returns:
        The path, absolute and without links in its folder, so that equal files have equal paths.

    Raises:
        UserError: It is a folder, a symbolic link, a device, or a file that exists; or its folder
            cannot be written.
    """
    where = f"{label} ({path})"
    try:
        name = Path(path).expanduser()
        if not name.name or name.name in (".", "..") or str(path).endswith("/"):
            raise UserError(f"{where}: names no file. Give a name in a folder.")
        name.parent.mkdir(parents=True, exist_ok=True)
        # The folder's links are followed; a link in the place of the file is refused below.
        name = Path(os.path.realpath(name.parent)) / name.name
        kind = file_kind(name)
        if kind in ("folder", "link", "device"):
            what = {"folder": "is a folder", "link": "is a symbolic link, which is never replaced",
                    "device": "is no regular file"}[kind]  # fmt: skip
            raise UserError(f"{where}: {what}. Give the name of a new file.")
        if kind == "file" and not force:
            raise UserError(f"{where}: exists. Give another name, or --force to replace it.")
        if kind == "file" and not os.access(name, os.W_OK):
            raise PermissionError(13, "Permission denied")
        # Says more than the folder's permissions: quotas, read-only disks, names that are too long.
        with tempfile.NamedTemporaryFile(dir=name.parent, prefix=f".{name.name}.", suffix=PARTIAL):
            pass
    except (OSError, ValueError, RuntimeError) as problem:
        if isinstance(problem, UserError):
            raise
        raise UserError(
            f"{where}: cannot be written ({reason_of(problem)}). Give another place."
        ) from problem
    return name


def file_kind(path: Path) -> str:
    """Return ``none``, ``file``, ``folder``, ``link`` or ``device``, without following a link."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "none"
    for kind, is_kind in (("link", stat.S_ISLNK), ("file", stat.S_ISREG), ("folder", stat.S_ISDIR)):
        if is_kind(mode):
            return kind
    return "device"


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file as a whole: after a full disk or a kill the earlier one is still there.

    Raises:
        UserError: It cannot be written, or is a link or a device.
    """
    if file_kind(path) not in ("none", "file"):
        raise UserError(f"{path}: is no regular file and is not replaced. Remove it.")
    # A model's text may hold half of a surrogate pair, which UTF-8 cannot encode.
    data = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
    new = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(new, flags, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        sync_folder(path.parent)
    except BaseException as problem:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        if not isinstance(problem, OSError):
            raise
        raise UserError(
            f"{path}: cannot be written ({reason_of(problem)}). Free some space there, or give "
            "another place."
        ) from problem


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write data as JSON with `write_whole`; NaN and infinities, which JSON lacks, become null."""
    text = json.dumps(_finite(content), indent=indent, allow_nan=False, ensure_ascii=False)
    write_whole(path, text + "\n")


def append(path: Path, text: str) -> None:
    """Append to a file all of a text or, where that fails, nothing of it.

    Raises:
        OSError: It cannot be written; it ends as it did.
    """
    # A link in its place, made after the folder was checked, must not be followed.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o666), "ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        data = memoryview(text.encode("utf-8", "replace"))
        try:
            while data:
                data = data[file.write(data) :]
        except BaseException:
            file.truncate(size)
            raise


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    # An int has no NaN, and may be too large for a float.
    is_bad = isinstance(content, float) and content - content != 0
    return None if is_bad else content


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Make a folder that is whole or not there: yields one next to it, which gets its name last.

    A folder of that name is replaced, and deleted only when the new one is there. If the block
    fails, nothing of it stays. Its files get the permissions that the umask asks for: safetensors
    would keep them from everybody else.

    Raises:
        UserError: The name is taken by a file or a link.
    """
    kind = file_kind(path)
    if kind not in ("none", "folder"):
        raise UserError(f"{path}: is no folder and is not replaced. Remove it.")
    new = path.with_name(f"{path.name}{PARTIAL}")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(new)
    new.mkdir()
    try:
        yield new
        publish(new, path)
    except BaseException:
        remove(new)
        raise


def publish(new: Path, path: Path) -> None:
    """Sync a finished folder and give it its name, in the place of an older one of that name."""
    old = path.with_name(f"{path.name}.replaced")
    sync_tree(new)
    remove(old)
    if path.exists():  # a folder that is not empty cannot be replaced in one call
        os.replace(path, old)
    os.replace(new, path)
    sync_folder(path.parent)
    remove(old)


def sync_tree(folder: Path) -> None:
    """Give the files of a folder their permissions, and have it on the disk."""
    allowed = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            path.chmod(allowed)
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk; some file systems cannot, which is no error."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> str | None:
    """Delete a file, a link or a folder with all in it; return the reason where that fails."""
    try:
        if file_kind(path) == "folder":
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as problem:
        return reason_of(problem)
    return None
