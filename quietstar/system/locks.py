"""A lock on a folder or file that two processes must not write at once."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quietstar.errors import UserError, reason_of

SECONDS_TO_SIGN = 2.0
"""Time that a process which has taken a lock gets to write its name into the file."""


@contextmanager
def locked(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Hold the lock ``path`` while entered, or say who holds it.

    The kernel gives up the lock of a process that dies, however it dies, so a lock is never stale:
    the file itself stays and means nothing. Who holds it is written into it.

    Args:
        path: Lock file; made if need be. Never a file with other content.
        what: What is locked, to begin the message with.
        remedy: What to do while it is held.

    Raises:
        UserError: Another process holds it, or it cannot be made.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = -1
    try:
        while descriptor < 0:
            descriptor = os.open(path, flags, 0o666)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError("it is no regular file")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    break
            os.close(descriptor)  # its last holder deleted it in the meantime
            descriptor = -1
    except BlockingIOError:
        holder = _read_holder(descriptor) or "another process"
        os.close(descriptor)
        raise UserError(f"{what}: is in use by {holder}. {remedy}") from None
    except OSError as problem:  # a file system without locks, among others
        if descriptor >= 0:
            os.close(descriptor)
        raise UserError(
            f"{what}: cannot be locked ({path}: {reason_of(problem)}), so two processes could "
            "destroy each other's files. Give another place."
        ) from problem
    try:
        before = os.pread(descriptor, 4096, 0)
        if before and _describe(before) is None:
            raise UserError(f"{what}: {path} is no lock of quietstar. Move it away.")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        with suppress(OSError):  # a full disk: who holds it is then not known
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        try:
            yield
        finally:
            with suppress(OSError):  # or the next holder could be taken for this one
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)  # which unlocks


def _read_holder(descriptor: int) -> str | None:
    """Say who holds a lock, as `_describe`; one that was just taken names its holder soon."""
    deadline = time.monotonic() + SECONDS_TO_SIGN
    while (holder := _describe(os.pread(descriptor, 4096, 0))) is None:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return holder


def _describe(content: bytes) -> str | None:
    """Say who holds a lock, as far as its file tells; None if it is something else."""
    try:
        holder = json.loads(content)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(holder["since"])))
        return f"process {int(holder['pid'])} on {holder['host']} since {since}"
    except (ValueError, KeyError, TypeError, OverflowError, OSError):
        return None
