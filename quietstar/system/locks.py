"""A lock on a folder or file that two processes must not write at once."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quietstar.errors import UserError, reason_of


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
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as problem:
        raise UserError(
            f"{what}: its lock {path} cannot be made ({reason_of(problem)}). {remedy}"
        ) from problem
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _describe(os.pread(descriptor, 4096, 0))
            raise UserError(f"{what}: is in use by {holder}. {remedy}") from None
        except OSError as problem:  # a file system without locks
            raise UserError(
                f"{what}: the file system of {path} has no locks ({reason_of(problem)}), so two "
                f"processes could destroy each other's files. {remedy}"
            ) from problem
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        yield
    finally:
        os.close(descriptor)  # which unlocks


def _describe(content: bytes) -> str:
    """Say who holds a lock, as far as its file tells."""
    try:
        holder = json.loads(content)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(holder["since"])))
        return f"process {int(holder['pid'])} on {holder['host']} since {since}"
    except (ValueError, KeyError, TypeError, OverflowError, OSError):
        return "another process"
