"""Judges: causal LMs that say which of two texts is better, or how good one is (RLAIF)."""

from quietstar.judging.cache import VerdictCache
from quietstar.judging.critic import Critic
from quietstar.judging.judge import Comparison, Judge, Rating
from quietstar.judging.prompts import Template, load_template
from quietstar.judging.reward_model import RewardModel

__all__ = [
    "Comparison", "Critic", "Judge", "Rating", "RewardModel", "Template", "VerdictCache",
    "load_template",
]  # fmt: skip
