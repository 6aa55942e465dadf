"""What a learn pass says of its thoughts, for those who read figures and not gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quietstar.attention.layout import (
    IGNORE_INDEX,
    lookahead_states,
    lookahead_targets,
    text_ahead,
)
from quietstar.backbone.learn import LearnStates
from quietstar.backbone.output_head import OutputHead
from quietstar.losses.cross_entropy import RowResult, Segment, objective
from quietstar.losses.mixture import Mixture, MixtureResult, mixture_objective


@dataclass(frozen=True)
class ThoughtResults:
    """What the terms behind thoughts gave, without gradient; NLLs are 0 where there is no target.

    Attributes:
        mixed: NLL of the mixed prediction.
        thought: NLL of the thought's own, None if nothing read it.
        predicted: Most likely mixed token, None if not asked for.
        policy: NLL of the thought tokens at the policy temperature.
        entropy: Of their distributions, None if not computed.
        mixing_weight: As given.
    """

    mixed: Float[Tensor, "lookahead thoughts batch positions"]
    thought: Float[Tensor, "lookahead thoughts batch positions"] | None
    predicted: Int[Tensor, "lookahead thoughts batch positions"] | None
    policy: Float[Tensor, "length thoughts batch positions"]
    entropy: Float[Tensor, "length thoughts batch positions"] | None
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"]


@dataclass(frozen=True)
class ScoredThoughts:
    """What the thoughts did, position by position, without gradient.

    With chosen positions, P of them a text stand where ``positions`` is written; else S.

    Attributes:
        thoughts: Sampled tokens.
        logprobs: Their log-probabilities at the policy temperature.
        mixing_weight: Share of the thought in each prediction.
        base_logprobs: Of the true token x_{i+a}, without the thought.
        mixed_logprobs: With it.
        thought_logprobs: By the thought's own prediction alone; None if no loss needs it.
        valid: Whether there is a target x_{i+a}.
        entropy: Of each thought token's distribution, None if not computed.
        text_logprobs: Of the next token after every text position, 0 where there is no target.
        text_valid: Where there is one.
        positions: The chosen ones, None for all.
        base_predicted: Most likely next token without the thought, None if not asked for.
        mixed_predicted: Most likely x_{i+a} with it, None if not asked for.
    """

    thoughts: Int[Tensor, "length thoughts batch positions"]
    logprobs: Float[Tensor, "length thoughts batch positions"]
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"]
    base_logprobs: Float[Tensor, "lookahead batch positions"]
    mixed_logprobs: Float[Tensor, "lookahead thoughts batch positions"]
    thought_logprobs: Float[Tensor, "lookahead thoughts batch positions"] | None
    valid: Tensor  # (A, B, P), bool
    entropy: Float[Tensor, "length thoughts batch positions"] | None
    text_logprobs: Float[Tensor, "batch seq"]
    text_valid: Tensor  # (B, S), bool
    positions: Int[Tensor, "batch positions"] | None = None
    base_predicted: Int[Tensor, "batch seq"] | None = None
    mixed_predicted: Int[Tensor, "lookahead thoughts batch positions"] | None = None


def score(
    results: ThoughtResults,
    base: RowResult,
    thoughts: Int[Tensor, "length thoughts batch positions"],
    labels: Int[Tensor, "batch seq"],
    targets: Int[Tensor, "lookahead batch positions"],
    positions: Int[Tensor, "batch positions"] | None,
) -> ScoredThoughts:
    """The results of all positions and of the texts, put together."""
    text_nll, valid = base.nll.view(labels.shape), targets != IGNORE_INDEX
    ahead = lookahead_states(text_nll, targets.shape[0], positions)
    return ScoredThoughts(
        thoughts=thoughts,
        logprobs=-results.policy,
        mixing_weight=results.mixing_weight,
        base_logprobs=-ahead.where(valid, 0.0),
        mixed_logprobs=-results.mixed,
        thought_logprobs=None if results.thought is None else -results.thought,
        valid=valid,
        entropy=results.entropy,
        text_logprobs=-text_nll,
        text_valid=lookahead_targets(labels, 1)[0] != IGNORE_INDEX,
        positions=positions,
        base_predicted=_like(base.predicted, text_nll),
        mixed_predicted=results.predicted,
    )


def _like(x: Tensor | None, other: Tensor) -> Tensor | None:
    return None if x is None else x.view(other.shape)


def mixed_predictions(
    states: LearnStates,
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"],
    labels: Int[Tensor, "batch seq"],
    head: OutputHead,
    positions: Int[Tensor, "batch positions"] | None = None,
) -> MixtureResult:
    """The mixed prediction of every target alone: what a reader of scores needs, and no more.

    Arguments as in `quiet_star_loss`.
    """
    lookahead = mixing_weight.shape[0]
    targets = lookahead_targets(labels, lookahead, positions)
    mixture = Mixture(
        text_ahead(states.text, lookahead, positions),
        states.ahead,
        mixing_weight,
        targets,
        wants_thought=False,
        wants_predicted=True,
    )
    return mixture_objective(mixture, head)[1]


def mixed_candidates(
    states: LearnStates,
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"],
    head: OutputHead,
    candidates: Int[Tensor, " candidates"],
    positions: Int[Tensor, "batch positions"] | None = None,
) -> Float[Tensor, "thoughts batch positions candidates"]:
    """Mixed logits of a few candidates for the next token; arguments as in `quiet_star_loss`."""
    base = lookahead_states(states.text, 1, positions)  # (1, B, P, D)
    base, thought = (head.candidate_logits(x, candidates) for x in (base, states.ahead[0]))
    weight = mixing_weight[0].unsqueeze(-1).to(thought.dtype)
    return torch.lerp(base.expand_as(thought), thought, weight)


def next_token_entropy(
    states: Float[Tensor, "batch seq width"], head: OutputHead
) -> Float[Tensor, "batch seq"]:
    """Entropy of the next token's distribution after every text position, nats; no gradient."""
    rows = states.detach().flatten(0, 1)
    targets = torch.full_like(rows[:, 0], IGNORE_INDEX, dtype=torch.long)
    with torch.no_grad():
        _, results = objective([Segment(rows, targets, wants_entropy=True)], head)
    assert results[0].entropy is not None, "it was asked for"
    return results[0].entropy.view(states.shape[:2])
