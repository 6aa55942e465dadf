"""Cross entropies over a large vocabulary, in chunks of rows, with the backward pass fused in.

The logits of a chunk live only while its loss and gradient are computed: memory does not grow
with (rows x vocabulary), and every product with the output weight is done once. The gradient can be
computed in the forward pass because the coefficient of every row is known by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quietstar.attention.layout import IGNORE_INDEX
from quietstar.attention.precision import at_least_float32
from quietstar.backbone.output_head import OutputHead
from quietstar.losses.head_gradients import HeadGradients
from quietstar.losses.softmax import RowResult, softmax_rows

_CHUNK_ELEMENTS, _LEAST_ROWS = 2**23, 96
"""Logits held at once, per chunk: 32 MiB in float32, and more where that makes fewer rows: each
chunk reads the output weight twice and its gradient once."""


@dataclass(frozen=True)
class Segment:
    """Rows of one kind in the objective.

    Attributes:
        states: (rows, D), final states.
        targets: (rows,), token ids or IGNORE_INDEX.
        coefficients: (rows,): the objective is the sum of coefficient * nll. None: only the
            results are wanted.
        entropy_coefficients: Like ``coefficients``, for the entropy of each row.
        temperature: Divides the logits.
        sampled_only: The distribution is over the rows of the vocabulary that may be sampled.
        wants_entropy: Compute the entropy of each row.
        wants_predicted: Find the most likely token of each row.
        other_states, other_weight: With a soft-capped head logits are mixed, not states: the row's
            logits are (1 - other_weight) * f(states) + other_weight * f(other_states).
    """

    states: Tensor
    targets: Tensor
    coefficients: Tensor | None = None
    entropy_coefficients: Tensor | None = None
    temperature: float = 1.0
    sampled_only: bool = False
    wants_entropy: bool = False
    wants_predicted: bool = False
    other_states: Tensor | None = None
    other_weight: Tensor | None = None


def objective(
    segments: Sequence[Segment], head: OutputHead, sink: HeadGradients | None = None
) -> tuple[Tensor, list[RowResult]]:
    """Sum over all segments of coefficient * nll (+ entropy coefficient * entropy).

    Args:
        segments: Rows and what they count.
        head: From states to logits.
        sink: Collects the gradients of a linear head; by default they are those of its parameters.

    Returns:
        The scalar objective (differentiable in states and head) and each segment's results.
    """
    if head.is_linear:
        results: list[RowResult] = []
        states = [s.states for s in segments]
        params = (head.weight, head.bias) if sink is None else (None, None)
        args = (segments, head, sink, torch.is_grad_enabled(), results)
        return _FusedObjective.apply(*args, *params, *states), results
    return _recomputed_objective(segments, head)


def chunk_rows(vocab_size: int) -> int:
    """Rows whose logits are held at once."""
    return max(_LEAST_ROWS, _CHUNK_ELEMENTS // vocab_size)


def _chunks(rows: int, vocab_size: int) -> list[slice]:
    size = chunk_rows(vocab_size)
    return [slice(start, start + size) for start in range(0, rows, size)]


# --- Linear heads: fused --------------------------------------------------------------------------


class _FusedObjective(torch.autograd.Function):
    """Gradients of all segments in the forward pass; one buffer for the weight's."""

    @staticmethod
    def forward(ctx, segments, head, sink, grad_enabled, results, weight, bias, *states):
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[5:]]
        wants_weight, wants_bias, *wants_states = needs
        gradients = sink or HeadGradients(head, wants_weight, wants_bias)
        ctx.own = gradients if sink is None else None
        value = at_least_float32(head.weight.new_zeros(()))
        ctx.grads = []
        for segment, wanted in zip(segments, wants_states, strict=True):
            wanted = grad_enabled and (wanted or gradients.wanted)
            part, grad, result = _fused_segment(segment, head, gradients if wanted else None)
            value = value + part
            results.append(result)
            ctx.grads.append(grad)
        if ctx.own is not None:
            ctx.own.totals()  # nothing waits while the layers run backward
        return value

    @staticmethod
    def backward(ctx, grad_value):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.grads is None:
            raise RuntimeError(
                "backward through the objective a second time: its gradients were used up by the "
                "first. Call the model again."
            )
        weight, bias = (None, None) if ctx.own is None else ctx.own.scaled(grad_value)
        states = [None if g is None else g.mul_(grad_value.to(g.dtype)) for g in ctx.grads]
        ctx.grads = ctx.own = None
        return None, None, None, None, None, weight, bias, *states


def _fused_segment(
    segment: Segment, head: OutputHead, sink: HeadGradients | None
) -> tuple[Tensor, Tensor | None, RowResult]:
    """Value, gradient of the states (None without a sink), and results of one segment."""
    head = head.sampled_only() if segment.sampled_only else head
    factor = head.scale / segment.temperature
    dtype = compute_dtype(segment.states)
    weight = head.weight.to(dtype)
    bias = None if head.bias is None else (head.bias * factor).to(dtype)
    coefficients = segment.coefficients
    grad = None
    if sink is not None and coefficients is not None:
        grad = torch.empty_like(segment.states)
    # Made beforehand: small tensors that stay, between chunks that go, would keep the memory of
    # these from being used again.
    result = RowResult.empty(
        segment.targets, at_least_float32(weight.new_empty(0)).dtype, segment.wants_entropy,
        segment.wants_predicted,
    )  # fmt: skip
    for rows in _chunks(segment.states.shape[0], weight.shape[0]):
        result.put(rows, _fused_chunk(segment, rows, (weight, bias, factor), sink, grad))
    return _value(segment, coefficients, result), grad, result


def _fused_chunk(
    segment: Segment,
    rows: slice,
    head: tuple[Tensor, Tensor | None, float],
    sink: HeadGradients | None,
    grad: Tensor | None,
) -> RowResult:
    """Results of some rows; with ``grad`` the gradient of their states goes there."""
    weight, bias, factor = head
    states = segment.states[rows].to(weight.dtype)
    states = states if factor == 1.0 else states * factor
    logits = states @ weight.t() if bias is None else torch.addmm(bias, states, weight.t())
    found, grad_logits = softmax_rows(
        logits,
        segment.targets[rows],
        None if grad is None else _part(segment.coefficients, rows),
        _part(segment.entropy_coefficients, rows),
        segment.wants_entropy,
        segment.wants_predicted,
    )
    if sink is not None and grad is not None and grad_logits is not None:
        grad_logits = sink.add(grad_logits, states, factor)
        torch.mul(grad_logits @ weight, factor, out=grad[rows])
    return found


def _part(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def compute_dtype(states: Tensor) -> torch.dtype:
    """Of products with the output weight."""
    device = states.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return states.dtype


def _concatenate(pieces: Sequence[RowResult]) -> RowResult:
    nll = torch.cat([p.nll.detach() for p in pieces])
    entropies = [p.entropy.detach() for p in pieces if p.entropy is not None]
    predicted = [p.predicted for p in pieces if p.predicted is not None]
    return RowResult(
        nll,
        torch.cat(entropies) if entropies else None,
        torch.cat(predicted) if predicted else None,
    )


def _value(segment: Segment, coefficients: Tensor | None, result: RowResult) -> Tensor:
    """Sum of coefficient * nll + entropy coefficient * entropy over the rows."""
    if coefficients is None:
        return result.nll.new_zeros(())
    value = (coefficients * result.nll).sum()
    if segment.entropy_coefficients is not None and result.entropy is not None:
        value = value + (segment.entropy_coefficients * result.entropy).sum()
    return value


# --- Other heads (soft cap, adapters on the output layer): recomputed -----------------------------


def _recomputed_objective(
    segments: Sequence[Segment], head: OutputHead
) -> tuple[Tensor, list[RowResult]]:
    results: list[RowResult] = []
    value = at_least_float32(segments[0].states.new_zeros(()))
    for segment in segments:
        pieces = [
            RowResult(*_recomputed_rows(segment, rows, head))
            for rows in _chunks(segment.states.shape[0], head.num_logits)
        ]
        live = RowResult(
            torch.cat([p.nll for p in pieces]),
            torch.cat([p.entropy for p in pieces if p.entropy is not None]),
        )
        value = value + _value(segment, segment.coefficients, live)
        results.append(_concatenate(pieces))
    return value, results


def _recomputed_rows(
    segment: Segment, rows: slice, head: OutputHead
) -> tuple[Tensor, Tensor, Tensor]:
    other_states, other_weight = segment.other_states, segment.other_weight
    args = (
        segment.states[rows],
        segment.targets[rows],
        None if other_states is None else other_states[rows],
        None if other_weight is None else other_weight[rows],
        segment.temperature,
        head,
        head.vocab_size if segment.sampled_only else None,
    )
    if not torch.is_grad_enabled():
        return _plain_rows(*args)
    return checkpoint(_plain_rows, *args, use_reentrant=False, preserve_rng_state=False)


def _plain_rows(states, targets, other_states, other_weight, temperature, head, vocab_size):
    """Negative log-likelihood, entropy and most likely token of some rows, by the book."""
    logits = head.logits(states)
    if other_states is not None:
        weight = at_least_float32(other_weight).unsqueeze(-1)
        logits = (1 - weight) * logits + weight * head.logits(other_states)
    logprobs = (logits[:, :vocab_size] / temperature).log_softmax(-1)
    valid = targets != IGNORE_INDEX
    nll = -logprobs.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return nll.where(valid, 0.0), entropy, logprobs.argmax(-1)
