"""Thoughts into the weights: a student learns what a thinking teacher predicts.

The student is the same model without thoughts, or with shorter ones; the teacher is the model as it
thinks now, as it did at the start of the stage, on average, or in another run (`quietstar teach`).
The objective is the forward divergence KL(teacher || student) of every true token that a thought
reaches: context distillation (arXiv 2209.15189) with the thought as the context.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from quietstar.config.schema import LossWeight
from quietstar.losses.weights import Student, ThoughtScores, ThoughtWeights
from quietstar.objectives._policy import PolicyObjective, settings_with
from quietstar.objectives._student import (
    StudentSettings,
    has_weights_of_its_own,
    student_problems,
    unread_with_a_folder,
)

_Base: Any = settings_with(reward="teacher", reference="base")
_OF_THOUGHTS = (
    *("mixed_weight", "thought_weight", "thought_weighting", "target_weighting"),
    *("policy_weight", "estimator", "scaling", "token_weighting", "clip_low", "clip_high"),
    *("kl_weight", "reward_kl_weight", "entropy_weight", "min_signal", "reward"),
)


class DistillSettings(StudentSettings, _Base):
    """Who teaches whom, and how much of a prediction is learned."""

    student: Literal["plain", "thinking"] = Field(
        default="plain",
        description="Who learns: the model without thoughts (plain), or with thoughts of its own,"
        " such as shorter ones (thinking).",
    )
    distill_weight: LossWeight = Field(
        default=1.0, description="Weight of the divergence from the teacher."
    )


class Distill(PolicyObjective):
    """The divergence from the teacher; a thinking student's thoughts are reinforced by it too."""

    Settings = DistillSettings
    top_tokens = 64

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.student = settings.student

    def weigh(self, reward: Tensor, scores: ThoughtScores) -> ThoughtWeights:
        """Weigh a thinking student: the divergence stands in for the NLL of its prediction."""
        weights = super().weigh(reward, scores)
        weight = scores.mixed.new_full((), self.settings.distill_weight).expand_as(scores.mixed)
        return ThoughtWeights(weights.advantage, weight, weights.thought, weights.reward)

    def student_loss(self, rows: Student) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the divergence of a plain student."""
        loss, divergence = rows.divergence_loss(self.settings.distill_weight * rows.scale)
        return loss, {"divergence": divergence}

    def reads_reference(self, reward: str) -> bool:
        """Tell whether other weights of the model teach."""
        return has_weights_of_its_own(self.settings)

    @staticmethod
    def problems(config: Any) -> Iterable[tuple[tuple[str, ...], str]]:
        """Check who teaches; a thinking student has the rules of all that think."""
        loss = config.loss
        yield from student_problems(config)
        if loss.student == "plain":
            return
        yield from PolicyObjective.problems(config)
        for name in ("mixed_weight", "kl_weight", "reward_kl_weight"):
            if getattr(loss, name) > 0:
                reason = "the divergence from the teacher takes the place of the mixed NLL"
                if name != "mixed_weight":
                    reason = "loss.reference is the teacher"
                yield (
                    (f"loss.{name}", "loss.objective"),
                    f"loss.{name} ({getattr(loss, name)}) must be 0 with loss.objective: distill:"
                    f" {reason}. Leave it out.",
                )

    @staticmethod
    def unused(loss: Any) -> Iterable[tuple[str, str]]:
        """Name what a plain student does not read."""
        yield from unread_with_a_folder(loss)
        if loss.student == "plain":
            for name in _OF_THOUGHTS:
                yield f"loss.{name}", "with loss.student: plain"
        else:
            yield from PolicyObjective.unused(loss)
