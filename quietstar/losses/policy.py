"""The policy term: REINFORCE on the tokens of thoughts, clipped and held near a reference.

    sum_{k,i}  g(i,k) * -sum_t s(t) / L / (K M)

g is the advantage of a thought, s(t) is log p(t) or what `token_terms` makes of it, M the positions
of the whole step with a target after them. L is 1, T or the thought's own length
(`Objective.token_weighting`). T is the most tokens that a thought may have, also where one ends
early: dividing by its own length gives the tokens of short thoughts more weight, and the term is no
longer the gradient of the expected reward (arXiv 2503.20783, section 3.1).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from quietstar.attention.layout import IGNORE_INDEX, NO_TOKEN
from quietstar.backbone.output_head import OutputHead
from quietstar.losses.cross_entropy import HeadGradients, Segment, objective


class PolicyResults(NamedTuple):
    """What the policy term gave, without gradient, (length, thoughts, batch, positions).

    Attributes:
        logprobs: Log-probabilities of the thought tokens at the policy temperature, 0 at padding.
        entropy: Of each thought token's distribution; None if not computed.
        since_drawn: Log-probability of each thought token, minus that by the policy that drew it;
            None where the current one did.
        is_clipped: Whether a thought token is no longer reinforced; None where ``since_drawn`` is.
    """

    logprobs: Float[Tensor, "length thoughts batch positions"]
    entropy: Float[Tensor, "length thoughts batch positions"] | None
    since_drawn: Float[Tensor, "length thoughts batch positions"] | None
    is_clipped: Bool[Tensor, "length thoughts batch positions"] | None


def policy_loss(
    states: Float[Tensor, "length thoughts batch positions width"],
    thoughts: Int[Tensor, "length thoughts batch positions"],
    counts: Bool[Tensor, "batch positions"],
    advantage: Float[Tensor, "thoughts batch positions"] | None,
    settings: Any,
    temperature: float,
    num_items: Tensor,
    head: OutputHead,
    *,
    drawn: Float[Tensor, "length thoughts batch positions"] | None = None,
    reference: Float[Tensor, "length thoughts batch positions"] | None = None,
    rows: Int[Tensor, " rows"] | None = None,
    accumulator: HeadGradients | None = None,
) -> tuple[Float[Tensor, ""], PolicyResults]:
    """Compute the policy term of some positions of some texts.

    Args:
        states: Predict the thought tokens.
        thoughts: Their ids, `NO_TOKEN` after the end of a thought.
        counts: Whether there is a target after a position.
        advantage: Of every thought; None where only the results are wanted.
        settings: ``clip_low``, ``clip_high``, ``kl_weight``, ``entropy_weight`` and
            ``token_weighting`` of an `Objective`.
        temperature: Divides the logits.
        num_items: M.
        head: From states to logits.
        drawn: Log-probabilities by the policy that drew the tokens; None for the current one.
        reference: By a reference; None for no divergence.
        rows: Those of the flat thoughts that have a token; by default all run.
        accumulator: As in `objective`.
    """
    shape, is_token = thoughts.shape, counts & (thoughts != NO_TOKEN)
    tokens, dtype = thoughts.where(is_token, IGNORE_INDEX).flatten(), num_items.dtype
    scale = _token_scale(thoughts, settings.token_weighting, num_items)
    coefficients = bonus = surrogate = None
    by_drawer = None if drawn is None else drawn.flatten()
    by_reference = None if reference is None or settings.kl_weight == 0 else reference.flatten()
    if torch.is_grad_enabled():  # else only the results are wanted
        coefficients = torch.zeros_like(tokens, dtype=dtype)
        if advantage is not None:
            coefficients = (advantage * scale).expand(shape).flatten()
        if settings.entropy_weight > 0:
            bonus = (-settings.entropy_weight * scale).expand(shape).flatten()
            bonus = bonus.where(tokens != IGNORE_INDEX, 0.0)
    scale, states = scale.expand(shape).flatten(), states.flatten(0, 3)
    if rows is not None:
        states, tokens, scale = states[rows], tokens[rows], scale[rows]
        coefficients, bonus, by_drawer, by_reference = (
            x if x is None else x[rows] for x in (coefficients, bonus, by_drawer, by_reference)
        )
    if coefficients is not None and not (by_drawer is None and by_reference is None):
        surrogate = partial(
            token_terms, advantage=coefficients, scale=scale.where(tokens != IGNORE_INDEX, 0.0),
            drawn=by_drawer, reference=by_reference, settings=settings,
        )  # fmt: skip
    segment = Segment(
        states, tokens, coefficients, surrogate, bonus, temperature, sampled_only=True,
        wants_entropy=settings.entropy_weight > 0,
    )  # fmt: skip
    loss, (result,) = objective([segment], head, accumulator)
    logprobs, entropy = (
        x if x is None or rows is None else x.new_zeros(shape.numel()).index_copy(0, rows, x)
        for x in (-result.nll, result.entropy)
    )
    assert logprobs is not None, "they are always computed"
    logprobs, since_drawn, is_clipped = logprobs.view(shape), None, None
    if drawn is not None:
        since_drawn = (logprobs - drawn).where(is_token, 0.0)
        if advantage is not None:
            ratio = since_drawn.exp()
            is_clipped = is_beyond(ratio, advantage, settings.clip_low, settings.clip_high)
    entropy = None if entropy is None else entropy.view(shape)
    return loss, PolicyResults(logprobs, entropy, since_drawn, is_clipped)


def token_terms(
    nll: Float[Tensor, " some"],
    rows: slice,
    *,
    advantage: Float[Tensor, " rows"],
    scale: Float[Tensor, " rows"],
    drawn: Float[Tensor, " rows"] | None,
    reference: Float[Tensor, " rows"] | None,
    settings: Any,
) -> tuple[Float[Tensor, " some"], Float[Tensor, " some"]]:
    """Clipped, KL-regularized surrogate of thought tokens: values and derivatives by their NLL.

    For a token with advantage g, rho = p / p_drawn and d = log p_ref - log p, the objective has

        -min(rho g, clip(rho, 1 - clip_low, 1 + clip_high) g) + kl_weight (e^d - d - 1)

    in place of -g log p (PPO, arXiv 1707.06347, eq. 7; GRPO, arXiv 2402.03300, eq. 4: the second
    term is its k3 estimate of the divergence). Without a bound it is importance sampling.

    Args:
        nll: Of the tokens in ``rows``.
        rows: Which of all rows these are.
        advantage: Already divided by what the sums are divided by.
        scale: What the divergence of each row is divided by; 0 where a row is no token.
        drawn: Log-probabilities by the policy that drew the tokens; None for the current one.
        reference: By the reference; None for no divergence.
        settings: ``clip_low``, ``clip_high`` and ``kl_weight``.
    """
    advantage, is_token = advantage[rows], scale[rows] != 0
    value, slope = advantage * nll, advantage
    if drawn is not None:
        ratio = (-nll - drawn[rows]).where(is_token, 0.0).exp()
        is_clipped = is_beyond(ratio, advantage, settings.clip_low, settings.clip_high)
        low = 0.0 if settings.clip_low is None else 1 - settings.clip_low
        high = math.inf if settings.clip_high is None else 1 + settings.clip_high
        value = -advantage * ratio.where(~is_clipped, ratio.clamp(low, high))
        slope = (advantage * ratio).where(~is_clipped, 0.0)
    if reference is not None:
        gap = (reference[rows] + nll).where(is_token, 0.0)
        weight = settings.kl_weight * scale[rows]
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


@torch.no_grad()
def thought_logprobs(
    states: Float[Tensor, "length thoughts batch positions width"],
    thoughts: Int[Tensor, "length thoughts batch positions"],
    head: OutputHead,
    temperature: float,
) -> Float[Tensor, "length thoughts batch positions"]:
    """Log-probabilities of the thought tokens, 0 after the last; no gradient."""
    tokens = thoughts.where(thoughts != NO_TOKEN, IGNORE_INDEX).flatten()
    segment = Segment(states.flatten(0, 3), tokens, temperature=temperature, sampled_only=True)
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
