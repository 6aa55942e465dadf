"""The prediction of the next token without thoughts: its loss, and its entropy."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from quietstar.attention.layout import IGNORE_INDEX, lookahead_targets, text_lookahead
from quietstar.backbone.output_head import OutputHead
from quietstar.losses.cross_entropy import (
    HeadGradients,
    Products,
    RowResult,
    Segment,
    chunk_rows,
    objective,
)
from quietstar.sampling.positions import LEARNED_RULES

TOP_TOKENS = 16
"""Most likely tokens whose entropy is the score of ``top_entropy`` (RPT, arXiv:2506.08007)."""


def next_token_loss(
    states: Float[Tensor, "batch seq width"],
    labels: Int[Tensor, "batch seq"],
    head: OutputHead,
    num_items: Tensor | int | None = None,
    weight: float = 1.0,
    accumulator: HeadGradients | None = None,
    *,
    needs_predicted: bool = False,
) -> tuple[Float[Tensor, ""], RowResult, Bool[Tensor, "batch seq"]]:
    """Compute the loss of plain language modeling, sum_i -log p(x_{i+1}) / N, times ``weight``.

    N is ``num_items``, by default the valid targets of this batch. With ``needs_predicted`` the
    most likely tokens are found too; ``accumulator`` is as in `objective`. Returns the scalar loss,
    the results of all rows (batch * seq), and where there is a target.
    """
    targets = lookahead_targets(labels, 1)[0]
    valid = targets != IGNORE_INDEX
    count = valid.sum() if num_items is None else torch.as_tensor(num_items)
    wide = torch.promote_types(states.dtype, torch.float32)
    coefficients = valid.flatten() * (weight / count.clamp(min=1).to(wide))
    segment = Segment(
        states.flatten(0, 1), targets.flatten(), coefficients, wants_predicted=needs_predicted
    )
    loss, results = objective([segment], head, accumulator)
    return loss, results[0], valid


@torch.no_grad()
def next_token_entropy(
    states: Float[Tensor, "batch seq width"], head: OutputHead, top: int | None = None
) -> Float[Tensor, "batch seq"]:
    """Entropy of the next token's distribution after every text position, nats; no gradient.

    With ``top``, of the distribution over that many most likely tokens, renormalized.
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


@torch.no_grad()
def position_scores(
    rule: str, states: Float[Tensor, "batch seq width"], mixing_head: nn.Module, head: OutputHead
) -> Float[Tensor, "batch seq"]:
    """Score every text position by a rule of ``thoughts.positions`` that thinks at the highest."""
    score = torch.ones_like(states[..., 0])
    if rule in LEARNED_RULES:  # what the mixing head says without a thought
        ahead = text_lookahead(states, 1, None)
        score = mixing_head(ahead, torch.zeros_like(states)[None, None])[0, 0]
    if rule != "weight":
        top = TOP_TOKENS if rule == "top_entropy" else None
        score = score * next_token_entropy(states, head, top)
    return score
