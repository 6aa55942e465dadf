"""Blocks of tokens behind some positions of texts that ran before, and their exact attention.

The texts' keys and values are given; a pass runs block tokens alone. Each sees the text up to its
own position and its own block up to itself. `NeighbourBlocks` (positions that lie side by side)
need no mask: all of their text but its end is seen by all of them, and the end is plain causal
attention. `ChosenBlocks` (any positions) take a mask towards the text. The own part is that of
`quietstar.engine.own_block`, merged as in `quietstar.engine.parallel_attention`.

Letters as in `quietstar.engine.layout`; N rows of L tokens are what the model is run on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from quietstar.engine.chosen import PrefixAttention
from quietstar.engine.dense import ScoreRules, recomputed
from quietstar.engine.kernels import Kernel
from quietstar.engine.own_block import own_backward, own_scores, own_values
from quietstar.engine.parallel_attention import add_own_
from quietstar.precision import at_least_float32

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


@runtime_checkable
class Blocks(Protocol):
    """Where the tokens of some blocks lie in the rows of a pass, and how they see the text."""

    masked: bool

    def position_ids(self, device: torch.device) -> Int[Tensor, "rows tokens"]:
        """Position of every token."""
        ...

    def arrange(
        self, x: Shaped[Tensor, "W K B P width"]
    ) -> Shaped[Tensor, "rows tokens width"]:
        """Block tokens as rows."""
        ...

    def restore(
        self, x: Shaped[Tensor, "rows tokens width"]
    ) -> Shaped[Tensor, "W K B P width"]:
        """Rows as block tokens."""
        ...

    def own_view(self, x: Tensor) -> Tensor:
        """(N, H, L, ...) with every block together: (..., H, W, ...), a view."""
        ...

    def attend(self, kernel: Kernel, q: Tensor, text: Pair, scale: float) -> Pair:
        """Towards the text: output (N, H, L, d) and log-sum-exp."""
        ...

    def attend_backward(
        self, kernel: Kernel, grad: Tensor, qkv: Sequence[Tensor], out: Tensor, lse: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of the queries, and of the text's keys and values."""
        ...

    def steps(self, x: Tensor) -> Shaped[Tensor, "W texts heads queries size"]:
        """(N, H, L, .) token by token of the blocks, each towards its own text."""
        ...

    def from_steps(self, x: Tensor) -> Tensor:
        """The inverse of `steps`."""
        ...

    def step_texts(self, x: Tensor) -> Tensor:
        """The text's keys or values for the queries of `steps`."""
        ...

    def step_positions(self, device: torch.device) -> Tensor:
        """Positions of the queries of `steps`, (texts, queries)."""
        ...


@dataclass(frozen=True)
class NeighbourBlocks:
    """Blocks at positions first .. first + count - 1 of every text; rows (b w k), columns p.

    Attributes:
        batch_size: B.
        num_thoughts: K.
        block_length: W.
        first: Of the positions; virtual tokens before the text count.
        count: P.
    """

    batch_size: int
    num_thoughts: int
    block_length: int
    first: int
    count: int
    masked = False

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.batch_size, self.block_length, self.num_thoughts

    def position_ids(self, device):  # noqa: D102  (see Blocks)
        place = self.first + 1 + torch.arange(self.count, device=device)
        index = torch.arange(self.block_length, device=device)[:, None, None]
        rows = (place + index).expand(self.batch_size, -1, self.num_thoughts, -1)
        return rows.flatten(0, 2)

    def arrange(self, x):  # noqa: D102
        return x.movedim(2, 0).flatten(0, 2)

    def restore(self, x):  # noqa: D102
        return x.unflatten(0, self._sizes).movedim(0, 2)

    def own_view(self, x):  # noqa: D102
        return x.unflatten(0, self._sizes).movedim((0, 2, 4, 3, 1), (0, 1, 2, 3, 4))

    def attend(self, kernel, q, text, scale):  # noqa: D102
        out, lse = kernel.forward(q, *(self._near(x) for x in text), True, scale)
        if self.first:
            far = [x[:, :, : self.first] for x in text]
            far_out, far_lse = kernel.forward(self._by_text(q), *far, False, scale)
            far_out, far_lse = self._by_row(far_out), self._by_row(far_lse)
            merged = torch.logaddexp(lse, far_lse)
            out.mul_((lse - merged).exp_().unsqueeze(-1).to(out.dtype))
            out.addcmul_(far_out, (far_lse - merged).exp_().unsqueeze(-1).to(out.dtype))
            lse = merged
        return out, lse

    def attend_backward(self, kernel, grad, qkv, out, lse, scale):  # noqa: D102
        q, k, v = qkv
        near = (q, self._near(k), self._near(v))
        dq, dk, dv = kernel.backward(grad, near, out, lse, True, scale)
        dk, dv = (x.unflatten(0, (self.batch_size, -1)).sum(1) for x in (dk, dv))
        if not self.first:
            return dq, dk, dv
        far = (self._by_text(q), k[:, :, : self.first], v[:, :, : self.first])
        rows = (self._by_text(out), self._by_text(lse).contiguous())
        far_dq, far_dk, far_dv = kernel.backward(self._by_text(grad), far, *rows, False, scale)
        dq = dq.add_(self._by_row(far_dq))
        return dq, torch.cat([far_dk, dk], 2), torch.cat([far_dv, dv], 2)

    def _near(self, x: Tensor) -> Tensor:
        """The end of the text, from the first position on, for every row."""
        rows = self.block_length * self.num_thoughts
        near = x[:, :, self.first : self.first + self.count].unsqueeze(1)
        return near.expand(-1, rows, -1, -1, -1).reshape(-1, *near.shape[2:])

    def _by_text(self, x: Tensor) -> Tensor:
        """(N, H, P, ...) as (B, H, W * K * P, ...): all queries of a text in one line."""
        lines = x.transpose(1, 2).unflatten(0, (self.batch_size, -1)).flatten(1, 2)
        return lines.transpose(1, 2)

    def _by_row(self, x: Tensor) -> Tensor:
        """The inverse of `_by_text`."""
        rows = x.transpose(1, 2).unflatten(1, (-1, self.count)).flatten(0, 1)
        return rows.transpose(1, 2)

    def steps(self, x):  # noqa: D102
        return x.unflatten(0, self._sizes).movedim(1, 0).flatten(1, 2)

    def from_steps(self, x):  # noqa: D102
        return x.unflatten(1, (self.batch_size, self.num_thoughts)).movedim(0, 1).flatten(0, 2)

    def step_texts(self, x):  # noqa: D102
        return x.repeat_interleave(self.num_thoughts, 0)

    def step_positions(self, device):  # noqa: D102
        places = self.first + torch.arange(self.count, device=device)
        return places.expand(self.batch_size * self.num_thoughts, -1)


class ChosenBlocks:
    """Blocks at chosen positions; one row in the order (b p k w).

    Args:
        positions: (B, P), ascending; virtual tokens before the text count. Anything below zero
            fills up texts with fewer.
        num_thoughts: K.
        block_length: W.
        text_length: S, virtual tokens included.
    """

    masked = True

    def __init__(
        self,
        positions: Int[Tensor, "batch positions"],
        num_thoughts: int,
        block_length: int,
        text_length: int,
    ) -> None:
        self.positions = positions.clamp(min=0)
        self.num_thoughts, self.block_length = num_thoughts, block_length
        self.text_length = text_length

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        return (*self.positions.shape, self.num_thoughts, self.block_length)  # type: ignore

    @cached_property
    def _prefix(self) -> PrefixAttention:
        repeats = self.num_thoughts * self.block_length
        return PrefixAttention(self.positions, repeats, self.text_length)

    def position_ids(self, device):  # noqa: D102  (see Blocks)
        offset = 1 + torch.arange(self.block_length, device=device)
        block = self.positions[:, :, None, None] + offset
        return block.expand(self._sizes).reshape(1, -1)

    def arrange(self, x):  # noqa: D102
        return x.permute(2, 3, 1, 0, 4).flatten(0, 3).unsqueeze(0)

    def restore(self, x):  # noqa: D102
        return x[0].unflatten(0, self._sizes).permute(3, 2, 0, 1, 4)

    def own_view(self, x):  # noqa: D102
        return x[0].unflatten(1, (-1, self.block_length)).movedim(0, 1)

    def attend(self, kernel, q, text, scale):  # noqa: D102
        out, lse = self._prefix.forward(kernel, self._by_text(q), *text, scale)
        return self._as_row(out), self._as_row(lse)

    def attend_backward(self, kernel, grad, qkv, out, lse, scale):  # noqa: D102
        q, k, v = qkv
        q, grad, out, lse = (self._by_text(x) for x in (q, grad, out, lse))
        dq, dk, dv = self._prefix.backward(kernel, grad, (q, k, v), out, lse.contiguous(), scale)
        return self._as_row(dq), dk, dv

    def _by_text(self, x: Tensor) -> Tensor:
        """(1, H, L, ...) as (B, H, P * K * W, ...)."""
        return x[0].unflatten(1, (self.positions.shape[0], -1)).transpose(0, 1)

    def _as_row(self, x: Tensor) -> Tensor:
        """The inverse of `_by_text`."""
        return x.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2)

    def steps(self, x):  # noqa: D102
        by_text = x[0].unflatten(1, (self.positions.shape[0], -1, self.block_length))
        return by_text.permute(3, 1, 0, 2, 4)  # (W, B, H, P * K, .)

    def from_steps(self, x):  # noqa: D102
        return x.permute(2, 1, 3, 0, 4).flatten(1, 3).unsqueeze(0)

    def step_texts(self, x):  # noqa: D102
        return x

    def step_positions(self, device):  # noqa: D102
        return self.positions.repeat_interleave(self.num_thoughts, 1)


class BlockAttention(torch.autograd.Function):
    """Text part on a flash kernel and own part by small products, merged, with exact backward."""

    @staticmethod
    def forward(ctx, q, k, v, text_k, text_v, blocks, scale, kernel):  # noqa: D102
        out, lse = blocks.attend(kernel, q, (text_k, text_v), scale)
        own_q, own_k, own_v = (_together(blocks, x) for x in (q, k, v))
        scores = own_scores(own_q, own_k, scale)
        merged = torch.logaddexp(_together(blocks, lse), scores.logsumexp(-1))
        own_out = own_values(scores.sub_(merged.unsqueeze(-1)).exp_(), own_v)
        view = blocks.own_view(lse)
        own_out = own_out.view(*view.shape, -1)
        add_own_(blocks.own_view(out), view, own_out, merged.view(view.shape))
        ctx.save_for_backward(q, k, v, text_k, text_v, out, lse)
        ctx.blocks, ctx.scale, ctx.kernel = blocks, scale, kernel
        return out

    @staticmethod
    def backward(ctx, grad):  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, text_k, text_v, out, lse = ctx.saved_tensors
        blocks, scale = ctx.blocks, ctx.scale
        dq, text_dk, text_dv = blocks.attend_backward(
            ctx.kernel, grad, (q, text_k, text_v), out, lse, scale
        )
        views = (blocks.own_view(x) for x in (out, grad))
        delta = torch.linalg.vecdot(*(at_least_float32(x) for x in views))  # (..., H, W)
        own_grads = own_backward(
            _together(blocks, grad),
            tuple(_together(blocks, x) for x in (q, k, v)),
            _together(blocks, lse),
            delta.flatten(0, -3),
            scale,
        )
        dk, dv = _rows_like(k), _rows_like(v)
        view = blocks.own_view(dq)
        view.add_(own_grads[0].view(view.shape))
        for total, own in ((dk, own_grads[1]), (dv, own_grads[2])):
            view = blocks.own_view(total)
            view.copy_(own.view(view.shape))
        return dq, dk, dv, text_dk, text_dv, None, None, None


def _together(blocks: Blocks, x: Tensor) -> Tensor:
    """(N, H, L, ...) with the blocks as batch: (blocks, H, W, ...)."""
    view = blocks.own_view(x)
    tail = x.ndim - 1  # H, W and what follows
    return view.reshape(-1, *view.shape[view.ndim - tail :])


def _rows_like(x: Tensor) -> Tensor:
    """(N, H, L, d), stored as (N, L, H, d), the order that the layers around want."""
    rows, heads, tokens, size = x.shape
    return x.new_empty(rows, tokens, heads, size).transpose(1, 2)


def dense_block_attention(
    q: Tensor, k: Tensor, v: Tensor, text: Pair, blocks: Blocks, rules: ScoreRules
) -> Tensor:
    """The same by explicit scores, for what the kernels cannot do: (N, H, L, .) each."""
    queries, keys, values = (blocks.steps(x) for x in (q, k, v))
    text = (blocks.step_texts(text[0]), blocks.step_texts(text[1]))
    positions = blocks.step_positions(q.device)
    out = []
    for index, query in enumerate(queries):
        own = (keys[: index + 1], values[: index + 1])
        arguments: tuple[Any, ...] = (query, text, own, rules, index, positions)
        out.append(recomputed(*arguments))
    return blocks.from_steps(torch.stack(out))
