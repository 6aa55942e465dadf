"""Thinking before each new token: cached texts, thoughts that are dropped after use.

T + 1 passes a token: the last token and the start vectors together, the thought tokens but the last
one by one, and the last thought token with the end vectors. Where thoughts may end early, the end
vectors have passes of their own, as many as the longest thought needs. Keys and values of the text
stay, those of the thoughts are overwritten at the next token, so memory does not grow with their
number. Letters as in `quietstar.attention.layout`.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from itertools import repeat

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.attention.decode_pass import DecodeCache, DecodePass
from quietstar.attention.layout import NO_TOKEN, on_host
from quietstar.backbone.output_head import OutputHead
from quietstar.backbone.run import embedding_weight, num_virtual, run_backbone, run_text
from quietstar.sampling.noise import thought_noise
from quietstar.sampling.rollout import LOOK_EVERY, sample_logits, sample_rows
from quietstar.sampling.stopping import StopTexts
from quietstar.sampling.thoughts import Sampling


@dataclass(frozen=True)
class Appended:
    """What is known after the newest tokens, before any thought.

    Attributes:
        states: Final states of the texts.
        logits: The plain model's, of the next tokens.
        opened: Logits after the start vectors; None where they were not run.
    """

    states: Float[Tensor, "batch width"]
    logits: Float[Tensor, "batch vocab"]
    opened: Float[Tensor, "batch vocab"] | None


class Decoder:
    """Texts that grow by one token at a time, with thoughts before each.

    Args:
        model: A causal LM whose attention implementation is ``quietstar``.
        head: Its output head, for the thought tokens.
        start, end: Open and close every thought.
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
        start: Float[Tensor, "start embedding"],
        end: Float[Tensor, "end embedding"],
        sampling: Sampling,
        input_ids: Int[Tensor, "batch seq"],
        real: Bool[Tensor, "batch seq"],
        sample_ids: Int[Tensor, " batch"],
        constant: int | None = None,
    ) -> None:
        self.model, self.head, self.sampling, self.constant = model, head, sampling, constant
        self.embed = model.get_input_embeddings()
        dtype = embedding_weight(model).dtype
        self.start, self.end = start.to(dtype), end.to(dtype)
        self.sample_ids = sample_ids
        first = input_ids.shape[1] - real.sum(1)
        text = _aligned_text(model, input_ids, first)
        block_length = len(start) + sampling.thought_length + len(end)
        self.cache = DecodeCache(text, first, sampling.num_thoughts, block_length)
        self.virtual = num_virtual(model)

    @torch.no_grad()
    def append(self, tokens: Int[Tensor, " batch"], opens: bool) -> Appended:
        """Append a token to every text; with ``opens`` the start vectors run too, for `think`."""
        embedded = self.embed(tokens)[:, None]  # (B, 1, embedding)
        if opens:
            start = self.start.expand(tokens.shape[0], -1, -1)
            embedded = torch.cat([embedded, start], dim=1)
        states = self._run(self.cache, embedded, True, 0 if opens else None)
        self.cache.length += 1
        states = torch.stack([states[:, 0], states[:, -1]], 1) if opens else states
        logits = self.head.logits(states)  # of both at once: the head's weight is read once
        return Appended(states[:, 0], logits[:, 0], logits[:, 1] if opens else None)

    @torch.no_grad()
    def think(
        self, appended: Appended, rows: Int[Tensor, " rows"] | None = None
    ) -> tuple[Float[Tensor, "thoughts rows width"], Int[Tensor, "rows thoughts length"]]:
        """Think after the newest token of every text, or of these rows only.

        The texts of some rows are copied once a token; thoughts cost what their rows cost. Needs
        `append` with ``opens``; returns the state of the last end vector after each thought, and
        the tokens of the thoughts.
        """
        cache, first, sample_ids = self.cache, appended.opened, self.sample_ids
        assert first is not None, "append with opens"
        if rows is not None:
            cache, first, sample_ids = cache.select_rows(rows), first[rows], sample_ids[rows]
        noise = self._noise(cache, sample_ids)
        thoughts = [self._draw(first, 0, next(noise))]
        length = self.sampling.thought_length
        if self.sampling.stop is not None and self.constant is None:
            return self._think_to_the_end(self.sampling.stop, cache, thoughts[0], noise)
        before = len(self.start) - 1  # a thought's token n has the place before + n in its block
        for index in range(1, length):
            states = self._run(cache, self.embed(thoughts[-1]), False, before + index)
            thoughts.append(self._draw(states, index, next(noise)))
        embedded = self.embed(thoughts[-1]).unsqueeze(2)  # (B, K, 1, embedding)
        end = self.end.expand(*embedded.shape[:2], -1, -1)
        last = torch.cat([embedded, end], dim=2).flatten(1, 2)
        ahead = self._run(cache, last, False, before + length)
        ahead = ahead.unflatten(1, (-1, 1 + len(self.end)))[:, :, -1]
        return ahead.transpose(0, 1), torch.stack(thoughts, dim=-1)

    @torch.no_grad()
    def read(
        self,
        thoughts: Int[Tensor, "rows thoughts length"],
        rows: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "thoughts rows width"]:
        """Run other thoughts in the place of those of the last `think`; states as it returns them.

        In one pass; `NO_TOKEN` stands after the end of a thought, which may have no token.
        """
        cache = self.cache if rows is None else self.cache.select_rows(rows)
        lengths, num_end = (thoughts != NO_TOKEN).sum(-1), len(self.end)  # (B, K)
        column = torch.arange(thoughts.shape[-1] + num_end, device=thoughts.device)
        behind = column - lengths.unsqueeze(-1)  # place among the end vectors, (B, K, m)
        tokens = torch.nn.functional.pad(thoughts, (0, num_end)).clamp(min=0)
        end = self.end[behind.clamp(0, num_end - 1)]
        embedded = torch.where((behind >= 0).unsqueeze(-1), end, self.embed(tokens))
        states = self._run(cache, embedded.flatten(1, 2), False, len(self.start))
        states = states.unflatten(1, (thoughts.shape[1], -1))  # (B, K, m, D)
        last = (lengths + num_end - 1)[..., None, None].expand(-1, -1, 1, states.shape[-1])
        return states.gather(2, last).squeeze(2).transpose(0, 1)

    def go_on(self, thoughts: Int[Tensor, "batch thoughts length"]) -> Decoder:
        """Make a decoder of the texts as they go on after these thoughts, read by `read` before.

        Its rows are (B * K). It appends tokens after the end vectors, and thinks no more.
        """
        other = copy(self)
        used = len(self.start) + (thoughts != NO_TOKEN).sum(-1) + len(self.end)
        other.cache = self.cache.with_blocks(used)
        other.sample_ids = self.sample_ids.repeat_interleave(thoughts.shape[1])
        return other

    def without_thoughts(self, count: int) -> Decoder:
        """Make a decoder of every text so many times in a row, which thinks no more."""
        other = copy(self)
        other.cache = self.cache.repeated(count)
        other.sample_ids = self.sample_ids.repeat_interleave(count)
        return other

    def _think_to_the_end(
        self, stop: StopTexts, cache: DecodeCache, first: Tensor, noise: Iterator[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Go on with thoughts of one token, each until it has ended; results as of `think`.

        The end vectors stand directly after a thought's last token, so each has its own steps for
        them; what follows is seen by nothing that is read. Where half of the texts are done, the
        others go on without them.
        """
        length, num_end, before = self.sampling.thought_length, len(self.end), len(self.start) - 1
        thoughts = first.new_full((*first.shape, length), NO_TOKEN)
        thoughts[..., 0] = last = first
        rows = torch.arange(len(first), device=first.device)
        state = stop.step(torch.zeros_like(first), first)
        closing = torch.zeros_like(state)  # end vectors that are next or have run
        ahead: Tensor | None = None
        for index in range(1, length + num_end + 1):
            end = self.end[(closing - 1).clamp(0, num_end - 1)]
            is_closing = (closing > 0).unsqueeze(-1)
            embedded = torch.where(is_closing, end, self.embed(last.clamp(min=0)))
            states = self._run(cache, embedded, False, before + index)
            if ahead is None:
                ahead = states.clone()
            is_last = (closing == num_end).unsqueeze(-1)
            ahead[rows] = torch.where(is_last, states, ahead[rows])
            ended = (state == stop.ended) | (index >= length)
            closing = closing + ended.long()
            if on_host(closing) or index % LOOK_EVERY == 0:
                left = (closing <= num_end).any(1).nonzero().squeeze(1)
                if not len(left):
                    break
                if 2 * len(left) <= len(rows):
                    cache, rows = cache.select_rows(left), rows[left]
                    state, closing, ended, states, last = (
                        x[left] for x in (state, closing, ended, states, last)
                    )
            if index < length:
                last = self._draw(states, index, next(noise)[rows]).where(~ended, NO_TOKEN)
                state = stop.step(state, last).where(~ended, stop.ended)
                thoughts[rows, :, index] = last
        assert ahead is not None, "a thought has a token"
        return ahead.transpose(0, 1), thoughts

    def _run(
        self, cache: DecodeCache, embedded: Tensor, new_text: bool, index: int | None
    ) -> Tensor:
        """States of tokens (B, K * m, embedding)."""
        thoughts = 1 if new_text else cache.num_thoughts
        num_tokens = embedded.shape[1] // thoughts
        step = DecodePass(cache, new_text, index)
        offset = step.start + torch.arange(num_tokens, device=embedded.device)
        places = offset - cache.first[:, None]  # (B, m)
        places = places if thoughts == 1 else places.repeat(1, thoughts)
        return run_backbone(self.model, embedded, places, step)

    def _noise(self, cache: DecodeCache, sample_ids: Tensor) -> Iterator[Tensor]:
        """The noise of one token after the other, (B, K), as training would have it here."""
        sampling, shape = self.sampling, (len(sample_ids), self.sampling.num_thoughts)
        if self.constant is not None or sampling.temperature is None:  # which need none
            return repeat(torch.empty(shape, device=sample_ids.device))
        place = (cache.length - 1 - cache.first - self.virtual)[:, None]  # (B, 1)
        tokens = range(sampling.thought_length)
        noise = thought_noise(sampling.seed, sample_ids, sampling.num_thoughts, tokens, place)
        return (x[..., 0].T for x in noise)  # (K, B, 1) -> (B, K)

    def _draw(
        self, x: Tensor, index: int, noise: Float[Tensor, "rows thoughts"]
    ) -> Int[Tensor, "rows thoughts"]:
        """The next token of every thought.

        From states (B, K, D); the first token from logits (B, V), for all thoughts see the same.
        """
        if self.constant is not None:
            return torch.full_like(noise, self.constant, dtype=torch.long)
        if index == 0:
            logits = x[:, : self.head.vocab_size].clone()
            return sample_logits(logits, noise, self.sampling)
        flat = noise.flatten().unsqueeze(1)
        return sample_rows(x.flatten(0, 1), self.head, flat, self.sampling).view(noise.shape)


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
    text = run_text(model, input_ids.gather(1, moved)).keys
    if not first.any():
        return text
    length = next(iter(text.values()))[0].shape[2]
    column = torch.arange(length, device=input_ids.device)
    back = ((column - first[:, None]) % length)[:, None, :, None]  # (B, 1, S, 1)
    return {
        layer: tuple(x.gather(2, back.expand(-1, x.shape[1], -1, x.shape[3])) for x in pair)
        for layer, pair in text.items()
    }  # pyright: ignore[reportReturnType]
