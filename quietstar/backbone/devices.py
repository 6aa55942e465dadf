"""Which device does the work."""

from __future__ import annotations

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


def _refusal(name: str, reason: str) -> UserError:
    return UserError(f"device '{name}' cannot be used ({reason}); try cpu")
