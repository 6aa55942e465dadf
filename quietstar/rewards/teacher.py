"""How close the prediction after a thought is to a teacher's: the reward of a thinking student."""

from torch import Tensor

from quietstar.errors import UserError
from quietstar.losses.weights import ThoughtScores
from quietstar.rewards import without_thought
from quietstar.sampling.thoughts import ThoughtBatch


@without_thought
def teacher(thoughts: ThoughtBatch, scores: ThoughtScores) -> Tensor:
    """Negate the divergence KL(teacher || mixed), summed over the valid targets.

    Raises:
        UserError: There is no teacher, because the objective is none with one.
    """
    if scores.divergence is None:
        raise UserError(
            "loss.reward (teacher): needs a teacher. Set loss.objective: distill with loss.student:"
            " thinking, or another reward."
        )
    return -scores.divergence.where(scores.valid.unsqueeze(2), 0.0).sum(-1)
