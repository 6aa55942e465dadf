"""Exact attention of text and blocks at once, without a mask.

Block tokens attend to the text (plain causal attention, on a flash kernel) and to their own block
(tiny causal attention, by small matrix products); the two are merged by log-sum-exp. Both backward
passes need only the gradient, the output and the log-sum-exp of the *whole* softmax, so they get
the merged ones and their gradients add up (as in ring attention).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar.attention.own_block import merge_own_, merge_own_backward_
from quietstar.native.own import find_own_native


class ParallelAttention(torch.autograd.Function):
    """Prefix part on a flash kernel, own part by small products or compiled loops, merged."""

    @staticmethod
    def forward(ctx, q, k, v, batch_size, num_thoughts, scale, kernel):  # noqa: D102
        rows = RowViews(batch_size, num_thoughts)
        out, lse = kernel.forward(q, rows.text(k), rows.text(v), True, scale)
        ctx.native = find_own_native(q, k, v)
        own = [rows.places(x) for x in (q, k, v, out, lse)]
        merge_own_(own[:3], own[3], own[4], scale, ctx.native)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rows, ctx.scale, ctx.kernel = rows, scale, kernel
        return out

    @staticmethod
    def backward(ctx, grad):  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        rows, scale = ctx.rows, ctx.scale
        wide = ctx.kernel.backward_dtype(grad.dtype)
        text = tuple(x.to(wide) for x in (q, rows.text(k), rows.text(v)))
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        wide_grad, wide_out = grad.to(wide), out.to(wide)
        dq, *grads = ctx.kernel.backward(wide_grad, text, wide_out, lse, True, scale)
        dk, dv = (x.to(grad.dtype) for x in grads)
        for total in (dk, dv):
            total[: rows.batch_size] = total.unflatten(0, (-1, rows.batch_size)).sum(0)
        own = [rows.places(x) for x in (grad, q, k, v, wide_out, lse, dq, dk, dv)]
        merge_own_backward_(own[0], own[1:4], own[4:6], own[6:], scale, ctx.native)
        return dq.to(grad.dtype), dk, dv, None, None, None, None


class RowViews:
    """The orders in which the rows (rows, H, S, ...) of a learn pass are read."""

    def __init__(self, batch_size: int, num_thoughts: int) -> None:
        self.batch_size = batch_size
        self.columns = batch_size * num_thoughts

    def text(self, x: Tensor) -> Tensor:
        """The text's keys for every row: (rows, Hkv, S, d), no copy for one text."""
        repeats = x.shape[0] // self.batch_size
        text = x[: self.batch_size]
        return text.unsqueeze(0).expand(repeats, *text.shape).reshape(x.shape)

    def places(self, x: Tensor) -> Tensor:
        """Block rows as (K * B, S, H, W, ...), a view: one block at each place."""
        grid = x[self.batch_size :].unflatten(0, (-1, self.columns))  # (W, K * B, H, S, ...)
        return grid.movedim((1, 3, 2, 0), (0, 1, 2, 3))
