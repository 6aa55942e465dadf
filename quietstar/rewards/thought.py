"""The log-probability of the true tokens by the thought's own prediction, without the mixture."""

from torch import Tensor

from quietstar.losses.weights import ThoughtScores
from quietstar.sampling.thoughts import ThoughtBatch


def thought(thoughts: ThoughtBatch, scores: ThoughtScores) -> Tensor:
    """Sum log p_thought(x_{i+a}) over the valid targets, nats.

    Unlike the mixed prediction's, this reward does not fade while the mixing weight is small.
    """
    assert scores.thought is not None, "the thought's own prediction was computed"
    return scores.thought.where(scores.valid.unsqueeze(2), 0.0).sum(-1)
