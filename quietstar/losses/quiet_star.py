"""The objective of Quiet-STaR from the states of one learn pass. Pure functions.

Every sum is over valid targets and divided by their number in the *whole* step (over micro-batches
and ranks), so that the parts of a step add up to the step: N targets x_{i+1} in the texts, M of
them behind a thought (M = N with thoughts at all positions). With p the targets' probabilities, r
the rewards and b their baseline (arXiv 2403.09629, sections 4.3 and 4.4):

    base     sum_i        -log p_base(x_{i+1})                           / N
    mixed    sum_{a,k,i}  -log p_mixed(x_{i+a})                          / (A K M)
    thought  sum_{a,k,i}  -log p_thought(x_{i+a})                        / (A K M)
    draft    sum_i        -log p(x_{i+1} | x_<=i, start)                 / M   (ours)
    policy   sum_{k,i}    -(r - b) mean_t log p(t_t)                     / (K M)
    reward   r(i,k) = sum_a log p(x_{i+a}), p the mixed or the thought's own prediction

Only `base` is a sum over all positions i; the others are over those with thoughts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quietstar.attention.layout import IGNORE_INDEX, TextAhead, lookahead_targets, text_ahead
from quietstar.backbone.learn import LearnStates
from quietstar.backbone.output_head import OutputHead
from quietstar.config import LossConfig
from quietstar.losses.cross_entropy import RowResult, Segment, objective
from quietstar.losses.estimators import ESTIMATORS
from quietstar.losses.head_gradients import HeadGradients
from quietstar.losses.mixture import Mixture, MixtureResult, mixture_objective
from quietstar.losses.scores import ScoredThoughts, ThoughtResults, score

PAPER_POLICY_TEMPERATURE = 3.0
"""Value of the published code (`reinforce_temperature`); no reason is given there."""


def choose_policy_temperature(config: LossConfig, sampling_temperature: float) -> float:
    """Temperature inside the log-probability of the policy term."""
    if config.policy_temperature is not None:
        return config.policy_temperature
    return PAPER_POLICY_TEMPERATURE if config.estimator == "paper" else sampling_temperature


def rewards(
    logprobs: Float[Tensor, "lookahead thoughts batch positions"], valid: Tensor
) -> Float[Tensor, "thoughts batch positions"]:
    """Reward of each thought: sum of the log-probabilities of its valid targets."""
    return logprobs.where(valid.unsqueeze(1), 0.0).sum(0)


def quiet_star_loss(
    states: LearnStates,
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"],
    thoughts: Int[Tensor, "length thoughts batch positions"],
    labels: Int[Tensor, "batch seq"],
    head: OutputHead,
    config: LossConfig,
    policy_temperature: float,
    num_items: Tensor | int | None = None,
    scoring: bool = False,
    positions: Int[Tensor, "batch positions"] | None = None,
    num_thought_items: Tensor | int | None = None,
) -> tuple[Tensor, ScoredThoughts]:
    """Loss of one (micro-)batch, and its thoughts scored.

    Args:
        states: Of the learn pass.
        mixing_weight: From the mixing head, differentiable.
        thoughts: Sampled tokens.
        labels: Token ids of the text, IGNORE_INDEX where a token is no target.
        head: From states to logits.
        config: Weights, estimator, reward.
        policy_temperature: Inside the log-probability of the policy term.
        num_items: N; by default the valid targets of this batch.
        scoring: Compute what only readers want: the thought's own prediction even if no loss needs
            it, and the most likely tokens.
        positions: Where the thoughts are, None for all.
        num_thought_items: M; by default the valid targets of this batch behind a thought.

    Returns:
        The scalar loss and the scored thoughts.
    """
    targets = lookahead_targets(labels, mixing_weight.shape[0], positions)  # (A, B, P)
    count = count_thought_items(targets, num_items, num_thought_items, positions)
    settings = ThoughtLoss(config, policy_temperature, count, scoring)
    text_loss, base, _ = next_token_loss(
        states.text, labels, head, num_items, scoring, config.base_weight
    )
    ahead = text_ahead(states.text, mixing_weight.shape[0], positions)
    loss, results = thought_loss(
        states.policy, states.ahead, ahead, mixing_weight, thoughts, targets, head, settings
    )
    return text_loss + loss, score(results, base, thoughts, labels, targets, positions)


def count_thought_items(
    targets: Int[Tensor, "lookahead batch positions"],
    num_items: Tensor | int | None,
    num_thought_items: Tensor | int | None,
    positions: Tensor | None,
) -> Tensor:
    """M, at least 1: as given, or counted in this batch."""
    if positions is None and num_thought_items is None:
        num_thought_items = num_items
    return _count(targets[0], num_thought_items)


@dataclass(frozen=True)
class ThoughtLoss:
    """How the terms behind thoughts are weighed.

    Attributes:
        config: Weights, estimator, reward.
        policy_temperature: Inside the log-probability of the policy term.
        num_items: M, of the whole step.
        scoring: Compute what only readers want.
    """

    config: LossConfig
    policy_temperature: float
    num_items: Tensor
    scoring: bool = False

    @property
    def needs_thought(self) -> bool:
        """Whether the thought's own prediction is read."""
        config = self.config
        return self.scoring or config.thought_weight > 0 or config.reward == "thought"


def thought_loss(
    policy_states: Float[Tensor, "length thoughts batch positions width"],
    ahead_states: Float[Tensor, "lookahead thoughts batch positions width"],
    text: TextAhead,
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"],
    thoughts: Int[Tensor, "length thoughts batch positions"],
    targets: Int[Tensor, "lookahead batch positions"],
    head: OutputHead,
    settings: ThoughtLoss,
    sink: HeadGradients | None = None,
) -> tuple[Tensor, ThoughtResults]:
    """All terms but `base`, of some positions of some texts.

    Args:
        policy_states: Those that predict the thought tokens.
        ahead_states: Those from the end token on.
        text: The text's own states that predict the same tokens.
        mixing_weight: From the mixing head, differentiable.
        thoughts: Sampled tokens.
        targets: True tokens x_{i+a}, IGNORE_INDEX where there is none.
        head: From states to logits.
        settings: Weights and counts.
        sink: Collects the gradients of a linear head; by default they are those of its parameters.
    """
    mixture, mixed = _mixture(ahead_states, text, mixing_weight, targets, head, settings, sink)
    segments = [_policy(policy_states, thoughts, targets, mixed, settings)]
    if settings.config.draft_weight > 0:
        segments.append(_draft(policy_states, targets, settings))
    rest, results = objective(segments, head, sink)
    policy, entropy = results[0].nll.view(thoughts.shape), results[0].entropy
    entropy = None if entropy is None else entropy.view(thoughts.shape)
    found = ThoughtResults(
        mixed.mixed, mixed.thought, mixed.predicted, policy, entropy, mixing_weight.detach()
    )
    return mixture + rest, found


def _mixture(
    ahead_states: Tensor,
    text: TextAhead,
    mixing_weight: Tensor,
    targets: Tensor,
    head: OutputHead,
    settings: ThoughtLoss,
    sink: HeadGradients | None,
) -> tuple[Tensor, MixtureResult]:
    """The mixed and the thought's own prediction."""
    lookahead, num_thoughts = mixing_weight.shape[:2]
    each = lookahead * num_thoughts * settings.num_items
    mixture = Mixture(
        text,
        ahead_states,
        mixing_weight,
        targets,
        mixed_coefficient=_filled(targets, settings.config.mixed_weight / each),
        thought_coefficient=_filled(targets, settings.config.thought_weight / each),
        wants_thought=settings.needs_thought,
        wants_predicted=settings.scoring,
    )
    return mixture_objective(mixture, head, sink)


def _draft(policy_states: Tensor, targets: Tensor, settings: ThoughtLoss) -> Segment:
    coefficients = _filled(targets[0].flatten(), settings.config.draft_weight / settings.num_items)
    # The states at the start vector are the same for all thoughts of a position.
    return Segment(
        policy_states[0, 0].flatten(0, 1),
        targets[0].flatten(),
        coefficients,
    )


def _policy(
    policy_states: Tensor,
    thoughts: Tensor,
    targets: Tensor,
    mixed: MixtureResult,
    settings: ThoughtLoss,
) -> Segment:
    config, (length, num_thoughts) = settings.config, thoughts.shape[:2]
    has_target = (targets != IGNORE_INDEX).any(0)  # (B, P)
    tokens = thoughts.where(has_target, IGNORE_INDEX).flatten()
    scale = 1.0 / (length * num_thoughts * settings.num_items)
    coefficients = bonus = None
    if torch.is_grad_enabled():  # else only the results are wanted; advantages may not exist
        coefficients = torch.zeros_like(tokens, dtype=torch.float32)
        if config.policy_weight > 0:
            nll = mixed.mixed if config.reward == "mixed" else mixed.thought
            assert nll is not None, "the reward's prediction is computed"
            advantage = advantages(nll, targets, config) * config.policy_weight * scale
            coefficients = advantage.expand(length, *advantage.shape).flatten()
        if config.entropy_weight > 0:
            bonus = _filled(tokens, -config.entropy_weight * scale)
    return Segment(
        policy_states.flatten(0, 3),
        tokens,
        coefficients,
        entropy_coefficients=bonus,
        temperature=settings.policy_temperature,
        sampled_only=True,
        wants_entropy=config.entropy_weight > 0,
    )


def advantages(
    nll: Float[Tensor, "lookahead thoughts batch positions"],
    targets: Int[Tensor, "lookahead batch positions"],
    config: LossConfig,
) -> Float[Tensor, "thoughts batch positions"]:
    """Reward minus its baseline, without gradient; zero where no target is valid."""
    return ESTIMATORS[config.estimator](rewards(-nll, targets != IGNORE_INDEX))


def _count(targets: Tensor, given: Tensor | int | None) -> Tensor:
    """Number of targets to divide by, at least 1."""
    count = (targets != IGNORE_INDEX).sum() if given is None else torch.as_tensor(given)
    return count.clamp(min=1)


def next_token_loss(
    states: Float[Tensor, "batch seq width"],
    labels: Int[Tensor, "batch seq"],
    head: OutputHead,
    num_items: Tensor | int | None = None,
    scoring: bool = False,
    weight: float = 1.0,
    sink: HeadGradients | None = None,
) -> tuple[Tensor, RowResult, Tensor]:
    """Plain language modelling: sum_i -log p(x_{i+1}) / N.

    Args:
        states: The text's own.
        labels: As in `quiet_star_loss`.
        head: From states to logits.
        num_items: N; by default the valid targets of this batch.
        scoring: Find the most likely tokens too.
        weight: Of the loss.
        sink: Collects the gradients of a linear head; by default they are those of its parameters.

    Returns:
        The scalar loss, the results of all rows (batch * seq), and where there is a target.
    """
    targets = lookahead_targets(labels, 1)[0]
    valid = targets != IGNORE_INDEX
    coefficients = _filled(targets.flatten(), weight / _count(targets, num_items))
    segment = Segment(
        states.flatten(0, 1),
        targets.flatten(),
        coefficients,
        wants_predicted=scoring,
    )
    loss, results = objective([segment], head, sink)
    return loss, results[0], valid


def _filled(targets: Tensor, value: Tensor) -> Tensor:
    """``value`` where there is a target, else 0; (rows,), float32."""
    return (targets != IGNORE_INDEX) * value.float()
