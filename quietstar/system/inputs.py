"""What is read: regular files only, since to open a pipe may wait for ever, and plain JSON."""

import errno
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from quietstar.errors import UserError

NOT_REGULAR = "it is a pipe, a socket or a device, and no regular file"


def open_input(path: str | Path) -> BinaryIO:
    """Open a regular file to read its bytes, without waiting for anything.

    Raises:
        OSError: It is something else, or cannot be opened; `reason_of` says what is wrong.
    """
    _check_regular(os.stat(path), path)
    # Should a pipe have taken its place meanwhile, the call returns at once.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        _check_regular(os.fstat(descriptor), path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(status: os.stat_result, path: str | Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))


def check_folder(folder: str | Path) -> None:
    """Refuse a folder in whose files, or those of its subfolders, a library could wait for ever.

    Raises:
        UserError: One of them is a pipe, a socket or a device; or it is the folder of a run.
    """
    place = Path(folder)
    if (place / "config.yaml").exists() and (place / "final").is_dir():
        raise UserError(f"{place}: is the folder of a run. Give its model, {place / 'final'}.")
    for path in (*place.glob("*"), *place.glob("*/*")) if os.path.isdir(place) else ():
        with suppress(OSError):  # a link that leads nowhere, or a folder that is closed to us
            if not (stat.S_ISREG(mode := path.stat().st_mode) or stat.S_ISDIR(mode)):
                raise UserError(f"{path}: cannot be read ({NOT_REGULAR}). Remove or replace it.")


def parse_json(text: str, numbers_only: bool = True) -> Any:
    """Parse JSON in which every name of an object stands once; which of two would count?

    Raises:
        ValueError: It is something else, or has NaN or an infinity where ``numbers_only``.
        RecursionError: It is nested too deeply.
    """
    refuse = _refuse_constant if numbers_only else None
    return json.loads(text, object_pairs_hook=_unique, parse_constant=refuse)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the name {name[:60]!r} stands twice in an object")
    return made


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
