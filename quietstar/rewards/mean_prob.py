"""The mean probability of the true tokens that a thought adds: the reward of RLPR."""

from torch import Tensor

from quietstar.losses.weights import ThoughtScores
from quietstar.sampling.thoughts import ThoughtBatch


def mean_prob(thoughts: ThoughtBatch, scores: ThoughtScores) -> Tensor:
    """Average p_thought(x_{i+a}) over the valid targets, less the same without a thought, above 0.

    Without a thought the reference predicts where there is one, else the model itself (RLPR, arXiv
    2506.18254, section 3; without its reward for the format).
    """
    assert scores.thought is not None, "the thought's own prediction was computed"
    without = (scores.base if scores.reference is None else scores.reference).unsqueeze(2)
    valid = scores.valid.unsqueeze(2)
    added = (scores.thought.exp() - without.exp()).where(valid, 0.0).sum(-1)
    return (added / valid.sum(-1).clamp(min=1)).clamp(min=0.0)
