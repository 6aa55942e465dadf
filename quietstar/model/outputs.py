"""What the model returns: losses, scores, thoughts, and the metrics to watch."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from quietstar.attention.layout import NO_TOKEN
from quietstar.losses.scores import Scores, without_padding
from quietstar.sampling.stopping import StopTexts
from quietstar.sampling.thoughts import ThoughtBatch


@dataclass(frozen=True)
class ThoughtMetrics:
    """Sum and count of every metric, so that micro-batches and ranks add up exactly.

    ====================  ==========================================================================
    base_nll              NLL of the next token without thoughts, nats a token
    mixed_nll             with thoughts, mixed
    thought_nll           by the thought's own prediction
    gain                  base_nll - mixed_nll: the gain of thinking (derived)
    gain_beyond_next      the same over the targets further ahead (a > 1)
    mixing_weight         mean share of the thought in the prediction of the next token
    reward                log-probability that a thought adds over all its targets, nats
    reward_std            standard deviation of the reward among a position's thoughts
    policy_reward         what the objective was given (loss.reward): mean over thoughts
    policy_reward_std     its standard deviation among a position's thoughts
    dropped_fraction      fraction of positions without any advantage, which reinforce nothing
    ratio                 in later inner epochs: mean probability of a thought token over what it
                          was when drawn
    approx_kl             there: divergence from the policy that drew the thoughts, nats a token
    clipped_fraction      there: fraction of thought tokens that the clip reinforces no more
    no_signal_fraction    fraction of positions whose thoughts all have the same reward
    identical_fraction    fraction of positions whose thoughts are all the same: no signal there
    entropy               of the thought tokens' distributions, nats (at the policy temperature)
    distinct_token_ratio  distinct tokens of a thought over its length
    thought_logprob       mean log-probability of the thought tokens
    thought_length        where thoughts may end early: mean tokens of a thought
    thought_length_p90    there: 90th percentile of the tokens of a thought (derived)
    truncated_fraction    there: fraction of thoughts with all tokens that have written no stop text
    stop_fraction         with stop texts: fraction of thoughts that one of them, or end-of-text,
                          has ended
    text_nll              with chosen positions: NLL without thoughts over *all* next tokens, while
                          base_nll, mixed_nll and gain are over those after a thought
    text_gain             with chosen positions: what thoughts gain, over all next tokens
    ====================  ==========================================================================

    Attributes:
        sums: Sum and count by name.
        lengths: Number of thoughts of 0, 1, ... tokens; None where all have the same length.
    """

    sums: Mapping[str, tuple[Tensor, Tensor]]
    lengths: Int[Tensor, " lengths"] | None = None

    def __add__(self, other: ThoughtMetrics) -> ThoughtMetrics:
        """Metrics of both batches together."""
        lengths = None
        if self.lengths is not None and other.lengths is not None:
            lengths = self.lengths + other.lengths
        return ThoughtMetrics(
            {n: (s + other.sums[n][0], c + other.sums[n][1])
             for n, (s, c) in self.sums.items()},
            lengths,
        )  # fmt: skip

    def joined(self, other: ThoughtMetrics) -> ThoughtMetrics:
        """All metrics of both, of the same batch."""
        lengths = other.lengths if self.lengths is None else self.lengths
        return ThoughtMetrics({**self.sums, **other.sums}, lengths)

    def reduced(self, accelerator: Accelerator) -> ThoughtMetrics:
        """Metrics of all ranks together."""
        if accelerator.num_processes == 1:
            return self
        table = accelerator.reduce(self._table(), "sum")
        assert isinstance(table, Tensor)
        sums = {n: (r[0], r[1]) for n, r in zip(self.sums, table, strict=True)}
        lengths = None if self.lengths is None else accelerator.reduce(self.lengths, "sum")
        assert lengths is None or isinstance(lengths, Tensor)
        return ThoughtMetrics(sums, lengths)

    def means(self) -> dict[str, float]:
        """Every metric as a number; those that were not computed are left out."""
        table = self._table().tolist()
        means = {n: s / c for n, (s, c) in zip(self.sums, table, strict=True) if c > 0}
        if "mixed_nll" in means:
            means["gain"] = means["base_nll"] - means["mixed_nll"]
        if self.lengths is not None and "thought_length" in means:
            means["thought_length_p90"] = percentile(self.lengths.tolist(), 0.9)
        return means

    def _table(self) -> Tensor:
        """Sum and count of every metric in float64, (metrics, 2)."""
        pairs = list(self.sums.values())
        if pairs[0][0].device.type == "mps":  # has no float64: the CPU widens what is read
            sums, counts = torch.stack([s.float() for s, _ in pairs]), [c for _, c in pairs]
            return torch.stack([sums.cpu().double(), torch.stack(counts).cpu().double()], dim=1)
        return torch.stack([torch.stack([s.double(), c.double()]) for s, c in pairs])


def percentile(counts: Sequence[int], fraction: float) -> float:
    """Find the percentile of whole numbers 0, 1, ... that were counted, one at least.

    As numpy does by default: linear between the two numbers around the place.
    """
    ends = list(accumulate(counts))
    place = fraction * (ends[-1] - 1)
    below, above = (bisect(ends, index) for index in (math.floor(place), math.ceil(place)))
    return below + (above - below) * (place - math.floor(place))


@dataclass
class QuietStarOutput(ModelOutput):
    """Output of `QuietStarForCausalLM.forward`.

    Attributes:
        loss: Scalar, to call ``backward`` on.
        metrics: Those of the batch as sums and counts; ``metrics.means()`` gives numbers.
        thoughts: Tokens of the thoughts, (batch, positions, thoughts, length), -1 after the last of
            one that ends early.
        input_ids: The texts, (batch, seq).
        positions: Where the thoughts are, (batch, positions), -1 after the last; None for all.
        drawn: The thoughts with their log-probabilities, for further updates from them.
        logits: Of the next token after every position, (batch, seq, vocab), with the thoughts, as
            `QuietStarForCausalLM.next_logits` has them: where they were asked for, and in eval mode
            without labels.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    metrics: ThoughtMetrics | None = None
    thoughts: Tensor | None = None
    input_ids: Tensor | None = None
    positions: Tensor | None = None
    drawn: ThoughtBatch | None = None


@dataclass(frozen=True)
class PlainScores:
    """Predictions without thoughts; output of `QuietStarForCausalLM.score_plain`.

    Attributes:
        logprobs: Of the true next token, 0 where there is none.
        predicted: Most likely next token.
        valid: Whether there is a true next token.
        metrics: Those of the batch.
        candidates: Logits of the candidates after every text position; None if none were asked for.
    """

    logprobs: Float[Tensor, "batch seq"]
    predicted: Int[Tensor, "batch seq"]
    valid: Bool[Tensor, "batch seq"]
    metrics: ThoughtMetrics
    candidates: Float[Tensor, "batch seq candidates"] | None = None


def decode_thoughts(tokenizer: PreTrainedTokenizerBase, tokens: Int[Tensor, "*thoughts _"]) -> Any:
    """Return the texts of thoughts, in nested lists of their shape; one thought as a text."""
    if tokens.ndim > 1:
        return [decode_thoughts(tokenizer, some) for some in tokens]
    return tokenizer.decode(without_padding(tokens.tolist()))


def plain_metrics(nll: Tensor, valid: Tensor) -> ThoughtMetrics:
    """Metrics of a text read without thoughts."""
    return ThoughtMetrics({"base_nll": (nll.sum(), valid.sum())})


@torch.no_grad()
def thought_metrics(
    s: Scores, may_end_early: bool = False, stop: StopTexts | None = None
) -> ThoughtMetrics:
    """Compute the metrics of one batch, with the thoughts' lengths if they differ; no host sync."""
    assert s.base_logprobs is not None, "scored in full"
    assert s.logprobs is not None, "scored in full"
    num_thoughts, base = s.tokens.shape[2], s.base_logprobs
    valid, ahead = s.valid[..., 0], s.valid[..., 1:]  # (B, P) and (B, P, A - 1)
    count = valid.sum()
    gain = s.mixed_logprobs.mean(2) - base  # (B, P, A)
    sums = {
        "base_nll": (-base[..., 0].where(valid, 0.0).sum(), count),
        "mixed_nll": (-_of_next(s.mixed_logprobs, valid), count * num_thoughts),
        "gain_beyond_next": (gain[..., 1:].where(ahead, 0.0).sum(), ahead.sum()),
        "mixing_weight": (_of_next(s.mixing_weight, valid), count * num_thoughts),
    }
    if s.thought_logprobs is not None:
        sums["thought_nll"] = (-_of_next(s.thought_logprobs, valid), count * num_thoughts)
    if s.positions is not None:
        assert s.text_logprobs is not None, "scored in full"
        assert s.text_valid is not None, "scored in full"
        sums["text_nll"] = (-s.text_logprobs.sum(), s.text_valid.sum())
        sums["text_gain"] = (gain[..., 0].where(valid, 0.0).sum(), s.text_valid.sum())

    has_target = s.valid.any(-1)  # (B, P)
    places, of_thoughts = has_target.sum(), has_target.unsqueeze(-1)
    all_thoughts = places * num_thoughts
    added = s.mixed_logprobs - base.unsqueeze(2)
    added = added.where(s.valid.unsqueeze(2), 0.0).sum(-1)  # (B, P, K)
    sums["reward"] = (added.sum(), all_thoughts)
    if num_thoughts > 1:
        identical = (s.tokens == s.tokens[:, :, :1]).flatten(2).all(-1)  # (B, P)
        sums["reward_std"] = (added.std(-1).where(has_target, 0.0).sum(), places)
        sums["identical_fraction"] = ((identical & has_target).sum(), places)

    if s.reward is not None:
        sums["policy_reward"] = (s.reward.where(of_thoughts, 0.0).sum(), all_thoughts)
        if num_thoughts > 1:
            spread = s.reward.std(-1)
            sums["policy_reward_std"] = (spread.where(has_target, 0.0).sum(), places)
            flat = spread <= 1e-6 * s.reward.abs().amax(-1)  # differ by rounding at most
            sums["no_signal_fraction"] = ((flat & has_target).sum(), places)

    if s.divergence is not None:
        total = s.divergence.where(s.valid.unsqueeze(2), 0.0).sum()
        sums["divergence"] = (total, s.valid.sum() * num_thoughts)

    if s.advantage is not None:
        dropped = (s.advantage == 0).all(-1) & has_target
        sums["dropped_fraction"] = (dropped.sum(), places)

    counts = (s.tokens != NO_TOKEN) & of_thoughts.unsqueeze(-1)  # (B, P, K, T)
    tokens = counts.sum()
    if s.since_drawn is not None and s.is_clipped is not None:
        ratio = s.since_drawn.exp()
        sums["ratio"] = (ratio.where(counts, 0.0).sum(), tokens)
        sums["approx_kl"] = ((ratio - 1 - s.since_drawn).where(counts, 0.0).sum(), tokens)
        sums["clipped_fraction"] = ((s.is_clipped & counts).sum(), tokens)
    logprobs = s.logprobs.where(counts, 0.0).sum()
    # Sampled at the policy temperature, a token's surprise is an unbiased estimate of the entropy.
    entropy = -logprobs if s.entropy is None else s.entropy.where(counts, 0.0).sum()
    ordered = s.tokens.sort(-1).values  # padding first
    is_first = torch.ones_like(counts)
    is_first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    distinct = (is_first & (ordered != NO_TOKEN) & of_thoughts.unsqueeze(-1)).sum(-1)  # (B, P, K)
    ratio = distinct / counts.sum(-1).clamp(min=1)
    sums["entropy"] = (entropy, tokens)
    sums["distinct_token_ratio"] = (ratio.sum(), all_thoughts)
    sums["thought_logprob"] = (logprobs, tokens)
    if not may_end_early:
        return ThoughtMetrics(sums)
    is_cut = s.tokens[..., -1] != NO_TOKEN  # (B, P, K)
    if stop is not None:
        is_stopped = stop.is_ended(s.tokens)
        is_cut &= ~is_stopped
        sums["stop_fraction"] = ((is_stopped & of_thoughts).sum(), all_thoughts)
    sums["thought_length"] = (tokens, all_thoughts)
    sums["truncated_fraction"] = ((is_cut & of_thoughts).sum(), all_thoughts)
    # Neither bincount nor a mask, which would wait for a GPU.
    counted = of_thoughts.expand_as(is_cut).flatten().long()
    lengths = counted.new_zeros(s.tokens.shape[-1] + 1)
    return ThoughtMetrics(sums, lengths.index_add(0, counts.sum(-1).flatten(), counted))


def _of_next(x: Float[Tensor, "batch positions thoughts lookahead"], valid: Tensor) -> Tensor:
    """Sum over the thoughts what is about the next token, where there is one."""
    return x[..., 0].where(valid.unsqueeze(-1), 0.0).sum()
