"""Phase 1: sample a thought at every position of the text, all in parallel, without a graph.

The text runs once and leaves its keys and values; then every step runs one token of every block
(start first, then each sampled token but the last) against them. No cache of transformers is
involved, so activation checkpointing (which drops it) and train or eval mode make no difference.

End-of-text inside a thought is an ordinary token: a thought has a fixed length, and what comes
after it stays part of the thought.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.attention.blocks import PrefixAttention
from quietstar.attention.layout import shifted
from quietstar.attention.rollout_steps import (
    RolloutCache,
    RolloutStep,
    SelectedStep,
    StartStep,
    ThoughtStep,
)
from quietstar.backbone.casting import cast_weights
from quietstar.backbone.output_head import OutputHead
from quietstar.backbone.run import (
    TextRun,
    embedding_weight,
    num_virtual,
    run_backbone,
    run_text,
)
from quietstar.sampling.noise import keyed_uniform, sample_inverse_cdf
from quietstar.sampling.thoughts import Sampling

_CHUNK_ELEMENTS, _LEAST_ROWS = 2**22, 256
"""Logits held at once while sampling: 16 MiB in float32, and more where that makes fewer rows."""


@torch.no_grad()
def sample_thoughts(
    model: PreTrainedModel,
    head: OutputHead,
    start_embedding: Float[Tensor, " embedding"],
    input_ids: Int[Tensor, "batch seq"],
    sample_ids: Int[Tensor, " batch"],
    sampling: Sampling,
    positions: Int[Tensor, "batch positions"] | None = None,
    text: TextRun | None = None,
) -> Int[Tensor, "length thoughts batch positions"]:
    """Thought tokens of every position, (T, K, B, S), or of the chosen ones, (T, K, B, P).

    Args:
        model: A causal LM whose attention implementation is ``quietstar``.
        head: Its output head.
        start_embedding: Opens every thought.
        input_ids: Texts, padded on the right if at all.
        sample_ids: Index of each text in the run; with the seed it keys the noise.
        sampling: Number, length, temperature, seed.
        positions: The chosen ones, ascending; all by default.
        text: Of `run_text`, where the texts were run already.
    """
    rollout = Rollout(model, start_embedding, input_ids, sampling.num_thoughts,
                      sampling.thought_length, positions, text)  # fmt: skip
    with cast_weights(model.base_model):
        return torch.stack(list(_sample_tokens(rollout, head, sample_ids, sampling)))


def _sample_tokens(
    rollout: Rollout, head: OutputHead, sample_ids: Tensor, sampling: Sampling
) -> Iterator[Tensor]:
    """Of every thought the next one, (K, B, P), T times."""
    tokens: Tensor | None = None
    for index in range(sampling.thought_length):
        noise = keyed_uniform(
            sampling.seed, sample_ids, sampling.num_thoughts, index, rollout.positions
        )
        if tokens is None:  # all thoughts of a position draw from one distribution
            states = rollout.start()  # (B, P, D)
            noise = noise.flatten(1).T.contiguous()  # (B * P, K)
            sampled = sample_rows(states.flatten(0, 1), head, noise, sampling.temperature)
            tokens = sampled.T.unflatten(1, states.shape[:2])
        else:
            states = rollout.step(index, tokens)
            noise = rollout.order.from_thoughts(noise).flatten().unsqueeze(1)
            sampled = sample_rows(states.flatten(0, 1), head, noise, sampling.temperature)
            tokens = rollout.order.to_thoughts(sampled.view(states.shape[:2]))
        yield tokens


@torch.no_grad()
def policy_states(
    model: PreTrainedModel,
    start_embedding: Float[Tensor, " embedding"],
    input_ids: Int[Tensor, "batch seq"],
    thoughts: Int[Tensor, "length thoughts batch positions"],
    positions: Int[Tensor, "batch positions"] | None = None,
    text: TextRun | None = None,
) -> Float[Tensor, "length thoughts batch positions width"]:
    """States from which the rollout would sample each token of these thoughts.

    Those of the learn pass, by another way: for checks.
    """
    length, num_thoughts = thoughts.shape[:2]
    rollout = Rollout(model, start_embedding, input_ids, num_thoughts, length, positions, text)
    first = rollout.start().expand(num_thoughts, -1, -1, -1)
    rest = [rollout.step(n, thoughts[n - 1]) for n in range(1, length)]
    return torch.stack([first, *(rollout.order.to_thoughts(states) for states in rest)])


class Rollout:
    """The steps of all thoughts of a batch of texts, one token of each at a time.

    Args:
        model: Model of `sample_thoughts`.
        start_embedding: Input that opens every thought.
        input_ids: Texts.
        num_thoughts: Thoughts at each position, K.
        thought_length: T, most steps.
        positions: Chosen positions; all by default.
        text: Run of the texts, if there was one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        start_embedding: Tensor,
        input_ids: Tensor,
        num_thoughts: int,
        thought_length: int,
        positions: Tensor | None,
        text: TextRun | None = None,
    ) -> None:
        self.model, self.start_embedding = model, start_embedding
        self.embed = model.get_input_embeddings()
        cache = RolloutCache((text or run_text(model, input_ids)).keys, thought_length)
        virtual, length = num_virtual(model), input_ids.shape[1]
        if positions is None:
            self.positions = torch.arange(length, device=input_ids.device).expand(input_ids.shape)
        else:
            self.positions = positions
        if positions is None and not virtual:
            self.order = _AllPositions(cache, self.positions, num_thoughts)
        else:
            places = shifted(self.positions, virtual)
            self.order = _SelectedPositions(cache, places, num_thoughts, virtual + length)

    def start(self) -> Float[Tensor, "batch positions width"]:
        """Run the start token of every position, once for all its thoughts; its final states."""
        places = self.order.places  # of the start tokens
        inputs = self.start_embedding.to(embedding_weight(self.model).dtype)
        inputs = inputs.repeat(*places.shape, 1)  # as layers hand on: no graph of its own
        states = run_backbone(self.model, inputs, places + 1, self.order.start_attention())
        self.order.started()
        return states.view(*self.positions.shape, -1)

    def step(self, index: int, tokens: Int[Tensor, "thoughts batch positions"]) -> Tensor:
        """Run block token ``index``, sampled before it; its final states, in rows."""
        inputs = self.embed(self.order.from_thoughts(tokens))
        offset = self.order.for_each_thought(self.order.places) + index + 1
        return run_backbone(self.model, inputs, offset, self.order.attention(index))


class _AllPositions:
    """Steps of the blocks at all positions: rows (K * B, S)."""

    def __init__(self, cache: RolloutCache, positions: Tensor, num_thoughts: int) -> None:
        self.cache, self.num_thoughts = cache, num_thoughts
        self.batch_size, self.places = positions.shape[0], positions

    def start_attention(self) -> RolloutStep:
        return StartStep(self.cache, self)

    def started(self) -> None:
        self.cache.repeat_text(self.num_thoughts)

    def for_each_thought(self, x: Tensor) -> Tensor:  # (B, S, ...) -> (K * B, S, ...)
        return x.repeat(self.num_thoughts, *[1] * (x.ndim - 1))

    def attention(self, index: int) -> RolloutStep:
        return ThoughtStep(self.cache, index)

    def from_thoughts(self, x: Tensor) -> Tensor:  # (K, B, S, ...) -> (K * B, S, ...)
        return x.flatten(0, 1)

    def to_thoughts(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.batch_size))


class _SelectedPositions:
    """Steps of the blocks at chosen positions: one row in the order (b p k)."""

    def __init__(
        self, cache: RolloutCache, positions: Tensor, num_thoughts: int, length: int
    ) -> None:
        self.cache, self.positions = cache, positions
        self.sizes = (*positions.shape, num_thoughts)
        self.length = length
        self.prefix = PrefixAttention(positions, num_thoughts, length)
        self.places = self.prefix.positions.reshape(1, -1)

    def start_attention(self) -> RolloutStep:
        return StartStep(self.cache, self, PrefixAttention(self.positions, 1, self.length))

    def started(self) -> None:
        """Nothing to do: texts are not repeated."""

    def for_each_thought(self, x: Tensor) -> Tensor:  # (1, B * P, ...) -> (1, B * P * K, ...)
        return x.repeat_interleave(self.sizes[-1], 1)

    def attention(self, index: int) -> RolloutStep:
        return SelectedStep(self.cache, index, self.positions, self.prefix)

    def from_thoughts(self, x: Tensor) -> Tensor:  # (K, B, P, ...) -> (1, B * P * K, ...)
        return x.movedim(0, 2).flatten(0, 2).unsqueeze(0)

    def to_thoughts(self, x: Tensor) -> Tensor:
        return x.unflatten(1, self.sizes).squeeze(0).movedim(2, 0)


def sample_rows(
    states: Tensor, head: OutputHead, noise: Tensor, temperature: float | None
) -> Tensor:
    """Next tokens, a chunk of logits at a time: as many of every row as noise has columns."""
    vocab_size = head.vocab_size or head.num_logits
    chunk = max(_LEAST_ROWS, _CHUNK_ELEMENTS // head.num_logits)
    # Made beforehand: small tensors that stay, between chunks that go, would keep the memory of
    # these from being used again.
    tokens = torch.empty(noise.shape, dtype=torch.long, device=noise.device)
    for start in range(0, states.shape[0], chunk):
        rows = slice(start, start + chunk)
        tokens[rows] = sample_logits(
            head.logits(states[rows])[:, :vocab_size], noise[rows], temperature
        )
    return tokens


def sample_logits(
    logits: Float[Tensor, "rows vocab"],
    noise: Float[Tensor, "rows draws"],
    temperature: float | None,
) -> Int[Tensor, "rows draws"]:
    """Next tokens of every row; without a temperature the most likely."""
    if temperature is None:
        return logits.argmax(-1, keepdim=True).expand(noise.shape)
    logits = logits if temperature == 1.0 else logits / temperature
    return sample_inverse_cdf(logits, noise)
