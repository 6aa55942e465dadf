"""The loss of thoughts from the states of one teacher-forced pass. Pure functions.

Every sum is over valid targets and divided by their number in the *whole* step (over micro-batches
and ranks), so that the parts of a step add up to the step: N targets x_{i+1} in the texts, M
positions with a thought and at least one target after it. With p the targets' probabilities and
the weights u, v and advantages g that an objective chose (`ThoughtWeights`; Quiet-STaR's are those
of arXiv 2403.09629, sections 4.3 and 4.4):

    base     sum_i                   -log p_base(x_{i+1})             / N
    mixed    sum_{a,k,i}  u(i,k,a) * -log p_mixed(x_{i+a})            / (A K M)
    thought  sum_{a,k,i}  v(i,k,a) * -log p_thought(x_{i+a})          / (A K M)

    policy   sum_{k,i}    g(i,k)   * -sum_t s(t) / L                  / (K M)

An objective may sum over the lookahead where there is a division by A (`target_weighting`), and
says what L is (`token_weighting`): 1, T, or the thought's own length. T is the most tokens that a
thought may have, also where one ends early: a division by its own length weighs the tokens of short
thoughts more, and the policy term is no longer the gradient of the expected reward (arXiv
2503.20783, section 3.1). s(t) is log p(t), or what `PolicySurrogate` makes of it.

Only `base` is a sum over all positions i; the others are over those with thoughts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from quietstar.attention.layout import (
    IGNORE_INDEX,
    NO_TOKEN,
    TextLookahead,
    lookahead_states,
    lookahead_targets,
    text_lookahead,
)
from quietstar.backbone.output_head import OutputHead
from quietstar.backbone.teacher_forced import ThoughtStates
from quietstar.losses.cross_entropy import (
    HeadGradients,
    Products,
    RowResult,
    Segment,
    SoftTargets,
    chunk_rows,
    objective,
)
from quietstar.losses.mixture import Mixture, MixtureResult, mixture_objective
from quietstar.losses.weights import LossTerms


@dataclass(frozen=True)
class ThoughtResults:
    """What the terms after thoughts gave, without gradient; predictions are 0 without a target.

    Attributes:
        logprobs: Log-probabilities of the thought tokens at the policy temperature.
        entropy: Of each thought token's distribution, None if not computed.
        mixing_weight: Share of the thought in each prediction.
        mixed_logprobs: Log-probabilities of the true tokens x_{i+a} by the mixed prediction.
        thought_logprobs: By the thought's own prediction alone; None if no loss needs it.
        mixed_predicted: Most likely x_{i+a} by the mixed prediction, None if not asked for.
        advantage: Advantage of each thought; None if nothing was weighed.
        reward: Reward of each thought; None if nothing was weighed.
        since_drawn: Log-probability of each thought token, less that by the policy that drew it;
            None where the current one did.
        is_clipped: Whether a thought token is reinforced no more; None where ``since_drawn`` is.
        divergence: KL(teacher || mixed) of each target; None without a teacher.
    """

    logprobs: Float[Tensor, "length thoughts batch positions"]
    entropy: Float[Tensor, "length thoughts batch positions"] | None
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"]
    mixed_logprobs: Float[Tensor, "lookahead thoughts batch positions"]
    thought_logprobs: Float[Tensor, "lookahead thoughts batch positions"] | None
    mixed_predicted: Int[Tensor, "lookahead thoughts batch positions"] | None
    advantage: Float[Tensor, "thoughts batch positions"] | None
    reward: Float[Tensor, "thoughts batch positions"] | None
    since_drawn: Float[Tensor, "length thoughts batch positions"] | None
    is_clipped: Bool[Tensor, "length thoughts batch positions"] | None
    divergence: Float[Tensor, "lookahead thoughts batch positions"] | None


@dataclass(frozen=True)
class PolicySurrogate:
    """What a thought's token counts, where the policy that drew it or a reference is known.

    For a token with advantage g, rho = p / p_drawn and d = log p_ref - log p, the objective has

        -min(rho g, clip(rho, 1 - clip_low, 1 + clip_high) g) + kl_weight (e^d - d - 1)

    in place of -g log p (PPO, arXiv 1707.06347, eq. 7; GRPO, arXiv 2402.03300, eq. 4: the second
    term is its k3 estimate of the divergence). Without a bound it is importance sampling.

    Attributes:
        advantage: Of each row, already divided by what the sums are divided by.
        scale: What the divergence of each row is divided by; 0 where a row is no token.
        drawn: Log-probabilities by the policy that drew the tokens; None for the current one.
        reference: By the reference; None for no divergence.
        clip_low, clip_high, kl_weight: As in `LossTerms`.
    """

    advantage: Float[Tensor, " rows"]
    scale: Float[Tensor, " rows"]
    drawn: Float[Tensor, " rows"] | None
    reference: Float[Tensor, " rows"] | None
    clip_low: float | None
    clip_high: float | None
    kl_weight: float

    def __call__(self, nll: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Return values and derivatives with respect to the NLL of some rows."""
        advantage, is_token = self.advantage[rows], self.scale[rows] != 0
        value, slope = advantage * nll, advantage
        if self.drawn is not None:
            ratio = (-nll - self.drawn[rows]).where(is_token, 0.0).exp()
            is_clipped = is_beyond(ratio, advantage, self.clip_low, self.clip_high)
            low = 0.0 if self.clip_low is None else 1 - self.clip_low
            high = math.inf if self.clip_high is None else 1 + self.clip_high
            value = -advantage * ratio.where(~is_clipped, ratio.clamp(low, high))
            slope = (advantage * ratio).where(~is_clipped, 0.0)
        if self.reference is not None:
            gap = (self.reference[rows] + nll).where(is_token, 0.0)
            weight = self.kl_weight * self.scale[rows]
            value = value + weight * (gap.exp() - gap - 1)
            slope = slope + weight * (gap.exp() - 1)
        return value.where(is_token, 0.0), slope.where(is_token, 0.0)


def is_beyond(
    ratio: Tensor, advantage: Tensor, clip_low: float | None, clip_high: float | None
) -> Tensor:
    """Tell where a token's probability went so far that the clip takes its gradient away."""
    beyond = torch.zeros_like(ratio, dtype=torch.bool)
    if clip_high is not None:
        beyond |= (ratio > 1 + clip_high) & (advantage > 0)
    if clip_low is not None:
        beyond |= (ratio < 1 - clip_low) & (advantage < 0)
    return beyond


@dataclass(frozen=True)
class ScoredThoughts(ThoughtResults):
    """What the thoughts did, position by position, for readers of figures.

    With chosen positions, P of them a text stand where ``positions`` is written; else S.

    Attributes:
        thoughts: Token ids of the thoughts that were scored.
        base_logprobs: Of x_{i+a}, without the thought.
        valid: Whether there is a target x_{i+a}.
        text_logprobs: Of the next token after every text position, 0 where there is no target.
        text_valid: Whether there is a next target.
        base_predicted: Most likely next token without the thought, None if not asked for.
        positions: The chosen ones, None for all.
    """

    thoughts: Int[Tensor, "length thoughts batch positions"]
    base_logprobs: Float[Tensor, "lookahead batch positions"]
    valid: Bool[Tensor, "lookahead batch positions"]
    text_logprobs: Float[Tensor, "batch seq"]
    text_valid: Bool[Tensor, "batch seq"]
    base_predicted: Int[Tensor, "batch seq"] | None
    positions: Int[Tensor, "batch positions"] | None


def score(
    results: ThoughtResults,
    base: RowResult,
    thoughts: Int[Tensor, "length thoughts batch positions"],
    labels: Int[Tensor, "batch seq"],
    targets: Int[Tensor, "lookahead batch positions"],
    positions: Int[Tensor, "batch positions"] | None,
) -> ScoredThoughts:
    """Put the results of all positions and of the texts together."""
    text_nll, predicted = base.nll.view(labels.shape), base.predicted
    valid = targets != IGNORE_INDEX
    base_nll = lookahead_states(text_nll, targets.shape[0], positions)
    return ScoredThoughts(
        **vars(results),
        thoughts=thoughts,
        base_logprobs=-base_nll.where(valid, 0.0),
        valid=valid,
        text_logprobs=-text_nll,
        text_valid=lookahead_targets(labels, 1)[0] != IGNORE_INDEX,
        base_predicted=None if predicted is None else predicted.view(labels.shape),
        positions=positions,
    )


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
    rows: Int[Tensor, " rows"] | None = None,
    drawn: Float[Tensor, "length thoughts batch positions"] | None = None,
    reference: Float[Tensor, "length thoughts batch positions"] | None = None,
    soft: SoftTargets | None = None,
) -> tuple[Tensor, ScoredThoughts]:
    """Compute the loss of one (micro-)batch, and score its thoughts.

    Differentiable in the states, the mixing weight and the head. Labels are IGNORE_INDEX where a
    token is no target; without ``positions`` there are thoughts at all. N is ``num_items``, by
    default the valid targets of this batch; M is ``num_thought_items``, by default the positions of
    this batch with a target. ``rows``, ``drawn``, ``reference`` and ``soft`` as in `thought_loss`.
    """
    lookahead = mixing_weight.shape[0]
    targets = lookahead_targets(labels, lookahead, positions)  # (A, B, P)
    text_loss, base, _ = next_token_loss(
        states.text, labels, head, num_items, terms.scoring, terms.base_weight
    )
    text = text_lookahead(states.text, lookahead, positions)
    base_nll = lookahead_states(base.nll.view(labels.shape), lookahead, positions)
    loss, results = thought_loss(
        states.policy, states.ahead, text, mixing_weight, thoughts, targets, base_nll, head, terms,
        count_thought_items(targets, num_thought_items), rows=rows, drawn=drawn,
        reference=reference, soft=soft,
    )  # fmt: skip
    return text_loss + loss, score(results, base, thoughts, labels, targets, positions)


def count_thought_items(
    targets: Int[Tensor, "lookahead batch positions"], given: Tensor | int | None
) -> Tensor:
    """M, at least 1: as given, or the positions of this batch with a target after them."""
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
    rows: Int[Tensor, " rows"] | None = None,
    drawn: Float[Tensor, "length thoughts batch positions"] | None = None,
    reference: Float[Tensor, "length thoughts batch positions"] | None = None,
    soft: SoftTargets | None = None,
) -> tuple[Tensor, ThoughtResults]:
    """Compute all terms but `base`, of some positions of some texts.

    ``policy_states`` predict the thought tokens; ``ahead_states`` (from the end token on) and the
    text's own predict the targets. ``base_nll`` is the NLL of these without a thought;
    ``num_items`` is M of the whole step; ``accumulator`` is as in `objective`. ``thoughts`` that
    end early are padded with `NO_TOKEN`; ``rows`` are those of the flat thoughts that have a token,
    and by default all run. ``drawn`` and ``reference`` are log-probabilities of the thought tokens,
    by the policy that drew them and by another. ``soft`` are a teacher's distributions of the
    targets, (lookahead, batch, positions, top).
    """
    counts = (targets != IGNORE_INDEX).any(0) & (thoughts != NO_TOKEN)
    tokens = thoughts.where(counts, IGNORE_INDEX).flatten()
    policy = policy_states.flatten(0, 3)
    log_ratio = None
    if terms.needs_log_ratio and reference is not None and terms.weigh is not None:
        by_policy = drawn
        if by_policy is None:
            by_policy = thought_logprobs(policy_states, thoughts, head, terms.policy_temperature)
        log_ratio = (by_policy - reference).where(counts, 0.0).sum(0)
    mixture = Mixture(
        text, ahead_states, mixing_weight, targets, base_nll, num_items, terms.weigh, log_ratio,
        sums_targets=terms.target_weighting == "sum",
        needs_thought=terms.needs_thought or terms.scoring, needs_predicted=terms.scoring,
        soft=soft,
    )  # fmt: skip
    if terms.weighs_at_once and terms.weigh is not None and torch.is_grad_enabled():
        with torch.no_grad():
            _, known = mixture_objective(replace(mixture, weigh=None), head)
        everywhere = slice(None)
        scores = mixture.scores(
            known.mixed, known.thought, everywhere, everywhere, known.divergence
        )
        weights = terms.weigh(scores, everywhere, everywhere)
        mixture = replace(mixture, weigh=lambda _, texts, places: weights.part(texts, places))
    value, mixed = mixture_objective(mixture, head, accumulator)
    scale = _token_scale(thoughts, terms.token_weighting, num_items.to(mixed.mixed.dtype))
    coefficients = bonus = None
    if torch.is_grad_enabled():  # else only the results are wanted
        coefficients = torch.zeros_like(tokens, dtype=mixed.mixed.dtype)
        if mixed.advantage is not None:
            coefficients = (mixed.advantage * scale).expand(thoughts.shape).flatten()
        if terms.entropy_weight > 0:
            bonus = (-terms.entropy_weight * scale).expand(thoughts.shape).flatten()
            bonus = bonus.to(coefficients.dtype).where(tokens != IGNORE_INDEX, 0.0)
    by_drawer = None if drawn is None else drawn.flatten()
    by_reference = None if reference is None or terms.kl_weight == 0 else reference.flatten()
    scale = scale.expand(thoughts.shape).flatten()
    if rows is not None:
        policy, tokens, scale = policy[rows], tokens[rows], scale[rows]
        coefficients, bonus, by_drawer, by_reference = (
            x if x is None else x[rows] for x in (coefficients, bonus, by_drawer, by_reference)
        )
    surrogate = None
    if coefficients is not None and not (by_drawer is None and by_reference is None):
        scale = scale.to(coefficients.dtype).where(tokens != IGNORE_INDEX, 0.0)
        surrogate = PolicySurrogate(
            coefficients, scale, by_drawer, by_reference, terms.clip_low, terms.clip_high,
            terms.kl_weight,
        )  # fmt: skip
    segments = [Segment(
        policy, tokens, coefficients, surrogate, bonus, terms.policy_temperature,
        sampled_only=True, wants_entropy=terms.entropy_weight > 0,
    )]  # fmt: skip
    rest, results = objective(segments, head, accumulator)
    nll, entropy, *_ = results[0]
    if rows is not None:
        nll, entropy = (x if x is None else x.new_zeros(thoughts.numel()).index_copy(0, rows, x)
                        for x in (nll, entropy))  # fmt: skip
    assert nll is not None, "it is always computed"
    since_drawn = is_clipped = None
    if drawn is not None:
        since_drawn = (-nll.view(thoughts.shape) - drawn).where(counts, 0.0)
        if mixed.advantage is not None:
            is_clipped = is_beyond(
                since_drawn.exp(), mixed.advantage.expand(thoughts.shape), terms.clip_low,
                terms.clip_high,
            )  # fmt: skip
    return value + rest, ThoughtResults(
        logprobs=-nll.view(thoughts.shape),
        entropy=None if entropy is None else entropy.view(thoughts.shape),
        mixing_weight=mixing_weight.detach(),
        mixed_logprobs=-mixed.mixed,
        thought_logprobs=None if mixed.thought is None else -mixed.thought,
        mixed_predicted=mixed.predicted,
        advantage=mixed.advantage,
        reward=mixed.reward,
        since_drawn=since_drawn,
        is_clipped=is_clipped,
        divergence=mixed.divergence,
    )


@torch.no_grad()
def thought_logprobs(
    policy_states: Float[Tensor, "length thoughts batch positions width"],
    thoughts: Int[Tensor, "length thoughts batch positions"],
    head: OutputHead,
    temperature: float,
) -> Float[Tensor, "length thoughts batch positions"]:
    """Log-probabilities of the thought tokens, 0 after the last; no gradient."""
    tokens = thoughts.where(thoughts != NO_TOKEN, IGNORE_INDEX).flatten()
    states = policy_states.detach().flatten(0, 3)
    segment = Segment(states, tokens, temperature=temperature, sampled_only=True)
    return -objective([segment], head)[1][0].nll.view(thoughts.shape)


def _token_scale(
    thoughts: Int[Tensor, "length thoughts batch positions"], weighting: str, num_items: Tensor
) -> Tensor:
    """What a token's place in the policy term is divided by: a scalar, or (1, K, B, P)."""
    length, num_thoughts = thoughts.shape[:2]
    if weighting == "mean":
        own = (thoughts != NO_TOKEN).sum(0, keepdim=True).clamp(min=1)
        return 1.0 / (own * num_thoughts * num_items)
    return 1.0 / ((length if weighting == "constant" else 1) * num_thoughts * num_items)


def next_token_loss(
    states: Float[Tensor, "batch seq width"],
    labels: Int[Tensor, "batch seq"],
    head: OutputHead,
    num_items: Tensor | int | None = None,
    scoring: bool = False,
    weight: float = 1.0,
    accumulator: HeadGradients | None = None,
) -> tuple[Tensor, RowResult, Tensor]:
    """Compute the loss of plain language modeling, sum_i -log p(x_{i+1}) / N, times ``weight``.

    N is ``num_items``, by default the valid targets of this batch. With ``scoring`` the most likely
    tokens are found too; ``accumulator`` is as in `objective`. Returns the scalar loss, the results
    of all rows (batch * seq), and where there is a target.
    """
    targets = lookahead_targets(labels, 1)[0]
    valid = targets != IGNORE_INDEX
    count = valid.sum() if num_items is None else torch.as_tensor(num_items)
    rows = targets.flatten()
    coefficients = _filled(rows, weight, count.clamp(min=1), states)
    segment = Segment(states.flatten(0, 1), rows, coefficients, wants_predicted=scoring)
    loss, results = objective([segment], head, accumulator)
    return loss, results[0], valid


def _filled(targets: Tensor, weight: float, count: Tensor, states: Tensor) -> Tensor:
    """``weight / count`` where there is a target, else 0; (rows,), in float32 at least."""
    wide = torch.promote_types(states.dtype, torch.float32)
    return (targets != IGNORE_INDEX) * (weight / count.to(wide))


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
    text = text_lookahead(states.text, lookahead, positions)
    mixture = Mixture(
        text, states.ahead, mixing_weight, targets, needs_thought=False, needs_predicted=True
    )
    return mixture_objective(mixture, head)[1]


def mixed_candidates(
    states: ThoughtStates,
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"],
    head: OutputHead,
    candidates: Int[Tensor, " candidates"],
    positions: Int[Tensor, "batch positions"] | None = None,
) -> Float[Tensor, "lookahead thoughts batch positions candidates"]:
    """Mixed logits of a few candidates for every target; arguments as in `loss_from_states`."""
    base = lookahead_states(states.text, mixing_weight.shape[0], positions)  # (A, B, P, D)
    base, thought = (head.candidate_logits(x, candidates) for x in (base, states.ahead))
    weight = mixing_weight.unsqueeze(-1).to(thought.dtype)
    return torch.lerp(base.unsqueeze(1).expand_as(thought), thought, weight)


@torch.no_grad()
def next_token_entropy(
    states: Float[Tensor, "batch seq width"], head: OutputHead, top: int | None = None
) -> Float[Tensor, "batch seq"]:
    """Entropy of the next token's distribution after every text position, nats; no gradient.

    With ``top``, of the distribution over so many most likely tokens, renormalized.
    """
    rows = states.detach().flatten(0, 1)
    if top is not None:
        products = Products(head, rows, None) if head.is_linear else None
        best = []
        for part in rows.split(chunk_rows(head.num_logits)):
            logits = head.logits(part) if products is None else products.logits(part)[1]
            best.append(logits.topk(min(top, logits.shape[-1])).values)
        logprobs = torch.cat(best).log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1).view(states.shape[:2])
    targets = torch.full_like(rows[:, 0], IGNORE_INDEX, dtype=torch.long)
    _, results = objective([Segment(rows, targets, wants_entropy=True)], head)
    assert results[0].entropy is not None, "it was asked for"
    return results[0].entropy.view(states.shape[:2])
