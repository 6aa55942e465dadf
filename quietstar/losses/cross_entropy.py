"""Cross entropies over a large vocabulary, in chunks of rows, with the backward pass fused in.

The logits of a chunk live only while its loss and gradient are computed: memory does not grow
with (rows x vocabulary), and every product with the output weight is done once. The gradient can be
computed in the forward pass because the coefficient of every row is known by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quietstar.attention.kernels import at_least_float32
from quietstar.attention.layout import IGNORE_INDEX
from quietstar.backbone.output_head import OutputHead

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
    segments: Sequence[Segment], head: OutputHead, accumulator: HeadGradients | None = None
) -> tuple[Tensor, list[RowResult]]:
    """Sum over all segments of coefficient * nll (+ entropy coefficient * entropy).

    Args:
        segments: Rows and what they count.
        head: From states to logits.
        accumulator: Collects the gradients of a linear head; by default they are those of its
            parameters.

    Returns:
        The scalar objective (differentiable in states and head) and each segment's results.
    """
    if head.is_linear:
        results: list[RowResult] = []
        states = [s.states for s in segments]
        params = (head.weight, head.bias) if accumulator is None else (None, None)
        args = (segments, head, accumulator, torch.is_grad_enabled(), results)
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
    def forward(ctx, segments, head, accumulator, grad_enabled, results, weight, bias, *states):
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[5:]]
        wants_weight, wants_bias, *wants_states = needs
        gradients = accumulator or HeadGradients(head, wants_weight, wants_bias)
        ctx.own = gradients if accumulator is None else None
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
    segment: Segment, head: OutputHead, accumulator: HeadGradients | None
) -> tuple[Tensor, Tensor | None, RowResult]:
    """Value, gradient of the states (None without a accumulator), and results of one segment."""
    head = head.sampled_only() if segment.sampled_only else head
    factor = head.scale / segment.temperature
    dtype = compute_dtype(segment.states)
    weight = head.weight.to(dtype)
    bias = None if head.bias is None else (head.bias * factor).to(dtype)
    coefficients = segment.coefficients
    grad = None
    if accumulator is not None and coefficients is not None:
        grad = torch.empty_like(segment.states)
    # Made beforehand: small tensors that stay, between chunks that go, would keep the memory of
    # these from being used again.
    result = RowResult.empty(
        segment.targets, at_least_float32(weight.new_empty(0)).dtype, segment.wants_entropy,
        segment.wants_predicted,
    )  # fmt: skip
    for rows in _chunks(segment.states.shape[0], weight.shape[0]):
        result.put(rows, _fused_chunk(segment, rows, (weight, bias, factor), accumulator, grad))
    return _value(segment, coefficients, result), grad, result


def _fused_chunk(
    segment: Segment,
    rows: slice,
    head: tuple[Tensor, Tensor | None, float],
    accumulator: HeadGradients | None,
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
    if accumulator is not None and grad is not None and grad_logits is not None:
        grad_logits = accumulator.add(grad_logits, states, factor)
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
        nll, entropy, predicted = recomputed_rows(segment, head)
        value = value + _value(segment, segment.coefficients, RowResult(nll, entropy))
        results.append(RowResult(nll.detach(), entropy.detach(), predicted))
    return value, results


def recomputed_rows(segment: Segment, head: OutputHead) -> tuple[Tensor, Tensor, Tensor]:
    """NLL and entropy (both differentiable) and most likely token of every row of a segment.

    The logits of a chunk are made again in the backward pass.
    """
    pieces = []
    for rows in _chunks(segment.states.shape[0], head.num_logits):
        args = (
            segment.states[rows],
            segment.targets[rows],
            _part(segment.other_states, rows),
            _part(segment.other_weight, rows),
            segment.temperature,
            head,
            head.vocab_size if segment.sampled_only else None,
        )
        if torch.is_grad_enabled():
            piece = checkpoint(_plain_rows, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            piece = _plain_rows(*args)
        pieces.append(piece)
    nll, entropy, predicted = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return nll, entropy, predicted


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


# --- Softmax of a chunk ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RowResult:
    """What the rows of one segment gave, without gradient.

    Attributes:
        nll: (rows,), negative log-likelihood of the target, 0 where there is none.
        entropy: (rows,) of the distribution, or None where it was not asked for.
        predicted: (rows,), the most likely token, or None where it was not asked for.
    """

    nll: Tensor
    entropy: Tensor | None = None
    predicted: Tensor | None = None

    @staticmethod
    def empty(
        targets: Tensor, dtype: torch.dtype, wants_entropy: bool, wants_predicted: bool
    ) -> RowResult:
        """Room for the results of as many rows as there are targets."""
        return RowResult(
            torch.empty_like(targets, dtype=dtype),
            torch.empty_like(targets, dtype=dtype) if wants_entropy else None,
            torch.empty_like(targets) if wants_predicted else None,
        )

    def put(self, rows: slice, found: RowResult) -> None:
        """Fill in some rows."""
        for field in fields(self):
            whole, part = getattr(self, field.name), getattr(found, field.name)
            if whole is not None:
                whole[rows] = part.detach()


def softmax_rows(
    logits: Tensor,
    targets: Tensor,
    coefficients: Tensor | None = None,
    entropy_coefficients: Tensor | None = None,
    wants_entropy: bool = False,
    wants_predicted: bool = False,
) -> tuple[RowResult, Tensor | None]:
    """Results of all rows, and the gradient of sum(coefficient * nll); uses up the logits.

    Args:
        logits: Logits, (rows, V).
        targets: (rows,), token ids or IGNORE_INDEX.
        coefficients: (rows,); without them there is no gradient.
        entropy_coefficients: (rows,): adds sum(coefficient * entropy).
        wants_entropy: Compute the entropy of each row.
        wants_predicted: Find the most likely token of each row.
    """
    chunk = SoftmaxChunk(logits, targets, wants_entropy, wants_predicted)
    result = RowResult(chunk.nll, chunk.entropy, chunk.predicted)
    if coefficients is None:
        return result, None
    return result, chunk.gradient_(coefficients, entropy_coefficients)


class SoftmaxChunk:
    """One chunk of logits turned into probabilities in place; (rows, V) is held once.

    (Twice where the entropy is wanted: its gradient needs the log-probabilities too.)
    """

    def __init__(
        self,
        logits: Tensor,
        targets: Tensor,
        wants_entropy: bool = False,
        wants_predicted: bool = False,
    ) -> None:
        logits = at_least_float32(logits)
        self.valid = targets != IGNORE_INDEX
        self.targets = targets.clamp(min=0).unsqueeze(1)
        target_logits = logits.gather(1, self.targets)
        self.predicted = logits.argmax(-1) if wants_predicted else None
        peak = logits.amax(-1, keepdim=True)
        shifted = logits.sub_(peak)
        self.log_weights = shifted if wants_entropy else None
        self.weights = shifted.exp() if wants_entropy else shifted.exp_()
        self.total = self.weights.sum(-1, keepdim=True)
        log_total = self.total.log()
        self.nll = (log_total + peak - target_logits).squeeze(1).where(self.valid, 0.0)
        self.entropy = None
        if self.log_weights is not None:
            self.log_total = log_total
            expected = torch.linalg.vecdot(self.weights, self.log_weights).unsqueeze(1)
            self.entropy = (log_total - expected / self.total).squeeze(1)

    def gradient_(self, coefficients: Tensor, entropy_coefficients: Tensor | None = None) -> Tensor:
        """Gradient of the value with respect to the logits; uses up the chunk."""
        coefficients = coefficients.where(self.valid, 0.0).to(self.total.dtype).unsqueeze(1)
        probs = self.weights
        if entropy_coefficients is None or self.log_weights is None or self.entropy is None:
            probs = probs.mul_(coefficients / self.total)
        else:  # dH/dz = -p (log p + H)
            surprise = self.log_weights.sub_(self.log_total - self.entropy.unsqueeze(1))
            surprise.mul_(-entropy_coefficients.to(surprise.dtype).unsqueeze(1)).add_(coefficients)
            probs = probs.div_(self.total).mul_(surprise)
        return probs.scatter_add_(1, self.targets, -coefficients)


# --- Gradients of the output layer ----------------------------------------------------------------

_ROWS = 512
"""Rows of half precision that make one product: what it adds to the sum is read and written once
for all of them."""
_VOCABULARY_BLOCK = 8192
"""Rows of the weight that such a product fills at once."""


class HeadGradients:
    """Sums of the output layer's gradients, in float32 or wider.

    Args:
        head: A linear one.
        wants_weight: Whether to collect the gradient of its weight.
        wants_bias: Whether to collect that of its bias, if it has one.
    """

    def __init__(self, head: OutputHead, wants_weight: bool, wants_bias: bool) -> None:
        weight, bias = head.weight, head.bias
        self.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        wide = at_least_float32(weight.new_zeros(())).dtype
        wants_bias = wants_bias and bias is not None
        self._weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        self._bias = weight.new_zeros(weight.shape[0], dtype=wide) if wants_bias else None
        self._waiting = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    @property
    def wanted(self) -> bool:
        """Whether anything is collected."""
        return self._weight is not None or self._bias is not None

    def add(self, grad_logits: Tensor, states: Tensor, factor: float) -> Tensor:
        """Add one chunk: (rows, V') and (rows, D), V' the first rows of the vocabulary.

        The states were multiplied by ``factor`` already; the bias is here.

        Returns:
            The gradient of the logits in the dtype of the states; to be used before the next chunk.
        """
        if self._bias is not None:
            size = grad_logits.shape[1]
            self._bias[:size] += factor * grad_logits.sum(0, dtype=self._bias.dtype)
        if self._weight is None:
            return grad_logits.to(states.dtype)
        if states.dtype != self._weight.dtype:
            return self._wait(grad_logits, states)
        grad_logits = grad_logits.to(states.dtype)
        self._weight[: grad_logits.shape[1]].addmm_(grad_logits.t(), states)
        return grad_logits

    def _wait(self, grad_logits: Tensor, states: Tensor) -> Tensor:
        """Keep half precisions until there are rows enough for a product worth its sum."""
        rows, size = grad_logits.shape
        if self._waiting + rows > _ROWS:
            self._multiply()
        if rows >= _ROWS:
            grad_logits = grad_logits.to(states.dtype)
            self._add_product(grad_logits, states)
            return grad_logits
        assert self._weight is not None, "only called with one"
        if self._buffers is None:
            vocab_size, width = self._weight.shape
            self._buffers = (states.new_empty(_ROWS, vocab_size), states.new_empty(_ROWS, width))
        place = slice(self._waiting, self._waiting + rows)
        kept, kept_states = (buffer[place] for buffer in self._buffers)
        kept[:, :size].copy_(grad_logits)
        kept[:, size:].zero_()
        kept_states.copy_(states)
        self._waiting += rows
        return kept[:, :size]

    def _multiply(self) -> None:
        if self._waiting:
            assert self._buffers is not None, "rows wait in them"
            grad_logits, states = (buffer[: self._waiting] for buffer in self._buffers)
            self._add_product(grad_logits, states)
        self._waiting = 0

    def _add_product(self, grad_logits: Tensor, states: Tensor) -> None:
        """In blocks: the product in half precision is never there as a whole."""
        assert self._weight is not None, "only called with one"
        for block, part in zip(
            self._weight.split(_VOCABULARY_BLOCK), grad_logits.t().split(_VOCABULARY_BLOCK),
            strict=False,
        ):  # fmt: skip
            block[: len(part)].add_(part @ states)

    def totals(self) -> tuple[Tensor | None, Tensor | None]:
        """Of weight and bias, in float32 or wider, None where not wanted."""
        self._multiply()
        self._buffers = None
        return self._weight, self._bias

    def scaled(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradients times ``factor``, in the dtypes of the parameters."""
        pairs = zip(self.totals(), self.dtypes, strict=True)
        weight, bias = (None if g is None else g.mul_(factor).to(dtype) for g, dtype in pairs)
        return weight, bias
