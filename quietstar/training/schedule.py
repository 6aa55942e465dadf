"""Thoughts that get shorter, or longer, over the steps of a stage (``thoughts.schedule``).

Fast Quiet-STaR (arXiv 2505.17746) teaches a model to think in ever fewer tokens.
"""

from __future__ import annotations

from bisect import bisect_right

from quietstar.config import ThoughtsConfig


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
    length, lookahead = (x[bisect_right(steps, step) - 1] for x in courses)
    now = {"length": length, "lookahead": lookahead, "schedule": []}
    return thoughts.model_copy(update=now)
