"""Which bytes are alive while a step runs: on fake tensors, which have shapes but no content."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTrace(TorchDispatchMode):
    """Context manager that counts what operators make and what is let go.

    Args:
        model: Its parameters are not counted; their gradients are, by their share.
        gradient_share: Part of every gradient that stays on this process.

    Attributes:
        peak: Most bytes alive at once, gradients included.
        peak_gradients: Bytes of gradients at that moment.
    """

    def __init__(self, model: nn.Module, gradient_share: float = 1.0) -> None:
        super().__init__()
        self.peak = self.peak_gradients = 0
        self._share = gradient_share
        self._live: dict[int, int] = {}
        self._others = self._gradients = 0
        for parameter in model.parameters():
            self._live[_key(parameter)] = 0
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._mark_gradient)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator; count what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:  # rows of a gradient, counted already, and their tokens
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._live[key] = size
        self._others += size
        weakref.finalize(storage, self._forget, key)
        self._note()

    def _forget(self, key: int) -> None:
        self._others -= self._live.pop(key, 0)

    def _mark_gradient(self, parameter: nn.Parameter) -> None:
        """A gradient that stays: no longer one of the other tensors."""
        assert parameter.grad is not None, "called after it was added up"
        key = _key(parameter.grad)
        size = self._live.get(key, 0)
        if size:
            self._live[key] = 0
            self._others -= size
            self._gradients += int(size * self._share)
            self._note()

    def _note(self) -> None:
        alive = self._others + self._gradients
        if alive > self.peak:
            self.peak, self.peak_gradients = alive, self._gradients


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors that share no memory."""
    return sum(x.numel() * x.element_size() for x in tensors)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that train."""
    return [p for p in model.parameters() if p.requires_grad]


def fake_tokens(batch: int, seq_len: int) -> Tensor:
    """A batch of texts; in a fake mode it takes no memory."""
    return torch.zeros((batch, seq_len), dtype=torch.long)
