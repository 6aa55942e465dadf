"""What each pass of the engine does at an attention layer: who attends to whom.

`TextPass` runs a text alone and may keep its keys and values; `BlockPass` runs blocks against them,
with gradient, `ThoughtStep` one token of every block at a time, without. `LearnPass` runs text and
blocks at once. `ChosenLearnPass` and `ChosenStep` are for thoughts at chosen positions only.
"""

from __future__ import annotations

import logging
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from quietstar.engine.block_attention import block_attention, dense_block_attention
from quietstar.engine.blocks import Blocks
from quietstar.engine.chosen import (
    ChosenAttention,
    ChosenViews,
    PrefixAttention,
    dense_chosen,
)
from quietstar.engine.dense import ScoreRules, dense_attention, dense_blocks, recomputed
from quietstar.engine.kernels import Kernel, find_kernel
from quietstar.engine.layout import ChosenLayout
from quietstar.engine.own_block import own_dtype, own_step
from quietstar.engine.parallel_attention import ParallelAttention, add_own_
from quietstar.precision import at_least_float32

VIRTUAL_TOKENS = "virtual_tokens"
"""Child of a model, and of attention layers, with what stands for learned tokens before a text."""

logger = logging.getLogger(__name__)


@runtime_checkable
class Order(Protocol):
    """In which the thoughts of a rollout lie (`quietstar.engine.rollout`)."""

    def for_each_thought(self, x: Tensor) -> Tensor:
        """What there is of a position (rows, tokens, ...), for each of its thoughts."""
        ...


@runtime_checkable
class Pass(Protocol):
    """What a parallel-thought pass does at each attention layer."""

    def attend(
        self, layer: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, rules: ScoreRules
    ) -> Tensor:
        """Output (N, H, S, dv) of queries (N, H, S, d) and keys and values (N, Hkv, S, .)."""
        ...


def with_virtual(layer: torch.nn.Module, k: Tensor, v: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Put a layer's learned keys and values in the place of those of the virtual tokens.

    They are the first of a text, along axis ``dim`` of texts (B, Hkv, S, .).
    """
    virtual = getattr(layer, VIRTUAL_TOKENS, None)
    if virtual is None:
        return k, v
    count = virtual.keys.shape[1]
    pairs = ((k, virtual.keys), (v, virtual.values))
    k, v = (
        torch.cat(
            [
                new.to(x.dtype).expand(x.shape[0], -1, -1, -1),
                x.narrow(dim, count, x.shape[dim] - count),
            ],
            dim,
        )
        for x, new in pairs
    )
    return k, v


# --- A text alone ---------------------------------------------------------------------------------


TextKeys = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of texts (B, Hkv, S, .), virtual tokens included, by `id` of the layer."""


class TextPass:
    """A text alone: what the model's own attention does, virtual tokens heeded.

    Args:
        keys: Where its keys and values are kept, with their graph.
    """

    def __init__(self, keys: TextKeys | None = None) -> None:
        self.keys = keys

    def attend(self, layer, q, k, v, rules):  # noqa: D102
        k, v = with_virtual(layer, k, v, 2)
        if self.keys is not None:
            self.keys[id(layer)] = (k, v)
        kernel = choose_kernel(q, k, v, rules, q.shape[2])
        if kernel is None:
            return recomputed(q, (k, v), None, rules)
        return CausalAttention.apply(q, k, v, rules.scale, kernel)


class CausalAttention(torch.autograd.Function):
    """Plain causal attention on a kernel."""

    @staticmethod
    def forward(ctx, q, k, v, scale, kernel):  # noqa: D102
        out, lse = kernel.forward(q, k, v, True, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.kernel = scale, kernel
        return out

    @staticmethod
    def backward(ctx, grad):  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        wide = ctx.kernel.backward_dtype(grad.dtype)
        dtype, (grad, q, k, v, out) = grad.dtype, (x.to(wide) for x in (grad, q, k, v, out))
        grads = ctx.kernel.backward(grad, (q, k, v), out, lse, True, ctx.scale)
        return *(x.to(dtype) for x in grads), None, None


# --- Blocks of some positions, against a text that ran before -------------------------------------


class BlockPass:
    """Attention of blocks to the text and to themselves, with gradient.

    Args:
        keys: Of the texts.
        blocks: Where their tokens lie.
        num_positions: Highest position of any block token, plus one.
    """

    def __init__(self, keys: TextKeys, blocks: Blocks, num_positions: int) -> None:
        self.keys, self.blocks, self.num_positions = keys, blocks, num_positions

    def attend(self, layer, q, k, v, rules):  # noqa: D102
        text = self.keys[id(layer)]
        kernel = choose_kernel(q, k, v, rules, self.num_positions, masked=self.blocks.masked)
        if kernel is None:
            return dense_block_attention(q, k, v, text, self.blocks, rules)
        return block_attention(q, k, v, text, self.blocks, rules.scale, kernel)


# --- The learn pass: text and all blocks at once -------------------------------------------------


class LearnPass:
    """Attention of the text and all its blocks at once, with gradient.

    Args:
        batch_size: B.
        num_thoughts: K.
        block_length: W.
    """

    def __init__(self, batch_size: int, num_thoughts: int, block_length: int) -> None:
        self.batch_size = batch_size
        self.num_thoughts = num_thoughts
        self.block_length = block_length

    def attend(self, layer, q, k, v, rules):  # noqa: D102  (see Pass)
        kernel = choose_kernel(q, k, v, rules, q.shape[2] + self.block_length)
        if kernel is None:
            return dense_blocks(q, k, v, self.batch_size, self.num_thoughts, rules)
        return ParallelAttention.apply(
            q, k, v, self.batch_size, self.num_thoughts, rules.scale, kernel
        )


class ChosenLearnPass:
    """The same with thoughts at chosen positions only, as one row.

    Args:
        layout: Its sizes and positions.
    """

    def __init__(self, layout: ChosenLayout) -> None:
        sizes = layout.layout
        self.layout = layout
        self.views = ChosenViews(layout)
        self.num_positions = sizes.text_length + sizes.block_length
        repeats = sizes.num_thoughts * sizes.block_length
        self.prefix = PrefixAttention(layout.positions, repeats, sizes.text_length)

    def attend(self, layer, q, k, v, rules):  # noqa: D102
        k, v = self._with_virtual(layer, k, v)
        kernel = choose_kernel(q, k, v, rules, self.num_positions, masked=True)
        if kernel is None:
            return dense_chosen(q, k, v, self.layout, rules)
        return ChosenAttention.apply(q, k, v, self.views, self.prefix, rules.scale, kernel)

    def _with_virtual(self, layer: torch.nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not hasattr(layer, VIRTUAL_TOKENS):
            return k, v
        texts = with_virtual(layer, self.views.text(k), self.views.text(v), 2)
        flat = (x.transpose(0, 1).flatten(1, 2) for x in texts)  # (Hkv, B * S, .)
        count = self.layout.num_text
        k, v = (
            torch.cat([text, x[0, :, count:]], 1).unsqueeze(0)
            for text, x in zip(flat, (k, v), strict=True)
        )
        return k, v


# --- The rollout: the text once, then one token of every block at a time -------------------------


class RolloutCache:
    """Keys and values of the text and of the thoughts so far, by attention layer.

    Args:
        text: Keys and values of the text.
        num_steps: Block tokens that will be run (start and every thought token but the last).
    """

    def __init__(self, text: TextKeys, num_steps: int) -> None:
        self.num_steps = num_steps
        self.text = {layer: (k.detach(), v.detach()) for layer, (k, v) in text.items()}
        self.own: TextKeys = {}

    def repeat_text(self, num_thoughts: int) -> None:
        """Give every thought its text: keys and values (B, ...) become (K * B, ...)."""
        for layer, pair in self.text.items():
            k, v = (x.unsqueeze(0).expand(num_thoughts, *x.shape).flatten(0, 1) for x in pair)
            self.text[layer] = (k, v)

    def store_start(self, layer: int, order: Order, k: Tensor, v: Tensor) -> None:
        """The start tokens, rows (B, Hkv, S, .) for all thoughts: the first of every block."""
        self.own[layer] = (self._first(order, k), self._first(order, v))

    def _first(self, order: Order, x: Tensor) -> Tensor:
        x = order.for_each_thought(x.transpose(1, 2))  # (rows, tokens, Hkv, .)
        cache = x.new_empty(self.num_steps, *x.shape, dtype=own_dtype(x))
        cache[0] = x
        return cache

    def store_own(self, layer: int, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token to all blocks; returns them so far, (index + 1, rows, tokens, Hkv, .)."""
        for cache, new in zip(self.own[layer], (k, v), strict=True):
            cache[index] = new.transpose(1, 2)
        keys, values = self.own[layer]
        return keys[: index + 1], values[: index + 1]


class StartStep:
    """The start token of every position, once for all thoughts: its block holds nothing else.

    Args:
        cache: Of the text, once for every text.
        order: In which the thoughts of positions lie.
        prefix: Attention to the text at chosen positions; None at all of them.
    """

    def __init__(
        self, cache: RolloutCache, order: Order, prefix: PrefixAttention | None = None
    ) -> None:
        self.cache, self.order, self.prefix = cache, order, prefix

    def attend(self, layer, q, k, v, rules):  # noqa: D102
        text = self.cache.text[id(layer)]
        self.cache.store_start(id(layer), self.order, k, v)
        chosen = self.prefix is not None
        kernel = choose_kernel(q, k, v, rules, text[0].shape[2] + 1, masked=chosen)
        # At chosen positions all texts lie in one row (b p).
        rows = [_by_text(x, len(text[0])) for x in (q, k, v)] if chosen else [q, k, v]
        if kernel is None:
            own = (rows[1].unsqueeze(0), rows[2].unsqueeze(0))
            places = None if self.prefix is None else self.prefix.positions
            out = dense_attention(rows[0], text, own, rules, 0, places)
        else:
            if self.prefix is None:
                out, lse = kernel.forward(rows[0], text[0], text[1], True, rules.scale)
            else:
                out, lse = self.prefix.forward(kernel, rows[0], text[0], text[1], rules.scale)
            _add_itself_(out, lse, rows[0], rows[1], rows[2], rules.scale)
        return out.transpose(0, 1).flatten(1, 2).unsqueeze(0) if chosen else out


def _by_text(row: Tensor, batch_size: int) -> Tensor:
    """(1, H, B * P, .) as (B, H, P, .), a view."""
    return row[0].unflatten(1, (batch_size, -1)).transpose(0, 1)


def _add_itself_(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Let every query (N, H, S, d) also see the one key of its own place, (N, Hkv, S, d)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    score = at_least_float32(q * k).sum(-1) * scale
    merged = torch.logaddexp(lse, score)
    add_own_(out, lse, v * (score - merged).exp().unsqueeze(-1).to(v.dtype), merged)


class ThoughtStep:
    """One token of every block against the text and the block so far.

    Args:
        cache: Of the text (repeated for every thought) and the earlier steps.
        index: Place of the token in its block.
    """

    def __init__(self, cache: RolloutCache, index: int) -> None:
        self.cache = cache
        self.index = index

    def attend(self, layer, q, k, v, rules):  # noqa: D102
        text = self.cache.text[id(layer)]
        own = self.cache.store_own(id(layer), self.index, k, v)
        kernel = choose_kernel(q, k, v, rules, q.shape[2] + self.index + 1)
        if kernel is None:
            return dense_attention(q, text, _dense_own(own, q.dtype), rules, self.index)
        out, lse = kernel.forward(q, *text, True, rules.scale)
        return own_step(q, own, out, lse, rules.scale)


class ChosenStep:
    """One token of every block at chosen positions, as one row in the order (b p k).

    Args:
        cache: Of the text and the earlier steps.
        index: Place of the token in its block.
        positions: Of the blocks, (B, P).
        prefix: Attention to the text for K queries a position.
    """

    def __init__(
        self, cache: RolloutCache, index: int, positions: Tensor, prefix: PrefixAttention
    ) -> None:
        self.cache, self.index = cache, index
        self.positions, self.prefix = positions, prefix

    def attend(self, layer, q, k, v, rules):  # noqa: D102
        text = self.cache.text[id(layer)]
        own = self.cache.store_own(id(layer), self.index, k, v)
        # (1, H, B * P * K, d) -> (B, H, P * K, d), a view
        queries = q[0].unflatten(1, (self.positions.shape[0], -1)).transpose(0, 1)
        # (tokens, 1, B * P * K, Hkv, d) -> (tokens, B, P * K, Hkv, d)
        keys, values = (x[:, 0].unflatten(1, (self.positions.shape[0], -1)) for x in own)
        num_positions = text[0].shape[2] + self.index + 1
        kernel = choose_kernel(q, k, v, rules, num_positions, masked=True)
        if kernel is None:
            repeats = queries.shape[2] // self.positions.shape[1]
            places = self.positions.clamp(min=0).repeat_interleave(repeats, 1)
            own = _dense_own((keys, values), q.dtype)
            out = dense_attention(queries, text, own, rules, self.index, places)
        else:
            out, lse = self.prefix.forward(kernel, queries, *text, rules.scale)
            out = own_step(queries, (keys, values), out, lse, rules.scale)
        return out.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _dense_own(own: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The blocks so far, (tokens, N, S, Hkv, .), as `dense_attention` wants them."""
    keys, values = (x.transpose(2, 3).to(dtype) for x in own)
    return keys, values


_told: set[str] = set()


def choose_kernel(
    q: Tensor, k: Tensor, v: Tensor, rules: ScoreRules, num_positions: int, masked: bool = False
) -> Kernel | None:
    """The flash kernel, or None for the dense path; says once why the dense path is taken."""
    if not rules.fits_flash(num_positions):
        _tell_once("soft-capping, attention sinks or a sliding window shorter than the text")
        return None
    kernel = find_kernel(q, k, v, masked)
    if kernel is None:
        _tell_once(f"no flash kernel for {q.dtype} on {q.device.type} with head size {q.shape[-1]}")
    return kernel


def _tell_once(reason: str) -> None:
    if reason not in _told:
        _told.add(reason)
        logger.warning("attention takes the slow exact path (dense mask): %s", reason)
