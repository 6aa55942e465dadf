"""Baselines of REINFORCE: from the rewards of a position's thoughts to their advantages.

By enumeration of every thought on a small problem (``tests/test_estimators.py``): leave-one-out
gives exactly the gradient of the expected reward, as does a baseline from earlier steps; the group
mean that includes the thought itself gives (K - 1) / K of it; dropping negative advantages on top
bends its direction.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from quietstar.errors import UserError

Rewards = Float[Tensor, "*positions thoughts"]
Running = Float[Tensor, " 2"]
"""Means of the rewards and of their standard deviations in a group, over earlier steps."""


def leave_one_out(reward: Rewards, running: Running | None = None) -> Rewards:
    """Subtract the mean reward of the *other* thoughts of the position. Unbiased."""
    num_thoughts = reward.shape[-1]
    if num_thoughts < 2:
        raise UserError(
            "loss.estimator (leave_one_out): compares the thoughts of a position, and there is one "
            "thought. Give two at least, or set loss.estimator: no_baseline."
        )
    return (reward - reward.mean(-1, keepdim=True)) * (num_thoughts / (num_thoughts - 1))


def group_mean(reward: Rewards, running: Running | None = None) -> Rewards:
    """Subtract the mean of all thoughts of the position, as GRPO does (arXiv 2402.03300)."""
    return reward - reward.mean(-1, keepdim=True)


def paper(reward: Rewards, running: Running | None = None) -> Rewards:
    """Subtract the mean of all thoughts of the position and drop negative results.

    This is the estimator of arXiv 2403.09629, section 4.4.2, and of the published code. Biased.
    """
    return group_mean(reward).clamp(min=0.0)


def no_baseline(reward: Rewards, running: Running | None = None) -> Rewards:
    """Return the reward itself: unbiased, of high variance."""
    return reward


def running_mean(reward: Rewards, running: Running | None = None) -> Rewards:
    """Subtract the mean reward of earlier steps, which needs one thought only. Unbiased.

    The first step, which has no earlier one, reinforces nothing.
    """
    return reward * 0.0 if running is None else reward - running[0].to(reward.dtype)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    estimator.__name__: estimator
    for estimator in (leave_one_out, group_mean, paper, no_baseline, running_mean)
}
GROUPED = ("leave_one_out", "group_mean", "paper")
"""Estimators that compare the thoughts of a position."""
