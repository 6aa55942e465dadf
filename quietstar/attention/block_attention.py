"""Exact attention of thought blocks to a text that ran before and to themselves, with gradient.

The text part runs on a flash kernel (`Blocks.attend`). The part inside a block is thousands of tiny
causal problems: a flash kernel pays its set-up for each of them, batched matrix products do not
(measured in ``docs/performance.md``), and only W x W scores a block are ever made. Long blocks
(`PackedBlocks`) are few, and run on the flash kernel inside too. The two parts
are merged by log-sum-exp; both backward passes take the *merged* output and log-sum-exp, so their
gradients add up, as in ring attention.

Letters as in `quietstar.attention.layout`. Inside a block, queries are (N, H, Q, d) and keys and
values (N, Hkv, W, d) with one block for each of the N rows; Q is W (all tokens, causal) or 1 (the
newest token, which sees all W).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quietstar.attention.blocks import Blocks, PackedBlocks, Pair
from quietstar.attention.kernels import Kernel, at_least_float32


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, text: Pair, blocks: Blocks, scale: float, kernel: Kernel
) -> Tensor:
    """Attend from block tokens to their text and to their own block; differentiable everywhere.

    Args:
        q: Queries, (N, H, L, d).
        k: Keys, (N, Hkv, L, d).
        v: Values, (N, Hkv, L, d).
        text: Keys and values of the texts, (B, Hkv, S, d).
        blocks: Layout of the tokens.
        scale: Multiplier of the scores.
        kernel: Attention kernel for the text part.

    Returns:
        Output, (N, H, L, d).
    """
    return _BlockAttention.apply(q, k, v, *text, blocks, scale, kernel)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, text_k, text_v, blocks, scale, kernel):
        out, lse = blocks.attend(kernel, q, (text_k, text_v), scale)
        inner = tuple(_by_block(blocks, x, inner_dtype(x)) for x in (q, k, v))
        scores = inner_scores(inner[0], inner[1], scale)
        text_lse = _by_block(blocks, lse, lse.dtype)
        merged = torch.logaddexp(text_lse, scores.logsumexp(-1))
        # Kept for the backward pass: with W columns they are smaller than the queries.
        weights = scores.sub_(merged.unsqueeze(-1)).exp_()
        inner_out = inner_values(weights, inner[2])
        rescale = text_lse.sub_(merged).exp_()
        out_views, lse_views = blocks.block_views(out), blocks.block_views(lse)
        parts = (_by_token(blocks, x, lse_views) for x in (inner_out, rescale, merged))
        for view, lse_view, own, factor, total in zip(out_views, lse_views, *parts, strict=True):
            view.mul_(factor.unsqueeze(-1)).add_(own)
            lse_view.copy_(total)
        ctx.save_for_backward(q, k, v, text_k, text_v, out, lse, weights)
        ctx.blocks, ctx.scale, ctx.kernel = blocks, scale, kernel
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, text_k, text_v, out, lse, weights = ctx.saved_tensors
        blocks, scale, dtype = ctx.blocks, ctx.scale, grad.dtype
        wide = ctx.kernel.backward_dtype(dtype)
        wide_grad, wide_out = grad.to(wide), out.to(wide)
        dq, text_dk, text_dv = blocks.attend_backward(
            ctx.kernel, wide_grad, [x.to(wide) for x in (q, text_k, text_v)], wide_out, lse, scale
        )
        delta = torch.linalg.vecdot(*(at_least_float32(x) for x in (wide_out, wide_grad)))
        inner_q, inner_k, inner_v = (_by_block(blocks, x, inner_dtype(x)) for x in (q, k, v))
        inner_grads = inner_backward(
            _by_block(blocks, grad, inner_q.dtype, once=True),
            (inner_q, inner_k, inner_v),
            weights,
            _by_block(blocks, delta, delta.dtype, once=True),
            scale,
        )
        rows, _, tokens, _ = grad.shape
        dk, dv = (_empty_tokens(grad, (rows, x.shape[1], tokens, x.shape[3]))
                  for x in (k, v))  # fmt: skip
        views = blocks.block_views(dq)
        for view, part in zip(views, _by_token(blocks, inner_grads[0], views), strict=True):
            view.add_(part)
        for total, part in zip((dk, dv), inner_grads[1:], strict=True):
            views = blocks.block_views(total)
            for view, x in zip(views, _by_token(blocks, part, views, summed=True), strict=True):
                view.copy_(x)
        return dq.to(dtype), dk, dv, text_dk.to(dtype), text_dv.to(dtype), None, None, None


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, text: Pair, blocks: PackedBlocks, scale: float, kernel: Kernel
) -> Tensor:
    """`block_attention` of packed blocks, with the kernel for both parts."""
    return _PackedAttention.apply(q, k, v, *text, blocks, scale, kernel)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, text_k, text_v, blocks, scale, kernel):
        out, lse = blocks.attend(kernel, q, (text_k, text_v), scale)
        inner_out, inner_lse = torch.empty_like(out), torch.empty_like(lse)
        for bucket in blocks.buckets:
            parts = kernel.forward(*(bucket.gather(x) for x in (q, k, v)), True, scale)
            for whole, part in zip((inner_out, inner_lse), parts, strict=True):
                bucket.write(whole, part)
        merged = torch.logaddexp(lse, inner_lse)
        inner_out.mul_((inner_lse - merged).exp_().unsqueeze(-1).to(out.dtype))
        merge_(out, lse, inner_out, merged)
        ctx.save_for_backward(q, k, v, text_k, text_v, out, lse)
        ctx.blocks, ctx.scale, ctx.kernel = blocks, scale, kernel
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        blocks, scale, kernel, dtype = ctx.blocks, ctx.scale, ctx.kernel, grad.dtype
        *tensors, lse = ctx.saved_tensors
        wide = kernel.backward_dtype(dtype)
        grad, q, k, v, text_k, text_v, out = (x.to(wide) for x in (grad, *tensors))
        dq, text_dk, text_dv = blocks.attend_backward(
            kernel, grad, (q, text_k, text_v), out, lse, scale
        )
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for bucket in blocks.buckets:
            # A token that only pads has a gradient of zero, and nothing else sees it.
            qkv = (bucket.gather(q), bucket.gather(k), bucket.gather(v))
            rows = (bucket.gather(out), bucket.gather(lse).contiguous())
            grads = kernel.backward(bucket.gather_once(grad), qkv, *rows, True, scale)
            for total, part in zip((dq, dk, dv), grads, strict=True):
                bucket.add(total, part)
        return *(x.to(dtype) for x in (dq, dk, dv, text_dk, text_dv)), None, None, None


def step_attention(
    q: Tensor, past: tuple[Tensor, Tensor], out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """Complete what the newest token of every block saw of the text; may overwrite it.

    Args:
        q: Queries, (N, H, S, d).
        past: Keys and values of the blocks so far, in `inner_dtype`: (tokens, N, S, Hkv, d).
        out: Output towards the text, (N, H, S, d).
        lse: Log-sum-exp towards the text, (N, H, S).
        scale: Multiplier of the scores.

    Returns:
        Output under the softmax over text and block, (N, H, S, d).
    """
    by_place = out.transpose(1, 2)  # (N, S, H, d)
    keys, values = (x.movedim(0, 3).flatten(0, 1) for x in past)  # (N * S, Hkv, tokens, d)
    queries = q.transpose(1, 2).flatten(0, 1).unsqueeze(2)
    with torch.autocast(q.device.type, enabled=False):  # it would cast the keys every time
        scores = inner_scores(queries.to(keys.dtype), keys, scale)
        text = lse.transpose(1, 2).reshape(*scores.shape[:3], 1)
        weights = torch.cat([scores, text], dim=-1).softmax(-1)  # (N * S, H, 1, tokens + 1)
        inner = inner_values(weights[..., :-1], values).view(by_place.shape).to(out.dtype)
    fraction = weights[..., -1].view(*by_place.shape[:-1], 1).to(out.dtype)
    return torch.addcmul(inner, by_place, fraction).transpose(1, 2)


def merge_(out: Tensor, lse: Tensor, inner_out: Tensor, merged: Tensor) -> None:
    """Complete the text's part with the block's part, in place.

    With l = logaddexp(l1, l2): o = o1 exp(l1 - l) + sum_j exp(s_j - l) v_j.

    Args:
        out: Output of the text part, (..., d); becomes the merged output.
        lse: Its log-sum-exp, (...); becomes the merged one.
        inner_out: Values of the block under the merged softmax, (..., d).
        merged: Merged log-sum-exp, (...).
    """
    out.mul_((lse - merged).exp_().unsqueeze(-1).to(out.dtype)).add_(inner_out)
    lse.copy_(merged)


# --- Inside a block -------------------------------------------------------------------------------
def inner_dtype(x: Tensor) -> torch.dtype:
    """Choose the type of the products inside a block.

    The CPU's small products of half precisions are three times slower than those in float32.
    """
    return at_least_float32(x.new_empty(0)).dtype if x.device.type == "cpu" else x.dtype


def inner_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Compute scaled scores, (N, H, Q, W) in float32 or wider; -inf where a key is later."""
    scores = at_least_float32(_by_group(q, k).bmm(k.flatten(0, 1).mT)).mul_(scale)
    scores = scores.view(*q.shape[:3], k.shape[2])
    if q.shape[2] > 1:
        later = torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype, device=q.device)
        scores.add_(later.triu_(1))
    return scores


def inner_values(weights: Tensor, v: Tensor) -> Tensor:
    """Apply weights (N, H, Q, W) to the values: (N, H, Q, d)."""
    out = _by_group(weights.to(v.dtype), v).bmm(v.flatten(0, 1))
    return out.view(*weights.shape[:3], -1)


def inner_backward(
    grad: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    weights: Tensor,
    delta: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of queries, keys and values inside blocks.

    With p = exp(score - lse): dv = p^T do, ds = p (do v^T - delta), dq = scale ds k, and so on, as
    in every flash backward; p and ``delta`` are those of the whole softmax, text included.

    Args:
        grad: Gradient of the output, (N, H, W, d).
        qkv: Queries, keys and values.
        weights: p, (N, H, W, W).
        delta: Sum over d of output times its gradient, (N, H, W).
        scale: Multiplier of the scores.
    """
    q, k, v = qkv
    grad_by_group = _by_group(grad, v)
    grad_weights = at_least_float32(grad_by_group.bmm(v.flatten(0, 1).mT)).view(weights.shape)
    grad_scores = grad_weights.sub_(delta.unsqueeze(-1)).mul_(weights).mul_(scale)
    weights, grad_scores = _by_group(weights.to(q.dtype), k), _by_group(grad_scores.to(q.dtype), k)
    dq = grad_scores.bmm(k.flatten(0, 1)).view(q.shape)
    dk = grad_scores.mT.bmm(_by_group(q, k)).view(k.shape)
    dv = weights.mT.bmm(grad_by_group).view(v.shape)
    return dq, dk, dv


def _by_group(x: Tensor, keys: Tensor) -> Tensor:
    """(N, H, Q, .) as (N * Hkv, H / Hkv * Q, .): query heads that share keys, together."""
    return x.reshape(keys.shape[0] * keys.shape[1], -1, x.shape[-1])


def _by_block(blocks: Blocks, x: Tensor, dtype: torch.dtype, once: bool = False) -> Tensor:
    """(N, H, L, ...) with the blocks as batch, a copy: (blocks, H, W, ...).

    All thoughts of a position share its start tokens; with ``once`` (gradients) only the first one
    gets them, the others zeros.
    """
    start, rest = blocks.block_views(x)
    grid, first = rest.shape[:4], start.shape[4]  # (X, K, Y, H), M
    whole = torch.empty(*grid, first + rest.shape[4], *rest.shape[5:], dtype=dtype, device=x.device)
    if once:
        whole[:, 1:, :, :, :first].zero_()
        whole[:, :1, :, :, :first].copy_(start)
    else:
        whole[:, :, :, :, :first].copy_(start)
    whole[:, :, :, :, first:].copy_(rest)
    return whole.flatten(0, 2)


def _by_token(blocks: Blocks, x: Tensor, views: Pair, summed: bool = False) -> Pair:
    """(blocks, H, W, ...) in the order of `Blocks.block_views`, whose views are given.

    The start tokens are those of the first thought, or the sum over all of them.
    """
    x, first = x.unflatten(0, views[1].shape[:3]), views[0].shape[4]
    start = x[:, :, :, :, :first]
    return start.sum(1, keepdim=True) if summed else start[:, :1], x[:, :, :, :, first:]


def _empty_tokens(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Room for (N, H, L, d), stored as (N, L, H, d): the order that the layers around want."""
    rows, heads, tokens, size = shape
    return x.new_empty(rows, tokens, heads, size).transpose(1, 2)
