"""The probability of the true tokens after a thought: the reward of VeriFree."""

from torch import Tensor

from quietstar.losses.weights import ThoughtScores
from quietstar.sampling.thoughts import ThoughtBatch


def prob(thoughts: ThoughtBatch, scores: ThoughtScores) -> Tensor:
    """Multiply p_thought(x_{i+a}) over the valid targets (VeriFree, arXiv 2505.21493).

    0 where there is no target.
    """
    assert scores.thought is not None, "the thought's own prediction was computed"
    valid = scores.valid.unsqueeze(2)
    logprob = scores.thought.where(valid, 0.0).sum(-1)
    return logprob.exp().where(valid.any(-1), 0.0)
