"""What a trained reward model says of the text that the model writes after a thought."""

from torch import Tensor

from quietstar.losses.weights import ThoughtScores
from quietstar.rewards import asks_policy, without_thought
from quietstar.sampling.thoughts import ThoughtBatch


@asks_policy
@without_thought
def reward_model(thoughts: ThoughtBatch, scores: ThoughtScores) -> Tensor:
    """Score what follows each thought by the sequence classifier ``judge.model``.

    The score is the classifier's only logit (RLAIF, arXiv 2309.00267, section 2.2.1).
    """
    written = scores.continuations(thoughts)
    return written.table(scores.judge(written.prompts, written.texts))
