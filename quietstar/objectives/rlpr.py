"""RLPR (arXiv 2506.18254): the mean probability of the answer's tokens as reward, by GRPO."""

from __future__ import annotations

from quietstar.objectives._policy import PolicyObjective, settings_with


class Rlpr(PolicyObjective):
    """GRPO with the probability that a thought adds, and positions without signal dropped.

    As in GRPO the gradient is not that of an expected reward: advantages are divided by the
    standard deviation of their position, and a thought's tokens count their mean.
    """

    Settings = settings_with(
        reward="mean_prob", estimator="group_mean", scaling="std", token_weighting="mean",
        clip_low=0.2, clip_high=0.27, min_signal=0.5,
    )  # fmt: skip
