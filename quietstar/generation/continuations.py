"""What a model writes after given thoughts, for rewards that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from quietstar.attention.layout import NO_TOKEN, on_host, to_device
from quietstar.backbone.casting import cast_weights
from quietstar.errors import UserError
from quietstar.generation.generate import most_tokens, next_logits
from quietstar.sampling.decoding import Decoder
from quietstar.sampling.noise import thought_noise
from quietstar.sampling.rollout import LOOK_EVERY, sample_logits
from quietstar.sampling.thoughts import Sampling, ThoughtBatch

CACHED_TOKENS = 2**15
"""Tokens of texts, thoughts and continuations whose keys and values are held at once."""


@dataclass(frozen=True)
class Writing:
    """How texts after thoughts are written.

    Attributes:
        num_tokens: Most tokens of each.
        temperature: Divides the logits.
        stop: Texts before which one ends.
    """

    num_tokens: int
    temperature: float = 1.0
    stop: Sequence[str] = ()


@torch.no_grad()
def continue_thoughts(
    model: Any,
    thoughts: ThoughtBatch,
    num_tokens: int,
    temperature: float | None = 1.0,
    seed: int = 0,
) -> Int[Tensor, "batch positions thoughts new"]:
    """Sample the tokens that follow each thought, from the mixed prediction.

    A continuation depends on the seed, the text's index in the run, its position and the number of
    the thought, and not on how batches are cut. It ends after an end-of-text token, which is left
    out; after its end, and where there is no position, stands `NO_TOKEN`.

    Where weights are sharded, all ranks must call this together.

    Args:
        model: The model that writes, a `QuietStarForCausalLM`.
        thoughts: Texts and their thoughts.
        num_tokens: Most tokens of a continuation.
        temperature: Divides the logits; None takes the most likely tokens.
        seed: Seed of the noise.

    Raises:
        UserError: The model has too few positions for text, thought and continuation.
    """
    positions = thoughts.positions
    batch, places, num_thoughts, length = thoughts.tokens.shape
    result = thoughts.tokens.new_full((batch, places, num_thoughts, num_tokens), NO_TOKEN)
    where = (positions >= 0).nonzero()
    where = where[positions[where[:, 0], where[:, 1]].argsort(descending=True, stable=True)]
    groups: list[Tensor] = []
    start, prompt_lengths = 0, positions[where[:, 0], where[:, 1]].tolist()
    longest = most_tokens(model, thinks=True)
    if longest is not None and max(prompt_lengths, default=0) + 1 + num_tokens > longest:
        raise UserError(
            f"a continuation of {num_tokens} tokens (judge.continuation): with a text of "
            f"{max(prompt_lengths) + 1} tokens and a thought the model's positions hold texts of "
            f"{longest} at most. Set it lower, or data.seq_len."
        )
    while start < len(where):  # from the longest text to the shortest
        columns = prompt_lengths[start] + 1 + model.block_length + num_tokens
        rows = max(1, CACHED_TOKENS // (columns * num_thoughts))
        groups.append(where[start : start + rows])
        start += rows
    passes = len(groups)
    if model.passes_together:
        most = torch.tensor(passes, device=positions.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        passes = int(most)
    sampling = Sampling(num_thoughts, length, temperature, seed)
    with cast_weights(model.causal_lm.base_model):
        for index in range(passes):
            # A rank without texts left runs its first one, since weights are gathered from all.
            rows = groups[index] if index < len(groups) else where.new_zeros(1, 2)
            tokens = _continue(model, thoughts, rows, num_tokens, sampling)
            if index < len(groups):
                result[rows[:, 0], rows[:, 1], :, : tokens.shape[-1]] = tokens
    return result


def _continue(
    model: Any,
    thoughts: ThoughtBatch,
    rows: Int[Tensor, "rows two"],
    num_tokens: int,
    sampling: Sampling,
) -> Int[Tensor, "rows thoughts new"]:
    """Continue the thoughts at some places (text, position) of a batch, at once."""
    text, place = rows.T
    num_thoughts = sampling.num_thoughts
    positions = thoughts.positions[text, place].clamp(min=0)
    # One column at least: a pass that some ranks leave out would keep the others waiting.
    width = max(1, int(positions.max()))
    source = torch.arange(width, device=text.device) - (width - positions)[:, None]
    before = thoughts.input_ids[text].gather(1, source.clamp(min=0))  # padded on the left
    decoder = Decoder(
        model.causal_lm, model.output_head, model.start_vectors, model.end_vectors, sampling,
        before, source >= 0, thoughts.sample_ids[text],
    )  # fmt: skip
    newest = decoder.append(thoughts.input_ids[text, positions], opens=True)
    given = thoughts.tokens[text, place]
    ahead = rearrange(decoder.read(given), "k r d -> 1 (r k) d")
    behind = decoder.go_on(given)
    # Where the thought alone predicts, nothing reads what the text without it would say.
    is_mixed = model.mixing_head.fixed_weight != 1.0
    plain = decoder.without_thoughts(num_thoughts) if is_mixed else None
    states = newest.states.repeat_interleave(num_thoughts, 0)
    base = newest.logits.repeat_interleave(num_thoughts, 0)
    stops = to_device(np.array(_end_tokens(model), dtype=np.int64), text.device)
    keys = (sampling.seed, thoughts.sample_ids[text], num_thoughts)
    places = range(sampling.thought_length, sampling.thought_length + num_tokens)
    is_open = torch.ones_like(states[:, 0], dtype=torch.bool)
    written: list[Tensor] = []
    for index, noise in enumerate(thought_noise(*keys, places, positions[:, None])):
        logits = next_logits(model, states, base, ahead)[:, : model.output_head.vocab_size]
        noise = rearrange(noise, "k r 1 -> (r k) 1")
        tokens = sample_logits(logits, noise, sampling)[:, 0]
        is_open = is_open & ~torch.isin(tokens, stops)
        written.append(tokens.where(is_open, NO_TOKEN))
        if index + 1 == num_tokens:
            break
        is_due = on_host(is_open) or (index + 1) % LOOK_EVERY == 0
        if is_due and not model.passes_together and not is_open.any():
            break
        if plain is not None:
            appended = plain.append(tokens, opens=False)
            states, base = appended.states, appended.logits
        ahead = behind.append(tokens, opens=False).states[None]
    return rearrange(torch.stack(written, dim=-1), "(r k) c -> r k c", k=num_thoughts)


def _end_tokens(model: Any) -> list[int]:
    """Tokens that end a text, by the model's settings of generation and its tokenizer."""
    ends = getattr(model.causal_lm.generation_config, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else [*(ends or ())]
    token = getattr(model.tokenizer, "eos_token_id", None)
    return [*ends, token] if isinstance(token, int) and token not in ends else ends
