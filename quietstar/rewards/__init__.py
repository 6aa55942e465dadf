"""Rewards of thoughts (``loss.reward``): a file each, named as the reward.

A reward is a pure function of `ThoughtBatch` and `ThoughtScores`. It returns a number for every
thought, (batch, positions, thoughts), and runs without gradient on some texts and some of their
positions at a time, always with all thoughts of a position.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import Tensor

from quietstar.losses.weights import ThoughtScores
from quietstar.sampling.thoughts import ThoughtBatch


class Reward(Protocol):
    """What a reward is.

    One that does not read ``scores.thought`` may say so (`without_thought`): where nothing else
    reads it either, it is not computed, and ``scores.thought`` is None.
    """

    def __call__(self, thoughts: ThoughtBatch, scores: ThoughtScores) -> Tensor:
        """Return the reward of every thought, (batch, positions, thoughts)."""
        ...


R = TypeVar("R", bound=Any)


def asks_policy(reward: R) -> R:
    """Say of a reward that it calls ``scores.logprob``, ``continuations`` or ``judge``.

    It is then called once for all positions that learn together (all of a micro-batch where weights
    are sharded), and at the same moment on all ranks: what it asks is batched, and engines that
    shard the weights can answer. Later updates from the same thoughts keep what it said.
    """
    reward.asks_policy = True
    return reward


def without_thought(reward: R) -> R:
    """Say of a reward that it does not read ``scores.thought``."""
    reward.reads_thought = False
    return reward
