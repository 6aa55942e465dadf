"""Limits of programs that come with data: a template may loop for ever, or fill the memory."""

import ctypes
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

SECONDS = 10.0
"""Time that a limited block may take; a real template takes microseconds a message."""
MORE_BYTES = 2**30
"""Memory that it may take on top of what is in use when it is entered."""


class _TooLong(BaseException):
    """The time is over. No `Exception`: jinja catches those while it compiles, and goes on."""


@contextmanager
def limited() -> Iterator[None]:
    """Raise `TimeoutError` or `MemoryError` in a block that takes more than `SECONDS` or memory.

    Memory is limited in the main thread and on Linux alone: what other threads allocate meanwhile
    would count. Blocks do not nest.
    """
    is_main = threading.current_thread() is threading.main_thread()
    try:
        with _main_limits() if is_main else _thread_limit():
            yield
    except _TooLong:
        raise TimeoutError(f"it takes more than {SECONDS:g} seconds") from None


@contextmanager
def _main_limits() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _TooLong

    before, memory = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError, ValueError):  # no /proc elsewhere; a limit may be lower already
        descriptor = os.open("/proc/self/statm", os.O_RDONLY)  # for every record, so not by Path
        used = int(os.read(descriptor, 20).split()[0]) * resource.getpagesize()
        os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_AS, (used + MORE_BYTES, memory[1]))
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, memory)


@contextmanager
def _thread_limit() -> Iterator[None]:
    """Limit the time where no signal arrives; a single call into C is not interrupted."""
    ident, ending, has_ended = threading.get_ident(), threading.Lock(), threading.Event()

    def stop() -> None:
        with ending:
            if not has_ended.is_set():
                _throw(ident, _TooLong)

    timer = threading.Timer(SECONDS, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with ending:
            has_ended.set()
            _throw(ident, None)  # it may have been thrown, and not have arrived


def _throw(ident: int, kind: type[BaseException] | None) -> None:
    """Raise in another thread at its next step; None takes back what was not raised yet."""
    raised = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), raised)
