"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_MOST = 2**31 - 1  # bytes


def keep_freed_memory() -> bool:
    """Let glibc keep large blocks that are freed, for the next ones; returns whether it does.

    By default it gives blocks of megabytes back at once, and gets them again page by page: on two
    cores 11 % of a training step (docs/performance.md). A ``MALLOC_`` variable in the environment
    is left to rule.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, _MOST))
