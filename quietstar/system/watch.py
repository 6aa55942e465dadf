"""Ranks of a launch watch each other: one that falls silent ends it, and one that fails is named.

A thread of every rank beats in the launch's store, whatever its main thread works on or waits for.
Rank 0 looks at the beats of all others, and these look at those of rank 0.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import threading
from contextlib import suppress
from datetime import timedelta
from typing import Any

BEAT_SECONDS, WORD_SECONDS = 2.0, 60
"""Time between two beats, and of silence before a word is said of it."""
TURN_SECONDS = 10
"""How long the ranks above 1 leave it to rank 1 to say that rank 0 is silent."""
LEFT = 2**40
"""Beats of a rank that has left, more than any other has."""
STORE = -1
logger = logging.getLogger(__name__)


class _Watch:
    def __init__(self, rank: int, count: int, seconds: int) -> None:
        from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

        self.rank, self.seconds, self.has_left = rank, seconds, threading.Event()
        # A connection of its own: a call that waits in another one would hold up the beats. A
        # launcher that restarts its ranks may keep the store.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=30)
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store: Any = PrefixStore(f"quietstar/{attempt}", store)
        self.store.set(f"who/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
        of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        keeper = "the launcher of the first machine" if of_launcher else "rank 0"
        self.names = {STORE: f"{keeper} (its store at {host}:{port})"}
        self.silence = dict.fromkeys([STORE, *(range(1, count) if rank == 0 else [0])], 0)
        works = (self._beat, self._judge)
        self.threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in self.threads:
            thread.start()
        atexit.register(self.stop)  # a thread inside torch would abort the interpreter's end

    def stop(self) -> None:
        self.has_left.set()
        for thread in self.threads:
            thread.join(5.0)

    def _beat(self) -> None:
        seen = dict.fromkeys(self.silence, 0)
        with suppress(RuntimeError):  # the store has gone, and its silence tells
            while not self.has_left.wait(BEAT_SECONDS):
                self.store.add(f"beats/{self.rank}", 1)
                self.silence[STORE] = 0
                for rank in (rank for rank in seen if rank != STORE):
                    beats = self.store.add(f"beats/{rank}", 0)  # reads them
                    if rank not in self.names and self.store.check([f"who/{rank}"]):
                        self.names[rank] = f"rank {rank} ({self.store.get(f'who/{rank}').decode()})"
                    if beats != seen[rank] or beats >= LEFT:
                        seen[rank], self.silence[rank] = beats, 0

    def _judge(self) -> None:
        is_told, limit = False, self.seconds + (TURN_SECONDS if self.rank > 1 else 0)
        while not self.has_left.wait(1.0):
            # By turns of this thread, not by a clock: nobody is silent in a launch that is
            # suspended as a whole.
            for rank in self.silence:
                self.silence[rank] += 1
            longest = max(self.silence.values())
            least = max(longest / 2, longest - 2 * BEAT_SECONDS)
            silent = [rank for rank, seconds in self.silence.items() if seconds > least]
            silent = [STORE] if STORE in silent else silent  # without it no beat is seen
            who = ", ".join(self.names.get(rank, f"rank {rank}") for rank in silent[:8])
            about = f"{who}, silent for {longest} s"
            if longest >= limit:
                remedy = "See what stopped it, and start again with --resume auto."
                logger.error("the launch ends: %s (training.rank_timeout). %s", about, remedy)
                os._exit(2)
            if longest >= min(WORD_SECONDS, self.seconds / 2) and not is_told and self.rank < 2:
                end = f"the launch ends after {self.seconds} s (training.rank_timeout)"
                logger.warning("waiting for %s; %s", about, end)
            is_told = longest >= min(WORD_SECONDS, self.seconds / 2)


_watch: _Watch | None = None


def watch(rank: int, count: int, seconds: int = 600) -> None:
    """End this process, with a line, once another rank has been silent for so long.

    A word is said of it after a minute. Only a process that is stopped, or whose machine is gone,
    is silent: one that works for hours is not. Call it when all ranks have met.
    """
    global _watch
    if _watch is not None:
        _watch.seconds = seconds
    elif count > 1 and "MASTER_ADDR" in os.environ:
        _watch = _Watch(rank, count, seconds)


def stop_watching() -> None:
    """Watch no more, and tell the others that this rank's silence is its end."""
    global _watch
    if _watch is not None:
        _watch.stop()
        with suppress(RuntimeError):
            _watch.store.add(f"beats/{_watch.rank}", LEFT)
        _watch = None


def first_failure(text: str | None = None) -> str | None:
    """Say which other rank has failed first, and why; None if none has.

    Args:
        text: Why this one fails, if that is no consequence: the others then hear of it.
    """
    if _watch is None:
        return None
    with suppress(RuntimeError):  # the store has gone
        store, told = _watch.store, f"{_watch.rank} "
        if text is not None:
            told = store.compare_set("failure", "", told + text).decode()
        elif store.check(["failure"]):
            told = store.get("failure").decode()
        rank, _, reason = told.partition(" ")
        if int(rank) != _watch.rank and reason != text:
            return f"rank {rank} has failed: {reason}"
    return None
