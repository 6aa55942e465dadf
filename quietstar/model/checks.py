"""Checks of numbers that are on a device: nobody waits for them, and nothing learns from a failure.

On the host a check raises at once. On a device it would have to wait, and torch's own assertions
there leave a process that cannot even save a checkpoint. So a failure is noted: `void_if_failed`
makes the loss NaN, and `raise_failed` says why where somebody waits anyway.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from quietstar.attention.layout import has_content, on_host
from quietstar.errors import UserError

_failed: dict[tuple[str, torch.device], Tensor] = {}
"""Whether a check has failed since the last look, by its message."""


def expect(ok: Bool[Tensor, ""], message: str) -> None:
    """Refuse what a user gave unless ``ok``: now if it is on the host, else with the loss.

    Raises:
        UserError: It is not, and the host can see that.
    """
    if on_host(ok):
        if not ok:
            raise UserError(message)
    elif has_content(ok):
        before = _failed.get((message, ok.device))
        _failed[message, ok.device] = ~ok if before is None else before | ~ok


def void_if_failed(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Make a loss NaN if a check of its device has failed."""
    failed = [x for (_, device), x in _failed.items() if device == loss.device]
    return loss.masked_fill(torch.stack(failed).any(), math.nan) if failed else loss


def raise_failed() -> None:
    """Raise the first failure since the last look; waits for the device if one was checked there.

    Raises:
        UserError: A check has failed.
    """
    noted = [(message, bool(x)) for (message, _), x in _failed.items()]
    _failed.clear()
    for message, has_failed in noted:
        if has_failed:
            raise UserError(message)


def forget() -> None:
    """Begin anew, where the loss has shown that nothing failed."""
    _failed.clear()
