"""Attention while a text is generated: few tokens against cached keys and values.

Rows are aligned on the right: every row's last token lies in the same column of the cache, and
columns before a row's first token are never seen. Letters as in `quietstar.attention.layout`.

A single thought lies in the columns after its text, where the text's next token will overwrite it,
so that torch's own attention serves. Several thoughts share their text and have columns of their
own; their scores are joined by hand, and so are those with a soft cap or sinks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from quietstar.attention.dense import softcapped, softmax_with_sinks
from quietstar.attention.kernels import at_least_float32
from quietstar.attention.passes import Pair, TextKeys

_ROOM = 128
"""Columns by which the cache of a text grows."""


class DecodeCache:
    """Keys and values by attention layer, of the texts and of the current thoughts.

    Args:
        text: Of each layer, (B, Hkv, S, .), as a text pass left them, aligned on the right.
        first: Column of each row's first token, (B,).
        num_thoughts: Thoughts at each token, K.
        block_length: Tokens of a block: start, the thought, end.
    """

    def __init__(
        self, text: TextKeys, first: Int[Tensor, " batch"], num_thoughts: int, block_length: int
    ) -> None:
        self.text, self.first = text, first
        self.blocks: TextKeys = {}
        self.num_thoughts, self.block_length = num_thoughts, block_length
        self.length = next((k.shape[2] for k, _ in text.values()), 0)
        self.is_padded = bool(first.any())

    def select_rows(self, rows: Int[Tensor, " rows"]) -> DecodeCache:
        """Copy some rows, for the thoughts of this token alone."""
        stop = self.length + self.block_length
        text = {layer: (k[rows, :, :stop], v[rows, :, :stop])
                for layer, (k, v) in self.text.items()}  # fmt: skip
        selected = DecodeCache(text, self.first[rows], self.num_thoughts, self.block_length)
        selected.length = self.length
        selected.blocks = {layer: (k[rows], v[rows]) for layer, (k, v) in self.blocks.items()}
        return selected

    def with_blocks(self, used: Int[Tensor, "batch thoughts"]) -> DecodeCache:
        """Copy every text once for each of its blocks, the first ``used`` tokens of which join it.

        Rows are (B * K), aligned on the right again.
        """
        used = used.flatten()
        rows = torch.arange(len(used), device=used.device)[:, None]
        length = self.length + self.block_length
        shift = self.block_length - used  # columns by which a row moves
        source = (torch.arange(length, device=used.device) - shift[:, None]).clamp(min=0)

        def join(text: Tensor, block: Tensor | None) -> Tensor:
            if block is None:  # of the only thought, in the columns after its text
                joined = text[:, :, :length]
            else:
                text = text[:, :, None, : self.length].expand(-1, -1, self.num_thoughts, -1, -1)
                joined = torch.cat([text, block], dim=3).transpose(1, 2).flatten(0, 1)
            return joined.transpose(1, 2)[rows, source].transpose(1, 2)  # (B K, Hkv, columns, .)

        text = {}
        for layer, (k, v) in self.text.items():
            block_k, block_v = self.blocks.get(layer, (None, None))
            text[layer] = (join(k, block_k), join(v, block_v))
        first = self.first.repeat_interleave(self.num_thoughts) + shift
        return DecodeCache(text, first, num_thoughts=1, block_length=0)

    def repeated(self, count: int) -> DecodeCache:
        """Copy every text so many times in a row, without its blocks."""

        def copy(x: Tensor) -> Tensor:
            return x[:, :, : self.length].repeat_interleave(count, dim=0)

        text = {layer: (copy(k), copy(v)) for layer, (k, v) in self.text.items()}
        first = self.first.repeat_interleave(count)
        return DecodeCache(text, first, num_thoughts=1, block_length=0)

    def add_text(self, layer: int, start: int, k: Tensor, v: Tensor) -> Pair:
        """Store tokens from a column on, (B, Hkv, m, .); returns all up to them, views."""
        stop = start + k.shape[2]
        pair = self.text.get(layer)
        if pair is None or pair[0].shape[2] < stop:  # room for more, and for a block after them
            columns = self.length + _ROOM + self.block_length
            grown = [x.new_empty(*x.shape[:2], columns, x.shape[3]) for x in (k, v)]
            for new, old in zip(grown, pair or (), strict=False):
                new[:, :, : old.shape[2]] = old
            pair = self.text[layer] = (grown[0], grown[1])
        for cache, new in zip(pair, (k, v), strict=True):
            cache[:, :, start:stop] = new
        return pair[0][:, :, :stop], pair[1][:, :, :stop]

    def add_block(self, layer: int, index: int, k: Tensor, v: Tensor) -> Pair:
        """Store tokens of every block, (B, Hkv, K or 1, m, .); returns the blocks so far."""
        if layer not in self.blocks:
            shape = (*k.shape[:2], self.num_thoughts, self.block_length)
            self.blocks[layer] = (k.new_empty(*shape, k.shape[4]), v.new_empty(*shape, v.shape[4]))
        stop = index + k.shape[3]
        keys, values = self.blocks[layer]
        keys[:, :, :, index:stop] = k
        values[:, :, :, index:stop] = v
        return keys[:, :, :, :stop], values[:, :, :, :stop]


class DecodePass:
    """Some tokens of every row against its text and their own blocks.

    Args:
        cache: Keys and values of the rows.
        new_text: Whether the first token of each row is one of the text.
        index: Place of the first block token in its block; None where there is none.

    Attributes:
        start: Column of the first token, as if its block went on after the text.
    """

    def __init__(self, cache: DecodeCache, new_text: bool, index: int | None) -> None:
        self.cache, self.new_text, self.index = cache, new_text, index
        self.start = cache.length + (0 if new_text else index or 0)
        self._seen: dict[int | None, Tensor] = {}  # by window; the same in most layers

    def attend(self, layer, q, k, v, rules):  # noqa: D102  (see Pass)
        cache, new_text = self.cache, self.new_text
        if cache.num_thoughts == 1 and rules.softcap is None and rules.sinks is None:
            keys, values = cache.add_text(id(layer), self.start, k, v)
            mask = None  # a single token sees all columns
            if q.shape[2] > 1 or rules.window is not None or cache.is_padded:
                mask = self._sees(keys.shape[2], q.shape[2], rules.window)
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask, scale=rules.scale, enable_gqa=grouped
            )
        if new_text:
            text = cache.add_text(id(layer), cache.length, k[:, :, :1], v[:, :, :1])
        else:
            k_text, v_text = cache.text[id(layer)]
            text = k_text[:, :, : cache.length], v_text[:, :, : cache.length]
        thoughts = 1 if new_text else cache.num_thoughts
        block = None
        if self.index is not None:
            new = (x[:, :, int(new_text) :].unflatten(2, (thoughts, -1)) for x in (k, v))
            block = [x[:, :, :thoughts] for x in cache.add_block(id(layer), self.index, *new)]
        # Few queries, by plain products: G heads share keys, m tokens a thought.
        kv_heads, length = text[0].shape[1:3]
        q = q.unflatten(2, (thoughts, -1)).unflatten(1, (kv_heads, -1))  # (B, Hkv, G, K, m, d)
        scores = at_least_float32(q.flatten(2, 4) @ text[0].mT).view(*q.shape[:-1], length)
        if block is not None:
            block_scores = at_least_float32(q @ block[0].unsqueeze(2).mT)
            scores = torch.cat([scores, block_scores], dim=-1)
        sees = self._sees(scores.shape[-1], q.shape[4], rules.window)
        scores = softcapped(scores * rules.scale, rules).where(sees[:, :, None, None], -math.inf)
        weights = softmax_with_sinks(scores, rules.sinks).to(text[1].dtype)
        out = (weights[..., :length].flatten(2, 4) @ text[1]).view(*q.shape[:-1], -1)
        if block is not None:
            out = out + weights[..., length:] @ block[1].unsqueeze(2)
        return out.flatten(3, 4).flatten(1, 2)  # (B, H, K * m, dv)

    def _sees(self, num_columns: int, num_tokens: int, window: int | None) -> Tensor:
        """Whether each token sees a column of its text or block: (B or 1, 1, m, columns)."""
        if window not in self._seen:
            first = self.cache.first
            column = torch.arange(num_columns, device=first.device)
            query = self.start + torch.arange(num_tokens, device=first.device)[:, None]
            sees = column <= query
            if window is not None:
                sees = sees & (query - column < window)
            if self.cache.is_padded:
                sees = sees & (column >= first[:, None, None])
            self._seen[window] = sees.view(-1, 1, num_tokens, num_columns)
        return self._seen[window]
