"""What the terms behind thoughts gave, put together for those who read figures."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from quietstar.attention.layout import IGNORE_INDEX, lookahead_states, lookahead_targets
from quietstar.losses.cross_entropy import RowResult


@dataclass(frozen=True)
class ThoughtResults:
    """What the terms behind thoughts gave, without gradient; NLLs are 0 where there is no target.

    Attributes:
        mixed: NLL of the mixed prediction.
        thought: NLL of the thought's own, None if nothing read it.
        predicted: Most likely mixed token, None if not asked for.
        policy: NLL of the thought tokens at the policy temperature.
        entropy: Entropy of their distributions, None if not computed.
        mixing_weight: Mixing weight as given.
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
        thoughts: Thought tokens.
        logprobs: Their log-probabilities at the policy temperature.
        mixing_weight: Share of the thought in each prediction.
        base_logprobs: Of the true token x_{i+a}, without the thought.
        mixed_logprobs: Log-probabilities of x_{i+a} by the mixed prediction.
        thought_logprobs: By the thought's own prediction alone; None if no loss needs it.
        valid: Whether there is a target x_{i+a}.
        entropy: Of each thought token's distribution, None if not computed.
        text_logprobs: Of the next token after every text position, 0 where there is no target.
        text_valid: Whether there is a next target.
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
