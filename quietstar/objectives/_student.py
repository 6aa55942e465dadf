"""What all objectives with a student share: who teaches, and the rules for that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import Field

from quietstar.config import Section
from quietstar.config.schema import Name, Tokens


class StudentSettings(Section):
    """Who teaches."""

    teacher: Name | None = Field(
        default=None,
        description="Folder of a teacher's predictions, which quietstar teach wrote; null means"
        " that the model itself teaches, with the weights that loss.reference says.",
    )
    teacher_length: Tokens | None = Field(
        default=None,
        description="Tokens of the teacher's thoughts; null means thoughts.length.",
    )


def has_weights_of_its_own(settings: Any) -> bool:
    """Tell whether the teacher is the model with other weights than it has now."""
    return settings.teacher is None and settings.reference != "current"


def unread_with_a_folder(loss: Any) -> Iterable[tuple[str, str]]:
    """Name what is not read where the teacher's predictions are on disk."""
    if loss.teacher is not None:
        for name in ("reference", "teacher_length"):
            yield f"loss.{name}", "with loss.teacher, whose predictions are there already"


def student_problems(config: Any) -> Iterable[tuple[tuple[str, ...], str]]:
    """Check who teaches, and that every update has a teacher."""
    loss, training = config.loss, config.training
    if loss.teacher is None and loss.reference == "ema" and training.ema_decay is None:
        yield (
            ("training.ema_decay", "loss.reference"),
            "training.ema_decay (null) must be set with loss.reference: ema, which is that average."
            " Set it, such as to 0.999, or loss.reference to base or current.",
        )
    if training.inner_epochs > 1:
        yield (
            ("training.inner_epochs", "loss.objective"),
            f"training.inner_epochs ({training.inner_epochs}) must be 1 with loss.objective:"
            f" {loss.objective}, which learns no drawn thoughts again. Set it to 1.",
        )
    if config.thoughts.sampler == "pause":
        yield (
            ("thoughts.sampler", "loss.objective"),
            f"thoughts.sampler (pause) has nothing to teach with loss.objective: {loss.objective}."
            " Set it to rollout.",
        )
