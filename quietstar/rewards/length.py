"""The length of a thought, for a sum such as ``thought + -0.001*length``."""

from torch import Tensor

from quietstar.losses.weights import ThoughtScores
from quietstar.sampling.thoughts import ThoughtBatch


def length(thoughts: ThoughtBatch, scores: ThoughtScores) -> Tensor:
    """Count the tokens of each thought, without its start and end."""
    assert scores.lengths is not None, "the model gives lengths"
    return scores.lengths.to(scores.mixed.dtype)
