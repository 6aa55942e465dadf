"""What each step of the rollout does at an attention layer, without gradient.

The text ran once and left its keys and values (`TextPass`); then every `RolloutStep` runs one token
of every block against them: the start token in rows (B, P), once for all thoughts of a position,
and each thought token in rows (K * B, P).

Layers are told apart by the order in which they attend, not by what they are, so that code compiled
for one layer serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from quietstar.attention.block_attention import inner_dtype, merge_, step_attention
from quietstar.attention.blocks import PrefixAttention
from quietstar.attention.dense import ScoreRules, dense_attention
from quietstar.attention.kernels import at_least_float32
from quietstar.attention.passes import TextKeys, choose_kernel


class RolloutCache:
    """Keys and values of the text and of the thoughts so far, by attention layer.

    Args:
        text: Keys and values of the text.
        num_steps: Block tokens that will be run (start and every thought token but the last).
        num_thoughts: Thoughts at each position, K.
        positions: Positions of the blocks, virtual tokens included; None for all of the text.
    """

    def __init__(
        self,
        text: TextKeys,
        num_steps: int,
        num_thoughts: int,
        positions: Int[Tensor, "batch positions"] | None,
    ) -> None:
        self.num_steps, self.num_thoughts, self.positions = num_steps, num_thoughts, positions
        self.text = {layer: (k.detach(), v.detach()) for layer, (k, v) in text.items()}
        self.own: TextKeys = {}
        self.start_prefix = self.prefix = None
        if positions is not None:
            length = next(iter(text.values()))[0].shape[2]
            self.start_prefix = PrefixAttention(positions, 1, length)
            self.prefix = PrefixAttention(positions, num_thoughts, length)

    def repeat_text(self) -> None:
        """Give every thought its text: keys and values (B, ...) become (K * B, ...)."""
        for layer, pair in self.text.items():
            self.text[layer] = _repeated(pair, self.num_thoughts)

    def store_block(self, layer: int, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token to all blocks; returns them so far, (index + 1, rows, tokens, Hkv, .)."""
        if index == 0:
            self.own[layer] = (self._room(k), self._room(v))
        for cache, new in zip(self.own[layer], (k, v), strict=True):
            cache[index].unflatten(0, (-1, len(new))).copy_(new.transpose(1, 2))
        keys, values = self.own[layer]
        return keys[: index + 1], values[: index + 1]

    def _room(self, x: Tensor) -> Tensor:
        rows, heads, tokens, size = x.shape
        shape = (self.num_steps, self.num_thoughts * rows, tokens, heads, size)
        return x.new_empty(shape, dtype=inner_dtype(x))


class RolloutStep:
    """One token of every block against the text and the block so far, through all layers, once.

    Args:
        cache: Keys and values of the text (with thoughts at all of its positions, repeated for
            every thought behind the start token) and the earlier steps.
        index: Place of the token in its block.
    """

    def __init__(self, cache: RolloutCache, index: int) -> None:
        self.cache, self.index = cache, index
        self._layers: Iterator[int] = iter(cache.text)

    def attend(
        self, layer: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, rules: ScoreRules
    ) -> Tensor:
        """As `quietstar.attention.passes.Pass`."""
        return self.attend_next(q, k, v, rules)

    def attend_next(self, q: Tensor, k: Tensor, v: Tensor, rules: ScoreRules) -> Tensor:
        """The same for the layer whose turn it is, in the order in which they saw the text."""
        layer, cache, index = next(self._layers), self.cache, self.index
        text, positions = cache.text[layer], cache.positions
        own = cache.store_block(layer, index, k, v)
        num_positions = text[0].shape[2] + index + 1
        kernel = choose_kernel(q, k, v, rules, num_positions, masked=positions is not None)
        if kernel is None:
            keys, values = (x.transpose(2, 3).to(q.dtype) for x in own)
            if index == 0:  # not yet one for every thought
                keys, values = k.unsqueeze(0), v.unsqueeze(0)
            repeats = len(q) // len(text[0])
            places = None if positions is None else positions.clamp(min=0).repeat(repeats, 1)
            text = _repeated(text, repeats)
            return dense_attention(q, text, (keys, values), rules, index, places)
        prefix = cache.prefix if index else cache.start_prefix
        if prefix is None:
            out, lse = kernel.forward(q, *text, True, rules.scale)
        else:  # towards the text, (K * B, H, P, d) is (B, H, P * K, d)
            by_text = q.unflatten(0, (-1, len(text[0]))).movedim(0, 3).flatten(2, 3)
            parts = prefix.forward(kernel, by_text, *text, rules.scale)
            out, lse = (
                x.unflatten(2, (-1, prefix.repeats)).movedim(3, 0).flatten(0, 1) for x in parts
            )
        if index > 0:
            return step_attention(q, own, out, lse, rules.scale)
        # A block of the start token alone: every query also sees the one key of its own place.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        score = at_least_float32(q * k).sum(-1) * rules.scale
        merged = torch.logaddexp(lse, score)
        merge_(out, lse, v * (score - merged).exp().unsqueeze(-1).to(v.dtype), merged)
        return out


def _repeated(pair: tuple[Tensor, Tensor], times: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, ...) as (times * B, ...), as they are for one time."""
    k, v = (x.unsqueeze(0).expand(times, *x.shape).flatten(0, 1) for x in pair)
    return k, v
