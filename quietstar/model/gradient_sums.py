"""Sums of gradients over groups of blocks that learn one after the other.

In float32 or wider, so that many groups lose nothing in half precisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quietstar.attention.precision import at_least_float32
from quietstar.backbone.output_head import OutputHead
from quietstar.losses.head_gradients import HeadGradients
from quietstar.model.parts import ThinkingParts


class Source:
    """A tensor that groups read parts of; what flows back to them is summed here."""

    def __init__(self, x: Tensor, wanted: bool) -> None:
        self.x = x
        wide = at_least_float32(x.new_zeros(())).dtype
        wanted = wanted and x.requires_grad
        self.grad = torch.zeros_like(x, dtype=wide) if wanted else None

    def part(self, where: Any = ...) -> Tensor:
        """A leaf with the content of a part."""
        return self.x.detach()[where].requires_grad_(self.grad is not None)

    def add(self, where: Any, grad: Tensor | None) -> None:
        """What flows back to a part."""
        if self.grad is not None and grad is not None:
            self.grad[where] += grad

    def total(self) -> Tensor | None:
        """In the tensor's own type."""
        return None if self.grad is None else self.grad.to(self.x.dtype)


class Weights:
    """What trains, but for the learned vectors, which are read outside of the groups."""

    def __init__(self, model: ThinkingParts, head: OutputHead, wanted: bool) -> None:
        vectors = (model.start_embedding, model.end_embedding)
        outside = {id(vector) for vector in vectors}
        self.parameters = [
            p for p in model.parameters() if p.requires_grad and id(p) not in outside
        ]
        self.sink = None
        if head.is_linear and wanted:
            bias = head.bias is not None and head.bias.requires_grad
            self.sink = HeadGradients(head, head.weight.requires_grad, bias)
        in_sink = {id(head.weight), id(head.bias)} if self.sink is not None else set()
        # The gradients of a linear head are collected by the losses, not by autograd.
        self.in_graph = [p for p in self.parameters if id(p) not in in_sink]
        self._grads: dict[int, Tensor] = {}

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Of ``in_graph``, of one group."""
        for parameter, grad in zip(self.in_graph, grads, strict=True):
            if grad is None:
                continue
            total = self._grads.get(id(parameter))
            if total is None:
                # Its own: autograd may hand out one tensor twice.
                self._grads[id(parameter)] = at_least_float32(grad).clone()
            else:
                total.add_(grad)

    def totals(self, head: OutputHead) -> list[Tensor | None]:
        """Of ``parameters``, in their own types."""
        totals = dict(self._grads)
        if self.sink is not None:
            pairs = zip((head.weight, head.bias), self.sink.totals(), strict=True)
            totals |= {id(p): grad for p, grad in pairs if p is not None and grad is not None}
        grads = [totals.get(id(p)) for p in self.parameters]
        return [
            None if g is None else g.to(p.dtype)
            for p, g in zip(self.parameters, grads, strict=True)
        ]
