"""Rules that all objectives with a student share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


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
