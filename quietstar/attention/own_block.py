"""Attention of block tokens to their own block: thousands of tiny causal problems.

A flash kernel pays its set-up per problem; batched matrix products do not (measured in
`docs/performance.md`). Only W x W scores a block are ever made. The softmax is
that of the whole row, text included: forward and backward take the merged log-sum-exp.

Shapes: queries (N, H, Q, d), keys and values (N, Hkv, W, d) with N = K * B * S blocks; Q is W (all
tokens of a block, causal) or 1 (its newest token, which sees all W).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quietstar.attention.precision import at_least_float32
from quietstar.native.own import OwnNative, find_own_native, split_start


def own_dtype(x: Tensor) -> torch.dtype:
    """In which the rollout keeps a block's keys and values.

    The CPU's small products of half precisions are three times slower than those in float32.
    """
    return at_least_float32(x.new_empty(0)).dtype if x.device.type == "cpu" else x.dtype


def own_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled scores in float32 at least, (N, H, Q, W), -inf where a key is later than the query."""
    scores = _by_group(q, k).bmm(_flat(k).mT)
    scores = at_least_float32(scores).mul_(scale).view(*q.shape[:3], k.shape[2])
    if q.shape[2] > 1:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(later, -torch.inf)
    return scores


def own_values(weights: Tensor, v: Tensor) -> Tensor:
    """Weights (N, H, Q, W) applied to the values: (N, H, Q, d)."""
    n, heads, queries, _ = weights.shape
    return _by_group(weights.to(v.dtype), v).bmm(_flat(v)).view(n, heads, queries, -1)


def own_backward(
    grad: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    weights: Tensor,
    delta: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values.

    With p = exp(score - lse): dv = p^T do, ds = p (do v^T - delta), dq = scale ds k, and so on, as
    in every flash backward; p and ``delta`` are those of the whole row.

    Args:
        grad: Of the output, (N, H, Q, d).
        qkv: Queries, keys and values.
        weights: p, (N, H, Q, W).
        delta: Sum over d of output times its gradient, (N, H, Q).
        scale: Of the scores.
    """
    q, k, v = qkv
    grad_weights = _by_group(grad, v).bmm(_flat(v).mT).view_as(weights)
    grad_scores = (at_least_float32(grad_weights) - delta.unsqueeze(-1)).mul_(weights).mul_(scale)
    weights, grad_scores = _by_group(weights.to(q.dtype), k), _by_group(grad_scores.to(q.dtype), k)
    dq = grad_scores.bmm(_flat(k)).view(q.shape)
    dk = grad_scores.mT.bmm(_by_group(q, k)).view(k.shape)
    dv = weights.mT.bmm(_by_group(grad, v)).view(v.shape)
    return dq, dk, dv


def add_own_(out: Tensor, lse: Tensor, own_out: Tensor, merged: Tensor) -> None:
    """Complete a prefix part with its own part, in place.

    With l = logaddexp(l1, l2): o = o1 exp(l1 - l) + sum_j exp(s_j - l) v_j.

    Args:
        out: Output of the prefix part, (..., d); becomes the merged output.
        lse: Its log-sum-exp, (...); becomes the merged one.
        own_out: Values of the own part under the merged softmax, (..., d).
        merged: Merged log-sum-exp, (...).
    """
    out.mul_((lse - merged).exp_().unsqueeze(-1).to(out.dtype)).add_(own_out)
    lse.copy_(merged)


# --- All tokens of blocks, at places (X, Y, H, W, ...): one block at each ------------------------


def merge_own_(
    qkv: Sequence[Tensor], out: Tensor, lse: Tensor, scale: float, native: OwnNative | None
) -> None:
    """Complete what blocks saw of the text with what they see of themselves, in place.

    Args:
        qkv: Queries, keys and values at their places.
        out: Output towards the text, at its places; becomes that of the whole row.
        lse: Its log-sum-exp; becomes that of the whole row.
        scale: Of the scores.
        native: Compiled loops, if they serve.
    """
    if native is not None:
        views = [split_start(x) for x in (*qkv, out, lse)]
        return native.forward_(views[:3], views[3], views[4], scale)
    q, k, v = (x.flatten(0, 1) for x in qkv)
    scores = own_scores(q, k, scale)
    merged = torch.logaddexp(lse.flatten(0, 1), scores.logsumexp(-1))  # (X * Y, H, W)
    own_out = own_values(scores.sub_(merged.unsqueeze(-1)).exp_(), v)
    split = out.shape[:2]
    add_own_(out, lse, own_out.unflatten(0, split), merged.unflatten(0, split))


def merge_own_backward_(
    grad: Tensor,
    qkv: Sequence[Tensor],
    result: Sequence[Tensor],
    grads: Sequence[Tensor],
    scale: float,
    native: OwnNative | None,
) -> None:
    """Add the own part to the queries' gradient, and write those of the own keys and values.

    Args:
        grad: Of the output.
        qkv: Queries, keys and values.
        result: Output (float32 for compiled loops) and log-sum-exp of the whole row.
        grads: Of queries (float32 for compiled loops), keys and values.
        scale: Of the scores.
        native: As in the forward pass.
    """
    if native is not None:
        views = [split_start(x) for x in (grad, *qkv, *result, *grads)]
        return native.backward_(views[0], views[1:4], views[4:6], views[6:], scale)
    delta = torch.linalg.vecdot(*(at_least_float32(x) for x in (result[0], grad)))
    q, k, v = (x.flatten(0, 1) for x in qkv)
    weights = own_scores(q, k, scale).sub_(result[1].flatten(0, 1).unsqueeze(-1)).exp_()
    own = own_backward(grad.flatten(0, 1), (q, k, v), weights, delta.flatten(0, 1), scale)
    split = grad.shape[:2]
    grads[0].add_(own[0].unflatten(0, split))
    for total, part in zip(grads[1:], own[1:], strict=True):
        total.copy_(part.unflatten(0, split))


def empty_tokens(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Room for (N, H, L, d), stored as (N, L, H, d): the order that the layers around want."""
    rows, heads, tokens, size = shape
    return x.new_empty(rows, tokens, heads, size).transpose(1, 2)


# --- One token of every block ---------------------------------------------------------------------


def own_step(
    q: Tensor, past: tuple[Tensor, Tensor], out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """Complete what the newest token of every block saw of the text; may overwrite it.

    Args:
        q: Queries, (N, H, S, d).
        past: Keys and values of the blocks so far, in `own_dtype`: (tokens, N, S, Hkv, d).
        out: Output towards the text, (N, H, S, d).
        lse: Log-sum-exp towards the text, (N, H, S).
        scale: Of the scores.

    Returns:
        Output under the softmax of the whole row, (N, H, S, d).
    """
    native = find_own_native(q, out)
    if native is not None:
        native.step_(q, past, out, lse, scale)
        return out
    by_place = out.transpose(1, 2)  # (N, S, H, d)
    keys, values = (x.movedim(0, 3).flatten(0, 1) for x in past)  # (N * S, Hkv, tokens, d)
    queries = q.transpose(1, 2).flatten(0, 1).unsqueeze(2)
    with torch.autocast(q.device.type, enabled=False):  # it would cast the keys every time
        scores = own_scores(queries.to(keys.dtype), keys, scale)
        text = lse.transpose(1, 2).reshape(*scores.shape[:3], 1)
        weights = torch.cat([scores, text], dim=-1).softmax(-1)  # (N * S, H, 1, tokens + 1)
        own = own_values(weights[..., :-1], values).view(by_place.shape).to(out.dtype)
    share = weights[..., -1].view(*by_place.shape[:-1], 1).to(out.dtype)
    return torch.addcmul(own, by_place, share).transpose(1, 2)


def _by_group(x: Tensor, keys: Tensor) -> Tensor:
    """(N, H, Q, .) as (N * Hkv, H / Hkv * Q, .): query heads that share keys, together."""
    return x.reshape(keys.shape[0] * keys.shape[1], -1, x.shape[-1])


def _flat(keys: Tensor) -> Tensor:
    """(N, Hkv, W, d) as (N * Hkv, W, d)."""
    return keys.flatten(0, 1)
