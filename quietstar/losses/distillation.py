"""What a thinking teacher predicts, and how a student that does not think learns from it.

The teacher's prediction of a true token is the mean of its mixed predictions over the thoughts of a
position, an estimate of the prediction with the thought marginalized out. It is kept as its most
likely tokens and the rest as one bucket. A student predicts the same token from the text alone. It
learns from the nearest thought: of two whose lookahead reaches a token, the later one has read
more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from quietstar.attention.kernels import at_least_float32
from quietstar.attention.layout import (
    IGNORE_INDEX,
    NO_POSITION,
    lookahead_states,
    lookahead_targets,
)
from quietstar.backbone.output_head import OutputHead
from quietstar.backbone.teacher_forced import ThoughtStates
from quietstar.losses.cross_entropy import Segment, SoftTargets, chunk_rows
from quietstar.losses.cross_entropy import objective as weighted_sum
from quietstar.losses.next_token import next_token_loss
from quietstar.losses.predictions import groups


@dataclass(frozen=True)
class TeacherTargets:
    """Predictions of the true tokens after thoughts, by a model that read these.

    Attributes:
        positions: Positions of the thoughts, -1 after the last of a text; None for all.
        tokens: Most likely tokens of each prediction.
        logprobs: Log-probabilities of these.
        rest: Log-probability of all other tokens together; -inf where there are none.
        true_logprobs: Log-probability of the true token; 0 where there is none.
        num_tokens: Tokens of the thoughts, in all; 0 where they were drawn in another run.
    """

    positions: Int[Tensor, "batch positions"] | None
    tokens: Int[Tensor, "batch positions lookahead top"]
    logprobs: Float[Tensor, "batch positions lookahead top"]
    rest: Float[Tensor, "batch positions lookahead"]
    true_logprobs: Float[Tensor, "batch positions lookahead"]
    num_tokens: Int[Tensor, ""]

    @property
    def lookahead(self) -> int:
        """True tokens after each position."""
        return self.tokens.shape[2]

    def soft_targets(self) -> SoftTargets:
        """Put the distributions into the order (lookahead, batch, positions)."""
        return SoftTargets(*(x.movedim(2, 0) for x in (self.tokens, self.logprobs, self.rest)))

    def to(self, device: torch.device) -> TeacherTargets:
        """Copy all to another device."""
        moved = {name: x if x is None else x.to(device) for name, x in vars(self).items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class StudentRows:
    """Predictions of a student without thoughts that a teacher's stand beside; rows in one order.

    Attributes:
        states: Final states of the text, from which the student predicts.
        targets: True tokens, -100 where a row has none, or a nearer thought teaches it.
        nll: NLL of these by the student, without gradient.
        soft: The teacher's distributions.
        teacher_nll: NLL of the true tokens by the teacher.
        num_items: Targets of the texts of the whole step, by which sums are divided.
        head: From states to logits.
    """

    states: Float[Tensor, "rows width"]
    targets: Int[Tensor, " rows"]
    nll: Float[Tensor, " rows"]
    soft: SoftTargets
    teacher_nll: Float[Tensor, " rows"]
    num_items: Float[Tensor, ""]
    head: OutputHead

    @property
    def scale(self) -> Float[Tensor, " rows"]:
        """Weight of each row in a mean over the step's targets; 0 where it has no target."""
        return (self.targets != IGNORE_INDEX) / self.num_items

    def token_loss(
        self, tokens: Int[Tensor, " rows"], weights: Float[Tensor, " rows"]
    ) -> Float[Tensor, ""]:
        """Sum weight * -log p(token) by the student over the rows that have a target."""
        tokens = tokens.where(self.targets != IGNORE_INDEX, IGNORE_INDEX)
        return weighted_sum([Segment(self.states, tokens, weights)], self.head)[0]

    def divergence_loss(
        self, weights: Float[Tensor, " rows"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " rows"]]:
        """Sum weight * KL(teacher || student) over the rows; and the divergences."""
        segment = Segment(self.states, self.targets, weights, soft=self.soft)
        loss, results = weighted_sum([segment], self.head)
        assert results[0].divergence is not None, "there are soft targets"
        return loss, results[0].divergence


@torch.no_grad()
def teacher_targets(
    states: ThoughtStates,
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"],
    labels: Int[Tensor, "batch seq"],
    head: OutputHead,
    positions: Int[Tensor, "batch positions"] | None,
    top: int,
    num_tokens: Int[Tensor, ""],
) -> TeacherTargets:
    """Average the mixed predictions over the thoughts of each position; keep the ``top`` tokens.

    Logits live a chunk at a time. ``states`` are those of thoughts that were read.
    """
    lookahead, num_thoughts, *places = mixing_weight.shape
    top = min(top, head.num_logits)
    targets = lookahead_targets(labels, lookahead, positions)  # (A, B, P)
    text = lookahead_states(states.text, lookahead, positions)  # (A, B, P, D)
    rows = (lookahead, *places)
    like = at_least_float32(text.new_zeros(()))
    rest, true = like.new_zeros(rows), like.new_zeros(rows)
    tokens = torch.zeros(*rows, top, dtype=torch.long, device=labels.device)
    logprobs = like.new_zeros(*rows, top)
    most = chunk_rows(head.num_logits) // (lookahead * (num_thoughts + 1))
    for some, few in groups(places[0], places[1], max(1, most)):
        where = (..., some, few)
        weight = mixing_weight[where].unsqueeze(-1).to(like.dtype)
        base = head.logits(text[:, some, few]).unsqueeze(1)
        mixed = torch.lerp(base, head.logits(states.ahead[..., some, few, :]), weight)
        mean = mixed.log_softmax(-1).logsumexp(1) - math.log(num_thoughts)
        best = mean.topk(top, dim=-1)
        tokens[:, some, few], logprobs[:, some, few] = best.indices, best.values
        true[where] = mean.gather(-1, targets[where].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        if top < head.num_logits:
            others = mean.scatter_(-1, best.indices, -torch.inf)
            rest[where] = others.logsumexp(-1)
        else:
            rest[where] = -torch.inf
    true = true.where(targets != IGNORE_INDEX, 0.0)
    return TeacherTargets(
        positions,
        rearrange(tokens, "a b p t -> b p a t"),
        rearrange(logprobs, "a b p t -> b p a t"),
        rearrange(rest, "a b p -> b p a"),
        rearrange(true, "a b p -> b p a"),
        num_tokens,
    )


def nearest_thought(
    positions: Int[Tensor, "batch positions"] | None, lookahead: int
) -> Bool[Tensor, "lookahead batch positions"] | Bool[Tensor, "lookahead 1 1"]:
    """Tell which predictions after a position are of tokens that no later thought reaches.

    x_{i+a} is, unless there is a thought at one of i + 1 .. i + a - 1.
    """
    device = None if positions is None else positions.device
    steps = torch.arange(1, lookahead + 1, device=device)[:, None, None]
    if positions is None:
        return steps == 1
    following = torch.full_like(positions, torch.iinfo(torch.long).max // 2)
    following[:, :-1] = positions[:, 1:].where(positions[:, 1:] != NO_POSITION, following[:, 1:])
    return steps <= following - positions


def plain_student_loss(
    text_states: Float[Tensor, "batch seq width"],
    labels: Int[Tensor, "batch seq"],
    teacher: TeacherTargets,
    objective: Any,
    head: OutputHead,
    num_items: Tensor | int | None,
) -> tuple[Float[Tensor, ""], dict[str, tuple[Tensor, Tensor]]]:
    """Compute the loss of the model without thoughts, given its teacher's predictions.

    Returns the scalar, and metrics of the batch as sums and counts.
    """
    loss, base, valid = next_token_loss(text_states, labels, head, num_items, objective.base_weight)
    nll = base.nll.view(labels.shape)
    rows = student_rows(text_states, nll, labels, teacher, head, num_items)
    more, by_row = objective.student_loss(rows)
    counts = rows.targets != IGNORE_INDEX
    by_row |= {"student_nll": rows.nll, "teacher_nll": rows.teacher_nll}
    sums = {n: (x.where(counts, 0.0).sum(), counts.sum()) for n, x in by_row.items()}
    sums["teacher_tokens"] = (teacher.num_tokens, counts.sum())
    return loss + more, {"base_nll": (base.nll.sum(), valid.sum()), **sums}


def student_rows(
    text_states: Float[Tensor, "batch seq width"],
    text_nll: Float[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"],
    teacher: TeacherTargets,
    head: OutputHead,
    num_items: Tensor | int | None,
) -> StudentRows:
    """Put the student's states beside the teacher's predictions of the same tokens.

    ``text_nll`` is that of every next token, without gradient; N is ``num_items``, by default the
    valid targets of this batch.
    """
    lookahead, positions = teacher.lookahead, teacher.positions
    targets = lookahead_targets(labels, lookahead, positions)
    is_nearest = nearest_thought(positions, lookahead).to(targets.device)
    count = lookahead_targets(labels, 1)[0] != IGNORE_INDEX
    items = count.sum() if num_items is None else torch.as_tensor(num_items, device=labels.device)
    return StudentRows(
        states=lookahead_states(text_states, lookahead, positions).flatten(0, 2),
        targets=targets.where(is_nearest, IGNORE_INDEX).flatten(),
        nll=lookahead_states(text_nll, lookahead, positions).flatten(),
        soft=SoftTargets(*(x.flatten(0, 2) for x in teacher.soft_targets())),
        teacher_nll=-rearrange(teacher.true_logprobs, "b p a -> (a b p)"),
        num_items=items.clamp(min=1).to(teacher.rest.dtype),
        head=head,
    )
