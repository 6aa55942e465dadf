"""The slow exact path: explicit scores, for what the flash kernels cannot do.

Soft-capped scores, sliding windows shorter than the text, attention sinks, unequal key and value
sizes, devices and dtypes without a kernel. It goes block token by block token; every step is
recomputed in the backward pass, so that the scores of one step at most are held.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quietstar.attention.blocks import Blocks, PackedBlocks, Pair
from quietstar.attention.kernels import at_least_float32


@dataclass(frozen=True)
class ScoreRules:
    """How one attention layer turns queries and keys into weights.

    Attributes:
        scale: Multiplies the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        window: A query sees keys less than this many positions back.
        sinks: One learned score a head, (H,), that takes weight and gives no value.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None

    def fits_flash(self, num_positions: int) -> bool:
        """Whether plain causal attention over so many positions is the same thing."""
        windowed = self.window is not None and self.window < num_positions
        return self.softcap is None and self.sinks is None and not windowed


def dense_attention(
    q: Tensor, text: Pair, block: Pair | None, rules: ScoreRules, positions: Tensor | None = None
) -> Tensor:
    """One token of every block (or of the text) against the text and its own block.

    Args:
        q: Queries, (N, H, Q, d), at position i + 1 + w; of the text without ``block``, at i.
        text: Keys and values of the text, (N, Hkv, S, .).
        block: Keys and values of the blocks up to this token, (w + 1, N, Hkv, Q, .).
        rules: Scale, soft-capping, window and sinks.
        positions: The i of every query, (N, Q); by default 0 .. S - 1.

    Returns:
        (N, H, Q, dv).
    """
    n, heads, queries, _ = q.shape
    kv_heads, length = text[0].shape[1:3]
    q = q.reshape(n, kv_heads, heads // kv_heads, queries, -1)  # (N, Hkv, G, Q, d)
    scores = at_least_float32(torch.einsum("nhgsd,nhjd->nhgsj", q, text[0]))
    if positions is None:
        positions = torch.arange(queries, device=q.device).unsqueeze(0)
    visible = _visible(positions, length, -1 if block is None else len(block[0]) - 1, rules.window)
    scores = softcapped(scores * rules.scale, rules).masked_fill(~visible, -math.inf)
    if block is not None:
        block_scores = at_least_float32(torch.einsum("nhgsd,wnhsd->nhgsw", q, block[0]))
        block_scores = softcapped(block_scores * rules.scale, rules)
        if rules.window is not None:
            distance = torch.arange(block[0].shape[0] - 1, -1, -1, device=q.device)
            block_scores = block_scores.masked_fill(distance >= rules.window, -math.inf)
        scores = torch.cat([scores, block_scores], dim=-1)
    weights = softmax_with_sinks(scores, rules.sinks).to(text[1].dtype)
    out = torch.einsum("nhgsj,nhjd->nhgsd", weights[..., :length], text[1])
    if block is not None:
        out = out + torch.einsum("nhgsw,wnhsd->nhgsd", weights[..., length:], block[1])
    return out.flatten(1, 2)


def _visible(positions: Tensor, length: int, index: int, window: int | None) -> Tensor:
    """Which text keys a query of each position sees: (N or 1, 1, 1, Q, S), True = seen."""
    key = torch.arange(length, device=positions.device)
    query = positions[:, None, None, :, None]
    seen = key <= query
    if window is not None:
        seen &= (query + 1 + index) - key < window
    return seen


def softcapped(scores: Tensor, rules: ScoreRules) -> Tensor:
    """Scores as the rules bound them."""
    if rules.softcap is None:
        return scores
    return rules.softcap * torch.tanh(scores / rules.softcap)


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights of scores (B, Hkv, G, ..., S); a sink takes some and gives nothing."""
    if sinks is None:
        # A window may hide the whole text from a late block token; its own block never is.
        return scores.softmax(-1)
    rest = [1] * (scores.ndim - 3)
    column = sinks.to(scores.dtype).reshape(1, scores.shape[1], scores.shape[2], *rest)
    column = column.expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]


def recomputed(*args) -> Tensor:
    """`dense_attention`, its scores made again in the backward pass."""
    return _recomputed(dense_attention, *args)


def _recomputed(function: Callable[..., Tensor], *args) -> Tensor:
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def dense_block_attention(
    q: Tensor, k: Tensor, v: Tensor, text: Pair, blocks: Blocks, rules: ScoreRules
) -> Tensor:
    """`block_attention` from explicit scores, for what the kernels cannot do: (N, H, L, .) each."""
    positions = blocks.query_positions(q.device)  # (rows, queries)
    batch_size, grid = len(text[0]), blocks.block_views(q)[1].shape[:3]  # X, K, Y
    repeats = len(positions) // batch_size
    if repeats > 1:
        text = (text[0].repeat_interleave(repeats, 0), text[1].repeat_interleave(repeats, 0))

    def by_token(x: Tensor) -> Tensor:
        """Token by token of the blocks, (W, rows, H, queries, .)."""
        start, rest = blocks.block_views(x)
        start = start.expand(-1, grid[1], -1, -1, -1, -1)  # the same for all thoughts
        tokens = torch.cat([start, rest], 4).flatten(0, 2)  # (X * K * Y, H, W, .)
        return tokens.unflatten(0, positions.shape).permute(3, 0, 2, 1, 4)

    queries, keys, values = by_token(q), by_token(k), by_token(v)
    out = torch.stack(
        [
            recomputed(query, text, (keys[: w + 1], values[: w + 1]), rules, positions)
            for w, query in enumerate(queries)
        ]
    )
    out = out.transpose(2, 3).flatten(3).flatten(1, 2)  # (W, X * K * Y, H * dv)
    out = out.unflatten(1, grid).transpose(1, 2).unflatten(2, (batch_size, -1)).flatten(3, 4)
    first = blocks.num_start
    rows = blocks.to_rows(out[:first, 0], out[first:])  # of (W, K, B, P, H * dv)
    return rows.unflatten(2, (q.shape[1], -1)).transpose(1, 2)


def dense_packed_attention(
    q: Tensor, k: Tensor, v: Tensor, text: Pair, blocks: PackedBlocks, rules: ScoreRules
) -> Tensor:
    """`dense_block_attention` of packed blocks, block by block: (1, H, L, .) each."""
    parts = []
    for span, tokens, first in blocks.sequences:
        n, _, end = blocks.spans[span]
        rows = torch.as_tensor(tokens, device=q.device)
        keys, values = (
            torch.cat([past[n : n + 1, :, :end], new[:, :, rows]], 2)
            for past, new in zip(text, (k, v), strict=True)
        )
        parts.append(_recomputed(_last_queries, q[:, :, rows], keys, values, rules)[:, :, first:])
    return torch.cat(parts, 2)  # in the order of the row


def _last_queries(q: Tensor, k: Tensor, v: Tensor, rules: ScoreRules) -> Tensor:
    """Causal attention of the last tokens of a sequence (1, ., S, .) to all of it."""
    heads, length = (k.shape[1], q.shape[1] // k.shape[1]), k.shape[2]
    query = torch.arange(length - q.shape[2], length, device=q.device)[:, None]
    key = torch.arange(length, device=q.device)
    hidden = key > query
    if rules.window is not None:
        hidden |= query - key >= rules.window
    grouped = q.unflatten(1, heads)  # (1, Hkv, G, Q, d)
    scores = at_least_float32(grouped @ k.unsqueeze(2).mT) * rules.scale
    scores = softcapped(scores, rules).masked_fill(hidden, -math.inf)
    weights = softmax_with_sinks(scores, rules.sinks).to(v.dtype)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)
