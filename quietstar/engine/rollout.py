"""Phase 1: sample a thought at every position of the text, all in parallel, without a graph.

The text runs once and leaves its keys and values; then every step runs one token of every block
(start first, then each sampled token but the last) against them. No cache of transformers is
involved, so activation checkpointing (which drops it) and train or eval mode make no difference.

End-of-text inside a thought is an ordinary token: a thought has a fixed length, and what comes
after it stays part of the thought.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.engine.attention import RolloutCache, TextPass, ThoughtStep
from quietstar.engine.backbone import embedding_weight, run_backbone
from quietstar.engine.sampling import keyed_uniform, sample_inverse_cdf
from quietstar.losses.output_head import OutputHead

_CHUNK_ELEMENTS = 2**22
"""Logits held at once while sampling: 16 MiB in float32."""


@dataclass(frozen=True)
class Sampling:
    """How thoughts are drawn.

    Attributes:
        num_thoughts: K.
        thought_length: T.
        temperature: Divides the logits; None takes the most likely token.
        seed: Of the keyed noise.
    """

    num_thoughts: int
    thought_length: int
    temperature: float | None
    seed: int = 0


@torch.no_grad()
def sample_thoughts(
    model: PreTrainedModel,
    head: OutputHead,
    start_embedding: Float[Tensor, " embedding"],
    input_ids: Int[Tensor, "batch seq"],
    sample_ids: Int[Tensor, " batch"],
    sampling: Sampling,
) -> Int[Tensor, "length thoughts batch seq"]:
    """Thought tokens of every position, (T, K, B, S).

    Args:
        model: A causal LM whose attention implementation is ``quietstar``.
        head: Its output head.
        start_embedding: Opens every thought.
        input_ids: Texts, padded on the right if at all.
        sample_ids: Index of each text in the run; with the seed it keys the noise.
        sampling: Number, length, temperature, seed.
    """
    embed = model.get_input_embeddings()
    batch_size, length = input_ids.shape
    cache = RolloutCache(sampling.num_thoughts, sampling.thought_length)
    positions = torch.arange(length, device=input_ids.device)
    run_backbone(model, embed(input_ids), positions.expand(batch_size, -1), TextPass(cache))
    rows = sampling.num_thoughts * batch_size
    tokens: list[Tensor] = []
    for index in range(sampling.thought_length):
        if index == 0:
            embeddings = start_embedding.expand(rows, length, -1)
            embeddings = embeddings.to(embedding_weight(model).dtype)
        else:
            embeddings = embed(tokens[-1].flatten(0, 1))
        offset = (positions + index + 1).expand(rows, -1)
        states = run_backbone(model, embeddings, offset, ThoughtStep(cache, index))
        noise = keyed_uniform(sampling.seed, sample_ids, sampling.num_thoughts, index, length)
        sampled = _sample_rows(states.flatten(0, 1), head, noise.flatten(), sampling.temperature)
        tokens.append(sampled.view(sampling.num_thoughts, batch_size, length))
    return torch.stack(tokens)


def _sample_rows(
    states: Tensor, head: OutputHead, noise: Tensor, temperature: float | None
) -> Tensor:
    """Next token of every row, (rows,), a chunk of logits at a time."""
    vocab_size = head.vocab_size or head.num_logits
    chunk = max(64, _CHUNK_ELEMENTS // head.num_logits)
    tokens = []
    for rows in range(0, states.shape[0], chunk):
        logits = head.logits(states[rows : rows + chunk])[:, :vocab_size]
        if temperature is None:
            tokens.append(logits.argmax(-1))
        else:
            logits = logits if temperature == 1.0 else logits / temperature
            tokens.append(sample_inverse_cdf(logits, noise[rows : rows + chunk]))
    return torch.cat(tokens)
