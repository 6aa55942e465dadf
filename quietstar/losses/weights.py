"""What an objective is given and what it gives: scores of thoughts, and weights for the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class ThoughtScores:
    """Log-probabilities of the true tokens behind thoughts: natural logarithm, no gradient.

    Entry a - 1 of the last axis is about the true token x_{i+a}. Where there is no target, entries
    are 0 and ``valid`` is False.

    Attributes:
        base: Log-probabilities without a thought.
        thought: By the thought's own prediction; None if neither reward nor objective reads it.
        mixed: Log-probabilities by the mixed prediction.
        reference: By a reference model without a thought; None if there is none.
        valid: Whether there is a target.
    """

    base: Float[Tensor, "batch positions lookahead"]
    thought: Float[Tensor, "batch positions thoughts lookahead"] | None
    mixed: Float[Tensor, "batch positions thoughts lookahead"]
    reference: Float[Tensor, "batch positions lookahead"] | None
    valid: Bool[Tensor, "batch positions lookahead"]


@dataclass(frozen=True)
class ThoughtWeights:
    """What an objective makes of scores and rewards, without gradient.

    The loss divides the sums by counts of the whole step: by K M for the policy term and A K M for
    the true tokens, with M positions that have a target.

    Attributes:
        advantage: Weight of the mean log-probability of each thought's tokens.
        mixed: Weight of the NLL of each true token by the mixed prediction; None for zero.
        thought: The same for the thought's own prediction.
    """

    advantage: Float[Tensor, "batch positions thoughts"] | None
    mixed: Float[Tensor, "batch positions thoughts lookahead"] | None = None
    thought: Float[Tensor, "batch positions thoughts lookahead"] | None = None


Weigh = Callable[[ThoughtScores, slice, slice], ThoughtWeights]
"""From the scores of some texts and some of their positions to weights."""
