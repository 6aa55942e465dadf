"""Bounds on programs that come with data: a chat template may loop for ever, or fill the memory."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

MORE_BYTES = 2**30
"""Memory that a limited block may take besides what is in use when it is entered."""


class TooLong(BaseException):
    """The time is over. No `Exception`: jinja catches those while it compiles, and goes on."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TooLong` or `MemoryError` in a block that takes more time, or `MORE_BYTES`.

    Outside the main thread, which alone may set handlers, nothing is limited; memory is limited on
    Linux alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise TooLong

    before, memory = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError, ValueError):  # no /proc elsewhere; a limit may be lower already
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MORE_BYTES, memory[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, memory)
