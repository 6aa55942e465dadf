"""Cross entropies of the mixed prediction and of the thought's own, from logits made once.

Mixed logits are ``(1 - w) * base + w * thought``: with both at hand, the mixed prediction needs no
product with the output weight of its own, forward or backward. As in
`quietstar.losses.cross_entropy`, logits live a chunk at a time and gradients are computed with
them. Letters: A lookahead, K thoughts, B texts, P positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quietstar.attention.layout import TextAhead
from quietstar.attention.precision import at_least_float32
from quietstar.backbone.output_head import OutputHead
from quietstar.losses.cross_entropy import Segment, chunk_rows, compute_dtype, objective
from quietstar.losses.head_gradients import HeadGradients
from quietstar.losses.softmax import softmax_rows


@dataclass(frozen=True)
class Mixture:
    """Rows of the two predictions behind a thought, with what each counts in the objective.

    Attributes:
        text: The text's own states that predict the same tokens.
        thought: States from the end token on.
        mixing_weight: Share of the thought.
        targets: Token ids or IGNORE_INDEX, the same for all thoughts.
        mixed_coefficient: Of the mixed NLL of every target; None: only results are wanted.
        thought_coefficient: Of the NLL of the thought's own prediction.
        wants_thought: Compute the thought's own prediction.
        wants_predicted: Find the most likely mixed token.
    """

    text: TextAhead
    thought: Float[Tensor, "lookahead thoughts batch positions width"]
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"]
    targets: Int[Tensor, "lookahead batch positions"]
    mixed_coefficient: Tensor | None = None
    thought_coefficient: Tensor | None = None
    wants_thought: bool = True
    wants_predicted: bool = False

    def chunks(self, vocab_size: int) -> Iterator[tuple[slice, slice]]:
        """Texts and positions whose logits are held at once."""
        lookahead, num_thoughts, batch_size, num_positions = self.mixing_weight.shape
        # Mixed logits lie beside those of the thoughts, and a share of the text's.
        rows_each = lookahead * (2 * num_thoughts + 1)
        return groups(batch_size, num_positions, 2 * chunk_rows(vocab_size) // rows_each)


@dataclass(frozen=True)
class MixtureResult:
    """Without gradient: negative log-likelihoods, 0 where there is no target.

    Attributes:
        mixed: By the mixed prediction.
        thought: By the thought's own; None if it was not wanted.
        predicted: Most likely mixed token; None if it was not wanted.
    """

    mixed: Float[Tensor, "lookahead thoughts batch positions"]
    thought: Float[Tensor, "lookahead thoughts batch positions"] | None
    predicted: Int[Tensor, "lookahead thoughts batch positions"] | None


def groups(batch_size: int, num_positions: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Cut (texts, positions) into rectangles of about equal size, at most ``most`` places each.

    Whole texts together where one fits, else pieces of one text.
    """
    texts = max(1, min(batch_size, most // num_positions))
    pieces = -(-num_positions // max(1, min(most, num_positions)))
    size = -(-num_positions // pieces)
    for text in range(0, batch_size, texts):
        for place in range(0, num_positions, size):
            yield (
                slice(text, min(text + texts, batch_size)),
                slice(place, min(place + size, num_positions)),
            )


def mixture_objective(
    mixture: Mixture, head: OutputHead, sink: HeadGradients | None = None
) -> tuple[Tensor, MixtureResult]:
    """Sum over all targets and thoughts of coefficient * nll, mixed and thought's own.

    Args:
        mixture: States, weights, targets, coefficients.
        head: From states to logits.
        sink: Collects the gradients of a linear head; by default they are those of its parameters.

    Returns:
        The scalar objective (differentiable in states, mixing weight and head) and the results.
    """
    if not head.is_linear:
        return _by_rows(mixture, head)
    results: list[MixtureResult] = []
    args = (mixture, head, sink, torch.is_grad_enabled(), results)
    weight = None if sink is not None else head.weight
    bias = None if sink is not None else head.bias
    value = _FusedMixture.apply(
        *args, mixture.text.rows, mixture.thought, mixture.mixing_weight, weight, bias
    )
    return value, results[0]


def _by_rows(mixture: Mixture, head: OutputHead) -> tuple[Tensor, MixtureResult]:
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


# --- Linear heads: fused --------------------------------------------------------------------------

Where = tuple[EllipsisType, slice, slice]
"""Texts and positions of a chunk."""


class _FusedMixture(torch.autograd.Function):
    """All gradients in the forward pass, a chunk of positions at a time."""

    @staticmethod
    def forward(ctx, mixture, head, sink, grad_enabled, results, rows, thought, weight, *params):
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[5:]]
        ctx.own = HeadGradients(head, needs[3], needs[4]) if sink is None else None
        wants = mixture.mixed_coefficient is not None and (any(needs) or sink is not None)
        work = _Work(mixture, head, (sink or ctx.own) if wants and grad_enabled else None)
        for texts, places in mixture.chunks(head.weight.shape[0]):
            work.chunk(texts, places)
        results.append(work.result())
        if ctx.own is not None:
            ctx.own.totals()  # nothing waits while the layers run backward
        ctx.grads = work.grads
        return work.value()

    @staticmethod
    def backward(ctx, grad_value):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.grads is None:
            raise RuntimeError(
                "backward through the objective a second time: its gradients were used up by the "
                "first. Call the model again."
            )
        states = [None if g is None else g.mul_(grad_value.to(g.dtype)) for g in ctx.grads]
        head = (None, None) if ctx.own is None else ctx.own.scaled(grad_value)
        ctx.grads = ctx.own = None
        return None, None, None, None, None, *states, *head


class _Work:
    """What the chunks fill."""

    def __init__(self, mixture: Mixture, head: OutputHead, sink: HeadGradients | None) -> None:
        self.mixture, self.sink = mixture, sink
        self.factor, self.dtype = head.scale, compute_dtype(mixture.thought)
        self.weight = head.weight.to(self.dtype)
        self.bias = None if head.bias is None else (head.bias * self.factor).to(self.dtype)
        shape, like = mixture.mixing_weight.shape, at_least_float32(mixture.mixing_weight)
        self.mixed = torch.empty_like(like, memory_format=torch.contiguous_format)
        self.thought = torch.empty_like(self.mixed) if mixture.wants_thought else None
        self.predicted = None
        if mixture.wants_predicted:
            self.predicted = torch.empty(shape, dtype=torch.long, device=like.device)
        self.grads: list[Tensor | None] = [None, None, None]
        if sink is not None:
            self.grad_rows = torch.zeros_like(mixture.text.rows)  # neighbours' parts overlap
            self.grad_thought = torch.empty_like(
                mixture.thought, memory_format=torch.contiguous_format
            )
            self.grad_weight = torch.empty_like(self.mixed)
            self.grads = [self.grad_rows, self.grad_thought, self.grad_weight]

    def chunk(self, texts: slice, places: slice) -> None:
        """Results and gradients of some positions of some texts."""
        where = (..., texts, places)
        text = self.mixture.text.part(texts, places)
        text_states, base = self._logits(text.rows)
        thought_states, own = self._logits(self.mixture.thought[..., texts, places, :])
        share = at_least_float32(self.mixture.mixing_weight[where]).unsqueeze(-1)
        grid = own.view(*share.shape[:-1], -1)  # (A, K, B', P', V)
        base = text.spread(base.view(*text.rows.shape[:2], -1)).unsqueeze(1)  # a view
        grad = self._mixed(where, grid, base, share)
        if grad is not None:
            self._to_text(text, text_states, grad, share, texts, places)
            grad = grad.mul_(share)
        alone = self._alone(where, own)
        if grad is not None:
            grad = grad if alone is None else grad.add_(alone.view(grid.shape))
            states = self._to_states(grad.flatten(0, 3), thought_states)
            self.grad_thought[..., texts, places, :] = states.view(*grid.shape[:-1], -1)

    def _mixed(self, where: Where, own: Tensor, base: Tensor, share: Tensor) -> Tensor | None:
        """Mixed NLL; gradient with respect to the mixed logits, and that of the mixing weight."""
        mixture = self.mixture
        logits = torch.lerp(base, own, share).flatten(0, 3)
        result, grad = softmax_rows(
            logits,
            self._each(mixture.targets, where),
            self._coefficients(mixture.mixed_coefficient, where),
            wants_predicted=mixture.wants_predicted,
        )
        self.mixed[where] = result.nll.view(own.shape[:-1])
        if self.predicted is not None and result.predicted is not None:
            self.predicted[where] = result.predicted.view(own.shape[:-1])
        if grad is None:
            return None
        grad = grad.view(own.shape)
        by_weight = torch.linalg.vecdot(grad, own)
        self.grad_weight[where] = by_weight.sub_(torch.linalg.vecdot(grad, base))
        return grad

    def _alone(self, where: Where, own: Tensor) -> Tensor | None:
        """NLL of the thought's own prediction, and its gradient in place of the logits."""
        if self.thought is None:
            return None
        coefficients = self._coefficients(self.mixture.thought_coefficient, where)
        targets = self._each(self.mixture.targets, where)
        result, grad = softmax_rows(own, targets, coefficients)
        part = self.thought[where]
        part.copy_(result.nll.view(part.shape))
        return grad

    def _coefficients(self, x: Tensor | None, where: Where) -> Tensor | None:
        """Of every row of a chunk, where gradients are collected."""
        return None if x is None or self.sink is None else self._each(x, where)

    def _each(self, x: Tensor, where: Where) -> Tensor:
        """(A, B, P) for every thought of a chunk, flat."""
        shape = self.mixture.mixing_weight[where].shape
        return x[where].unsqueeze(1).expand(shape).flatten()

    def _logits(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States as they enter the product, (rows, D), and logits in float32 at least."""
        states = states.reshape(-1, states.shape[-1]).to(self.dtype)
        states = states if self.factor == 1.0 else states * self.factor
        weight = self.weight.t()
        logits = states @ weight if self.bias is None else torch.addmm(self.bias, states, weight)
        return states, at_least_float32(logits)

    def _to_text(self, text, states, grad, share, texts, places) -> None:
        """The part that flows to the text's own states."""
        total = grad[:, 0] * (1 - share[:, 0])  # (A, B', P', V)
        for n in range(1, grad.shape[1]):
            total.addcmul_(grad[:, n], 1 - share[:, n])
        rows = self._to_states(text.collect(total).flatten(0, 1), states)
        target = self.mixture.text.part(texts, places)  # a view where positions are neighbours
        rows = rows.view(target.rows.shape)
        if self.mixture.text.neighbours:
            stop = places.stop + self.mixture.text.lookahead - 1
            self.grad_rows[texts, places.start : stop] += rows
        else:
            lookahead = self.mixture.text.lookahead
            by_step = self.grad_rows.unflatten(1, (lookahead, -1))
            by_step[texts, :, places] = rows.unflatten(1, (lookahead, -1))

    def _to_states(self, grad_logits: Tensor, states: Tensor) -> Tensor:
        """Gradient of the states, (rows, D); that of the head goes to the sink."""
        assert self.sink is not None, "only called with one"
        grad = self.sink.add(grad_logits, states, self.factor) @ self.weight
        return grad if self.factor == 1.0 else grad * self.factor

    def value(self) -> Tensor:
        mixture, total = self.mixture, self.mixed.new_zeros(())
        if mixture.mixed_coefficient is not None:
            total = total + (mixture.mixed_coefficient.unsqueeze(1) * self.mixed).sum()
        if mixture.thought_coefficient is not None and self.thought is not None:
            total = total + (mixture.thought_coefficient.unsqueeze(1) * self.thought).sum()
        return total

    def result(self) -> MixtureResult:
        return MixtureResult(self.mixed, self.thought, self.predicted)
