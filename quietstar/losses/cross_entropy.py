"""Cross entropies over a large vocabulary, in chunks of rows, with the backward pass fused in.

The logits of a chunk live only while its loss and gradient are computed: memory does not grow
with (rows x vocabulary), and every product with the output weight is done once. The gradient can be
computed in the forward pass because the coefficient of every row is known by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quietstar.attention.kernels import at_least_float32
from quietstar.attention.layout import IGNORE_INDEX, on_host, worth_running
from quietstar.backbone.output_head import OutputHead

_CHUNK_ELEMENTS, _LEAST_ROWS = 2**23, 96
"""Logits held at once, per chunk: 32 MiB in float32, and more where that makes fewer rows: each
chunk reads the output weight twice and its gradient once."""


Surrogate = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""A function that stands for the NLL in the objective: from the NLL of some rows, and which these
are, to its values and its derivatives, both (rows,) and without gradient."""


class SoftTargets(NamedTuple):
    """Distributions in place of target tokens: their most likely tokens, all others as one bucket.

    Attributes:
        tokens: (rows, top), the most likely tokens of each.
        logprobs: (rows, top), their log-probabilities.
        rest: (rows,), log-probability of all other tokens together; -inf where there are none.
    """

    tokens: Tensor
    logprobs: Tensor
    rest: Tensor

    def part(self, index: Any) -> SoftTargets:
        """Take some rows."""
        return SoftTargets(*(x[index] for x in self))


@dataclass(frozen=True)
class Segment:
    """Rows of one kind in the objective.

    Attributes:
        states: (rows, D), final states.
        targets: (rows,), token ids or IGNORE_INDEX.
        coefficients: (rows,): the objective is the sum of coefficient * nll. None: only the
            results are wanted.
        surrogate: In place of ``coefficients``, where what a row counts depends on its NLL.
        entropy_coefficients: Like ``coefficients``, for the entropy of each row.
        temperature: Divides the logits.
        sampled_only: The distribution is over the rows of the vocabulary that may be sampled.
        wants_entropy, wants_predicted: Find the entropy, the most likely token of each row too.
        soft: The objective is of the divergence from these, in place of the NLL; ``targets`` only
            say which rows have a target, and what the NLL in the results is of.
        other_states, other_weight: With a soft-capped head logits are mixed, not states: the row's
            logits are (1 - other_weight) * f(states) + other_weight * f(other_states).
    """

    states: Tensor
    targets: Tensor
    coefficients: Tensor | None = None
    surrogate: Surrogate | None = None
    entropy_coefficients: Tensor | None = None
    temperature: float = 1.0
    sampled_only: bool = False
    wants_entropy: bool = False
    wants_predicted: bool = False
    soft: SoftTargets | None = None
    other_states: Tensor | None = None
    other_weight: Tensor | None = None


class RowResult(NamedTuple):
    """What the rows of one segment gave.

    Attributes:
        nll: (rows,), negative log-likelihood of the target, 0 where there is none.
        entropy: (rows,) of the distribution, or None where it was not asked for.
        predicted: (rows,), the most likely token, or None where it was not asked for.
        divergence: (rows,), forward KL divergence from the soft targets, or None without any.
    """

    nll: Tensor
    entropy: Tensor | None = None
    predicted: Tensor | None = None
    divergence: Tensor | None = None


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
    results: list[RowResult] = []
    if not head.is_linear:  # soft cap, adapters on the output layer
        value = at_least_float32(segments[0].states.new_zeros(()))
        for segment in segments:
            rows = recomputed_rows(segment, head)
            value = value + _value(segment, rows)
            nll, *others = (None if x is None else x.detach() for x in rows)
            assert nll is not None, "it is always computed"
            results.append(RowResult(nll, *others))
        return value, results

    def compute(sums, needs):
        value, grads = at_least_float32(head.weight.new_zeros(())), []
        for segment, needed in zip(segments, needs, strict=True):
            wanted = sums is not None and (needed or sums.wanted)
            result, grad = _fused_segment(segment, head, sums if wanted else None)
            value = value + _value(segment, result)
            results.append(result)
            grads.append(grad)
        return value, grads

    return fused(compute, head, accumulator, [s.states for s in segments]), results


def _value(segment: Segment, rows: RowResult) -> Tensor:
    """Sum of coefficient * nll + entropy coefficient * entropy over the rows."""
    if segment.surrogate is not None:
        with torch.no_grad():
            values, slopes = segment.surrogate(rows.nll.detach(), slice(None))
        # Its gradient is that of slope * nll.
        value = values.sum() + (slopes * (rows.nll - rows.nll.detach())).sum()
    elif segment.coefficients is not None:
        of = rows.nll if rows.divergence is None else rows.divergence
        value = (segment.coefficients * of).sum()
    else:
        return rows.nll.new_zeros(())
    if segment.entropy_coefficients is not None and rows.entropy is not None:
        value = value + (segment.entropy_coefficients * rows.entropy).sum()
    return value


def chunk_rows(vocab_size: int) -> int:
    """Rows whose logits are held at once."""
    return max(_LEAST_ROWS, _CHUNK_ELEMENTS // vocab_size)


def _chunks(rows: int, vocab_size: int) -> list[slice]:
    size = chunk_rows(vocab_size)
    return [slice(start, start + size) for start in range(0, rows, size)]


class WithGradients(torch.autograd.Function):
    """A value that was computed together with its gradients; backward hands them out once.

    ``compute`` takes which of the inputs need a gradient, and gives the value and all gradients.
    """

    @staticmethod
    def forward(ctx, compute, *inputs):  # noqa: D102
        value, ctx.grads = compute(ctx.needs_input_grad[1:])
        return value

    @staticmethod
    def backward(ctx, grad_value):  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.grads is None:
            raise RuntimeError(
                "backward through the loss a second time: its gradients were used up by the "
                "first. Call the model again."
            )
        grads, ctx.grads = ctx.grads, None
        if not (on_host(grad_value) and grad_value == 1):  # known without waiting
            grads = [None if g is None else g.mul_(grad_value.to(g.dtype)) for g in grads]
        return None, *grads  # autograd casts them to the dtypes of the inputs


def fused(
    compute: Callable[[HeadGradients | None, list[bool]], tuple[Tensor, list[Tensor | None]]],
    head: OutputHead,
    accumulator: HeadGradients | None,
    inputs: Sequence[Tensor],
) -> Tensor:
    """A value of linear logits, differentiable in the head (without accumulator) and ``inputs``.

    ``compute`` takes what collects the gradients of the head (None if no gradient is wanted) and
    which inputs need a gradient; it gives the value and the gradients of the inputs.
    """
    grad_enabled = torch.is_grad_enabled()
    params = (head.weight, head.bias) if accumulator is None else (None, None)

    def with_head(needs):
        wants_weight, wants_bias, *wanted = (grad_enabled and needed for needed in needs)
        sums = accumulator or HeadGradients(head, wants_weight, wants_bias)
        value, grads = compute(sums if grad_enabled else None, wanted)
        # Nothing waits while the layers run backward.
        of_head = sums.totals() if accumulator is None else (None, None)
        return value, [*of_head, *grads]

    return WithGradients.apply(with_head, *params, *inputs)  # pyright: ignore[reportReturnType]


class Products:
    """Products of a linear head (its logits divided by a temperature) with states like ``like``.

    They are in the dtype of autocast or of the states; ``sums`` collects the head's gradients.
    """

    def __init__(
        self, head: OutputHead, like: Tensor, sums: HeadGradients | None, temperature: float = 1.0
    ) -> None:
        device = like.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else like.dtype
        self.sums, self.factor = sums, head.scale / temperature
        self.weight = head.weight.to(dtype)
        self.bias = None if head.bias is None else (head.bias * self.factor).to(dtype)

    def logits(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States (rows, D) as they enter the product, and logits in float32 at least."""
        states, weight = states.to(self.weight.dtype), self.weight.t()
        states = states if self.factor == 1.0 else states * self.factor
        logits = states @ weight if self.bias is None else torch.addmm(self.bias, states, weight)
        return states, at_least_float32(logits)

    def backward(self, grad_logits: Tensor, states: Tensor) -> Tensor:
        """Gradient of the states, (rows, D); that of the head goes to the sums."""
        assert self.sums is not None, "only called with gradients"
        grad = self.sums.add(grad_logits, states, self.factor) @ self.weight
        return grad if self.factor == 1.0 else grad.mul_(self.factor)


def _fused_segment(
    segment: Segment, head: OutputHead, sums: HeadGradients | None
) -> tuple[RowResult, Tensor | None]:
    """Results and gradient of the states (None without ``sums``) of one segment."""
    head = head.sampled_only() if segment.sampled_only else head
    products = Products(head, segment.states, sums, segment.temperature)
    targets, dtype = segment.targets, at_least_float32(products.weight.new_empty(0)).dtype
    counts = segment.coefficients is not None or segment.surrogate is not None
    wants_grad = sums is not None and counts
    grad = torch.empty_like(segment.states) if wants_grad else None
    # Made beforehand: small tensors that stay, between chunks that go, would keep the memory of
    # these from being used again.
    result = RowResult(
        torch.empty_like(targets, dtype=dtype),
        torch.empty_like(targets, dtype=dtype) if segment.wants_entropy else None,
        torch.empty_like(targets) if segment.wants_predicted else None,
        None if segment.soft is None else torch.empty_like(targets, dtype=dtype),
    )
    for rows in worth_running(_chunks(len(targets), head.num_logits), targets):
        _fused_chunk(segment, rows, products, result, grad)
    return result, grad


def _fused_chunk(
    segment: Segment, rows: slice, products: Products, result: RowResult, grad: Tensor | None
) -> None:
    """Fill in some rows; a function of its own, so that its logits are gone before the next."""
    states, logits = products.logits(segment.states[rows])
    soft = None if segment.soft is None else segment.soft.part(rows)
    chunk = SoftmaxChunk(
        logits, segment.targets[rows], segment.wants_entropy, segment.wants_predicted, soft
    )
    parts = (chunk.nll, chunk.entropy, chunk.predicted, chunk.divergence)
    for whole, part in zip(result, parts, strict=True):
        if whole is not None and part is not None:
            whole[rows] = part
    if grad is None:
        return
    if segment.surrogate is not None:
        _, coefficients = segment.surrogate(chunk.nll, rows)
    else:
        assert segment.coefficients is not None, "a gradient is of something"
        coefficients = segment.coefficients[rows]
    bonus = segment.entropy_coefficients
    bonus = None if bonus is None else bonus[rows]
    grad[rows] = products.backward(chunk.gradient_(coefficients, bonus), states)


def recomputed_rows(segment: Segment, head: OutputHead) -> RowResult:
    """All results of every row of a segment; differentiable, but for the most likely token.

    The logits of a chunk are made again in the backward pass.
    """
    vocab_size = head.vocab_size if segment.sampled_only else None

    def by_the_book(rows: slice) -> tuple[Tensor, ...]:
        logits, targets = head.logits(segment.states[rows]), segment.targets[rows]
        if segment.other_states is not None and segment.other_weight is not None:
            weight = at_least_float32(segment.other_weight[rows]).unsqueeze(-1)
            logits = (1 - weight) * logits + weight * head.logits(segment.other_states[rows])
        logprobs = (logits[:, :vocab_size] / segment.temperature).log_softmax(-1)
        nll = -logprobs.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        valid = targets != IGNORE_INDEX
        results = (nll.where(valid, 0.0), entropy, logprobs.argmax(-1))
        if segment.soft is None:
            return results
        return *results, divergence_from(segment.soft.part(rows), logprobs).where(valid, 0.0)

    run = by_the_book
    if torch.is_grad_enabled():
        run = partial(checkpoint, by_the_book, use_reentrant=False, preserve_rng_state=False)
    pieces = [run(rows) for rows in _chunks(len(segment.states), head.num_logits)]
    return RowResult(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def divergence_from(soft: SoftTargets, logprobs: Tensor) -> Tensor:
    """Compute KL(soft || p) over the buckets of ``soft``, (rows,); logprobs are (rows, V)."""
    top, few = logprobs.gather(1, soft.tokens), soft.logprobs
    result = (few.exp() * (few - top)).sum(1)
    if soft.tokens.shape[1] == logprobs.shape[1]:
        return result
    rest = logprobs.scatter(1, soft.tokens, -torch.inf).logsumexp(1)
    return result + _rest_term(soft.rest, rest)


def _rest_term(rest: Tensor, by_model: Tensor) -> Tensor:
    """Compute the term of the bucket with all other tokens; 0 where it is empty."""
    is_empty = rest == -torch.inf
    rest, by_model = rest.where(~is_empty, 0.0), by_model.where(~is_empty, 0.0)
    return (rest.exp() * (rest - by_model)).where(~is_empty, 0.0)


class SoftmaxChunk:
    """One chunk of logits turned into probabilities in place; (rows, V) is held once.

    (Twice where the entropy is wanted: its gradient needs the log-probabilities too.)
    """

    def __init__(
        self, logits: Tensor, targets: Tensor, wants_entropy: bool = False,
        wants_predicted: bool = False, soft: SoftTargets | None = None,
    ) -> None:  # fmt: skip
        self.valid, self.soft = targets != IGNORE_INDEX, soft
        self.targets = targets.clamp(min=0).unsqueeze(1)
        target_logits = logits.gather(1, self.targets)
        # Before the chunk is turned into probabilities, the smallest of which are lost.
        top_logits = None if soft is None else logits.gather(1, soft.tokens)
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
        self.divergence, self.others = None, self.total.squeeze(1)
        if soft is not None and top_logits is not None:
            few, tiny = soft.logprobs.to(log_total.dtype), torch.finfo(self.weights.dtype).tiny
            result = (few.exp() * (few - (top_logits - peak - log_total))).sum(1)
            self.others = self.weights.scatter(1, soft.tokens, 0.0).sum(1).clamp(min=tiny)
            by_model = self.others.log() - log_total.squeeze(1)
            result += _rest_term(soft.rest.to(log_total.dtype), by_model)
            self.divergence = result.where(self.valid, 0.0)

    def gradient_(self, coefficients: Tensor, entropy_coefficients: Tensor | None = None) -> Tensor:
        """Gradient of the value with respect to the logits; uses up the chunk."""
        coefficients = coefficients.where(self.valid, 0.0).to(self.total.dtype).unsqueeze(1)
        probs = self.weights
        if self.soft is not None:
            # d KL / d z = p - q, where q spreads the rest as p does.
            soft, dtype = self.soft, probs.dtype
            few = probs.gather(1, soft.tokens) / self.total - soft.logprobs.exp().to(dtype)
            share = soft.rest.exp().to(dtype) / self.others  # finite: others are clamped
            probs = probs.mul_((1 / self.total - share.unsqueeze(1)) * coefficients)
            return probs.scatter_(1, soft.tokens, few * coefficients)
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
    """Sums of a linear head's gradients, in float32 or wider: of its weight, of a bias it has."""

    def __init__(self, head: OutputHead, wants_weight: bool, wants_bias: bool) -> None:
        wide = at_least_float32(head.weight.new_empty(0)).dtype
        self._weight = torch.zeros_like(head.weight, dtype=wide) if wants_weight else None
        self._bias = None
        if wants_bias and head.bias is not None:
            self._bias = torch.zeros_like(head.bias, dtype=wide)
        self.wanted = self._weight is not None or self._bias is not None
        self._waiting = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def add(self, grad_logits: Tensor, states: Tensor, factor: float) -> Tensor:
        """Add one chunk: (rows, V') and (rows, D), V' the first rows of the vocabulary.

        The states were multiplied by ``factor`` already; the bias is here. Returns the gradient of
        the logits in the dtype of the states, to be used before the next chunk.
        """
        rows, size = grad_logits.shape
        weight = self._weight
        if self._bias is not None:
            self._bias[:size] += factor * grad_logits.sum(0, dtype=self._bias.dtype)
        if weight is None:
            return grad_logits.to(states.dtype)
        if states.dtype == weight.dtype:
            grad_logits = grad_logits.to(states.dtype)
            weight[:size].addmm_(grad_logits.t(), states)
            return grad_logits
        # Half precision waits until there are rows enough for a product worth its sum.
        if self._waiting + rows > _ROWS:
            self._multiply()
        if rows >= _ROWS:
            grad_logits = grad_logits.to(states.dtype)
            self._add_product(grad_logits, states)
            return grad_logits
        if self._buffers is None:
            vocab_size, width = weight.shape
            self._buffers = (states.new_empty(_ROWS, vocab_size), states.new_empty(_ROWS, width))
        kept, kept_states = (buffer[self._waiting :][:rows] for buffer in self._buffers)
        kept[:, :size].copy_(grad_logits)
        kept[:, size:].zero_()
        kept_states.copy_(states)
        self._waiting += rows
        return kept[:, :size]

    def _multiply(self) -> None:
        if self._waiting and self._buffers is not None:
            self._add_product(*(buffer[: self._waiting] for buffer in self._buffers))
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
