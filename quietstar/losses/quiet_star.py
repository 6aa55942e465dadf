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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quietstar.config import LossConfig
from quietstar.engine.layout import IGNORE_INDEX, lookahead_states, lookahead_targets
from quietstar.engine.learn import LearnStates
from quietstar.losses.cross_entropy import RowResult, Segment, objective
from quietstar.losses.estimators import ESTIMATORS
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
    next_tokens = lookahead_targets(labels, 1)[0]  # (B, S)
    targets = lookahead_targets(labels, mixing_weight.shape[0], positions)  # (A, B, P)
    if positions is None and num_thought_items is None:
        num_thought_items = num_items
    counts = (_count(next_tokens, num_items), _count(targets[0], num_thought_items))
    needs_thought = scoring or config.thought_weight > 0 or config.reward == "thought"
    builder = _Segments(
        states, mixing_weight, thoughts, next_tokens, targets, positions, config, counts
    )
    segments = {"base": builder.base(), "mixed": builder.mixed(head)}
    if scoring:
        segments = {name: replace(s, wants_predicted=True) for name, s in segments.items()}
    if needs_thought:
        segments["thought"] = builder.thought()
    if config.draft_weight > 0:
        segments["draft"] = builder.draft()
    segments["policy"] = builder.policy(policy_temperature, list(segments))
    if not torch.is_grad_enabled():  # only the results are wanted; advantages may not exist
        segments = {name: replace(s, coefficients=None) for name, s in segments.items()}
    loss, results = objective(list(segments.values()), head)
    return loss, builder.scored(dict(zip(segments, results, strict=True)))


class _Segments:
    """The rows of each term, with their coefficients."""

    def __init__(
        self, states, mixing_weight, thoughts, next_tokens, targets, positions, config, counts
    ) -> None:
        self.states: LearnStates = states
        self.mixing_weight: Tensor = mixing_weight
        self.thoughts: Tensor = thoughts
        self.next_tokens: Tensor = next_tokens
        self.targets: Tensor = targets
        self.positions: Tensor | None = positions
        self.config: LossConfig = config
        self.num_items: Tensor = counts[0]
        self.num_thought_items: Tensor = counts[1]
        self.valid = targets != IGNORE_INDEX
        self.lookahead, self.num_thoughts = mixing_weight.shape[:2]

    def base(self) -> Segment:
        targets = self.next_tokens.flatten()
        coefficient = self.config.base_weight / self.num_items
        return Segment(self.states.text.flatten(0, 1), targets, _filled(targets, coefficient))

    def _ahead(self, weight: float) -> tuple[Tensor, Tensor]:
        targets = self.targets.unsqueeze(1).expand(self.mixing_weight.shape).flatten()
        scale = weight / (self.lookahead * self.num_thoughts * self.num_thought_items)
        return targets, _filled(targets, scale)

    def mixed(self, head: OutputHead) -> Segment:
        targets, coefficients = self._ahead(self.config.mixed_weight)
        base = lookahead_states(self.states.text, self.lookahead, self.positions).unsqueeze(1)
        thought = self.states.ahead
        if head.is_linear:  # mixing logits is mixing states
            mixed = torch.lerp(base, thought, self.mixing_weight.unsqueeze(-1).to(thought.dtype))
            return Segment(mixed.flatten(0, 3), targets, coefficients)
        return Segment(
            base.expand_as(thought).flatten(0, 3),
            targets,
            coefficients,
            other_states=thought.flatten(0, 3),
            other_weight=self.mixing_weight.flatten(),
        )

    def thought(self) -> Segment:
        targets, coefficients = self._ahead(self.config.thought_weight)
        return Segment(self.states.ahead.flatten(0, 3), targets, coefficients)

    def draft(self) -> Segment:
        targets = self.targets[0].flatten()
        coefficients = _filled(targets, self.config.draft_weight / self.num_thought_items)
        # The states at the start vector are the same for all thoughts of a position.
        return Segment(self.states.policy[0, 0].flatten(0, 1), targets, coefficients)

    def policy(self, temperature: float, earlier: Sequence[str]) -> Segment:
        length = self.thoughts.shape[0]
        has_target = self.valid.any(0)  # (B, P)
        targets = self.thoughts.where(has_target, IGNORE_INDEX).flatten()
        scale = 1.0 / (length * self.num_thoughts * self.num_thought_items)

        def coefficients(results: Sequence[RowResult]) -> Tensor:
            if self.config.policy_weight == 0:
                return torch.zeros_like(targets, dtype=torch.float32)
            reward = results[earlier.index(self.config.reward)]
            advantage = self.advantage(reward) * self.config.policy_weight * scale
            return advantage.expand(length, *advantage.shape).flatten()

        bonus = None
        if self.config.entropy_weight > 0:
            bonus = _filled(targets, -self.config.entropy_weight * scale)
        return Segment(
            self.states.policy.flatten(0, 3),
            targets,
            coefficients,
            entropy_coefficients=bonus,
            temperature=temperature,
            sampled_only=True,
            wants_entropy=self.config.entropy_weight > 0,
        )

    def advantage(self, result: RowResult) -> Tensor:
        """(K, B, P), without gradient; zero where no target is valid."""
        reward = rewards(-result.nll.view(self.mixing_weight.shape), self.valid)
        return ESTIMATORS[self.config.estimator](reward)

    def scored(self, results: Mapping[str, RowResult]) -> ScoredThoughts:
        shape = self.mixing_weight.shape
        policy, thought = results["policy"], results.get("thought")
        base_predicted, mixed_predicted = results["base"].predicted, results["mixed"].predicted
        text_nll = results["base"].nll.view(self.next_tokens.shape)
        base = lookahead_states(text_nll, self.lookahead, self.positions)
        return ScoredThoughts(
            thoughts=self.thoughts,
            logprobs=-policy.nll.view(self.thoughts.shape),
            mixing_weight=self.mixing_weight.detach(),
            base_logprobs=-base.where(self.valid, 0.0),
            mixed_logprobs=-results["mixed"].nll.view(shape),
            thought_logprobs=None if thought is None else -thought.nll.view(shape),
            valid=self.valid,
            entropy=None if policy.entropy is None else policy.entropy.view(self.thoughts.shape),
            text_logprobs=-text_nll,
            text_valid=self.next_tokens != IGNORE_INDEX,
            positions=self.positions,
            base_predicted=_like(base_predicted, text_nll),
            mixed_predicted=None if mixed_predicted is None else mixed_predicted.view(shape),
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
) -> tuple[Tensor, RowResult, Tensor]:
    """Plain language modelling: sum_i -log p(x_{i+1}) / N.

    Args:
        states: The text's own.
        labels: As in `quiet_star_loss`.
        head: From states to logits.
        num_items: N; by default the valid targets of this batch.
        scoring: Find the most likely tokens too.

    Returns:
        The scalar loss, the results of all rows (batch * seq), and where there is a target.
    """
    targets = lookahead_targets(labels, 1)[0]
    valid = targets != IGNORE_INDEX
    coefficients = _filled(targets.flatten(), 1.0 / _count(targets, num_items))
    segment = Segment(
        states.flatten(0, 1),
        targets.flatten(),
        coefficients if torch.is_grad_enabled() else None,
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
) -> RowResult:
    """The mixed prediction of every target alone: what a reader of scores needs, and no more.

    Rows are (lookahead thoughts batch positions), flat; arguments as in `quiet_star_loss`.
    """
    targets = lookahead_targets(labels, mixing_weight.shape[0], positions)
    config, one = LossConfig(), torch.ones((), device=labels.device)
    thoughts = mixing_weight.new_zeros(0, *mixing_weight.shape[1:])
    builder = _Segments(
        states, mixing_weight, thoughts, targets[0], targets, positions, config, (one, one)
    )
    segment = replace(builder.mixed(head), coefficients=None, wants_predicted=True)
    return objective([segment], head)[1][0]


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
