"""Sums of the output layer's gradients over chunks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar.attention.precision import at_least_float32
from quietstar.backbone.output_head import OutputHead

_ROWS = 512
"""Rows of half precision that make one product: what it adds to the sum is read and written once
for all of them."""
_VOCABULARY_BLOCK = 8192
"""Rows of the weight that such a product fills at once."""


class HeadGradients:
    """Sums of the output layer's gradients, in float32 or wider.

    Args:
        head: A linear one.
        wants_weight: Whether that of its weight is wanted.
        wants_bias: And of its bias, if it has one.
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
