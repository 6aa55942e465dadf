"""Phase 1: sample a thought at every position of the text, all in parallel, without a graph.

The text runs once and leaves its keys and values; then every step runs one token of every block
(start first, then each sampled token but the last) against them. No cache of transformers is
involved, so activation checkpointing (which drops it) and train or eval mode make no difference.

Thoughts end with the texts that `Sampling.stop` knows, the rollout with the last thought. Without
it end-of-text inside a thought is an ordinary token, and what comes after it stays part of the
thought.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from quietstar.attention.layout import (
    NO_TOKEN,
    has_content,
    on_host,
    shifted,
    to_device,
    worth_running,
)
from quietstar.attention.live_pass import LiveCache, LiveStep
from quietstar.attention.passes import RolloutCache, RolloutStep
from quietstar.backbone.casting import cast_weights
from quietstar.backbone.output_head import OutputHead
from quietstar.backbone.run import TextRun, embedding_weight, num_virtual, run_backbone, run_text
from quietstar.sampling.noise import sample_inverse_cdf, thought_noise
from quietstar.sampling.thoughts import Sampling

LOOK_EVERY = 8
"""Tokens between two looks at a device whether all thoughts have ended: each waits for it."""
LIVE_FROM = 24
"""Tokens of a thought from which thoughts at chosen positions leave the batch when they end."""
_CHUNK_ELEMENTS, _LEAST_ROWS = 2**22, 256
"""Logits held at once while sampling: 16 MiB in float32, and more where that makes fewer rows."""


@torch.no_grad()
def sample_thoughts(
    model: PreTrainedModel,
    head: OutputHead,
    start: Float[Tensor, "start embedding"],
    input_ids: Int[Tensor, "batch seq"],
    sample_ids: Int[Tensor, " batch"],
    sampling: Sampling,
    positions: Int[Tensor, "batch positions"] | None = None,
    text: TextRun | None = None,
    passes_together: bool = False,
    places: Int[np.ndarray, "batch positions"] | None = None,
) -> Int[Tensor, "length thoughts batch positions"]:
    """Sample thoughts at every position of the texts, or at chosen ones.

    After the last token of a thought that ends early stands `NO_TOKEN`.

    Args:
        model: A causal LM whose attention implementation is ``quietstar``.
        head: Its output head.
        start: Opens every thought.
        input_ids: Texts, padded on the right if at all.
        sample_ids: Index of each text in the run; with the seed it keys the noise.
        sampling: Number, length, temperature, seed.
        positions: The chosen ones, ascending; all by default.
        text: Of `run_text`, where the texts were run already.
        passes_together: Whether all processes must run as many passes as the longest thought of any
            of them needs.
        places: The positions in the host's memory, where they are known there: else long thoughts
            wait for the device to read them.
    """
    if positions is not None and sampling.thought_length >= LIVE_FROM:
        live = _LiveThoughts(
            model, head, start, input_ids, sample_ids, sampling, positions, text, places
        )
        return live.sample(passes_together)
    num_thoughts, length, stop = sampling.num_thoughts, sampling.thought_length, sampling.stop
    steps = _Steps(model, start, input_ids, num_thoughts, length, positions, text)
    thoughts: list[Tensor] = []
    keys = (sampling.seed, sample_ids, num_thoughts, range(length), steps.positions)
    state = input_ids.new_zeros(num_thoughts, *steps.positions.shape)
    if stop is not None:  # nothing waits for thoughts that only pad
        state = state.masked_fill(steps.positions < 0, stop.ended)
    with cast_weights(model.base_model):
        indices = worth_running(range(length), input_ids)
        for index, noise in zip(indices, thought_noise(*keys), strict=False):  # (K, B, P)
            steps.index = index and len(start) + index - 1
            states = steps.run(thoughts[-1].clamp(min=0)) if thoughts else steps.open()
            states = states.flatten(0, 1)
            # After the start tokens all thoughts of a position draw from one distribution.
            draws = noise.reshape(-1, len(states)).T.contiguous()  # (B * P, K), or (K * B * P, 1)
            tokens = sample_rows(states, head, draws, sampling)
            tokens = tokens.T.reshape(noise.shape)
            if stop is not None:
                tokens = tokens.where(state != stop.ended, NO_TOKEN)
                state = stop.step(state, tokens).where(tokens >= 0, state)
            thoughts.append(tokens)
            is_due = (on_host(state) and not passes_together) or (index + 1) % LOOK_EVERY == 0
            is_last = index + 1 == length
            if stop is not None and is_due and not is_last and has_content(state):
                all_ended = (state == stop.ended).all()
                if _everywhere(all_ended, passes_together).item():
                    break
    missing = [torch.full_like(thoughts[-1], NO_TOKEN)] * (length - len(thoughts))
    return torch.stack([*thoughts, *missing])


@torch.no_grad()
def policy_states(
    model: PreTrainedModel,
    start: Float[Tensor, "start embedding"],
    input_ids: Int[Tensor, "batch seq"],
    thoughts: Int[Tensor, "length thoughts batch positions"],
    positions: Int[Tensor, "batch positions"] | None = None,
    text: TextRun | None = None,
) -> Float[Tensor, "length thoughts batch positions width"]:
    """States from which the rollout would sample each token of these thoughts.

    Those of the learn pass, by another way: for checks. After the end of a thought that ends early
    they are of no use.
    """
    thoughts = thoughts.clamp(min=0)
    length, num_thoughts, batch_size = thoughts.shape[:3]
    steps = _Steps(model, start, input_ids, num_thoughts, length, positions, text)
    first = steps.open().expand(num_thoughts, -1, -1, -1)
    rest = [steps.run(tokens) for tokens in thoughts[:-1]]
    return torch.stack([first, *(states.unflatten(0, (-1, batch_size)) for states in rest)])


class _Steps:
    """One token of every thought of a batch of texts at a time; arguments as `sample_thoughts`."""

    def __init__(
        self,
        model: PreTrainedModel,
        start: Tensor,
        input_ids: Tensor,
        num_thoughts: int,
        thought_length: int,
        positions: Tensor | None,
        text: TextRun | None,
    ) -> None:
        self.model, self.start, self.index = model, start, 0
        keys, virtual = (text or run_text(model, input_ids)).keys, num_virtual(model)
        masked = positions is not None or virtual > 0
        if positions is None:
            seq = torch.arange(input_ids.shape[1], device=input_ids.device)
            positions = seq.expand(input_ids.shape)
        self.positions, places = positions, shifted(positions, virtual)
        self.places = places.clamp(min=0)  # of the text tokens before the blocks
        num_steps = len(start) + thought_length - 1
        self.cache = RolloutCache(
            keys, num_steps, len(start), num_thoughts, places if masked else None
        )

    def open(self) -> Float[Tensor, "batch positions width"]:
        """Run the start tokens, once for all thoughts; the final states of the last one."""
        states = None
        for vector in self.start.to(embedding_weight(self.model).dtype):
            # Repeated, as layers hand on: no graph of its own.
            states = self._run(vector.repeat(*self.places.shape, 1), self.places)
        if self.cache.positions is None:
            self.cache.repeat_text()
        assert states is not None, "a marker has a token"
        return states

    def run(
        self, tokens: Int[Tensor, "thoughts batch positions"]
    ) -> Float[Tensor, "rows positions width"]:
        """Run the next token of every thought; its final states, in rows (K * B, P)."""
        inputs = self.model.get_input_embeddings()(tokens.flatten(0, 1))
        return self._run(inputs, self.places.repeat(len(tokens), 1))

    def _run(self, inputs: Tensor, places: Tensor) -> Tensor:
        step = RolloutStep(self.cache, self.index)
        self.index += 1
        return run_backbone(self.model, inputs, places + self.index, step)


class _LiveThoughts:
    """Thoughts at a few positions, of which those that have ended leave the batch.

    Arguments as `sample_thoughts`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: OutputHead,
        start: Tensor,
        input_ids: Tensor,
        sample_ids: Tensor,
        sampling: Sampling,
        positions: Tensor,
        text: TextRun | None,
        places: np.ndarray | None,
    ) -> None:
        self.model, self.head, self.sampling = model, head, sampling
        self.sample_ids, self.positions = sample_ids, positions
        self.start = start.to(embedding_weight(model).dtype)
        keys, virtual = (text or run_text(model, input_ids)).keys, num_virtual(model)
        if not has_content(positions):  # only planned: the most that may be
            places = np.full(positions.shape, input_ids.shape[1] - 1)
        elif places is None:
            places = positions.cpu().numpy()
        # Of each row, its thought in the order (k b p). A pass has one row at least.
        self.first = np.flatnonzero(places >= 0) if (places >= 0).any() else np.zeros(1, np.int64)
        last = places.flatten()[self.first].clip(min=0) + virtual
        stop = int(last.max()) + 1
        keys = {layer: (k[:, :, :stop], v[:, :, :stop]) for layer, (k, v) in keys.items()}
        self.cache = LiveCache(keys, self.first // positions.shape[1], last)

    def sample(self, passes_together: bool) -> Int[Tensor, "length thoughts batch positions"]:
        """Draw all thoughts."""
        sampling, shape = self.sampling, (self.sampling.num_thoughts, *self.positions.shape)
        num_thoughts, length, stop = shape[0], sampling.thought_length, sampling.stop
        count, rows, device = self.positions.numel(), len(self.first), self.positions.device
        # Where nothing ends early every thought has all tokens, also what only pads.
        fill = 0 if stop is None else NO_TOKEN
        tokens = self.positions.new_full((length, num_thoughts * count), fill)
        keys = (sampling.seed, self.sample_ids, num_thoughts, range(length), self.positions)
        with cast_weights(self.model.base_model):
            states = self._run(self.start.expand(rows, -1, -1))
            self.cache.repeat(num_thoughts)
            ids = np.arange(num_thoughts)[:, None] * count + self.first
            ids = to_device(ids.flatten(), device)
            last = state = torch.zeros_like(ids)
            indices = worth_running(range(length), tokens)
            for index, noise in zip(indices, thought_noise(*keys), strict=False):
                noise = noise.flatten()[ids]
                if index == 0:  # all thoughts of a position draw from one distribution
                    noise = noise.view(num_thoughts, rows).T.contiguous()
                else:
                    self.cache.length = len(self.start) + index - 1
                    embedded = self.model.get_input_embeddings()(last.clamp(min=0))
                    states, noise = self._run(embedded.unsqueeze(1)), noise.unsqueeze(1)
                last = sample_rows(states, self.head, noise, sampling).T.flatten()
                if stop is not None:
                    last = last.where(state != stop.ended, NO_TOKEN)
                    state = stop.step(state, last).where(last >= 0, state)
                tokens[index, ids] = last
                is_due = (index + 1) % LOOK_EVERY == 0
                if stop is None or not has_content(state) or index + 1 == length:
                    continue
                if not (is_due or on_host(state)):
                    continue
                is_alive = state != stop.ended
                all_ended = ~is_alive.any()
                is_due = is_due or not passes_together
                if is_due:
                    all_ended = _everywhere(all_ended, passes_together)
                # The one time that the host waits.
                *alive, ends = torch.cat([is_alive, all_ended[None]]).tolist()
                if ends and is_due:
                    break
                keep = self._drop_ended(np.array(alive))
                if keep is not None:
                    ids, last, state = ids[keep], last[keep], state[keep]
        return tokens.view(-1, *shape).where(self.positions >= 0, fill)

    def _run(self, embedded: Tensor) -> Float[Tensor, "rows width"]:
        """Run the next tokens of all rows, (N, m, embedding); the states of the last ones."""
        step = self.cache.length + torch.arange(embedded.shape[1], device=embedded.device)
        places = self.cache.places[:, None] + 1 + step
        states = run_backbone(self.model, embedded, places, LiveStep(self.cache))
        self.cache.length += embedded.shape[1]
        return states[:, -1]

    def _drop_ended(self, is_alive: Bool[np.ndarray, " rows"]) -> Int[Tensor, " left"] | None:
        """Let thoughts that have ended leave; which rows are left, in their order; None for all.

        One stays at least. Rows from the end fill the gaps: caches are not copied.
        """
        if is_alive.all():
            return None
        if not is_alive.any():
            is_alive[0] = True
        left = np.flatnonzero(is_alive)
        rows = np.arange(len(left))
        sources, targets = left[left >= len(left)], np.flatnonzero(~is_alive[: len(left)])
        self.cache.move(sources, targets, len(left))
        rows[targets] = sources
        return to_device(rows, self.positions.device)


def _everywhere(all_ended: Bool[Tensor, ""], passes_together: bool) -> Bool[Tensor, ""]:
    """Whether all thoughts have ended: of all processes, where these must run as many passes."""
    if not passes_together:
        return all_ended
    count = all_ended.int()
    torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MIN)
    return count.bool()


def sample_rows(states: Tensor, head: OutputHead, noise: Tensor, sampling: Sampling) -> Tensor:
    """Next tokens, a chunk of logits at a time: as many of every row as noise has columns."""
    vocab_size = head.vocab_size or head.num_logits
    chunk = max(_LEAST_ROWS, _CHUNK_ELEMENTS // head.num_logits)
    # Made beforehand: small tensors that stay, between chunks that go, would keep the memory of
    # these from being used again.
    tokens = torch.empty(noise.shape, dtype=torch.long, device=noise.device)
    for start in worth_running(range(0, states.shape[0], chunk), states):
        rows = slice(start, start + chunk)
        tokens[rows] = sample_logits(
            head.logits(states[rows])[:, :vocab_size], noise[rows], sampling
        )
    return tokens


def sample_logits(
    logits: Float[Tensor, "rows vocab"],
    noise: Float[Tensor, "rows draws"],
    sampling: Sampling,
) -> Int[Tensor, "rows draws"]:
    """Next tokens of every row; without a temperature the most likely.

    Filters as transformers does: temperature first, then ``top_k``, then ``top_p`` of the rest.
    """
    temperature, ids = sampling.temperature, torch.LongTensor()  # which no filter reads
    if temperature is None:
        return logits.argmax(-1, keepdim=True).expand(noise.shape)
    logits = logits if temperature == 1.0 else logits / temperature
    if sampling.top_k is not None:
        logits = TopKLogitsWarper(sampling.top_k)(ids, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(ids, logits)
    return sample_inverse_cdf(logits, noise)
