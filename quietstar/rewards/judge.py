"""The reward of RLAIF: what a judge says of the text that the model writes after a thought."""

from torch import Tensor

from quietstar.losses.weights import ThoughtScores
from quietstar.rewards import asks_policy, without_thought
from quietstar.sampling.thoughts import ThoughtBatch


@asks_policy
@without_thought
def judge(thoughts: ThoughtBatch, scores: ThoughtScores) -> Tensor:
    """Rate what follows each thought by ``judge.model`` (RLAIF, arXiv 2309.00267).

    With ``judge.mode: rating`` the expected rating from 1 to 10, mapped to [-1, 1] (section 2.3);
    with ``pairs`` the mean probability of being preferred to the other thoughts' texts, in [0, 1].
    """
    written = scores.continuations(thoughts)
    return written.table(scores.judge(written.prompts, written.texts))
