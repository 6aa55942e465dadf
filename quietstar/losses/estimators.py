"""Baselines of REINFORCE: from the rewards of a position's thoughts to their advantages.

By enumeration of every thought on a small problem (``tests/test_estimators.py``): leave-one-out
gives exactly the gradient of the expected reward; the group mean that includes the thought itself
gives (K - 1) / K of it; dropping negative advantages on top bends its direction.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from quietstar.errors import UserError

Rewards = Float[Tensor, "*positions thoughts"]


def leave_one_out(reward: Rewards) -> Rewards:
    """Subtract the mean reward of the *other* thoughts of the position. Unbiased."""
    num_thoughts = reward.shape[-1]
    if num_thoughts < 2:
        raise UserError(
            "loss.estimator (leave_one_out): compares the thoughts of a position, and there is one "
            "thought. Give two at least, or set loss.estimator: no_baseline."
        )
    return (reward - reward.mean(-1, keepdim=True)) * (num_thoughts / (num_thoughts - 1))


def paper(reward: Rewards) -> Rewards:
    """Subtract the mean of all thoughts of the position and drop negative results.

    This is the estimator of arXiv 2403.09629, section 4.4.2, and of the published code. Biased.
    """
    return (reward - reward.mean(-1, keepdim=True)).clamp(min=0.0)


def no_baseline(reward: Rewards) -> Rewards:
    """Return the reward itself: unbiased, of high variance; the only choice for one thought."""
    return reward


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    estimator.__name__: estimator for estimator in (leave_one_out, paper, no_baseline)
}
