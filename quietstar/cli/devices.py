"""Which device does the work."""

from __future__ import annotations

import argparse

import torch

from quietstar.errors import UserError


def find_device(wanted: str | None = None) -> str:
    """A device that is there; by default a GPU, or the CPU where there is none.

    Raises:
        UserError: The wanted one is not there, or cannot compute (``meta``).
    """
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=_named(wanted)).tolist()
    except NotImplementedError as problem:  # torch tells of all its backends
        raise _refusal(wanted, "torch cannot compute there") from problem
    except (RuntimeError, AssertionError) as problem:
        raise _refusal(wanted, str(problem).splitlines()[0]) from problem
    return wanted


def _named(wanted: str) -> torch.device:
    try:
        return torch.device(wanted)
    except RuntimeError as problem:
        raise _refusal(wanted, "torch knows none of this name") from problem


def _refusal(wanted: str, reason: str) -> UserError:
    return UserError(f"device '{wanted}' cannot be used ({reason}); try cpu")


def device_option(text: str) -> str:
    """The same for ``--device`` of a command line."""
    try:
        return find_device(text)
    except UserError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from problem
