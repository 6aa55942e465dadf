"""What each pass does at an attention layer: who attends to whom.

`TextPass` runs a text alone and may keep its keys and values. Against these, `BlockPass` runs
blocks with gradient, and each `RolloutStep` runs one token of every block without: the start token
in rows (B, P), once for all thoughts of a position, the thought tokens in rows (K * B, P).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from quietstar.attention.block_attention import (
    block_attention,
    inner_dtype,
    merge_,
    packed_attention,
    step_attention,
)
from quietstar.attention.blocks import Blocks, PackedBlocks, Pair, PrefixAttention
from quietstar.attention.dense import (
    ScoreRules,
    dense_attention,
    dense_block_attention,
    dense_packed_attention,
    recomputed,
)
from quietstar.attention.kernels import Kernel, at_least_float32, find_kernel

VIRTUAL_TOKENS = "virtual_tokens"
"""Child of a model, and of attention layers, with what stands for learned tokens before a text."""

TextKeys = dict[int, Pair]
"""Keys and values of texts (B, Hkv, S, .), virtual tokens included, by `id` of the layer."""

logger = logging.getLogger(__name__)


@runtime_checkable
class Pass(Protocol):
    """What a parallel-thought pass does at each attention layer."""

    def attend(
        self, layer: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, rules: ScoreRules
    ) -> Tensor:
        """Output (N, H, S, dv) of queries (N, H, S, d) and keys and values (N, Hkv, S, .)."""
        ...


def choose_kernel(
    q: Tensor, k: Tensor, v: Tensor, rules: ScoreRules, num_positions: int, masked: bool = False
) -> Kernel | None:
    """The flash kernel, or None for the dense path; says once why the dense path is taken."""
    if not rules.fits_flash(num_positions):
        _warn_once("soft-capping, attention sinks or a sliding window shorter than the text")
        return None
    kernel = find_kernel(q, k, v, masked)
    if kernel is None:
        _warn_once(f"no flash kernel for {q.dtype} on {q.device.type} with head size {q.shape[-1]}")
    return kernel


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("attention takes the slow exact path (dense mask): %s", reason)


class TextPass:
    """A text alone: what the model's own attention does, virtual tokens heeded.

    Args:
        keys: Where its keys and values are kept, with their graph.
    """

    def __init__(self, keys: TextKeys | None = None) -> None:
        self.keys = keys

    def attend(self, layer, q, k, v, rules):  # noqa: D102  (see Pass)
        virtual = getattr(layer, VIRTUAL_TOKENS, None)
        if virtual is not None:  # its learned keys and values replace those of the first tokens
            k, v = (
                torch.cat([new.to(x.dtype).expand(len(x), -1, -1, -1), x[:, :, new.shape[1] :]], 2)
                for x, new in zip((k, v), virtual(), strict=True)
            )
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


class BlockPass:
    """Attention of blocks to the text and to themselves, with gradient.

    Args:
        keys: Keys and values of the texts.
        blocks: Layout of the block tokens.
        num_positions: Highest position of any block token, plus one.
    """

    def __init__(self, keys: TextKeys, blocks: Blocks | PackedBlocks, num_positions: int) -> None:
        self.keys, self.blocks, self.num_positions = keys, blocks, num_positions

    def attend(self, layer, q, k, v, rules):  # noqa: D102
        text, blocks = self.keys[id(layer)], self.blocks
        kernel = choose_kernel(q, k, v, rules, self.num_positions, masked=blocks.masked)
        if isinstance(blocks, PackedBlocks):
            if kernel is None:
                return dense_packed_attention(q, k, v, text, blocks, rules)
            return packed_attention(q, k, v, text, blocks, rules.scale, kernel)
        if kernel is None:
            return dense_block_attention(q, k, v, text, blocks, rules)
        return block_attention(q, k, v, text, blocks, rules.scale, kernel)


class RolloutCache:
    """Keys and values of the text and of the thoughts so far, by attention layer.

    Args:
        text: Keys and values of the text.
        num_steps: Block tokens that will be run (start and every thought token but the last).
        num_start: Those of them that open a block, M.
        num_thoughts: Thoughts at each position, K.
        positions: Positions of the blocks, virtual tokens included; None for all of the text.
    """

    def __init__(
        self,
        text: TextKeys,
        num_steps: int,
        num_start: int,
        num_thoughts: int,
        positions: Int[Tensor, "batch positions"] | None,
    ) -> None:
        self.num_steps, self.num_start = num_steps, num_start
        self.num_thoughts, self.positions = num_thoughts, positions
        self.text = {layer: (k.detach(), v.detach()) for layer, (k, v) in text.items()}
        self.blocks: TextKeys = {}
        self.start_prefix = self.prefix = None
        if positions is not None:
            length = next(iter(text.values()))[0].shape[2]
            self.start_prefix = PrefixAttention(positions, 1, length)
            self.prefix = PrefixAttention(positions, num_thoughts, length)

    def repeat_text(self) -> None:
        """Give every thought its text: keys and values (B, ...) become (K * B, ...)."""
        for layer, pair in self.text.items():
            self.text[layer] = _repeated(pair, self.num_thoughts)

    def store_block(self, layer: int, index: int, k: Tensor, v: Tensor) -> Pair:
        """Add one token to all blocks; returns them so far, (index + 1, rows, tokens, Hkv, .).

        While start tokens run, which all thoughts share, those of the first thoughts.
        """
        if index == 0:
            rows, heads, tokens = k.shape[:3]
            shape = (self.num_steps, self.num_thoughts * rows, tokens, heads)
            room = [x.new_empty(*shape, x.shape[3], dtype=inner_dtype(x)) for x in (k, v)]
            self.blocks[layer] = (room[0], room[1])
        for cache, new in zip(self.blocks[layer], (k, v), strict=True):
            cache[index].unflatten(0, (-1, len(new))).copy_(new.transpose(1, 2))
        rows = k.shape[0]
        keys, values = self.blocks[layer]
        return keys[: index + 1, :rows], values[: index + 1, :rows]


class RolloutStep:
    """One token of every block against the text and the block so far, through all layers, once.

    Args:
        cache: Keys and values of the text (with thoughts at all of its positions, repeated for
            every thought after the start tokens) and the earlier steps.
        index: Place of the token in its block.
    """

    def __init__(self, cache: RolloutCache, index: int) -> None:
        self.cache, self.index = cache, index
        self._layers: Iterator[int] = iter(cache.text)

    def attend(self, layer: object, q: Tensor, k: Tensor, v: Tensor, rules: ScoreRules) -> Tensor:
        """As `Pass`, for the next layer in the order in which they saw the text.

        Layers are not told apart by what they are, so that code compiled for one serves all.
        """
        layer_id, cache, index = next(self._layers), self.cache, self.index
        text, positions = cache.text[layer_id], cache.positions
        block = cache.store_block(layer_id, index, k, v)
        num_positions = text[0].shape[2] + index + 1
        kernel = choose_kernel(q, k, v, rules, num_positions, masked=positions is not None)
        if kernel is None:
            keys, values = (x.transpose(2, 3).to(q.dtype) for x in block)
            repeats = len(q) // len(text[0])
            places = None if positions is None else positions.clamp(min=0).repeat(repeats, 1)
            text = _repeated(text, repeats)
            return dense_attention(q, text, (keys, values), rules, places)
        prefix = cache.start_prefix if index < cache.num_start else cache.prefix
        if prefix is None:
            out, lse = kernel.forward(q, *text, True, rules.scale)
        else:  # towards the text, (K * B, H, P, d) is (B, H, P * K, d)
            by_text = q.unflatten(0, (-1, len(text[0]))).movedim(0, 3).flatten(2, 3)
            parts = prefix.forward(kernel, by_text, *text, rules.scale)
            out, lse = (
                x.unflatten(2, (-1, prefix.repeats)).movedim(3, 0).flatten(0, 1) for x in parts
            )
        if index > 0:
            return step_attention(q, block, out, lse, rules.scale)
        # A block of the start token alone: every query also sees the one key of its own place.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        score = at_least_float32(q * k).sum(-1) * rules.scale
        merged = torch.logaddexp(lse, score)
        merge_(out, lse, v * (score - merged).exp().unsqueeze(-1).to(v.dtype), merged)
        return out


def _repeated(pair: Pair, times: int) -> Pair:
    """Keys and values (B, ...) as (times * B, ...), as they are for one time."""
    k, v = (x.unsqueeze(0).expand(times, *x.shape).flatten(0, 1) for x in pair)
    return k, v
