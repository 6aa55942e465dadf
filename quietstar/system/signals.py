"""Signals that ask a process to end: SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (schedulers).

They raise `Stopped` wherever the main thread is, as Ctrl-C does: in a rollout, in an evaluation,
while a model loads. Only what must not be left half done is entered with `held`: the change of the
weights, a save. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 0.5
"""A launcher hands on a signal that its whole process group got: that is no second request."""


class Stopped(KeyboardInterrupt):
    """A signal asked for an end. Libraries treat it as Ctrl-C, so none swallows it."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} asked for an end")
        self.signal = name


class _Requests:
    """What this process was asked, and how deep it is in blocks that wait."""

    name: str | None = None
    at = 0.0
    depth = 0
    is_raised = False


def requested() -> str | None:
    """Return the name of the signal that asked for an end; None if none did."""
    return _Requests.name


@contextmanager
def listening() -> Iterator[None]:
    """Have the signals raise `Stopped`, while entered; in another than the main thread nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    _Requests.name, _Requests.is_raised = None, False
    before = {number: signal.signal(number, _take) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def noted(active: bool = True) -> Iterator[None]:
    """Have the signals raise nothing while entered: for those who ask `requested`."""
    _Requests.depth += active
    try:
        yield
    finally:
        _Requests.depth -= active


@contextmanager
def held(active: bool = True) -> Iterator[None]:
    """Put the signals off until the block is left, and raise a new one then, unless it fails."""
    with noted(active):
        yield
    if active:
        _raise()


def _raise() -> None:
    """Raise the request once; what then saves the state must not be stopped by it again."""
    if _Requests.name is not None and _Requests.depth == 0 and not _Requests.is_raised:
        _Requests.is_raised = True
        raise Stopped(_Requests.name)


def _take(number: int, frame: FrameType | None) -> None:
    if _Requests.name is None:
        _Requests.name, _Requests.at = signal.Signals(number).name, time.monotonic()
        _raise()
    elif time.monotonic() - _Requests.at > SAME_REQUEST_SECONDS:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
