"""Exact attention of blocks to a text that ran before and to themselves, with gradient.

The text part is on a flash kernel, as `quietstar.attention.blocks` cuts it; the own part is that of
`quietstar.attention.own_block` (by compiled loops where there are any), merged by log-sum-exp.
Letters as in `quietstar.attention.blocks`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quietstar.attention.blocks import Blocks, Pair
from quietstar.attention.dense import ScoreRules, recomputed
from quietstar.attention.kernels import Kernel
from quietstar.attention.own_block import (
    add_own_,
    empty_tokens,
    own_backward,
    own_scores,
    own_values,
)
from quietstar.attention.precision import at_least_float32
from quietstar.native.own import find_own_native


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, text: Pair, blocks: Blocks, scale: float, kernel: Kernel
) -> Tensor:
    """Output (N, H, L, d) of block tokens, differentiable in all tensors.

    Args:
        q: Queries, (N, H, L, d).
        k: Keys, (N, Hkv, L, d).
        v: Values, (N, Hkv, L, d).
        text: Keys and values of the texts, (B, Hkv, S, d).
        blocks: Where the tokens lie.
        scale: Of the scores.
        kernel: Of the text part.
    """
    native = find_own_native(q, k, v)
    if native is None:
        return _BlockAttention.apply(q, k, v, *text, blocks, scale, kernel)
    return _NativeBlockAttention.apply(q, k, v, *text, blocks, scale, kernel, native)


class _NativeBlockAttention(torch.autograd.Function):
    """Own part by compiled loops, in place: nothing of it is kept but the log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v, text_k, text_v, blocks, scale, kernel, native):
        out, lse = blocks.attend(kernel, q, (text_k, text_v), scale)
        views = [blocks.own_views(x) for x in (q, k, v)]
        native.forward_(views, blocks.own_views(out), blocks.own_views(lse), scale)
        ctx.save_for_backward(q, k, v, text_k, text_v, out, lse)
        ctx.blocks, ctx.scale, ctx.kernel, ctx.native = blocks, scale, kernel, native
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, text_k, text_v, out, lse = ctx.saved_tensors
        blocks, scale, wide = ctx.blocks, ctx.scale, torch.float32
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        wide_out = out.to(wide)
        dq, text_dk, text_dv = blocks.attend_backward(
            ctx.kernel, grad.to(wide), [x.to(wide) for x in (q, text_k, text_v)], wide_out, lse,
            scale,
        )  # fmt: skip
        dk, dv = (empty_tokens(x, x.shape) for x in (k, v))
        views = [blocks.own_views(x) for x in (grad, q, k, v, wide_out, lse, dq, dk, dv)]
        ctx.native.backward_(views[0], views[1:4], views[4:6], views[6:], scale)
        dtype = grad.dtype
        grads = (dq.to(dtype), dk, dv, text_dk.to(dtype), text_dv.to(dtype))
        return *grads, None, None, None, None


class _BlockAttention(torch.autograd.Function):
    """Own part by batched products."""

    @staticmethod
    def forward(ctx, q, k, v, text_k, text_v, blocks, scale, kernel):
        out, lse = blocks.attend(kernel, q, (text_k, text_v), scale)
        own = tuple(_together(blocks, x) for x in (q, k, v))
        scores = own_scores(own[0], own[1], scale)
        own_lse = torch.logaddexp(_together(blocks, lse), scores.logsumexp(-1))
        # Kept for the backward pass: with W columns it is smaller than the queries.
        weights = scores.sub_(own_lse.unsqueeze(-1)).exp_()
        own_out = own_values(weights, own[2])
        outs, lses = blocks.own_views(out), blocks.own_views(lse)
        parts = (outs, lses, _apart(blocks, own_out, lses), _apart(blocks, own_lse, lses))
        for out_view, lse_view, own_part, merged in zip(*parts, strict=True):
            add_own_(out_view, lse_view, own_part, merged)
        ctx.save_for_backward(q, *own, text_k, text_v, out, lse, weights)
        ctx.blocks, ctx.scale, ctx.kernel = blocks, scale, kernel
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, own_q, own_k, own_v, text_k, text_v, out, lse, weights = ctx.saved_tensors
        blocks, scale = ctx.blocks, ctx.scale
        wide = ctx.kernel.backward_dtype(grad.dtype)
        wide_grad, wide_out = grad.to(wide), out.to(wide)
        dq, text_dk, text_dv = blocks.attend_backward(
            ctx.kernel, wide_grad, [x.to(wide) for x in (q, text_k, text_v)], wide_out, lse, scale
        )
        delta = (at_least_float32(wide_out) * at_least_float32(wide_grad)).sum(-1)  # (N, H, L)
        own_grads = own_backward(
            _together(blocks, grad, once=True),
            (own_q, own_k, own_v),
            weights,
            _together(blocks, delta, once=True),
            scale,
        )
        dtype = grad.dtype
        rows, _, tokens, _ = grad.shape
        dk, dv = (empty_tokens(x, (rows, x.shape[1], tokens, x.shape[3])) for x in (own_k, own_v))
        views = blocks.own_views(dq)
        for view, part in zip(views, _apart(blocks, own_grads[0], views), strict=True):
            view.add_(part)
        for total, own in ((dk, own_grads[1]), (dv, own_grads[2])):
            views = blocks.own_views(total)
            for view, part in zip(views, _apart(blocks, own, views, summed=True), strict=True):
                view.copy_(part)
        return dq.to(dtype), dk, dv, text_dk.to(dtype), text_dv.to(dtype), None, None, None


def _together(blocks: Blocks, x: Tensor, once: bool = False) -> Tensor:
    """(N, H, L, ...) with the blocks as batch: (blocks, H, W, ...).

    All thoughts of a position get its start token; with ``once`` the first one only, the others
    zeros.
    """
    start, rest = blocks.own_views(x)
    if once and rest.shape[1] > 1:
        others = start.new_zeros(()).expand(start.shape[0], rest.shape[1] - 1, *start.shape[2:])
        start = torch.cat([start, others], 1)
    else:
        start = start.expand(-1, rest.shape[1], *start.shape[2:])
    return torch.cat([start, rest], 4).flatten(0, 2)


def _apart(blocks: Blocks, own: Tensor, views: Pair, summed: bool = False) -> Pair:
    """(blocks, H, W, ...) in the order of `Blocks.own_views`, whose views are given.

    The start token is that of the first thought, or the sum over all.
    """
    x, k, y = views[1].shape[:3]
    own = own.unflatten(0, (x, k, y))
    start = own[:, :, :, :, :1]
    return start.sum(1, keepdim=True) if summed else start[:, :1], own[:, :, :, :, 1:]


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
