"""Fast Quiet-STaR's last stage (arXiv 2505.17746): a model without thoughts is reinforced.

The reward of a true token is what the plain model's likelihood is above that of the thinking
teacher, r = log p(x | text) - log p_teacher(x | text, thought). The paper and its published code
use it differently, and both are here:

    paper   sum_i  r_i * -log p(x_i)                     the true token, r of either sign
    code    sum_i  max(0, r_i) * -log p^(1/3)(s_i)       a token s_i drawn from the model

With the paper's form a token that the teacher predicts better is unlearned; with the code's form
nothing says that a token that was drawn is a good one. Both pull away from the teacher, or from
the data, where the plain model is worse: `distill` does what they are meant to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from quietstar.config.schema import LossWeight
from quietstar.losses.weights import Student, ThoughtScores, ThoughtWeights
from quietstar.objectives import Objective
from quietstar.objectives._student import (
    StudentSettings,
    has_weights_of_its_own,
    student_problems,
    unread_with_a_folder,
)


class FastRlSettings(StudentSettings):
    """Which weights teach, and how much."""

    reference: Literal["current", "ema", "base"] = Field(
        default="base",
        description="Weights that teach: the model itself as it is, its moving average"
        " (training.ema_decay), or the weights at the start of the stage.",
    )
    policy_weight: LossWeight = Field(default=1.0, description="Weight of the policy term.")
    base_weight: LossWeight = Field(
        default=0.0, description="Weight of the NLL of all next tokens."
    )


class FastRl(Objective):
    """Reinforces the plain model by what it is ahead of its thinking teacher."""

    Settings = FastRlSettings
    student = "plain"

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.base_weight, self.reference = settings.base_weight, settings.reference

    def student_loss(self, rows: Student) -> tuple[Tensor, dict[str, Tensor]]:
        """Weigh the log-probability of the true token by the reward."""
        reward, weight = rows.teacher_nll - rows.nll, self.settings.policy_weight * rows.scale
        return rows.token_loss(rows.targets, weight * reward), {"student_reward": reward}

    def weigh(self, reward: Tensor, scores: ThoughtScores) -> ThoughtWeights:
        """Weigh nothing: no thought is learned."""
        raise AssertionError("a plain student has no thoughts")

    def reads_reference(self, reward: str) -> bool:
        """Tell whether other weights of the model teach."""
        return has_weights_of_its_own(self.settings)

    @staticmethod
    def problems(config: Any) -> Iterable[tuple[tuple[str, ...], str]]:
        """Check who teaches."""
        return student_problems(config)

    @staticmethod
    def unused(loss: Any) -> Iterable[tuple[str, str]]:
        """Name what the objective, or a teacher of another run, does not read."""
        yield "loss.reward", "with loss.objective: fast_rl, which has its own"
        yield from unread_with_a_folder(loss)
