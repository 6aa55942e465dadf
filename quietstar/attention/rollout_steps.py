"""What each step of the rollout does at an attention layer, without gradient.

The text ran once and left its keys and values (`TextPass`); then every step
runs one token of every block against them: `StartStep`, then `ThoughtStep`, or `SelectedStep` where
only some positions have thoughts.

Layers are told apart by the order in which they attend, not by what they are, so that code compiled
for one layer serves all of them.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from quietstar.attention.block_attention import inner_dtype, merge_, step_attention
from quietstar.attention.blocks import PrefixAttention
from quietstar.attention.dense import ScoreRules, dense_attention
from quietstar.attention.kernels import at_least_float32
from quietstar.attention.passes import TextKeys, choose_kernel


@runtime_checkable
class Order(Protocol):
    """In which the thoughts of a rollout lie (`quietstar.sampling.rollout`)."""

    def for_each_thought(self, x: Tensor) -> Tensor:
        """What there is of a position (rows, tokens, ...), for each of its thoughts."""
        ...


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
        cache = x.new_empty(self.num_steps, *x.shape, dtype=inner_dtype(x))
        cache[0] = x
        return cache

    def store_block(self, layer: int, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token to all blocks; returns them so far, (index + 1, rows, tokens, Hkv, .)."""
        for cache, new in zip(self.own[layer], (k, v), strict=True):
            cache[index] = new.transpose(1, 2)
        keys, values = self.own[layer]
        return keys[: index + 1], values[: index + 1]


class RolloutStep(abc.ABC):
    """One token of every block, through all layers, once.

    Args:
        cache: Keys and values of the text and the earlier steps.
    """

    def __init__(self, cache: RolloutCache) -> None:
        self.cache = cache
        self._layers: Iterator[int] = iter(cache.text)

    def attend(
        self, layer: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, rules: ScoreRules
    ) -> Tensor:
        """As `quietstar.attention.passes.Pass`."""
        return self.attend_next(q, k, v, rules)

    def attend_next(self, q: Tensor, k: Tensor, v: Tensor, rules: ScoreRules) -> Tensor:
        """The same for the layer whose turn it is, in the order in which they saw the text."""
        return self._attend(next(self._layers), q, k, v, rules)

    @abc.abstractmethod
    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rules: ScoreRules) -> Tensor: ...


class StartStep(RolloutStep):
    """The start token of every position, once for all thoughts: its block holds nothing else.

    Args:
        cache: Keys and values of the texts.
        order: Layout of the rows.
        prefix: Attention to the text at chosen positions; None at all of them.
    """

    def __init__(
        self, cache: RolloutCache, order: Order, prefix: PrefixAttention | None = None
    ) -> None:
        super().__init__(cache)
        self.order, self.prefix = order, prefix

    def _attend(self, layer, q, k, v, rules):
        text = self.cache.text[layer]
        self.cache.store_start(layer, self.order, k, v)
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
    merge_(out, lse, v * (score - merged).exp().unsqueeze(-1).to(v.dtype), merged)


class ThoughtStep(RolloutStep):
    """One token of every block against the text and the block so far.

    Args:
        cache: Of the text (repeated for every thought) and the earlier steps.
        index: Place of the token in its block.
    """

    def __init__(self, cache: RolloutCache, index: int) -> None:
        super().__init__(cache)
        self.index = index

    def _attend(self, layer, q, k, v, rules):
        text = self.cache.text[layer]
        own = self.cache.store_block(layer, self.index, k, v)
        kernel = choose_kernel(q, k, v, rules, q.shape[2] + self.index + 1)
        if kernel is None:
            return dense_attention(q, text, _dense_blocks(own, q.dtype), rules, self.index)
        out, lse = kernel.forward(q, *text, True, rules.scale)
        return step_attention(q, own, out, lse, rules.scale)


class SelectedStep(RolloutStep):
    """One token of every block at chosen positions, as one row in the order (b p k).

    Args:
        cache: Keys and values of the text and the earlier steps.
        index: Place of the token in its block.
        positions: Positions of the blocks, (B, P).
        prefix: Attention to the text for K queries a position.
    """

    def __init__(
        self, cache: RolloutCache, index: int, positions: Tensor, prefix: PrefixAttention
    ) -> None:
        super().__init__(cache)
        self.index, self.positions, self.prefix = index, positions, prefix

    def _attend(self, layer, q, k, v, rules):
        text = self.cache.text[layer]
        own = self.cache.store_block(layer, self.index, k, v)
        # (1, H, B * P * K, d) -> (B, H, P * K, d), a view
        queries = q[0].unflatten(1, (self.positions.shape[0], -1)).transpose(0, 1)
        # (tokens, 1, B * P * K, Hkv, d) -> (tokens, B, P * K, Hkv, d)
        keys, values = (x[:, 0].unflatten(1, (self.positions.shape[0], -1)) for x in own)
        num_positions = text[0].shape[2] + self.index + 1
        kernel = choose_kernel(q, k, v, rules, num_positions, masked=True)
        if kernel is None:
            repeats = queries.shape[2] // self.positions.shape[1]
            places = self.positions.clamp(min=0).repeat_interleave(repeats, 1)
            own = _dense_blocks((keys, values), q.dtype)
            out = dense_attention(queries, text, own, rules, self.index, places)
        else:
            out, lse = self.prefix.forward(kernel, queries, *text, rules.scale)
            out = step_attention(queries, (keys, values), out, lse, rules.scale)
        return out.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _dense_blocks(own: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The blocks so far, (tokens, N, S, Hkv, .), as `dense_attention` wants them."""
    keys, values = (x.transpose(2, 3).to(dtype) for x in own)
    return keys, values
