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

from quietstar.config import LossConfig
from quietstar.engine.layout import (
    IGNORE_INDEX,
    TextAhead,
    lookahead_states,
    lookahead_targets,
    text_ahead,
)
from quietstar.engine.learn import LearnStates
from quietstar.losses.cross_entropy import HeadGradients, RowResult, Segment, objective
from quietstar.losses.estimators import ESTIMATORS
from quietstar.losses.mixture import Mixture, MixtureResult, mixture_objective
from quietstar.losses.output_head import OutputHead

PAPER_POLICY_TEMPERATURE = 3.0
"""Value of the published code (`reinforce_temperature`); no reason is given there."""


@dataclass(frozen=True)
class ScoredThoughts:
    """What the thoughts did, position by position, without gradient.

    With chosen positions, P of them a text stand where ``positions`` is written; else S.

    Attributes:
        thoughts: Sampled tokens.
        logprobs: Their log-probabilities at the policy temperature.
        mixing_weight: Share of the thought in each prediction.
        base_logprobs: Of the true token x_{i+a}, without the thought.
        mixed_logprobs: With it.
        thought_logprobs: By the thought's own prediction alone; None if no loss needs it.
        valid: Whether there is a target x_{i+a}.
        entropy: Of each thought token's distribution, None if not computed.
        text_logprobs: Of the next token after every text position, 0 where there is no target.
        text_valid: Where there is one.
        positions: The chosen ones, None for all.
        base_predicted: Most likely next token without the thought, None if not asked for.
        mixed_predicted: Most likely x_{i+a} with it, None if not asked for.
    """

    thoughts: Int[Tensor, "length thoughts batch positions"]
    logprobs: Float[Tensor, "length thoughts batch positions"]
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"]
    base_logprobs: Float[Tensor, "lookahead batch positions"]
    mixed_logprobs: Float[Tensor, "lookahead thoughts batch positions"]
    thought_logprobs: Float[Tensor, "lookahead thoughts batch positions"] | None
    valid: Tensor  # (A, B, P), bool
    entropy: Float[Tensor, "length thoughts batch positions"] | None
    text_logprobs: Float[Tensor, "batch seq"]
    text_valid: Tensor  # (B, S), bool
    positions: Int[Tensor, "batch positions"] | None = None
    base_predicted: Int[Tensor, "batch seq"] | None = None
    mixed_predicted: Int[Tensor, "lookahead thoughts batch positions"] | None = None


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


@dataclass(frozen=True)
class ThoughtResults:
    """What the terms behind thoughts gave, without gradient; NLLs are 0 where there is no target.

    Attributes:
        mixed: NLL of the mixed prediction.
        thought: NLL of the thought's own, None if nothing read it.
        predicted: Most likely mixed token, None if not asked for.
        policy: NLL of the thought tokens at the policy temperature.
        entropy: Of their distributions, None if not computed.
        mixing_weight: As given.
    """

    mixed: Float[Tensor, "lookahead thoughts batch positions"]
    thought: Float[Tensor, "lookahead thoughts batch positions"] | None
    predicted: Int[Tensor, "lookahead thoughts batch positions"] | None
    policy: Float[Tensor, "length thoughts batch positions"]
    entropy: Float[Tensor, "length thoughts batch positions"] | None
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"]


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
    if head.is_linear:
        return mixture_objective(mixture, head, sink)
    return _mixture_by_rows(mixture, head)


def _mixture_by_rows(mixture: Mixture, head: OutputHead) -> tuple[Tensor, MixtureResult]:
    """The same with a head whose logits are not linear in the states."""
    shape = mixture.mixing_weight.shape
    states = mixture.thought.flatten(0, 3)

    def each(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.unsqueeze(1).expand(shape).flatten()

    targets = each(mixture.targets)
    assert targets is not None, "there are targets"
    text = mixture.text.spread(mixture.text.rows).unsqueeze(1).expand_as(mixture.thought)
    segments = [
        Segment(
            text.flatten(0, 3),
            targets,
            each(mixture.mixed_coefficient),
            wants_predicted=mixture.wants_predicted,
            other_states=states,
            other_weight=mixture.mixing_weight.flatten(),
        )
    ]
    if mixture.wants_thought:
        segments.append(Segment(states, targets, each(mixture.thought_coefficient)))
    value, results = objective(segments, head)
    predicted = results[0].predicted
    return value, MixtureResult(
        results[0].nll.view(shape),
        results[1].nll.view(shape) if mixture.wants_thought else None,
        predicted.view(shape) if mixture.wants_predicted and predicted is not None else None,
    )


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


def score(
    results: ThoughtResults,
    base: RowResult,
    thoughts: Int[Tensor, "length thoughts batch positions"],
    labels: Int[Tensor, "batch seq"],
    targets: Int[Tensor, "lookahead batch positions"],
    positions: Int[Tensor, "batch positions"] | None,
) -> ScoredThoughts:
    """The results of all positions and of the texts, put together."""
    text_nll, valid = base.nll.view(labels.shape), targets != IGNORE_INDEX
    ahead = lookahead_states(text_nll, targets.shape[0], positions)
    return ScoredThoughts(
        thoughts=thoughts,
        logprobs=-results.policy,
        mixing_weight=results.mixing_weight,
        base_logprobs=-ahead.where(valid, 0.0),
        mixed_logprobs=-results.mixed,
        thought_logprobs=None if results.thought is None else -results.thought,
        valid=valid,
        entropy=results.entropy,
        text_logprobs=-text_nll,
        text_valid=lookahead_targets(labels, 1)[0] != IGNORE_INDEX,
        positions=positions,
        base_predicted=_like(base.predicted, text_nll),
        mixed_predicted=results.predicted,
    )


def _like(x: Tensor | None, other: Tensor) -> Tensor | None:
    return None if x is None else x.view(other.shape)


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
) -> tuple[Tensor, RowResult, Tensor]:
    """Plain language modelling: sum_i -log p(x_{i+1}) / N.

    Args:
        states: The text's own.
        labels: As in `quiet_star_loss`.
        head: From states to logits.
        num_items: N; by default the valid targets of this batch.
        scoring: Find the most likely tokens too.
        weight: Of the loss.

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
    loss, results = objective([segment], head)
    return loss, results[0], valid


def mixed_predictions(
    states: LearnStates,
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"],
    labels: Int[Tensor, "batch seq"],
    head: OutputHead,
    positions: Int[Tensor, "batch positions"] | None = None,
) -> MixtureResult:
    """The mixed prediction of every target alone: what a reader of scores needs, and no more.

    Arguments as in `quiet_star_loss`.
    """
    lookahead = mixing_weight.shape[0]
    targets = lookahead_targets(labels, lookahead, positions)
    mixture = Mixture(
        text_ahead(states.text, lookahead, positions),
        states.ahead,
        mixing_weight,
        targets,
        wants_thought=False,
        wants_predicted=True,
    )
    by = mixture_objective if head.is_linear else _mixture_by_rows
    return by(mixture, head)[1]


def mixed_candidates(
    states: LearnStates,
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"],
    head: OutputHead,
    candidates: Int[Tensor, " candidates"],
    positions: Int[Tensor, "batch positions"] | None = None,
) -> Float[Tensor, "thoughts batch positions candidates"]:
    """Mixed logits of a few candidates for the next token; arguments as in `quiet_star_loss`."""
    base = lookahead_states(states.text, 1, positions)  # (1, B, P, D)
    base, thought = (head.candidate_logits(x, candidates) for x in (base, states.ahead[0]))
    weight = mixing_weight[0].unsqueeze(-1).to(thought.dtype)
    return torch.lerp(base.expand_as(thought), thought, weight)


def next_token_entropy(
    states: Float[Tensor, "batch seq width"], head: OutputHead
) -> Float[Tensor, "batch seq"]:
    """Entropy of the next token's distribution after every text position, nats; no gradient."""
    rows = states.detach().flatten(0, 1)
    targets = torch.full_like(rows[:, 0], IGNORE_INDEX, dtype=torch.long)
    with torch.no_grad():
        _, results = objective([Segment(rows, targets, wants_entropy=True)], head)
    assert results[0].entropy is not None, "it was asked for"
    return results[0].entropy.view(states.shape[:2])


def _filled(targets: Tensor, value: Tensor) -> Tensor:
    """``value`` where there is a target, else 0; (rows,), float32."""
    return (targets != IGNORE_INDEX) * value.float()
