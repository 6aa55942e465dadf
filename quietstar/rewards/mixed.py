"""The paper's reward: the log-probability of the true tokens by the mixed prediction."""

from torch import Tensor

from quietstar.losses.weights import ThoughtScores
from quietstar.rewards import without_thought
from quietstar.sampling.thoughts import ThoughtBatch


@without_thought
def mixed(thoughts: ThoughtBatch, scores: ThoughtScores) -> Tensor:
    """Sum log p_mixed(x_{i+a}) over the valid targets (arXiv 2403.09629, section 4.4.2), nats."""
    return scores.mixed.where(scores.valid.unsqueeze(2), 0.0).sum(-1)
