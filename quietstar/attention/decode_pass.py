"""Attention while a text is generated: few tokens against cached keys and values.

Rows are aligned on the right: every row's last token lies in the same column of the cache, and
columns before a row's first token are never seen. Letters as in `quietstar.attention.layout`.

A single thought lies in the columns behind its text, where the text's next token will overwrite it,
so that torch's own attention serves. Several thoughts share their text and have columns of their
own; their scores are joined by hand, and so are those with a soft cap or sinks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from quietstar.attention.dense import ScoreRules, softcapped, softmax_with_sinks
from quietstar.attention.kernels import at_least_float32

_ROOM = 128
"""Columns by which the cache of a text grows."""


class DecodeCache:
    """Keys and values by attention layer, of the texts and of the thoughts at hand.

    Args:
        text: Of each layer, (B, Hkv, S, .), as a text pass left them, aligned on the right.
        first: Column of each row's first token, (B,).
        num_thoughts: Thoughts at each token, K.
        block_length: Tokens of a block: start, the thought, end.
    """

    def __init__(
        self,
        text: dict[int, tuple[Tensor, Tensor]],
        first: Int[Tensor, " batch"],
        num_thoughts: int,
        block_length: int,
    ) -> None:
        self.text, self.first = text, first
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_thoughts, self.block_length = num_thoughts, block_length
        self.length = next((k.shape[2] for k, _ in text.values()), 0)
        self.is_padded = bool(first.any())

    def chosen(self, rows: Int[Tensor, " rows"]) -> DecodeCache:
        """A copy of some rows, for the thoughts of this token alone."""
        stop = self.length + self.block_length
        text = {layer: (k[rows, :, :stop], v[rows, :, :stop])
                for layer, (k, v) in self.text.items()}  # fmt: skip
        few = DecodeCache(text, self.first[rows], self.num_thoughts, self.block_length)
        few.length = self.length
        few.own = {layer: (k[rows], v[rows]) for layer, (k, v) in self.own.items()}
        return few

    def add_text(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest token, (B, Hkv, 1, .); returns all up to it."""
        return self.add_behind(layer, self.length, k, v)

    def add_behind(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store tokens from a column on, (B, Hkv, m, .); returns all up to them."""
        stop = start + k.shape[2]
        pair = self.text.get(layer)
        if pair is None or pair[0].shape[2] < stop:
            old_k, old_v = pair or (None, None)
            pair = self.text[layer] = (self._grown(old_k, k), self._grown(old_v, v))
        for cache, new in zip(pair, (k, v), strict=True):
            cache[:, :, start:stop] = new
        return self.seen_text(layer, stop)

    def _grown(self, old: Tensor | None, x: Tensor) -> Tensor:
        """Room for more columns, and always for a block behind the text."""
        columns = self.length + _ROOM + self.block_length
        room = x.new_empty(*x.shape[:2], columns, x.shape[3])
        if old is not None:
            room[:, :, : old.shape[2]] = old
        return room

    def seen_text(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first columns, views."""
        k, v = self.text[layer]
        return k[:, :, :length], v[:, :, :length]

    def add_block(self, layer: int, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store tokens of every block, (B, Hkv, K or 1, m, .); returns the blocks so far."""
        if layer not in self.own:
            self.own[layer] = tuple(  # pyright: ignore[reportArgumentType]
                x.new_empty(*x.shape[:2], self.num_thoughts, self.block_length, x.shape[4])
                for x in (k, v)
            )
        stop = index + k.shape[3]
        for cache, new in zip(self.own[layer], (k, v), strict=True):
            cache[:, :, :, index:stop] = new
        keys, values = self.own[layer]
        return keys[:, :, :, :stop], values[:, :, :, :stop]


class DecodePass:
    """Some tokens of every row against its text and their own blocks.

    Args:
        cache: Keys and values of the rows.
        new_text: Whether the first token of each row is one of the text.
        index: Place of the first block token in its block; None where there is none.
    """

    def __init__(self, cache: DecodeCache, new_text: bool, index: int | None) -> None:
        self.cache, self.new_text, self.index = cache, new_text, index
        self._biases: dict[tuple[int | None, str], Tensor] = {}  # the same in most layers

    def attend(self, layer, q, k, v, rules):  # noqa: D102  (see Pass)
        cache, thoughts = self.cache, 1 if self.new_text else self.cache.num_thoughts
        if cache.num_thoughts == 1 and rules.softcap is None and rules.sinks is None:
            return self._attend_behind(layer, q, k, v, rules)
        if self.new_text:
            text = cache.add_text(id(layer), k[:, :, :1], v[:, :, :1])
        else:
            text = cache.seen_text(id(layer), cache.length)
        own = None
        if self.index is not None:
            blocks = (x[:, :, int(self.new_text) :].unflatten(2, (thoughts, -1)) for x in (k, v))
            own = cache.add_block(id(layer), self.index, *blocks)
            own = (own[0][:, :, :thoughts], own[1][:, :, :thoughts])
        return _attend(q.unflatten(2, (thoughts, -1)), text, own, rules, self)

    def _attend_behind(self, layer, q, k, v, rules):
        """With the thought in the columns behind the text: torch's own attention."""
        start = self.cache.length + (0 if self.new_text else self.index or 0)
        keys, values = self.cache.add_behind(id(layer), start, k, v)
        mask = self._mask(start, keys.shape[2], rules.window)
        return F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, scale=rules.scale, enable_gqa=q.shape[1] != k.shape[1]
        )

    def _mask(self, start: int, stop: int, window: int | None) -> Tensor | None:
        """True where a query sees a column, (B or 1, 1, m, stop); None where all see all."""
        if stop - start == 1 and window is None and not self.cache.is_padded:
            return None
        key = (window, "behind")
        if key not in self._biases:
            first = self.cache.first
            column = torch.arange(stop, device=first.device)
            query = column[start:, None]
            seen = column <= query  # (m, stop)
            if window is not None:
                seen = seen & (query - column < window)
            if self.cache.is_padded:
                seen = seen & (column >= first[:, None, None])
            self._biases[key] = seen.view(-1, 1, stop - start, stop)
        return self._biases[key]

    def text_bias(self, length: int, tokens: int, rules: ScoreRules) -> Tensor:
        """0 where a query sees a text column, else -inf: (B, 1, 1, 1, m, S)."""
        key = (rules.window, "text")
        if key not in self._biases:
            self._biases[key] = self._text_bias(length, tokens, rules)
        return self._biases[key]

    def block_bias(
        self, length: int, tokens: int, rules: ScoreRules, device: torch.device
    ) -> Tensor:
        """0 where a query sees a token of its block, else -inf: (m, L)."""
        key = (rules.window, "own")
        if key not in self._biases:
            self._biases[key] = self._block_bias(length, tokens, rules, device)
        return self._biases[key]

    def _text_bias(self, length: int, tokens: int, rules: ScoreRules) -> Tensor:
        first = self.cache.first
        column = torch.arange(length, device=first.device)
        hidden = (column < first[:, None])[:, None]  # (B, 1, S)
        if rules.window is not None:
            query = self._places(tokens, first.device)[:, None]  # (m, 1)
            hidden = hidden | (query - column >= rules.window)
        bias = torch.zeros(hidden.shape, device=first.device).masked_fill_(hidden, -math.inf)
        return bias[:, None, None, None]

    def _block_bias(
        self, length: int, tokens: int, rules: ScoreRules, device: torch.device
    ) -> Tensor:
        key = self.cache.length + int(self.new_text) + torch.arange(length, device=device)
        query = self._places(tokens, device)[:, None]
        hidden = key > query
        if rules.window is not None:
            hidden = hidden | (query - key >= rules.window)
        return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -math.inf)

    def _places(self, tokens: int, device: torch.device) -> Tensor:
        """Column of each query, as if its block went on behind the text."""
        start = self.cache.length if self.new_text else self.cache.length + (self.index or 0)
        return start + torch.arange(tokens, device=device)


def _attend(
    q: Tensor,
    text: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor] | None,
    rules: ScoreRules,
    rows: DecodePass,
) -> Tensor:
    """Attention of few queries, (B, H, K, m, d), by plain products; (B, H, K * m, dv)."""
    batch, heads, thoughts, tokens, _ = q.shape
    kv_heads, length = text[0].shape[1:3]
    q = q.reshape(batch, kv_heads, heads // kv_heads, thoughts, tokens, -1)
    flat = q.flatten(2, 4)  # (B, Hkv, G * K * m, d)
    scores = at_least_float32(flat @ text[0].transpose(-1, -2)).view(*q.shape[:-1], length)
    scores = softcapped(scores * rules.scale, rules) + rows.text_bias(length, tokens, rules)
    if own is not None:
        by_block = at_least_float32(q @ own[0].unsqueeze(2).transpose(-1, -2))
        block_length = own[0].shape[3]
        bias = rows.block_bias(block_length, tokens, rules, q.device)
        scores = torch.cat([scores, softcapped(by_block * rules.scale, rules) + bias], dim=-1)
    weights = softmax_with_sinks(scores, rules.sinks).to(text[1].dtype)
    out = (weights[..., :length].flatten(2, 4) @ text[1]).view(*q.shape[:-1], -1)
    if own is not None:
        out = out + weights[..., length:] @ own[1].unsqueeze(2)
    return out.flatten(3, 4).flatten(1, 2)
