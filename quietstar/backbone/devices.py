"""Which device does the work, and how its memory is asked for."""

from __future__ import annotations

import ctypes
import os
import sys

import torch
from accelerate.utils import get_max_memory

from quietstar.errors import UserError, reason_of


def find_device(name: str | None = None) -> str:
    """Return a device that can compute.

    Args:
        name: Device to use, as torch names it; None takes a GPU if there is one, else the CPU.

    Raises:
        UserError: torch does not know the device, or cannot compute on it (``meta``).
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except Exception:  # of many kinds: some devices want a package that is not there
        raise _refusal(name, "torch knows no device of this name") from None
    try:
        torch.empty(1, device=device).tolist()
    except NotImplementedError:  # its message lists every backend of torch
        raise _refusal(name, "torch cannot compute there") from None
    except Exception as problem:
        raise _refusal(name, reason_of(problem)) from None
    return name


_SHARE_OF_WEIGHTS = 0.8
"""What weights may take of free memory; the rest is for keys, values and activations."""


def free_memory(name: str | None = None) -> dict[int | str, int]:
    """Bytes that weights may take on a device, and in the memory of the machine (``cpu``).

    Args:
        name: As in `find_device`.
    """
    device = torch.device(find_device(name))
    place: int | str = device.type
    if device.type in ("cuda", "xpu"):
        current = torch.accelerator.current_device_index
        place = current() if device.index is None else device.index
    free = get_max_memory()
    return {key: int(free[key] * _SHARE_OF_WEIGHTS) for key in (place, "cpu") if key in free}


def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks for the next ones, and return True if it does.

    By default it gives blocks of megabytes back at once, and gets them again page by page: on two
    cores 11 % of a training step (docs/performance.md). A ``MALLOC_`` variable in the environment
    takes precedence.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def _refusal(name: str, reason: str) -> UserError:
    return UserError(f"device '{name}' cannot be used ({reason}); try cpu")
