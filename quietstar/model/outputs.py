"""What the model returns: losses, scores, thoughts, and the figures to watch."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from quietstar.attention.layout import NO_TOKEN
from quietstar.losses.thought_loss import ScoredThoughts
from quietstar.sampling.stopping import StopTexts
from quietstar.sampling.thoughts import ThoughtBatch

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class ThoughtMetrics:
    """Sum and count of every figure, so that micro-batches and ranks add up exactly.

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
        figures: Sum and count by name.
        lengths: Number of thoughts of 0, 1, ... tokens; None where all have the same length.
    """

    figures: Mapping[str, tuple[Tensor, Tensor]]
    lengths: Int[Tensor, " lengths"] | None = None

    def __add__(self, other: ThoughtMetrics) -> ThoughtMetrics:
        """Figures of both batches together."""
        lengths = None
        if self.lengths is not None and other.lengths is not None:
            lengths = self.lengths + other.lengths
        return ThoughtMetrics(
            {n: (s + other.figures[n][0], c + other.figures[n][1])
             for n, (s, c) in self.figures.items()},
            lengths,
        )  # fmt: skip

    def joined(self, other: ThoughtMetrics) -> ThoughtMetrics:
        """All figures of both, of the same batch."""
        lengths = other.lengths if self.lengths is None else self.lengths
        return ThoughtMetrics({**self.figures, **other.figures}, lengths)

    def reduced(self, accelerator: Accelerator) -> ThoughtMetrics:
        """Figures of all ranks together."""
        if accelerator.num_processes == 1:
            return self
        table = accelerator.reduce(self._table(), "sum")
        assert isinstance(table, Tensor)
        figures = {n: (r[0], r[1]) for n, r in zip(self.figures, table, strict=True)}
        lengths = None if self.lengths is None else accelerator.reduce(self.lengths, "sum")
        assert lengths is None or isinstance(lengths, Tensor)
        return ThoughtMetrics(figures, lengths)

    def means(self) -> dict[str, float]:
        """Every figure as a number; those that were not computed are left out."""
        table = self._table().tolist()
        means = {n: s / c for n, (s, c) in zip(self.figures, table, strict=True) if c > 0}
        if "mixed_nll" in means:
            means["gain"] = means["base_nll"] - means["mixed_nll"]
        if self.lengths is not None and "thought_length" in means:
            means["thought_length_p90"] = percentile(self.lengths.tolist(), 0.9)
        return means

    def _table(self) -> Tensor:
        """Sum and count of every figure in float64, (figures, 2)."""
        pairs = list(self.figures.values())
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
        metrics: Figures of the batch as sums and counts; ``metrics.means()`` gives numbers.
        thoughts: Sampled tokens, (batch, thoughts, positions, length), -1 after the last of a
            thought that ends early.
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
        metrics: Figures of the batch.
        candidates: Logits of the candidates after every text position; None if none were asked for.
    """

    logprobs: Float[Tensor, "batch seq"]
    predicted: Int[Tensor, "batch seq"]
    valid: Bool[Tensor, "batch seq"]
    metrics: ThoughtMetrics
    candidates: Float[Tensor, "batch seq candidates"] | None = None


@dataclass(frozen=True)
class MixedScores:
    """Predictions with thoughts; output of `QuietStarForCausalLM.score_mixed`.

    Attributes:
        logprobs: Of the true next token, 0 where there is none.
        predicted: Most likely next token.
        candidates: Logits of the candidates; None if none were asked for.

    Where a lookahead was asked for, its axis stands after that of the positions.
    """

    logprobs: Float[Tensor, "batch thoughts positions *lookahead"]
    predicted: Int[Tensor, "batch thoughts positions *lookahead"]
    candidates: Float[Tensor, "batch thoughts positions *lookahead candidates"] | None = None


@dataclass(frozen=True)
class Thoughts:
    """Thoughts of every position and what they did; output of `QuietStarForCausalLM.think`.

    Position i of a text is the thought after token i; entry a - 1 of the last axis of the
    predictions is about the true token x_{i+a}. ``positions`` are all, (seq,), or the chosen ones.

    Attributes:
        tokens: Tokens of the thoughts, -1 after the last of one that ends early.
        logprobs: Their log-probabilities (natural logarithm).
        mixing_weight: Share of the thought in the prediction.
        base_logprobs: Log-probabilities of the true tokens without the thought.
        thought_logprobs: The same by the thought's own prediction.
        mixed_logprobs: The same by the mixed prediction.
        valid: Where there is a true token to predict; elsewhere log-probabilities are 0.
        text_logprobs: Log-probability of the true next token without thoughts, after every text
            position.
        base_predicted: Most likely next token without the thought, after every text position.
        mixed_predicted: Most likely x_{i+a} with it.
        metrics: Figures of the batch.
        positions: The chosen ones, -1 after the last of a text; None for all.
    """

    tokens: Int[Tensor, "batch thoughts positions length"]
    logprobs: Float[Tensor, "batch thoughts positions length"]
    mixing_weight: Float[Tensor, "batch thoughts positions lookahead"]
    base_logprobs: Float[Tensor, "batch positions lookahead"]
    thought_logprobs: Float[Tensor, "batch thoughts positions lookahead"]
    mixed_logprobs: Float[Tensor, "batch thoughts positions lookahead"]
    valid: Bool[Tensor, "batch positions lookahead"]
    text_logprobs: Float[Tensor, "batch seq"]
    base_predicted: Int[Tensor, "batch seq"]
    mixed_predicted: Int[Tensor, "batch thoughts positions lookahead"]
    metrics: ThoughtMetrics
    positions: Int[Tensor, "batch positions"] | None = None

    @classmethod
    def from_scored(cls, scored: ScoredThoughts, metrics: ThoughtMetrics) -> Thoughts:
        """From the engine's order, (token or lookahead, thoughts, batch, seq)."""

        def public(x: Tensor | None) -> Tensor:
            assert x is not None, "compute with scoring"
            return x.permute(2, 1, 3, 0)

        assert scored.base_predicted is not None, "compute with scoring"
        return cls(
            tokens=public(scored.thoughts),
            logprobs=public(scored.logprobs),
            mixing_weight=public(scored.mixing_weight),
            base_logprobs=scored.base_logprobs.permute(1, 2, 0),
            thought_logprobs=public(scored.thought_logprobs),
            mixed_logprobs=public(scored.mixed_logprobs),
            valid=scored.valid.permute(1, 2, 0),
            text_logprobs=scored.text_logprobs,
            base_predicted=scored.base_predicted,
            mixed_predicted=public(scored.mixed_predicted),
            metrics=metrics,
            positions=scored.positions,
        )

    def next_predicted(self) -> Int[Tensor, "batch thoughts seq"]:
        """Most likely next token after every text position, thoughts considered."""
        return of_nearest_thought(self.base_predicted, self.mixed_predicted, self.positions)

    def next_logprobs(self) -> Float[Tensor, "batch thoughts seq"]:
        """Log-probability of the true next token there, 0 where there is none."""
        return of_nearest_thought(self.text_logprobs, self.mixed_logprobs, self.positions)

    def to_frame(self, tokenizer: PreTrainedTokenizerBase | None = None) -> DataFrame:
        """A pandas frame with a row for every thought and true token that it looks ahead to.

        Columns: ``text``, ``position``, ``thought``, ``ahead`` (1 for the next token), ``tokens``,
        ``mixing_weight``, ``base_logprob``, ``thought_logprob``, ``mixed_logprob`` and ``gain``
        (mixed minus base); with a tokenizer also ``thought_text``.
        """
        from pandas import DataFrame

        where = self.valid.unsqueeze(1).expand_as(self.mixed_logprobs).nonzero()
        text, thought, place, ahead = where.T
        base = self.base_logprobs[text, place, ahead]
        mixed = self.mixed_logprobs[text, thought, place, ahead]
        tokens = [without_padding(t) for t in self.tokens[text, thought, place].tolist()]
        position = place if self.positions is None else self.positions[text, place]
        columns: dict[str, Any] = {
            "text": text, "position": position, "thought": thought, "ahead": ahead + 1,
            "mixing_weight": self.mixing_weight[text, thought, place, ahead],
            "base_logprob": base,
            "thought_logprob": self.thought_logprobs[text, thought, place, ahead],
            "mixed_logprob": mixed,
            "gain": mixed - base,
        }  # fmt: skip
        columns = {name: column.cpu().numpy() for name, column in columns.items()}
        columns["tokens"] = tokens
        if tokenizer is not None:
            columns["thought_text"] = tokenizer.batch_decode(tokens)
        return DataFrame(columns)


def without_padding(tokens: Sequence[int]) -> list[int]:
    """Tokens of a thought without those that stand after its end."""
    return [token for token in tokens if token != NO_TOKEN]


def decode_thoughts(tokenizer: PreTrainedTokenizerBase, tokens: Int[Tensor, "*thoughts _"]) -> Any:
    """Return the texts of thoughts, in nested lists of their shape; one thought as a text."""
    if tokens.ndim > 1:
        return [decode_thoughts(tokenizer, some) for some in tokens]
    return tokenizer.decode(without_padding(tokens.tolist()))


def of_nearest_thought(
    text: Shaped[Tensor, "batch seq"],
    mixed: Shaped[Tensor, "batch thoughts positions lookahead"],
    positions: Int[Tensor, "batch positions"] | None,
) -> Shaped[Tensor, "batch thoughts seq"]:
    """Returns what is known of the token after every position of a text.

    From the thought there, else from the latest one whose lookahead reaches as far, else without.

    Args:
        text: What is known of the next token without thoughts.
        mixed: What is known of x_{i+a} with them.
        positions: Positions of the thoughts, -1 after the last; None for all.
    """
    if positions is None:
        return mixed[..., 0]
    num_thoughts, lookahead, last = mixed.shape[1], mixed.shape[-1], text.shape[-1]
    known = text.unsqueeze(1).expand(-1, num_thoughts, -1)
    known = torch.nn.functional.pad(known, (0, 1))  # takes what lies at no position
    for ahead in reversed(range(lookahead)):  # nearer thoughts overwrite
        index = positions + ahead
        index = index.where((positions >= 0) & (index < last), last)
        index = index.unsqueeze(1).expand(-1, num_thoughts, -1)
        known = known.scatter(-1, index, mixed[..., ahead])
    return known[..., :last]


def plain_metrics(nll: Tensor, valid: Tensor) -> ThoughtMetrics:
    """Figures of a text read without thoughts."""
    return ThoughtMetrics({"base_nll": (nll.sum(), valid.sum())})


@torch.no_grad()
def thought_metrics(
    s: ScoredThoughts, may_end_early: bool = False, stop: StopTexts | None = None
) -> ThoughtMetrics:
    """Figures of one batch of scored thoughts, with their lengths if they differ; no host sync."""
    num_thoughts = s.thoughts.shape[1]
    valid, ahead = s.valid[0], s.valid[1:]  # (B, P) and (A - 1, B, P)
    count = valid.sum()
    gain_beyond_next = (s.mixed_logprobs[1:].mean(1) - s.base_logprobs[1:]).where(ahead, 0.0)
    figures = {
        "base_nll": (-s.base_logprobs[0].where(valid, 0.0).sum(), count),
        "mixed_nll": (-s.mixed_logprobs[0].where(valid, 0.0).sum(), count * num_thoughts),
        "gain_beyond_next": (gain_beyond_next.sum(), ahead.sum()),
        "mixing_weight": (s.mixing_weight[0].where(valid, 0.0).sum(), count * num_thoughts),
    }
    if s.thought_logprobs is not None:
        total = -s.thought_logprobs[0].where(valid, 0.0).sum()
        figures["thought_nll"] = (total, count * num_thoughts)
    if s.positions is not None:
        gain = (s.mixed_logprobs[0].mean(0) - s.base_logprobs[0]).where(valid, 0.0)
        figures["text_nll"] = (-s.text_logprobs.sum(), s.text_valid.sum())
        figures["text_gain"] = (gain.sum(), s.text_valid.sum())

    has_target = s.valid.any(0)  # (B, P)
    places = has_target.sum()
    gain = (s.mixed_logprobs - s.base_logprobs.unsqueeze(1)).where(s.valid.unsqueeze(1), 0.0).sum(0)
    figures["reward"] = (gain.sum(), places * num_thoughts)
    if num_thoughts > 1:
        identical = (s.thoughts == s.thoughts[:, :1]).all(0).all(0)  # (B, P)
        figures["reward_std"] = (gain.std(0).where(has_target, 0.0).sum(), places)
        figures["identical_fraction"] = ((identical & has_target).sum(), places)

    if s.reward is not None:
        figures["policy_reward"] = (s.reward.where(has_target, 0.0).sum(), places * num_thoughts)
        if num_thoughts > 1:
            spread = s.reward.std(0)
            figures["policy_reward_std"] = (spread.where(has_target, 0.0).sum(), places)
            flat = spread <= 1e-6 * s.reward.abs().amax(0)  # differ by rounding at most
            figures["no_signal_fraction"] = ((flat & has_target).sum(), places)

    if s.divergence is not None:
        total = s.divergence.where(s.valid.unsqueeze(1), 0.0).sum()
        figures["divergence"] = (total, s.valid.sum() * num_thoughts)

    if s.advantage is not None:
        dropped = (s.advantage == 0).all(0) & has_target
        figures["dropped_fraction"] = (dropped.sum(), places)

    counts = (s.thoughts != NO_TOKEN) & has_target  # (T, K, B, P)
    tokens = counts.sum()
    if s.since_drawn is not None and s.is_clipped is not None:
        ratio = s.since_drawn.exp()
        figures["ratio"] = (ratio.where(counts, 0.0).sum(), tokens)
        figures["approx_kl"] = ((ratio - 1 - s.since_drawn).where(counts, 0.0).sum(), tokens)
        figures["clipped_fraction"] = ((s.is_clipped & counts).sum(), tokens)
    logprobs = s.logprobs.where(counts, 0.0).sum()
    # Sampled at the policy temperature, a token's surprise is an unbiased estimate of the entropy.
    entropy = -logprobs if s.entropy is None else s.entropy.where(counts, 0.0).sum()
    ordered = s.thoughts.sort(0).values  # padding first
    is_first = torch.ones_like(counts)
    is_first[1:] = ordered[1:] != ordered[:-1]
    distinct = (is_first & (ordered != NO_TOKEN) & has_target).sum(0)  # (K, B, P)
    ratio = distinct / counts.sum(0).clamp(min=1)
    figures["entropy"] = (entropy, tokens)
    figures["distinct_token_ratio"] = (ratio.sum(), places * num_thoughts)
    figures["thought_logprob"] = (logprobs, tokens)
    if not may_end_early:
        return ThoughtMetrics(figures)
    is_cut = s.thoughts[-1] != NO_TOKEN  # (K, B, P)
    if stop is not None:
        is_stopped = stop.is_ended(s.thoughts)
        is_cut &= ~is_stopped
        figures["stop_fraction"] = ((is_stopped & has_target).sum(), places * num_thoughts)
    figures["thought_length"] = (tokens, places * num_thoughts)
    figures["truncated_fraction"] = ((is_cut & has_target).sum(), places * num_thoughts)
    # Neither bincount nor a mask, which would wait for a GPU.
    counted = has_target.expand_as(is_cut).flatten().long()
    lengths = counted.new_zeros(len(s.thoughts) + 1)
    return ThoughtMetrics(figures, lengths.index_add(0, counts.sum(0).flatten(), counted))
