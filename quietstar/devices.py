"""Which device does the work."""

from __future__ import annotations

import argparse

import torch

from quietstar.errors import UserError


def find_device(wanted: str | None = None) -> str:
    """A device that is there; by default a GPU, or the CPU where there is none.

    Raises:
        UserError: The wanted one is not there, or holds no numbers (``meta``).
    """
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted).tolist()
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise UserError(f"device {wanted} is not there ({reason}); try cpu") from problem
    return wanted


def device_option(text: str) -> str:
    """The same for ``--device`` of a command line."""
    try:
        return find_device(text)
    except UserError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from problem
