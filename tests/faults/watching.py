"""Signals at a chosen moment of a run: inside a rollout, an evaluation, a save.

A thread of the process itself looks at the stack of its main thread, every half millisecond. It
changes nothing of what runs, and no clock has to be guessed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

PHASES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("export", "training/run.py", ("finish", "export")),
    ("save", "training/", ("save_checkpoint",)),
    ("evaluation", "training/evaluation.py", ("evaluate",)),
    ("rollout", "sampling/rollout.py", ()),
    ("learn", "training/loop.py", ("accumulate_gradients",)),
    ("setup", "training/build.py", ("set_up",)),
    ("generation", "generation/generate.py", ()),
    ("scoring", "evaluation/runner.py", ("_score", "_vote")),
    ("loading", "backbone/loading.py", ()),
)
"""Name of a phase, and the file of the package and the functions that are on the stack in it.

The first that fits counts: an evaluation has rollouts, too. Without functions, any of the file.
"""
NAMES = tuple(name for name, _, _ in PHASES)
ANY = "any"


def phase_of(frame: FrameType | None) -> str | None:
    """Return the phase that a stack is in."""
    stack: list[tuple[str, str]] = []
    while frame is not None:
        file = frame.f_code.co_filename
        if "quietstar" in file:
            stack.append((file.rpartition("quietstar/")[2], frame.f_code.co_name))
        frame = frame.f_back
    for name, file, functions in PHASES:
        if any(f.startswith(file) and (not functions or n in functions) for f, n in stack):
            return name
    return None


def strike(
    phase: str, number: int, marker: Path, *, after: float = 0.0, delay: float = 0.0,
    visit: int = 1, again: float | None = None,
) -> None:  # fmt: skip
    """Signal this process once it is in a phase.

    Args:
        phase: One of `NAMES`, or `ANY`.
        number: The signal.
        marker: File that tells when and where it was.
        after: Seconds from now before which nothing happens.
        delay: Seconds from the phase's beginning; if the phase is over by then, the next one
            is waited for.
        visit: Which of its beginnings.
        again: Seconds from the first signal to a second one; None: no second.
    """
    main = threading.main_thread().ident
    begun = time.monotonic()

    def now() -> str | None:
        return phase_of(sys._current_frames().get(main))

    def watch() -> None:
        time.sleep(after)
        visits, before = 0, None
        while True:
            found = now()
            visits += phase in (ANY, found) and found != before
            before = found
            if phase in (ANY, found) and visits >= visit:
                if delay:
                    time.sleep(delay)
                    found = now()
                if phase in (ANY, found):
                    break
            time.sleep(0.0005)
        where = {"phase": found, "at": time.monotonic(), "seconds": time.monotonic() - begun}
        marker.write_text(json.dumps(where))
        os.kill(os.getpid(), number)
        if again is not None:
            time.sleep(again)
            os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


def strike_by_environment() -> None:
    """Do what FAULTS_STRIKE says, in the first process of a launch."""
    text = os.environ.get("FAULTS_STRIKE")
    if text and os.environ.get("RANK", "0") == "0":
        settings = json.loads(text)
        number = signal.Signals[settings.pop("signal")]
        strike(settings.pop("phase"), number, Path(settings.pop("marker")), **settings)
