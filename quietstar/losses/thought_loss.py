"""The loss of thoughts from the states of one teacher-forced pass. Pure functions.

Every sum is over valid targets and divided by their number in the *whole* step (over micro-batches
and ranks), so that the parts of a step add up to the step: N targets x_{i+1} in the texts, M
positions with a thought and at least one target behind it. With p the targets' probabilities and
the weights u, v and advantages g that an objective chose (`ThoughtWeights`; Quiet-STaR's are those
of arXiv 2403.09629, sections 4.3 and 4.4):

    base     sum_i                   -log p_base(x_{i+1})             / N
    mixed    sum_{a,k,i}  u(i,k,a) * -log p_mixed(x_{i+a})            / (A K M)
    thought  sum_{a,k,i}  v(i,k,a) * -log p_thought(x_{i+a})          / (A K M)
    draft    sum_i                   -log p(x_{i+1} | x_<=i, start)   / M   (ours)
    policy   sum_{k,i}    g(i,k)   * -mean_t log p(t_t)               / (K M)

Only `base` is a sum over all positions i; the others are over those with thoughts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quietstar.attention.layout import (
    IGNORE_INDEX,
    TextLookahead,
    lookahead_states,
    lookahead_targets,
    text_lookahead,
)
from quietstar.backbone.output_head import OutputHead
from quietstar.backbone.teacher_forced import ThoughtStates
from quietstar.losses.cross_entropy import HeadGradients, RowResult, Segment, objective
from quietstar.losses.mixture import Mixture, MixtureResult, mixture_objective
from quietstar.losses.scores import ScoredThoughts, ThoughtResults, score
from quietstar.losses.weights import Weigh


@dataclass(frozen=True)
class LossTerms:
    """Which terms a loss has.

    Attributes:
        weigh: Chooses advantages and weights of true tokens; None where only figures are wanted.
        policy_temperature: Divides the logits inside the log-probability of the policy term.
        base_weight: Weight of the base prediction's NLL.
        draft_weight: Weight of the NLL of the next true token as first thought token.
        entropy_weight: Weight of a bonus on the entropy of thought tokens.
        needs_thought: Whether the thought's own prediction is read by reward or objective.
        scoring: Whether the thought's own prediction and the most likely tokens are computed for
            readers of figures.
    """

    weigh: Weigh | None
    policy_temperature: float = 1.0
    base_weight: float = 1.0
    draft_weight: float = 0.0
    entropy_weight: float = 0.0
    needs_thought: bool = True
    scoring: bool = False


def loss_from_states(
    states: ThoughtStates,
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"],
    thoughts: Int[Tensor, "length thoughts batch positions"],
    labels: Int[Tensor, "batch seq"],
    head: OutputHead,
    terms: LossTerms,
    num_items: Tensor | int | None = None,
    positions: Int[Tensor, "batch positions"] | None = None,
    num_thought_items: Tensor | int | None = None,
) -> tuple[Tensor, ScoredThoughts]:
    """Compute the loss of one (micro-)batch, and score its thoughts.

    Args:
        states: States of the teacher-forced pass.
        mixing_weight: Output of the mixing head, differentiable.
        thoughts: Thought tokens.
        labels: Token ids of the text, IGNORE_INDEX where a token is no target.
        head: From states to logits.
        terms: Terms of the loss.
        num_items: N; by default the valid targets of this batch.
        positions: Positions of the thoughts, None for all.
        num_thought_items: M; by default the positions of this batch with a target.

    Returns:
        The scalar loss and the scored thoughts.
    """
    targets = lookahead_targets(labels, mixing_weight.shape[0], positions)  # (A, B, P)
    text_loss, base, _ = next_token_loss(
        states.text, labels, head, num_items, terms.scoring, terms.base_weight
    )
    text = text_lookahead(states.text, mixing_weight.shape[0], positions)
    base_nll = lookahead_states(base.nll.view(labels.shape), mixing_weight.shape[0], positions)
    loss, results = thought_loss(
        states.policy, states.ahead, text, mixing_weight, thoughts, targets, base_nll, head, terms,
        count_thought_items(targets, num_thought_items),
    )  # fmt: skip
    return text_loss + loss, score(results, base, thoughts, labels, targets, positions)


def count_thought_items(
    targets: Int[Tensor, "lookahead batch positions"], given: Tensor | int | None
) -> Tensor:
    """M, at least 1: as given, or the positions of this batch with a target behind them."""
    count = (targets != IGNORE_INDEX).any(0).sum() if given is None else torch.as_tensor(given)
    return count.clamp(min=1)


def thought_loss(
    policy_states: Float[Tensor, "length thoughts batch positions width"],
    ahead_states: Float[Tensor, "lookahead thoughts batch positions width"],
    text: TextLookahead,
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"],
    thoughts: Int[Tensor, "length thoughts batch positions"],
    targets: Int[Tensor, "lookahead batch positions"],
    base_nll: Float[Tensor, "lookahead batch positions"],
    head: OutputHead,
    terms: LossTerms,
    num_items: Tensor,
    accumulator: HeadGradients | None = None,
) -> tuple[Tensor, ThoughtResults]:
    """Compute all terms but `base`, of some positions of some texts.

    Args:
        policy_states: States that predict the thought tokens.
        ahead_states: States from the end token on.
        text: The text's own states that predict the same tokens.
        mixing_weight: Output of the mixing head, differentiable.
        thoughts: Thought tokens.
        targets: True tokens x_{i+a}, IGNORE_INDEX where there is none.
        base_nll: NLL of the targets without a thought.
        head: From states to logits.
        terms: Terms of the loss.
        num_items: M, of the whole step.
        accumulator: Collects the gradients of a linear head; by default they are those of its
            parameters.
    """
    mixture = Mixture(
        text,
        ahead_states,
        mixing_weight,
        targets,
        base_nll,
        num_items,
        terms.weigh,
        needs_thought=terms.needs_thought or terms.scoring,
        needs_predicted=terms.scoring,
    )
    value, mixed = mixture_objective(mixture, head, accumulator)
    segments = [_policy(policy_states, thoughts, targets, mixed.advantage, terms, num_items)]
    if terms.draft_weight > 0:
        # The states at the start vector are the same for all thoughts of a position.
        next_targets = targets[0].flatten()
        coefficients = _filled(next_targets, terms.draft_weight / num_items)
        segments.append(Segment(policy_states[0, 0].flatten(0, 1), next_targets, coefficients))
    rest, results = objective(segments, head, accumulator)
    policy, entropy = results[0].nll.view(thoughts.shape), results[0].entropy
    entropy = None if entropy is None else entropy.view(thoughts.shape)
    return value + rest, ThoughtResults(
        mixed.mixed, mixed.thought, mixed.predicted, policy, entropy, mixing_weight.detach()
    )


def _policy(
    policy_states: Tensor,
    thoughts: Tensor,
    targets: Tensor,
    advantage: Tensor | None,
    terms: LossTerms,
    num_items: Tensor,
) -> Segment:
    length, num_thoughts = thoughts.shape[:2]
    tokens = thoughts.where((targets != IGNORE_INDEX).any(0), IGNORE_INDEX).flatten()
    scale = 1.0 / (length * num_thoughts * num_items)
    coefficients = bonus = None
    if torch.is_grad_enabled():  # else only the results are wanted
        coefficients = torch.zeros_like(tokens, dtype=torch.float32)
        if advantage is not None:
            coefficients = (advantage * scale).expand(length, *advantage.shape).flatten()
        if terms.entropy_weight > 0:
            bonus = _filled(tokens, -terms.entropy_weight * scale)
    return Segment(
        policy_states.flatten(0, 3),
        tokens,
        coefficients,
        entropy_coefficients=bonus,
        temperature=terms.policy_temperature,
        sampled_only=True,
        wants_entropy=terms.entropy_weight > 0,
    )


def next_token_loss(
    states: Float[Tensor, "batch seq width"],
    labels: Int[Tensor, "batch seq"],
    head: OutputHead,
    num_items: Tensor | int | None = None,
    scoring: bool = False,
    weight: float = 1.0,
    accumulator: HeadGradients | None = None,
) -> tuple[Tensor, RowResult, Tensor]:
    """Compute the loss of plain language modeling, sum_i -log p(x_{i+1}) / N.

    Args:
        states: States of the texts.
        labels: Token ids, IGNORE_INDEX where a token is no target.
        head: From states to logits.
        num_items: N; by default the valid targets of this batch.
        scoring: Find the most likely tokens too.
        weight: Factor of the loss.
        accumulator: Collects the gradients of a linear head; by default they are those of its
            parameters.

    Returns:
        The scalar loss, the results of all rows (batch * seq), and where there is a target.
    """
    targets = lookahead_targets(labels, 1)[0]
    valid = targets != IGNORE_INDEX
    count = valid.sum() if num_items is None else torch.as_tensor(num_items)
    coefficients = _filled(targets.flatten(), weight / count.clamp(min=1))
    segment = Segment(
        states.flatten(0, 1),
        targets.flatten(),
        coefficients,
        wants_predicted=scoring,
    )
    loss, results = objective([segment], head, accumulator)
    return loss, results[0], valid


def _filled(targets: Tensor, value: Tensor) -> Tensor:
    """``value`` where there is a target, else 0; (rows,), float32."""
    return (targets != IGNORE_INDEX) * value.float()


def mixed_predictions(
    states: ThoughtStates,
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"],
    labels: Int[Tensor, "batch seq"],
    head: OutputHead,
    positions: Int[Tensor, "batch positions"] | None = None,
) -> MixtureResult:
    """The mixed prediction of every target alone: what a reader of scores needs, and no more.

    Arguments as in `loss_from_states`.
    """
    lookahead = mixing_weight.shape[0]
    targets = lookahead_targets(labels, lookahead, positions)
    mixture = Mixture(
        text_lookahead(states.text, lookahead, positions),
        states.ahead,
        mixing_weight,
        targets,
        needs_thought=False,
        needs_predicted=True,
    )
    return mixture_objective(mixture, head)[1]


def mixed_candidates(
    states: ThoughtStates,
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"],
    head: OutputHead,
    candidates: Int[Tensor, " candidates"],
    positions: Int[Tensor, "batch positions"] | None = None,
) -> Float[Tensor, "thoughts batch positions candidates"]:
    """Mixed logits of a few candidates for the next token; arguments as in `loss_from_states`."""
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
