"""Figures to watch, kept as sums and counts so that micro-batches and ranks add up exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from quietstar.losses.thought_loss import ScoredThoughts


@dataclass(frozen=True)
class ThoughtMetrics:
    """Sums and counts of every figure; `means` divides them.

    ====================  ==========================================================================
    base_nll              NLL of the next token without thoughts, nats a token
    mixed_nll             with thoughts, mixed
    thought_nll           by the thought's own prediction
    gain                  base_nll - mixed_nll: the gain of thinking (derived)
    gain_beyond_next      the same over the targets further ahead (a > 1)
    mixing_weight         mean share of the thought in the prediction of the next token
    reward                log-probability that a thought adds over all its targets, nats
    reward_std            standard deviation of the reward among a position's thoughts
    identical_fraction    fraction of positions whose thoughts are all the same: no signal there
    entropy               of the thought tokens' distributions, nats (at the policy temperature)
    distinct_token_ratio  distinct tokens of a thought over its length
    thought_logprob       mean log-probability of the thought tokens
    text_nll              with chosen positions: NLL without thoughts over *all* next tokens, while
                          base_nll, mixed_nll and gain are over those behind a thought
    text_gain             with chosen positions: what thoughts gain, over all next tokens
    ====================  ==========================================================================
    """

    sums: Mapping[str, Tensor]
    counts: Mapping[str, Tensor]

    def __add__(self, other: ThoughtMetrics) -> ThoughtMetrics:
        """Figures of both batches together."""
        return ThoughtMetrics(
            {k: v + other.sums[k] for k, v in self.sums.items()},
            {k: v + other.counts[k] for k, v in self.counts.items()},
        )

    def joined(self, other: ThoughtMetrics) -> ThoughtMetrics:
        """All figures of both, of the same batch."""
        return ThoughtMetrics({**self.sums, **other.sums}, {**self.counts, **other.counts})

    def reduced(self, accelerator: Accelerator) -> ThoughtMetrics:
        """Figures of all ranks together."""
        if accelerator.num_processes == 1:
            return self
        table = accelerator.reduce(self._table(), "sum")
        assert isinstance(table, Tensor)
        rows = dict(zip(self.sums, table, strict=True))
        return ThoughtMetrics(
            {n: r[0] for n, r in rows.items()}, {n: r[1] for n, r in rows.items()}
        )

    def means(self) -> dict[str, float]:
        """Every figure as a number; those that were not computed are left out."""
        table = self._table().tolist()
        means = {n: s / c for n, (s, c) in zip(self.sums, table, strict=True) if c > 0}
        if "mixed_nll" in means:
            means["gain"] = means["base_nll"] - means["mixed_nll"]
        return means

    def _table(self) -> Tensor:
        """Sum and count of every figure in float64, (figures, 2)."""
        pairs = [(self.sums[name], self.counts[name]) for name in self.sums]
        if pairs[0][0].device.type == "mps":  # has no float64: the CPU widens what is read
            sums, counts = torch.stack([s.float() for s, _ in pairs]), [c for _, c in pairs]
            return torch.stack([sums.cpu().double(), torch.stack(counts).cpu().double()], dim=1)
        return torch.stack([torch.stack([s.double(), c.double()]) for s, c in pairs])


def as_metrics(figures: Mapping[str, tuple[Tensor, Tensor]]) -> ThoughtMetrics:
    """From pairs of sum and count."""
    return ThoughtMetrics(
        {name: total for name, (total, _) in figures.items()},
        {name: count for name, (_, count) in figures.items()},
    )


def plain_metrics(nll: Tensor, valid: Tensor) -> ThoughtMetrics:
    """Figures of a text read without thoughts."""
    return as_metrics({"base_nll": (nll.sum(), valid.sum())})


@torch.no_grad()
def thought_metrics(scored: ScoredThoughts) -> ThoughtMetrics:
    """Figures of one batch of scored thoughts; no host sync."""
    return as_metrics(
        _prediction_figures(scored) | _reward_figures(scored) | _token_figures(scored)
    )


def _prediction_figures(s: ScoredThoughts) -> dict[str, tuple[Tensor, Tensor]]:
    num_thoughts = s.mixing_weight.shape[1]
    valid = s.valid[0]  # (B, P)
    count = valid.sum()
    ahead = s.valid[1:]
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
    return figures


def _reward_figures(s: ScoredThoughts) -> dict[str, tuple[Tensor, Tensor]]:
    num_thoughts = s.mixing_weight.shape[1]
    has_target = s.valid.any(0)  # (B, P)
    count = has_target.sum()
    gain = (s.mixed_logprobs - s.base_logprobs.unsqueeze(1)).where(s.valid.unsqueeze(1), 0.0).sum(0)
    figures = {"reward": (gain.sum(), count * num_thoughts)}
    if num_thoughts > 1:
        identical = (s.thoughts == s.thoughts[:, :1]).all(0).all(0)  # (B, P)
        figures["reward_std"] = (gain.std(0).where(has_target, 0.0).sum(), count)
        figures["identical_fraction"] = ((identical & has_target).sum(), count)
    return figures


def _token_figures(s: ScoredThoughts) -> dict[str, tuple[Tensor, Tensor]]:
    length, num_thoughts = s.thoughts.shape[:2]
    has_target = s.valid.any(0)
    count = has_target.sum() * num_thoughts
    ordered = s.thoughts.sort(0).values
    distinct = 1 + (ordered[1:] != ordered[:-1]).sum(0)  # (K, B, P)
    logprobs = s.logprobs.where(has_target, 0.0).sum()
    # Sampled at the policy temperature, a token's surprise is an unbiased estimate of the entropy.
    entropy = -logprobs if s.entropy is None else s.entropy.where(has_target, 0.0).sum()
    return {
        "entropy": (entropy, count * length),
        "distinct_token_ratio": (distinct.where(has_target, 0).sum() / length, count),
        "thought_logprob": (logprobs, count * length),
    }
