"""How much a thought raises the log-probability of the true tokens: the reward of RLP."""

from torch import Tensor

from quietstar.losses.weights import ThoughtScores
from quietstar.sampling.thoughts import ThoughtBatch


def information_gain(thoughts: ThoughtBatch, scores: ThoughtScores) -> Tensor:
    """Sum log p_thought(x_{i+a}) - log p(x_{i+a}) over the valid targets, nats.

    The second is that of the reference without a thought, where there is one (RLP, arXiv
    2510.01265, section 2: a moving average of the weights), else of the model itself. It is the
    same for all thoughts of a position: a baseline over these cancels it.
    """
    assert scores.thought is not None, "the thought's own prediction was computed"
    without = scores.base if scores.reference is None else scores.reference
    gain = scores.thought - without.unsqueeze(2)
    return gain.where(scores.valid.unsqueeze(2), 0.0).sum(-1)
