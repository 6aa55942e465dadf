"""The model's own thoughts by transformers' ``generate``: an oracle for the rollout.

A plain causal LM, one row a thought: the noise and the choice of tokens are those of the rollout,
the passes are transformers', so the thoughts are the rollout's up to the rounding of the passes.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from quietstar.attention.layout import NO_TOKEN
from quietstar.backbone.casting import cast_weights
from quietstar.backbone.run import embedding_weight
from quietstar.judging.scoring import plainly
from quietstar.sampling.noise import keyed_uniform
from quietstar.sampling.rollout import sample_logits
from quietstar.sampling.stopping import StopTexts
from quietstar.sampling.thoughts import Sampling, Texts, ThoughtBatch

_CHUNK_TOKENS = 2**14
"""Tokens of texts and thoughts at once, whose keys and values stay while a thought grows."""
_CHUNK_LOGITS = 2**23
"""Logits at once, of the rows' last tokens: 32 MiB in float32, of which there are a few copies."""


class Generate:
    """Samples thoughts from the model with transformers' ``generate``, some rows at a time."""

    @torch.no_grad()
    def sample(
        self, model: Any, texts: Texts, positions: Tensor | None, spec: Sampling
    ) -> ThoughtBatch:
        """Draw the thoughts that the rollout would."""
        ids = texts.input_ids
        places = positions
        if places is None:
            places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        shape = (*places.shape, spec.num_thoughts, spec.thought_length)
        tokens = ids.new_full(shape, 0 if spec.stop is None else NO_TOKEN)
        where = (places >= 0).unsqueeze(-1).expand(shape[:3]).nonzero()  # text, place, thought
        where = where[places[where[:, 0], where[:, 1]].argsort(descending=True)]
        lengths: list[int] = (places[where[:, 0], where[:, 1]] + 1).tolist()
        start, num_logits = 0, model.output_head.num_logits
        with plainly(model.causal_lm), cast_weights(model.causal_lm.base_model):
            while start < len(where):  # from the longest text to the shortest
                row_tokens = lengths[start] + len(model.start_vectors) + spec.thought_length
                rows = max(1, min(_CHUNK_TOKENS // row_tokens, _CHUNK_LOGITS // num_logits))
                text, place, thought = where[start : start + rows].T
                keys = (texts.sample_ids[text], places[text, place], thought)
                drawn = _generate(model, ids[text], *keys, spec)
                tokens[text, place, thought, : drawn.shape[1]] = drawn
                start += rows
        return ThoughtBatch.of_texts(texts, positions, tokens)


def _generate(
    model: Any,
    input_ids: Int[Tensor, "rows seq"],
    sample_ids: Int[Tensor, " rows"],
    positions: Int[Tensor, " rows"],
    thoughts: Int[Tensor, " rows"],
    spec: Sampling,
) -> Int[Tensor, "rows length"]:
    """Draw a thought after one position of each text; the longest text comes first.

    As many tokens as the longest thought needs; `NO_TOKEN` after the others' last.
    """
    causal_lm = model.causal_lm
    dtype = embedding_weight(causal_lm).dtype
    start = model.start_vectors.to(dtype)
    column = torch.arange(int(positions[0]) + 1, device=input_ids.device)
    place = column + (positions - positions[0]).unsqueeze(1)  # (rows, seq), padded on the left
    text = causal_lm.get_input_embeddings()(input_ids.gather(1, place.clamp(min=0)))
    opened = torch.ones_like(place[:, :1]).expand(-1, len(start))
    ends = StoppingCriteriaList()
    if spec.stop is not None:
        ends.append(_Ends(spec.stop, len(positions)))
    tokens = causal_lm.generate(
        inputs_embeds=torch.cat([text, start.expand(len(text), -1, -1)], dim=1),
        attention_mask=torch.cat([(place >= 0).long(), opened], dim=1),
        generation_config=GenerationConfig(
            max_new_tokens=spec.thought_length, do_sample=False, pad_token_id=0, use_cache=True
        ),
        logits_processor=LogitsProcessorList(
            [_Draw(spec, model.vocab_size, sample_ids, positions, thoughts)]
        ),
        stopping_criteria=ends,
    )
    if spec.stop is not None:
        state = torch.zeros_like(positions)
        for index, drawn in enumerate(tokens.unbind(1)):
            tokens[:, index] = drawn.where(state != spec.stop.ended, NO_TOKEN)
            state = spec.stop.step(state, drawn)
    return tokens


class _Draw(LogitsProcessor):
    """Draws the token that the rollout would, and leaves no other; greedy search then takes it."""

    def __init__(
        self,
        spec: Sampling,
        vocab_size: int,
        sample_ids: Int[Tensor, " rows"],
        positions: Int[Tensor, " rows"],
        thoughts: Int[Tensor, " rows"],
    ) -> None:
        self.spec, self.vocab_size = spec, vocab_size
        self.sample_ids, self.positions, self.thoughts = sample_ids, positions, thoughts

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Take the tokens so far, (rows, index), and the logits, (rows, vocab)."""
        spec, index = self.spec, input_ids.shape[1]
        place = self.positions.unsqueeze(1)
        noise = keyed_uniform(spec.seed, self.sample_ids, spec.num_thoughts, index, place)
        noise = noise[..., 0].T.gather(1, self.thoughts.unsqueeze(1))  # (K, rows, 1) -> (rows, 1)
        tokens = sample_logits(scores[:, : self.vocab_size].clone(), noise, spec)
        return torch.full_like(scores, float("-inf")).scatter(1, tokens, 0.0)


class _Ends(StoppingCriteria):
    """Ends the rows that have written a stop text."""

    def __init__(self, stop: StopTexts, num_rows: int) -> None:
        self.stop, self.states = stop, torch.zeros(num_rows, dtype=torch.long)

    def __call__(self, input_ids: Any, scores: Any, **others: Any) -> Any:
        """Take the tokens so far, (rows, length), one more at each call."""
        self.states = self.stop.step(self.states.to(input_ids.device), input_ids[:, -1])
        return self.states == self.stop.ended
