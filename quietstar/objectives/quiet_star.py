"""Quiet-STaR (arXiv 2403.09629): REINFORCE on thoughts beside the likelihood of the true tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from quietstar.config import Section
from quietstar.config.schema import LossWeight, Temperature
from quietstar.losses.estimators import ESTIMATORS
from quietstar.losses.weights import ThoughtScores, ThoughtWeights
from quietstar.objectives import Objective

PAPER_POLICY_TEMPERATURE = 3.0
"""Value of the published code (`reinforce_temperature`); no reason is given there."""


class QuietStarSettings(Section):
    """Weights of the loss terms, and the estimator of the policy gradient."""

    base_weight: LossWeight = Field(
        default=0.3,
        description="Weight of the NLL of the base prediction (without a thought).",
    )
    mixed_weight: LossWeight = Field(
        default=0.3, description="Weight of the NLL of the mixed prediction."
    )
    thought_weight: LossWeight = Field(
        default=0.4,
        description="Weight of the NLL of the thought's own prediction, which teaches the model to"
        " go on after a thought.",
    )
    draft_weight: LossWeight = Field(
        default=0.0,
        description="Weight of the NLL of the next true token as the first thought token: thoughts"
        " begin as drafts of what follows, which gives REINFORCE something to improve.",
    )
    policy_weight: LossWeight = Field(
        default=0.1, description="Weight of the REINFORCE term on the thought tokens."
    )
    entropy_weight: LossWeight = Field(
        default=0.0, description="Weight of a bonus on the entropy of the thought tokens."
    )
    estimator: Literal["leave_one_out", "paper", "no_baseline"] = Field(
        default="leave_one_out",
        description="Policy gradient: leave_one_out is unbiased; paper takes the group mean as"
        " baseline and drops negative advantages; no_baseline uses the reward itself.",
    )
    policy_temperature: Temperature | None = Field(
        default=None,
        description="Temperature inside the log-probability of the policy term; null means"
        " thoughts.temperature, and 3.0 with estimator paper.",
    )


class QuietStar(Objective):
    """REINFORCE beside NLL terms: base and mixed in the paper; more terms here."""

    Settings = QuietStarSettings
    settings: QuietStarSettings

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.needs_thought = settings.thought_weight > 0
        self.base_weight, self.draft_weight = settings.base_weight, settings.draft_weight
        self.entropy_weight = settings.entropy_weight

    def weigh(self, reward: Tensor, scores: ThoughtScores) -> ThoughtWeights:
        """Weigh true tokens by constants; subtract a baseline from the rewards (section 4.4.2)."""
        settings, advantage = self.settings, None
        if settings.policy_weight > 0:
            advantage = ESTIMATORS[settings.estimator](reward) * settings.policy_weight
        ones = scores.mixed.new_ones(()).expand_as(scores.mixed)
        return ThoughtWeights(
            advantage,
            mixed=ones * settings.mixed_weight if settings.mixed_weight > 0 else None,
            thought=ones * settings.thought_weight if settings.thought_weight > 0 else None,
        )

    def policy_temperature(self, sampling_temperature: float) -> float:
        """Take the configured temperature, the paper's, or that of the sampling."""
        if self.settings.policy_temperature is not None:
            return self.settings.policy_temperature
        paper = self.settings.estimator == "paper"
        return PAPER_POLICY_TEMPERATURE if paper else sampling_temperature

    @staticmethod
    def problems(config: Any) -> Iterable[tuple[tuple[str, ...], str]]:
        """Check the weights against each other and against the thoughts."""
        thoughts, loss = config.thoughts, config.loss
        if thoughts.sampler == "pause" and loss.policy_weight > 0:
            yield (
                ("loss.policy_weight", "thoughts.sampler"),
                f"loss.policy_weight ({loss.policy_weight}) must be 0 with thoughts.sampler: pause:"
                " thoughts that nobody chose cannot be reinforced. Set it to 0.",
            )
        grouped = loss.estimator != "no_baseline" and loss.policy_weight > 0
        if thoughts.num_thoughts == 1 and grouped:
            yield (
                ("thoughts.num_thoughts", "loss.estimator", "loss.policy_weight"),
                "thoughts.num_thoughts (1) must be at least 2: the REINFORCE baseline compares"
                " thoughts sampled at the same position. Raise it, or set loss.estimator:"
                " no_baseline.",
            )
        names = [name for name in QuietStarSettings.model_fields if name.endswith("_weight")]
        if not any(getattr(loss, name) for name in names):
            keys = tuple(f"loss.{name}" for name in names)
            yield (
                keys,
                f"all weights ({', '.join(keys)}) are 0, but at least one must be above 0: there"
                " would be nothing to learn. Leave one of them out to get its default.",
            )

    @staticmethod
    def unused(loss: Any) -> Iterable[tuple[str, str]]:
        """Name what only the policy term reads, without one."""
        if loss.policy_weight == 0:
            for key in ("loss.estimator", "loss.policy_temperature", "loss.reward"):
                yield key, "with loss.policy_weight: 0"
