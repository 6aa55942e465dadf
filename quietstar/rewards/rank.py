"""A thought's rank among the thoughts of its position, by the likelihood of the true tokens."""

from torch import Tensor

from quietstar.losses.weights import ThoughtScores
from quietstar.sampling.thoughts import ThoughtBatch


def rank(thoughts: ThoughtBatch, scores: ThoughtScores) -> Tensor:
    """Count the position's thoughts that do worse by log p_thought, over K - 1: 0 to 1.

    Ties count half. A reward in bounds whatever the likelihoods are (as in NOVER, arXiv
    2505.16022, whose gates for format and length it leaves out).
    """
    assert scores.thought is not None, "the thought's own prediction was computed"
    logprob = scores.thought.where(scores.valid.unsqueeze(2), 0.0).sum(-1)
    mine, others = logprob.unsqueeze(-1), logprob.unsqueeze(-2)
    better = (mine > others).float() + 0.5 * (mine == others).float()
    num_thoughts = logprob.shape[-1]
    return (better.sum(-1) - 0.5) / max(1, num_thoughts - 1)  # without itself
