"""The frame that all objectives of thoughts share.

Every part of it is a key, and every named objective a set of defaults and its own deviations.
With rewards r of a position's K thoughts, true tokens a*, sg for no gradient, an objective here is

    policy_weight  * sum_k sg(g_k) * -sum_t log pi(c_kt) / L         g = scaled(r - baseline)
    thought_weight * sum_k sg(v_k) * -sum_a log p(a*_a | c_k) / A    v = 1, r, or a softmax
    mixed_weight   * sum_k         * -sum_a log p_mixed(a*_a) / A

over K and the positions, and terms for the text alone, the thoughts' entropy, length and divergence
from a reference (`quietstar.algorithm.learn_group` has the sums in full).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field, create_model
from torch import Tensor

from quietstar.config import LossConfig, Section
from quietstar.config.schema import (
    ClipHigh,
    ClipLow,
    LossWeight,
    ShareOfMean,
)
from quietstar.losses.estimators import ESTIMATORS, GROUPED
from quietstar.losses.weights import ThoughtScores, ThoughtWeights
from quietstar.objectives import Objective

PAPER_POLICY_TEMPERATURE = 3.0
"""Value of the published code (`reinforce_temperature`); no reason is given there."""
EPSILON = 1e-4
"""Added to a group's standard deviation before rewards are divided by it."""
REFERENCE_REWARDS = ("information_gain", "mean_prob")
"""Rewards that read ``scores.reference``."""
POSITIVE_REWARDS = ("prob", "mean_prob", "rank")
"""Rewards that are never below zero."""


class PolicySettings(Section):
    """Weights of the loss terms, and what makes advantages of rewards."""

    base_weight: LossWeight = Field(
        default=0.0,
        description="Weight of the NLL of the base prediction (without a thought).",
    )
    mixed_weight: LossWeight = Field(
        default=0.0, description="Weight of the NLL of the mixed prediction."
    )
    thought_weight: LossWeight = Field(
        default=0.0,
        description="Weight of the NLL of the thought's own prediction, which teaches the model to"
        " go on after a thought.",
    )
    thought_weighting: Literal["constant", "reward", "softmax"] = Field(
        default="constant",
        description="What the NLL of a thought's own prediction counts beside that of the other"
        " thoughts of its position: the same, the thought's reward, or its share of the"
        " position's likelihood of the true tokens.",
    )
    target_weighting: Literal["mean", "sum"] = Field(
        default="sum",
        description="True tokens after a thought count their mean over thoughts.lookahead, or"
        " their sum (the likelihood of the whole answer).",
    )
    policy_weight: LossWeight = Field(
        default=1.0, description="Weight of the REINFORCE term on the thought tokens."
    )
    estimator: Literal["leave_one_out", "group_mean", "paper", "no_baseline", "running_mean"] = (
        Field(
            default="leave_one_out",
            description="Baseline of the policy gradient: leave_one_out is unbiased, as is"
            " running_mean (of the rewards of earlier steps); group_mean shrinks the gradient by"
            " 1/thoughts.num_thoughts; paper (Quiet-STaR's) also drops negative advantages;"
            " no_baseline uses the reward itself.",
        )
    )
    scaling: Literal["none", "std"] = Field(
        default="none",
        description="Divide advantages by the standard deviation of the rewards of their position"
        " (std, as GRPO does), or not. Biased: positions on which thoughts differ little count as"
        " much as others.",
    )
    token_weighting: Literal["sum", "mean", "constant"] = Field(
        default="sum",
        description="Tokens of a thought count their sum, the mean over the thought (biased where"
        " thoughts end early: it favors short ones that do well), or their sum over"
        " thoughts.length.",
    )
    clip_low: ClipLow | None = Field(
        default=None,
        description="With training.inner_epochs above 1: how far a thought token's probability may"
        " fall, as a fraction of what it was when drawn, before it is reinforced no more; null"
        " means any.",
    )
    clip_high: ClipHigh | None = Field(
        default=None, description="The same for how far it may rise."
    )
    kl_weight: LossWeight = Field(
        default=0.0,
        description="Weight of the divergence of thought tokens from loss.reference (k3"
        " estimate, with its own gradient).",
    )
    reward_kl_weight: LossWeight = Field(
        default=0.0,
        description="Weight of log(pi/pi_ref) of a whole thought, subtracted from its reward.",
    )
    reference: Literal["current", "ema", "base"] = Field(
        default="current",
        description="Model that thoughts are compared with, by rewards that measure a gain and by"
        " divergences: the model itself as it is, its moving average (training.ema_decay), or the"
        " weights at the start of the stage.",
    )
    entropy_weight: LossWeight = Field(
        default=0.0, description="Weight of a bonus on the entropy of the thought tokens."
    )
    min_signal: ShareOfMean = Field(
        default=0.0,
        description="Drop positions whose thoughts' rewards have a standard deviation below this"
        " share of its running mean over earlier steps.",
    )


def settings_with(**defaults: Any) -> type[PolicySettings]:
    """Make a class of settings with other defaults; ``reward`` is one of them too."""
    known = {**LossConfig.model_fields, **PolicySettings.model_fields}
    changed: dict[str, Any] = {}
    for name, value in defaults.items():
        field, extra = known[name], known[name].json_schema_extra
        default = Field(value, description=field.description, json_schema_extra=extra)
        changed[name] = (field.rebuild_annotation(), default)
    return create_model("PolicySettings", __base__=PolicySettings, **changed)


class PolicyObjective(Objective):
    """REINFORCE on thoughts beside NLL terms, as the settings say."""

    Settings = PolicySettings
    settings: Any

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        for name in (
            *("base_weight", "entropy_weight", "token_weighting"),
            *("target_weighting", "clip_low", "clip_high", "kl_weight", "reference"),
        ):
            setattr(self, name, getattr(settings, name))
        self.needs_thought = settings.thought_weight > 0
        self.needs_log_ratio = settings.reward_kl_weight > 0
        self.needs_running = settings.estimator == "running_mean" or settings.min_signal > 0

    def weigh(self, reward: Tensor, scores: ThoughtScores) -> ThoughtWeights:
        """Subtract a baseline from the rewards; weigh the true tokens."""
        settings, advantage, given = self.settings, None, reward
        reward = self.shaped(reward, scores)
        keep = self.has_signal(reward, scores)
        if settings.policy_weight > 0:
            advantage = self.advantage(reward, scores) * settings.policy_weight
            advantage = advantage if keep is None else advantage * keep
        mixed = thought = None
        ones = scores.mixed.new_ones(()).expand_as(scores.mixed)
        if settings.mixed_weight > 0:
            mixed = ones * settings.mixed_weight
        if settings.thought_weight > 0:
            thought = ones * settings.thought_weight
            if settings.thought_weighting == "reward":
                thought = thought * given.unsqueeze(-1)
            elif settings.thought_weighting == "softmax":
                share = logprob_of_targets(scores).softmax(-1) * reward.shape[-1]
                thought = thought * share.unsqueeze(-1)
            thought = thought if keep is None else thought * keep.unsqueeze(-1)
        return ThoughtWeights(advantage, mixed, thought, reward)

    def shaped(self, reward: Tensor, scores: ThoughtScores) -> Tensor:
        """Subtract the thought's divergence from the reference."""
        settings = self.settings
        if settings.reward_kl_weight > 0:
            assert scores.log_ratio is not None, "the model was given a reference"
            reward = reward - settings.reward_kl_weight * scores.log_ratio
        return reward

    def advantage(self, reward: Tensor, scores: ThoughtScores) -> Tensor:
        """Subtract the baseline, and scale."""
        settings = self.settings
        advantage = ESTIMATORS[settings.estimator](reward, scores.running)
        if settings.scaling == "std":
            advantage = advantage / (reward.std(-1, keepdim=True) + EPSILON)
        return advantage

    def has_signal(self, reward: Tensor, scores: ThoughtScores) -> Tensor | None:
        """Tell which positions count, (batch, positions, 1); None for all."""
        if self.settings.min_signal == 0 or scores.running is None:
            return None
        return reward.std(-1, keepdim=True) >= self.settings.min_signal * scores.running[1]

    def policy_temperature(self, sampling_temperature: float) -> float:
        """Take the paper's temperature with its estimator, else that of the sampling."""
        paper = self.settings.estimator == "paper"
        return PAPER_POLICY_TEMPERATURE if paper else sampling_temperature

    def reads_reference(self, reward: str) -> bool:
        """Ask the divergences, and the reward: one of the user's may read it."""
        return _reads_reference(self.settings, reward)

    @staticmethod
    def problems(config: Any) -> Iterable[tuple[tuple[str, ...], str]]:
        """Check the settings against each other and against the thoughts."""
        thoughts, loss = config.thoughts, config.loss
        if thoughts.sampler == "pause" and loss.policy_weight > 0:
            yield (
                ("loss.policy_weight", "thoughts.sampler"),
                f"loss.policy_weight ({loss.policy_weight}) must be 0 with thoughts.sampler: pause:"
                " thoughts that nobody chose cannot be reinforced. Set it to 0.",
            )
        if loss.reward == "teacher" and not hasattr(loss, "teacher"):
            yield (
                ("loss.reward", "loss.objective"),
                f"loss.reward (teacher) needs a teacher, and loss.objective: {loss.objective} has"
                " none. Set loss.objective: distill with loss.student: thinking, or another"
                " reward.",
            )
        if thoughts.num_thoughts == 1:
            yield from _problems_of_one_thought(loss)
        may_be_negative = loss.reward not in POSITIVE_REWARDS and ":" not in loss.reward
        if loss.thought_weighting == "reward" and loss.thought_weight > 0 and may_be_negative:
            yield (
                ("loss.reward", "loss.thought_weighting"),
                f"loss.reward ({loss.reward}) must not be negative with loss.thought_weighting:"
                " reward, which would unlearn true tokens after thoughts of negative reward. Set"
                f" it to {', '.join(POSITIVE_REWARDS[:-1])} or {POSITIVE_REWARDS[-1]}, or"
                " loss.thought_weighting: constant.",
            )
        if loss.reference == "current":
            for name in ("kl_weight", "reward_kl_weight"):
                if getattr(loss, name) > 0:
                    yield (
                        ("loss.reference", f"loss.{name}"),
                        f"loss.reference (current) must be base or ema with loss.{name}"
                        f" ({getattr(loss, name)}): no model diverges from itself. Set it so, or"
                        f" loss.{name} to 0.",
                    )
        if loss.reference == "ema" and getattr(config.training, "ema_decay", None) is None:
            yield (
                ("training.ema_decay", "loss.reference"),
                "training.ema_decay (null) must be set with loss.reference: ema, which is that"
                " average. Set it, such as to 0.999 (RLP), or loss.reference to base or current.",
            )
        yield from _problems_of_the_ratio(config)
        names = [name for name in type(loss).model_fields if name.endswith("_weight")]
        names = [n for n in names if n != "reward_kl_weight"]
        if not any(getattr(loss, name) for name in names):
            keys = tuple(f"loss.{name}" for name in names)
            yield (
                keys,
                f"all weights ({', '.join(keys)}) are 0, but at least one must be above 0: there"
                " would be nothing to learn. Leave one of them out to get its default.",
            )

    @staticmethod
    def unused(loss: Any) -> Iterable[tuple[str, str]]:
        """Name what only one term reads, without it."""
        if loss.policy_weight == 0:
            for name in (
                *("estimator", "scaling", "token_weighting", "clip_low", "clip_high"),
                "reward_kl_weight",
            ):
                yield f"loss.{name}", "with loss.policy_weight: 0"
            if loss.thought_weighting != "reward":
                yield "loss.reward", "with loss.policy_weight: 0"
        if loss.thought_weight == 0:
            yield "loss.thought_weighting", "with loss.thought_weight: 0"
        if loss.reference != "current" and not _reads_reference(loss, loss.reward):
            yield "loss.reference", "with a reward that compares with no reference"


def _reads_reference(settings: Any, reward: str) -> bool:
    """Tell whether divergences or the reward compare with a reference that is not the model."""
    divergences = max(settings.kl_weight, settings.reward_kl_weight)
    is_read = divergences > 0 or reward in REFERENCE_REWARDS or ":" in reward
    return settings.reference != "current" and is_read


def logprob_of_targets(scores: ThoughtScores) -> Tensor:
    """Sum log p(a* | c) over a position's true tokens, (batch, positions, thoughts)."""
    assert scores.thought is not None, "the thought's own prediction was computed"
    return scores.thought.where(scores.valid.unsqueeze(2), 0.0).sum(-1)


def _problems_of_one_thought(loss: Any) -> Iterable[tuple[tuple[str, ...], str]]:
    """Name what compares the thoughts of a position."""
    if loss.estimator in GROUPED and loss.policy_weight > 0:
        yield (
            ("thoughts.num_thoughts", "loss.estimator", "loss.policy_weight"),
            "thoughts.num_thoughts (1) must be at least 2: the REINFORCE baseline compares"
            " thoughts sampled at the same position. Raise it, or set loss.estimator:"
            " no_baseline.",
        )
    elif (loss.scaling == "std" and loss.policy_weight > 0) or loss.min_signal > 0:
        name = "loss.min_signal" if loss.min_signal > 0 else "loss.scaling"
        yield (
            ("thoughts.num_thoughts", name),
            f"thoughts.num_thoughts (1) must be at least 2 with {name}"
            f" ({loss.min_signal or loss.scaling}), which asks how far the rewards of a position"
            " differ. Raise it, or leave that out.",
        )


def _problems_of_the_ratio(config: Any) -> Iterable[tuple[tuple[str, ...], str]]:
    """Check that probabilities now and when thoughts were drawn are of one distribution."""
    loss, epochs = config.loss, config.training.inner_epochs
    if loss.policy_weight == 0:
        return
    if epochs > 1 and loss.estimator == "paper":
        yield (
            ("training.inner_epochs", "loss.estimator"),
            f"training.inner_epochs ({epochs}) must be 1 with loss.estimator: paper, whose policy"
            f" term is at temperature {PAPER_POLICY_TEMPERATURE}: its ratios are of another policy"
            " than the one that drew the thoughts. Set it to 1, or another estimator.",
        )


def group_logmeanexp(logprob: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the mean likelihood of all thoughts of a position, and of all but each one.

    Args:
        logprob: Of the true tokens after each thought, (batch, positions, thoughts).

    Returns:
        (batch, positions, 1), and (batch, positions, thoughts).
    """
    count = logprob.shape[-1]
    everything = logprob.logsumexp(-1, keepdim=True) - torch.tensor(float(count)).log()
    others = logprob.unsqueeze(-2).expand(*logprob.shape, count)
    is_own = torch.eye(count, dtype=torch.bool, device=logprob.device)
    others = others.masked_fill(is_own, -torch.inf).logsumexp(-1)
    return everything, others - torch.tensor(float(count - 1)).log()
