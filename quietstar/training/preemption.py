"""Stopping a run from outside: schedulers warn with SIGTERM or SIGUSR1 before they kill.

The step under way is finished, a checkpoint is saved, and the process ends with
`EXIT_PREEMPTED`. The file ``preempted`` in the run folder says the same to launch
scripts, since launchers replace the exit codes of their processes by their own.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTED_FILE = "preempted"
SIGNALS = ("SIGTERM", "SIGUSR1")


class StopRequest:
    """Name of the signal that asked this run to stop, None without one."""

    def __init__(self) -> None:
        self.signal: str | None = None


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Makes signals ask for a stop instead of killing the process, while it is entered."""
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may set handlers
        return
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
