"""Peak resident memory of this process while something runs."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class PeakMemory:
    """Context manager; ``mb`` is the most resident memory above that at its start, in MiB.

    Sampled every 2 ms in a thread of its own.
    """

    mb: float

    def __enter__(self) -> PeakMemory:
        """Start to watch."""
        self._process = psutil.Process()
        self._before = self._peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop, and set ``mb``."""
        self._done.set()
        self._watcher.join()
        self.mb = (self._peak - self._before) / 2**20

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, self._process.memory_info().rss)
