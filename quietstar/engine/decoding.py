"""Thinking before each new token: cached texts, thoughts that are dropped after use.

T + 1 passes a token: the last token and the start vector together, the thought tokens but the last
one by one, and the last thought token with the end vector. Keys and values of the text stay, those
of the thoughts are overwritten at the next token, so memory does not grow with their number.

Rows are aligned on the right: every row's last token lies in the same column of the cache, and
columns before a row's first token are never seen. Letters as in `quietstar.engine.layout`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.engine.backbone import embedding_weight, num_virtual, run_backbone
from quietstar.engine.dense import ScoreRules, softcapped, softmax_with_sinks
from quietstar.engine.rollout import Sampling, run_text, sample_rows
from quietstar.engine.sampling import keyed_uniform
from quietstar.losses.output_head import OutputHead
from quietstar.precision import at_least_float32

_ROOM = 128
"""Columns by which the cache of a text grows."""


@dataclass(frozen=True)
class Decoded:
    """What a step knows of the next token of every row.

    Attributes:
        text: State of the last token.
        ahead: State of the end vector behind each thought.
        thoughts: Their tokens.
    """

    text: Float[Tensor, "batch width"]
    ahead: Float[Tensor, "thoughts batch width"]
    thoughts: Int[Tensor, "batch thoughts length"]


class DecodeCache:
    """Keys and values by attention layer, of the texts and of the thoughts at hand.

    Args:
        text: Of each layer, (B, Hkv, S, .), as a text pass left them, aligned on the right.
        first: Column of each row's first token, (B,).
        num_thoughts: K.
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

    def add_text(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest token, (B, Hkv, 1, .); returns all up to it."""
        pair = self.text.get(layer)
        if pair is None or pair[0].shape[2] == self.length:
            old_k, old_v = pair or (None, None)
            pair = self.text[layer] = (self._grown(old_k, k), self._grown(old_v, v))
        for cache, new in zip(pair, (k, v), strict=True):
            cache[:, :, self.length : self.length + 1] = new
        return self.seen_text(layer, self.length + 1)

    def _grown(self, old: Tensor | None, x: Tensor) -> Tensor:
        room = x.new_empty(*x.shape[:2], self.length + _ROOM, x.shape[3])
        if old is not None:
            room[:, :, : self.length] = old
        return room

    def seen_text(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first columns, views."""
        k, v = self.text[layer]
        return k[:, :, :length], v[:, :, :length]

    def add_own(self, layer: int, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
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
        cache: Of the rows.
        new_text: Whether the first token of each row is one of the text.
        index: Place of the first block token in its block; None where there is none.
    """

    def __init__(self, cache: DecodeCache, new_text: bool, index: int | None) -> None:
        self.cache, self.new_text, self.index = cache, new_text, index

    def attend(self, layer, q, k, v, rules):  # noqa: D102  (see Pass)
        cache, thoughts = self.cache, 1 if self.new_text else self.cache.num_thoughts
        if self.new_text:
            text = cache.add_text(id(layer), k[:, :, :1], v[:, :, :1])
        else:
            text = cache.seen_text(id(layer), cache.length)
        own = None
        if self.index is not None:
            blocks = (x[:, :, int(self.new_text) :].unflatten(2, (thoughts, -1)) for x in (k, v))
            own = cache.add_own(id(layer), self.index, *blocks)
            own = (own[0][:, :, :thoughts], own[1][:, :, :thoughts])
        return _attend(q.unflatten(2, (thoughts, -1)), text, own, rules, self)

    def text_bias(self, length: int, tokens: int, rules: ScoreRules) -> Tensor:
        """0 where a query sees a text column, else -inf: (B, 1, 1, 1, m, S)."""
        first = self.cache.first
        column = torch.arange(length, device=first.device)
        hidden = (column < first[:, None])[:, None]  # (B, 1, S)
        if rules.window is not None:
            query = self._places(tokens, first.device)[:, None]  # (m, 1)
            hidden = hidden | (query - column >= rules.window)
        bias = torch.zeros(hidden.shape, device=first.device).masked_fill_(hidden, -math.inf)
        return bias[:, None, None, None]

    def own_bias(self, length: int, tokens: int, rules: ScoreRules, device: torch.device) -> Tensor:
        """0 where a query sees a token of its block, else -inf: (m, L)."""
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
        own_length = own[0].shape[3]
        bias = rows.own_bias(own_length, tokens, rules, q.device)
        scores = torch.cat([scores, softcapped(by_block * rules.scale, rules) + bias], dim=-1)
    weights = softmax_with_sinks(scores, rules.sinks).to(text[1].dtype)
    out = (weights[..., :length].flatten(2, 4) @ text[1]).view(*q.shape[:-1], -1)
    if own is not None:
        out = out + weights[..., length:] @ own[1].unsqueeze(2)
    return out.flatten(3, 4).flatten(1, 2)


class Decoder:
    """Texts that grow by one token at a time, with thoughts before each.

    Args:
        model: A causal LM whose attention implementation is ``quietstar``.
        head: Its output head, for the thought tokens.
        start_embedding: Opens every thought.
        end_embedding: Closes every thought.
        sampling: Number, length, temperature and seed of the thoughts.
        input_ids: All tokens of the texts but their last, padded on the left.
        real: False at padding.
        sample_ids: Index of each text; with the seed it keys the noise.
        constant: Stands for every thought token instead of sampled ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: OutputHead,
        start_embedding: Float[Tensor, " embedding"],
        end_embedding: Float[Tensor, " embedding"],
        sampling: Sampling,
        input_ids: Int[Tensor, "batch seq"],
        real: Bool[Tensor, "batch seq"],
        sample_ids: Int[Tensor, " batch"],
        constant: int | None = None,
    ) -> None:
        self.model, self.head, self.sampling = model, head, sampling
        self.constant = constant
        self.embed = model.get_input_embeddings()
        dtype = embedding_weight(model).dtype
        self.start, self.end = start_embedding.to(dtype), end_embedding.to(dtype)
        self.sample_ids = sample_ids
        first = input_ids.shape[1] - real.sum(1)
        text = _aligned_text(model, input_ids, first)
        block_length = sampling.thought_length + 2
        self.cache = DecodeCache(text, first, sampling.num_thoughts, block_length)
        self.virtual = num_virtual(model)

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, " batch"], think: bool = True) -> Decoded:
        """Append a token to every text, think behind it.

        Args:
            tokens: The next of each text.
            think: Without it no thought is made: ``ahead`` is that of no thoughts, (0, B, D).
        """
        batch = tokens.shape[0]
        embedded = self.embed(tokens)[:, None]  # (B, 1, embedding)
        if not think:
            states = self._run(embedded, True, None)
            self.cache.length += 1
            empty = tokens.new_empty(batch, 0, self.sampling.thought_length)
            return Decoded(states[:, 0], states.new_empty(0, batch, states.shape[-1]), empty)
        start = self.start.expand(batch, 1, -1)
        states = self._run(torch.cat([embedded, start], dim=1), True, 0)
        self.cache.length += 1
        text, last = states[:, 0], states[:, 1:].expand(-1, self.sampling.num_thoughts, -1)
        thoughts = []
        for index in range(self.sampling.thought_length):
            thoughts.append(self._draw(last, index))
            if index < self.sampling.thought_length - 1:
                last = self._run(self.embed(thoughts[-1]), False, index + 1)
        ahead = self._close(thoughts[-1])
        return Decoded(text, ahead.transpose(0, 1), torch.stack(thoughts, dim=-1))

    def _close(self, tokens: Int[Tensor, "batch thoughts"]) -> Tensor:
        """Run the last thought token and the end vector; the latter's state, (B, K, D)."""
        embedded = self.embed(tokens).unsqueeze(2)  # (B, K, 1, embedding)
        end = self.end.expand(*embedded.shape)
        pairs = torch.cat([embedded, end], dim=2).flatten(1, 2)  # (B, K * 2, embedding)
        states = self._run(pairs, False, self.sampling.thought_length)
        return states.unflatten(1, (-1, 2))[:, :, 1]

    def _run(self, embedded: Tensor, new_text: bool, index: int | None) -> Tensor:
        """States of tokens (B, K * m, embedding)."""
        cache, device = self.cache, embedded.device
        num_tokens = embedded.shape[1] // (1 if new_text else cache.num_thoughts)
        offset = torch.arange(num_tokens, device=device) + (0 if new_text else index or 0)
        places = (cache.length - cache.first)[:, None] + offset  # (B, m)
        places = places.repeat(1, embedded.shape[1] // num_tokens)
        return run_backbone(self.model, embedded, places, DecodePass(cache, new_text, index))

    def _draw(self, states: Tensor, index: int) -> Int[Tensor, "batch thoughts"]:
        """The next token of every thought, by the noise that training would use here."""
        if self.constant is not None:
            return self.sample_ids.new_full(states.shape[:2], self.constant)
        place = (self.cache.length - 1 - self.cache.first - self.virtual)[:, None]  # (B, 1)
        sampling = self.sampling
        noise = keyed_uniform(sampling.seed, self.sample_ids, sampling.num_thoughts, index, place)
        noise = noise[..., 0].transpose(0, 1).flatten()  # (K, B, 1) -> (B * K)
        rows = sample_rows(states.flatten(0, 1), self.head, noise, sampling.temperature)
        return rows.view(states.shape[:2])


def _aligned_text(
    model: PreTrainedModel, input_ids: Tensor, first: Tensor
) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of texts (and virtual tokens), every row's last token in the last column.

    The pass itself takes texts padded on the right, where causal attention does not see it.
    """
    if input_ids.shape[1] + num_virtual(model) == 0:
        return {}
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    moved = (column + first[:, None]) % max(len(column), 1)
    text = run_text(model, input_ids.gather(1, moved), 1).cache.text
    if not first.any():
        return text
    length = next(iter(text.values()))[0].shape[2]
    column = torch.arange(length, device=input_ids.device)
    back = ((column - first[:, None]) % length)[:, None, :, None]  # (B, 1, S, 1)
    return {
        layer: tuple(x.gather(2, back.expand(-1, x.shape[1], -1, x.shape[3])) for x in pair)
        for layer, pair in text.items()
    }  # pyright: ignore[reportReturnType]
