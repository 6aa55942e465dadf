"""Thoughts that get shorter, or longer, over the steps of a stage (``thoughts.schedule``).

Fast Quiet-STaR (arXiv 2505.17746) teaches a model to think in ever fewer tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from quietstar.config import ThoughtsConfig


@dataclass
class Pace:
    """How far a stage is in its schedule.

    Attributes:
        place: Step of the schedule that the last step took, from 0; None before the first one.
        waits: True while the schedule stays where it is.
        best_gain: Highest held-out gain of the stage, nats a token; None before an evaluation.
    """

    place: int | None = None
    waits: bool = False
    best_gain: float | None = None

    @property
    def next_place(self) -> int:
        """Step of the schedule that the next step takes."""
        return 0 if self.place is None else self.place + (not self.waits)

    def see(self, gain: float, min_gain: float) -> None:
        """Takes in a held-out gain: the schedule waits while it is too far below the best."""
        self.best_gain = gain if self.best_gain is None else max(self.best_gain, gain)
        self.waits = self.best_gain <= 0 or gain < min_gain * self.best_gain


def scheduled(thoughts: ThoughtsConfig, step: int) -> ThoughtsConfig:
    """Returns the thoughts of one step of a stage, counted from 0, without their schedule."""
    if not thoughts.schedule:
        return thoughts
    points = [(0, thoughts.length, thoughts.lookahead)]
    for point in thoughts.schedule:
        _, length, lookahead = points[-1]
        length, lookahead = point.get("length", length), point.get("lookahead", lookahead)
        points.append((point["step"], length, lookahead))
    if points[1][0] == 0:
        del points[0]
    steps, *courses = zip(*points, strict=True)
    if thoughts.schedule_type == "linear":
        length, lookahead = (round(float(np.interp(step, steps, x))) for x in courses)
    else:
        length, lookahead = (x[bisect_right(steps, step) - 1] for x in courses)
    now = {"length": length, "lookahead": lookahead, "schedule": []}
    return thoughts.model_copy(update=now)
