"""Exact attention with thoughts at chosen positions only.

The pass is one row of tokens (`ChosenLayout`). Block tokens see the text up
to their own position, which plain causal attention cannot express for a choice of positions: the
prefix part takes a mask, in pieces of neighbouring positions that need no key behind the last of
them. The own part and the merge are those of `quietstar.attention.own_block`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from quietstar.attention.dense import ScoreRules, recomputed
from quietstar.attention.kernels import Kernel
from quietstar.attention.layout import ChosenLayout
from quietstar.attention.own_block import empty_tokens, merge_own_, merge_own_backward_
from quietstar.native.own import find_own_native
from quietstar.sampling.positions import on_host

_MASK_ELEMENTS = 2**22
"""Entries of a piece's mask: 16 MiB in float32."""
_PIECE_POSITIONS, _PIECE_QUERIES = 64, 512
"""Most positions of a piece; and, where fewer keys are read for fewer, about its most queries."""


class PrefixAttention:
    """Attention of queries at chosen positions to the text up to there.

    Shapes: queries (B, H, P * R, d), R of them at every position; keys and values of the text
    (B, Hkv, S, d); log-sum-exp (B, H, P * R).

    Args:
        positions: Ascending in every text; those below zero count as 0.
        repeats: R.
        text_length: S.
    """

    def __init__(
        self, positions: Int[Tensor, "batch positions"], repeats: int, text_length: int
    ) -> None:
        self.positions, self.repeats = positions.clamp(min=0), repeats
        batch_size, count = positions.shape
        # Where the positions are on the host anyway, no key behind the last one is read.
        cuts_keys = on_host(positions)
        sizes = [_MASK_ELEMENTS // (batch_size * repeats * text_length), _PIECE_POSITIONS]
        size = max(1, min(*sizes, _PIECE_QUERIES // repeats if cuts_keys else _PIECE_POSITIONS))
        self.pieces = [slice(n, min(n + size, count)) for n in range(0, count, size)]
        self._keeps = batch_size * repeats * count * text_length <= _MASK_ELEMENTS
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}
        self.ends = [
            int(self.positions[:, p].max()) + 1 if cuts_keys else text_length for p in self.pieces
        ]

    def _masked(self, dtype: torch.dtype) -> Iterator[tuple[slice, int, Tensor]]:
        """Every piece: its queries, the end of its keys, and its mask (B, 1, queries, keys)."""
        for piece, end in zip(self.pieces, self.ends, strict=True):
            rows = slice(piece.start * self.repeats, piece.stop * self.repeats)
            yield rows, end, self._mask(piece, end, dtype)

    def _mask(self, piece: slice, end: int, dtype: torch.dtype) -> Tensor:
        """0 where a query sees a key, else -inf; kept for the other layers where all are small."""
        found = self._masks.get((piece.start, dtype))
        if found is None:
            key = torch.arange(end, device=self.positions.device)
            hidden = key > self.positions[:, piece, None]  # (B, P', end)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=key.device)
            mask = mask.masked_fill_(hidden, -torch.inf)
            found = mask.repeat_interleave(self.repeats, 1).unsqueeze(1)
            if self._keeps:
                self._masks[piece.start, dtype] = found
        return found

    def forward(
        self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output (B, H, P * R, d) and log-sum-exp."""
        parts = [
            kernel.forward(q[:, :, rows], k[:, :, :end], v[:, :, :end], False, scale, mask)
            for rows, end, mask in self._masked(q.dtype)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)

    def backward(
        self,
        kernel: Kernel,
        grad: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values; output and log-sum-exp may be merged ones."""
        q, k, v = qkv
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, end, mask in self._masked(q.dtype):
            piece = (q[:, :, rows], k[:, :, :end], v[:, :, :end])
            out_piece, lse_piece = out[:, :, rows], lse[:, :, rows]
            grads = kernel.backward(
                grad[:, :, rows], piece, out_piece, lse_piece, False, scale, mask
            )  # of the types of q, k and v, which are `Kernel.backward_dtype`
            dq[:, :, rows] = grads[0]
            dk[:, :, :end] += grads[1]
            dv[:, :, :end] += grads[2]
        return dq, dk, dv


class ChosenViews:
    """The orders in which the row (1, H, N, ...) of a learn pass is read, all of them views."""

    def __init__(self, layout: ChosenLayout) -> None:
        self.num_text = layout.num_text
        self.batch_size, self.block_length = layout.layout.batch_size, layout.layout.block_length

    def text(self, x: Tensor) -> Tensor:
        """(B, H, S, ...)."""
        return x[0, :, : self.num_text].unflatten(1, (self.batch_size, -1)).transpose(0, 1)

    def blocks(self, x: Tensor) -> Tensor:
        """(B, H, P * K * W, ...)."""
        return x[0, :, self.num_text :].unflatten(1, (self.batch_size, -1)).transpose(0, 1)

    def own(self, blocks: Tensor) -> Tensor:
        """From (B, H, P * K * W, ...) to one problem a block: (B, P * K, H, W, ...)."""
        return blocks.unflatten(2, (-1, self.block_length)).transpose(1, 2)


class ChosenAttention(torch.autograd.Function):
    """Text, prefix part and own part of a learn pass with chosen positions, with exact backward."""

    @staticmethod
    def forward(ctx, q, k, v, views, prefix, scale, kernel):  # noqa: D102
        text = (views.text(k), views.text(v))
        text_out, text_lse = kernel.forward(views.text(q), *text, True, scale)
        out, lse = prefix.forward(kernel, views.blocks(q), *text, scale)
        ctx.native = find_own_native(q, k, v)
        own = [views.own(x) for x in (*map(views.blocks, (q, k, v)), out, lse)]
        merge_own_(own[:3], own[3], own[4], scale, ctx.native)
        rows = empty_tokens(q, (*q.shape[:3], v.shape[-1]))
        views.text(rows).copy_(text_out)
        views.blocks(rows).copy_(out)
        ctx.save_for_backward(q, k, v, rows, text_lse, lse)
        ctx.views, ctx.prefix, ctx.scale, ctx.kernel = views, prefix, scale, kernel
        return rows

    @staticmethod
    def backward(ctx, grad):  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, rows, text_lse, lse = ctx.saved_tensors
        views, kernel, scale = ctx.views, ctx.kernel, ctx.scale
        wide = kernel.backward_dtype(grad.dtype)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        wide_grad, wide_q, wide_k, wide_v, rows = (x.to(wide) for x in (grad, q, k, v, rows))
        text, blocks = (
            tuple(view(x) for x in (wide_q, wide_k, wide_v)) for view in (views.text, views.blocks)
        )
        text_grads = kernel.backward(
            views.text(wide_grad), text, views.text(rows), text_lse, True, scale
        )
        results = (views.blocks(rows), views.blocks(wide_grad))
        prefix_grads = ctx.prefix.backward(
            kernel, results[1], (blocks[0], text[1], text[2]), results[0], lse, scale
        )
        dq, dk, dv = (empty_tokens(x, x.shape) for x in (wide_q, k, v))
        views.text(dq).copy_(text_grads[0])
        views.blocks(dq).copy_(prefix_grads[0])
        for total, part in zip((dk, dv), zip(text_grads[1:], prefix_grads[1:], strict=True),
                               strict=True):  # fmt: skip
            views.text(total).copy_(part[0] + part[1])
        own = [
            views.own(x)
            for x in (*map(views.blocks, (grad, q, k, v, rows)), lse,
                      *map(views.blocks, (dq, dk, dv)))
        ]  # fmt: skip
        merge_own_backward_(own[0], own[1:4], own[4:6], own[6:], scale, ctx.native)
        return dq.to(grad.dtype), dk, dv, None, None, None, None


def dense_chosen(
    q: Tensor, k: Tensor, v: Tensor, layout: ChosenLayout, rules: ScoreRules
) -> Tensor:
    """The same by explicit scores, for what the kernels cannot do: (1, H, N, .) each."""
    views = ChosenViews(layout)
    text = (views.text(k), views.text(v))
    own = [views.blocks(x).unflatten(2, (-1, layout.layout.block_length)) for x in (k, v)]
    own = [x.movedim(3, 0) for x in own]  # (W, B, Hkv, P * K, .)
    queries = views.blocks(q).unflatten(2, (-1, layout.layout.block_length)).unbind(3)
    positions = layout.positions.clamp(min=0).repeat_interleave(layout.layout.num_thoughts, 1)
    steps = []
    for index, query in enumerate(queries):
        seen = (own[0][: index + 1], own[1][: index + 1])
        steps.append(recomputed(query, text, seen, rules, index, positions))
    blocks = torch.stack(steps, 3)  # (B, H, P * K, W, .)
    text_out = recomputed(views.text(q), text, None, rules, -1)
    flat = [x.transpose(0, 1).flatten(1, -2) for x in (text_out, blocks)]  # (H, tokens, .)
    return torch.cat(flat, 1).unsqueeze(0)
