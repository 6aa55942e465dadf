"""Which device does the work."""

from __future__ import annotations

import torch

from quietstar.errors import UserError


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
    except (RuntimeError, ValueError):
        raise _refusal(name, "torch knows no device of this name") from None
    try:
        torch.empty(1, device=device).tolist()
    except NotImplementedError:  # its message lists every backend of torch
        raise _refusal(name, "torch cannot compute there") from None
    except (RuntimeError, AssertionError) as problem:
        raise _refusal(name, str(problem).splitlines()[0]) from None
    return name


def _refusal(name: str, reason: str) -> UserError:
    return UserError(f"device '{name}' cannot be used ({reason}); try cpu")
