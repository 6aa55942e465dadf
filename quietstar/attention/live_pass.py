"""Attention of thoughts at a few positions that grow token by token and leave when they have ended.

Every row is one thought that is alive. Rows of one text share its keys and values, which are never
copied; a thought's own lie in a cache that grows. All queries of a text make one product with its
keys, so that reading these costs the same for one thought as for many. Scores are joined by hand,
so soft caps, windows and sinks need no path of their own.

Letters as in `quietstar.attention.layout`; N rows are alive.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from quietstar.attention.block_attention import inner_dtype
from quietstar.attention.dense import ScoreRules, softcapped
from quietstar.attention.kernels import at_least_float32
from quietstar.attention.layout import to_device
from quietstar.attention.passes import Pair, TextKeys

_ROOM = 32
"""Tokens for which a cache has room at first; it doubles when they are full."""


class LiveCache:
    """Keys and values of texts, and of the thoughts that are alive, by attention layer.

    Args:
        text: Of each layer, (B, Hkv, S, .), as far as any row sees them.
        owners: Text of each row, on the host.
        places: Last text token that each row sees, likewise; virtual tokens before the text count.
    """

    def __init__(
        self, text: TextKeys, owners: Int[np.ndarray, " rows"], places: Int[np.ndarray, " rows"]
    ) -> None:
        self.text = {
            layer: tuple(x.detach().to(inner_dtype(x)) for x in pair)
            for layer, pair in text.items()
        }
        self.own: TextKeys = {}
        self.length = 0  # tokens of every thought so far, those that open it included
        self._owners, self._places = owners, places
        self._lay_out()

    def _lay_out(self) -> None:
        """Give every row a slot among those of its text."""
        owners, text_k = self._owners, next(iter(self.text.values()))[0]
        order = np.argsort(owners, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order)) - np.searchsorted(owners[order], owners[order])
        self.num_slots = int(rank.max()) + 1
        slots = owners * self.num_slots + rank
        slot_places = np.zeros(len(text_k) * self.num_slots, dtype=np.int64)
        slot_places[slots] = self._places
        # Copied at once, for a device takes as long for a few numbers.
        parts = to_device(np.concatenate([slots, self._places, slot_places]), text_k.device)
        self.slots, self.places, slot_places = parts.split([len(slots)] * 2 + [len(slot_places)])
        self.slot_places = slot_places.view(len(text_k), self.num_slots)
        self.hidden: dict[int | None, Tensor] = {}  # by window, of the current pass

    def repeat(self, times: int) -> None:
        """Let every row become so many, in the order (times, rows)."""
        for layer, pair in self.own.items():
            self.own[layer] = tuple(x.repeat(times, 1, 1, 1) for x in pair)  # pyright: ignore
        self._owners, self._places = np.tile(self._owners, times), np.tile(self._places, times)
        self._lay_out()

    def move(
        self, sources: Int[np.ndarray, " moved"], targets: Int[np.ndarray, " moved"], n: int
    ) -> None:
        """Let some rows take the places of others, and forget all but the first ``n``."""
        moved = to_device(np.stack([sources, targets]), self.slots.device)
        for layer, pair in self.own.items():
            for x in pair if len(sources) else ():
                x[moved[1], :, : self.length] = x[moved[0], :, : self.length]
            self.own[layer] = (pair[0][:n], pair[1][:n])
        for x in (self._owners, self._places):
            x[targets] = x[sources]
        self._owners, self._places = self._owners[:n], self._places[:n]
        self._lay_out()

    def store(self, layer: int, k: Tensor, v: Tensor) -> Pair:
        """Add tokens to all rows, (N, Hkv, m, .); returns all so far, views."""
        stop = self.length + k.shape[2]
        pair = self.own.get(layer)
        if pair is None or pair[0].shape[2] < stop:
            room = _ROOM if pair is None else pair[0].shape[2]
            while room < stop:
                room *= 2
            grown = [x.new_empty(*x.shape[:2], room, x.shape[3], dtype=inner_dtype(x))
                     for x in (k, v)]  # fmt: skip
            for new, old in zip(grown, pair or (), strict=False):
                new[:, :, : old.shape[2]] = old
            pair = self.own[layer] = (grown[0], grown[1])
        for cache, new in zip(pair, (k, v), strict=True):
            cache[:, :, self.length : stop] = new
        return pair[0][:, :, :stop], pair[1][:, :, :stop]


class LiveStep:
    """The next tokens of every row against its text and its own thought so far.

    After it has gone through all layers, `LiveCache.length` must grow by the tokens that ran.
    """

    def __init__(self, cache: LiveCache) -> None:
        self.cache, self._layers = cache, iter(cache.text)
        cache.hidden.clear()

    def attend(self, layer: object, q: Tensor, k: Tensor, v: Tensor, rules: ScoreRules) -> Tensor:
        """As `Pass`, for the next layer in the order in which they saw the text."""
        layer_id, cache = next(self._layers), self.cache
        text_k, text_v = cache.text[layer_id]
        own_k, own_v = cache.store(layer_id, k, v)
        shape, (num_texts, kv_heads), tokens = q.shape, text_k.shape[:2], q.shape[2]
        q = q.to(own_k.dtype).reshape(shape[0], kv_heads, -1, shape[3])  # (N, Hkv, (g m), d)
        groups = q.shape[2] // tokens

        with torch.autocast(q.device.type, enabled=False):  # it would cast the keys every time
            by_slot = q.new_zeros(num_texts * cache.num_slots, *q.shape[1:])
            by_slot = by_slot.index_copy(0, cache.slots, q).unflatten(0, (num_texts, -1))
            by_text = by_slot.transpose(1, 2).flatten(2, 3)  # (B, Hkv, (slots g m), d)
            scores = at_least_float32(by_text @ text_k.mT) * rules.scale
            scores = softcapped(scores, rules).unflatten(2, (-1, groups, tokens))
            scores.masked_fill_(self._hidden(tokens, text_k.shape[2], rules.window), -math.inf)
            lse = scores.logsumexp(-1, keepdim=True)
            # A window may hide the whole text; its weight is zero then, not a ratio of zeros.
            weights = (scores - lse.clamp(min=torch.finfo(lse.dtype).min)).exp_()
            text_out = weights.flatten(2, 4).to(text_v.dtype) @ text_v
            text_out, lse = (
                x.view(*by_slot.shape[:1], kv_heads, cache.num_slots, q.shape[2], -1)
                .transpose(1, 2).flatten(0, 1)[cache.slots]
                for x in (text_out, lse)
            )  # fmt: skip

            own = softcapped(at_least_float32(q @ own_k.mT) * rules.scale, rules)
            own = own.unflatten(2, (groups, tokens))
            length = own_k.shape[2]
            age = torch.arange(length - tokens, length, device=q.device)[:, None]
            age = age - torch.arange(length, device=q.device)
            if tokens > 1:
                own = own.masked_fill(age < 0, -math.inf)
            if rules.window is not None:
                own = own.masked_fill(age >= rules.window, -math.inf)
            columns = [own.flatten(2, 3), lse.to(own.dtype)]
            if rules.sinks is not None:
                sinks = rules.sinks.to(own.dtype).view(kv_heads, groups, 1)
                sinks = sinks.expand(-1, -1, tokens).reshape(1, kv_heads, -1, 1)
                columns.append(sinks.expand(shape[0], -1, -1, -1))
            weights = torch.cat(columns, -1).softmax(-1).to(own_v.dtype)
            out = weights[..., :length] @ own_v
            out = out.addcmul_(text_out, weights[..., length : length + 1])
        return out.view(*shape[:3], -1).to(v.dtype)

    def _hidden(self, tokens: int, num_keys: int, window: int | None) -> Tensor:
        """Which text keys the slots do not see, (B, 1, slots, 1, m, S)."""
        hidden = self.cache.hidden.get(window)
        if hidden is None:
            places = self.cache.slot_places[:, None, :, None, None, None]
            key = torch.arange(num_keys, device=places.device)
            hidden = key > places
            if window is not None:
                step = torch.arange(tokens, device=places.device)[:, None] + self.cache.length
                hidden = hidden | (places + 1 + step - key >= window)
            self.cache.hidden[window] = hidden
        return hidden
