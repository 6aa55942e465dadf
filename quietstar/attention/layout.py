r"""Where every token of a parallel-thought pass lies.

Letters used in the whole engine: B batch, S text positions, K thoughts per position, T thought
tokens, A lookahead, W = T + A + 1 tokens of a block, D width, V vocabulary, H heads, d head size.

The model runs on *rows* of tokens: first the texts, then a *block* for every thought, against the
keys and values that the texts left (`quietstar.attention.blocks` says where blocks lie). Text token
i has position i; token w of a block after it has position i + 1 + w:

    index in the block   0      1 .. T    T+1   T+2 .. T+A
    token                start  thought   end   x_{i+1} .. x_{i+A-1}

A thought of L < T tokens ends early: its end token has index L + 1, the true tokens follow at once,
and T - L tokens pad the tail of the block, after all that is read. So positions stay consecutive,
and causal attention needs no mask for them.

A block token sees the text up to its own position i and its own block up to itself. For S = 3,
K = 1, and the first two block tokens (w0, w1), the allowed pairs are (rows: queries)

              text 0 1 2   w0 0 1 2   w1 0 1 2
    text 0         1 . .      . . .      . . .
    text 1         1 1 .      . . .      . . .
    text 2         1 1 1      . . .      . . .
    w0   0         1 . .      1 . .      . . .
    w0   1         1 1 .      . 1 .      . . .
    w0   2         1 1 1      . . 1      . . .
    w1   0         1 . .      1 . .      1 . .
    w1   1         1 1 .      . 1 .      . 1 .
    w1   2         1 1 1      . . 1      . . 1

Towards the text every row is plain causal attention; towards its own block a token of position i
only meets tokens of position i. Nothing else is ever computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Part = TypeVar("Part")

IGNORE_INDEX = -100
"""Label of a token that is no target (the convention of transformers)."""

NO_POSITION = -1
"""Pads the positions of texts with fewer thoughts than the longest in the batch."""

NO_TOKEN = -1
"""Pads the tokens of thoughts that end before the last place of their axis."""


def lookahead_targets(
    labels: Int[Tensor, "batch seq"],
    lookahead: int,
    positions: Int[Tensor, "batch positions"] | None = None,
) -> Int[Tensor, "lookahead batch positions"]:
    """Target x_{i+a} of every (chosen) position i and a = 1..A; IGNORE_INDEX where none is."""
    targets = torch.stack(
        [
            F.pad(labels[:, a:], (0, min(a, labels.shape[1])), value=IGNORE_INDEX)
            for a in range(1, lookahead + 1)
        ]
    )
    if positions is None:
        return targets
    return at_positions(targets, positions).where(positions != NO_POSITION, IGNORE_INDEX)


@dataclass(frozen=True)
class TextLookahead:
    """The text's own states (or figures) that predict what comes after some positions.

    x_{i+a} is predicted by the one at i + a - 1. Neighbouring positions share them.

    Attributes:
        rows: Those that are needed, (B, R, ...): R = P + A - 1 for P contiguous, else A * P in the
            order (a p). Zeros stand for those after the end of the text.
        lookahead: True tokens after each position, A.
        contiguous: Whether the positions are contiguous.
    """

    rows: Shaped[Tensor, "batch rows *rest"]
    lookahead: int
    contiguous: bool

    @property
    def num_positions(self) -> int:
        """P."""
        rows = self.rows.shape[1]
        return rows - self.lookahead + 1 if self.contiguous else rows // self.lookahead

    def gather(
        self, x: Shaped[Tensor, "batch rows *rest"]
    ) -> Shaped[Tensor, "lookahead batch positions *rest"]:
        """What was computed for the rows, for every target; a view."""
        if not self.contiguous:
            return x.unflatten(1, (self.lookahead, -1)).movedim(1, 0)
        return x.unfold(1, self.num_positions, 1).movedim(-1, 2).movedim(1, 0)

    def scatter_add(
        self, x: Shaped[Tensor, "lookahead batch positions *rest"]
    ) -> Shaped[Tensor, "batch rows *rest"]:
        """The transpose of `gather`: for every row, the sum over its targets."""
        if not self.contiguous:
            return x.movedim(0, 1).flatten(1, 2)
        total = x.new_zeros(x.shape[1], self.rows.shape[1], *x.shape[3:])
        for a, part in enumerate(x):
            total[:, a : a + self.num_positions] += part
        return total

    def part(self, texts: slice, places: slice) -> TextLookahead:
        """Of some texts and some of their positions."""
        rows = self.rows[texts]
        if self.contiguous:
            rows = rows[:, places.start : places.stop + self.lookahead - 1]
        else:
            rows = rows.unflatten(1, (self.lookahead, -1))[:, :, places].flatten(1, 2)
        return replace(self, rows=rows)


def text_lookahead(
    x: Shaped[Tensor, "batch seq *rest"],
    lookahead: int,
    positions: Int[Tensor, "batch positions"] | None,
    count: int | None = None,
) -> TextLookahead:
    """States (or figures) of a text that predict what comes after some of its positions.

    Args:
        x: States of all tokens.
        lookahead: True tokens after each position, A.
        positions: Positions that were chosen; None for the first ones.
        count: Number of the first ones; all of the text by default.
    """
    if positions is None:
        stop = (x.shape[1] if count is None else count) + lookahead - 1
        rows, missing = x[:, :stop], max(0, stop - x.shape[1])
        if missing:
            rows = F.pad(rows, [*[0, 0] * (x.ndim - 2), 0, missing])
        return TextLookahead(rows, lookahead, contiguous=True)
    steps = torch.arange(lookahead, device=positions.device)[:, None]
    ahead = (positions.clamp(min=0).unsqueeze(1) + steps).flatten(1)  # (B, A * P)
    inside = ahead < x.shape[1]
    texts = torch.arange(x.shape[0], device=positions.device)[:, None]
    rows = x[texts, ahead.clamp(max=x.shape[1] - 1)]
    rows = rows.where(inside.view(*inside.shape, *[1] * (x.ndim - 2)), 0.0)
    return TextLookahead(rows, lookahead, contiguous=False)


def lookahead_states(
    text_states: Float[Tensor, "batch seq *width"],
    lookahead: int,
    positions: Int[Tensor, "batch positions"] | None = None,
) -> Float[Tensor, "lookahead batch positions *width"]:
    """The text's own state (or figure) that predicts x_{i+a}: the one at i + a - 1."""
    ahead = text_lookahead(text_states, lookahead, positions)
    return ahead.gather(ahead.rows)


def shifted(positions: Int[Tensor, "batch positions"], by: int) -> Int[Tensor, "batch positions"]:
    """Positions moved by so many tokens; `NO_POSITION` stays."""
    return (positions + by).where(positions != NO_POSITION, NO_POSITION)


def at_positions(
    x: Shaped[Tensor, "*leading batch seq"], positions: Int[Tensor, "batch positions"]
) -> Shaped[Tensor, "*leading batch positions"]:
    """Entries of the last axis at every text's own positions; anything at `NO_POSITION`."""
    index = positions.clamp(min=0).expand(*x.shape[:-1], positions.shape[-1])
    return x.gather(-1, index)


def early_ends(
    thoughts: Int[Tensor, "length thoughts batch positions"],
) -> Int[Tensor, "thoughts batch positions"] | None:
    """Tokens of each thought; None where the host can see that all have the whole length."""
    lengths = (thoughts != NO_TOKEN).sum(0)
    return None if on_host(lengths) and bool((lengths == len(thoughts)).all()) else lengths


def on_host(x: Tensor) -> bool:
    """Whether its content can be read without waiting for a device."""
    return x.device.type == "cpu" and has_content(x)


def has_content(x: Tensor) -> bool:
    """Whether there is something to read: not where a run is only planned."""
    return x.device.type != "meta" and not isinstance(x, FakeTensor)


def to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Copy numbers of the host to a device, without waiting for what it does."""
    x = torch.tensor(numbers)
    if device.type == "cuda" and has_content(x):  # else large copies wait
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@dataclass(frozen=True)
class OnHost:
    """Positions and lengths of thoughts in the host's memory, where rows of blocks are laid out.

    Attributes:
        positions: As in `quietstar.sampling.thoughts.ThoughtBatch`; None for all.
        lengths: Tokens of each thought; None where all have the whole length.
    """

    positions: Int[np.ndarray, "batch positions"] | None
    lengths: Int[np.ndarray, "thoughts batch positions"] | None

    @classmethod
    def read(
        cls,
        positions: Int[Tensor, "batch positions"] | None,
        lengths: Int[Tensor, "thoughts batch positions"] | None,
        places: Int[np.ndarray, "batch positions"] | None = None,
    ) -> OnHost | None:
        """Read what is not known there as ``places``, in one transfer, which waits for a device.

        None where a run is only planned.
        """
        unknown = [x for x in (None if places is not None or positions is None else positions[None],
                               lengths) if x is not None]  # fmt: skip
        if not unknown:
            return cls(places, None)
        if not all(has_content(x) for x in unknown):
            return None
        rows = torch.cat(unknown).cpu().numpy()
        if places is None and positions is not None:
            places, rows = rows[0], rows[1:]
        return cls(places, None if lengths is None else rows)

    def part(self, texts: slice, places: slice) -> OnHost:
        """Of some texts and some of their positions."""
        positions, lengths = self.positions, self.lengths
        return OnHost(
            None if positions is None else positions[texts, places],
            None if lengths is None else lengths[:, texts, places],
        )


def worth_running(parts: Sequence[Part], x: Tensor) -> Sequence[Part]:
    """Return the parts of a loop to run: all, or the first and last where ``x`` is only planned.

    Those between need the memory of these two.
    """
    return parts if has_content(x) else [*parts[:1], *parts[1:][-1:]]
