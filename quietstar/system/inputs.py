"""Files that are read: regular ones only, since to open a pipe or a device may wait for ever."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

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
