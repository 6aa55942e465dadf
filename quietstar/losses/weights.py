"""What an objective is given and what it gives: scores of thoughts, and weights for the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from quietstar.errors import UserError


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
        log_ratio: log pi(t) - log pi_ref(t) of each thought's tokens together, by the policy that
            drew them; None without a reference that scores thoughts.
        lengths: Tokens of each thought.
        running: Means of the rewards and of their standard deviations in a group, over earlier
            steps; None in the first step, and for objectives that do not ask for them.
        policy: What `logprob` asks; None outside of a training step.
    """

    base: Float[Tensor, "batch positions lookahead"]
    thought: Float[Tensor, "batch positions thoughts lookahead"] | None
    mixed: Float[Tensor, "batch positions thoughts lookahead"]
    reference: Float[Tensor, "batch positions lookahead"] | None
    valid: Bool[Tensor, "batch positions lookahead"]
    log_ratio: Float[Tensor, "batch positions thoughts"] | None = None
    lengths: Int[Tensor, "batch positions thoughts"] | None = None
    running: Float[Tensor, " 2"] | None = None
    policy: Callable[[Sequence[str], Sequence[str]], Tensor] | None = None

    def logprob(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> Float[Tensor, " texts"]:
        """Ask the model that trains for log p(completion | prompt) of any texts.

        Batched, without thoughts and without gradient. A reward that calls this is marked with
        `quietstar.rewards.asks_policy`.

        Args:
            prompts: What stands before; may be empty texts where the model has a token that
                begins them.
            completions: As many; their log-probabilities are summed over their tokens, nats.

        Raises:
            UserError: Another number of completions than of prompts, or a reward without the mark.
        """
        if self.policy is None:
            raise UserError(
                "scores.logprob: only a reward marked with quietstar.rewards.asks_policy may ask "
                "the model. Put @asks_policy above it."
            )
        return self.policy(prompts, completions)


@dataclass(frozen=True)
class ThoughtWeights:
    """What an objective makes of scores and rewards, without gradient.

    The loss divides the sums by counts of the whole step: by K M, with M positions that have a
    target; and by numbers of tokens, as `Objective.token_weighting` and `target_weighting` say.

    Attributes:
        advantage: Weight of the log-probability of each thought's tokens.
        mixed: Weight of the NLL of each true token by the mixed prediction; None for zero.
        thought: The same for the thought's own prediction.
        reward: What the thoughts were given in all, for figures; None for ``loss.reward`` alone.
    """

    advantage: Float[Tensor, "batch positions thoughts"] | None
    mixed: Float[Tensor, "batch positions thoughts lookahead"] | None = None
    thought: Float[Tensor, "batch positions thoughts lookahead"] | None = None
    reward: Float[Tensor, "batch positions thoughts"] | None = None

    def part(self, texts: slice, places: slice) -> ThoughtWeights:
        """Take those of some texts and some of their positions."""
        tables = (self.advantage, self.mixed, self.thought, self.reward)
        return ThoughtWeights(*(None if x is None else x[texts, places] for x in tables))


Weigh = Callable[[ThoughtScores, slice, slice], ThoughtWeights]
"""From the scores of some texts and some of their positions to weights."""
