"""A moving average of the weights that train, and its use in place of the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from quietstar.distributed import Strategy
from quietstar.system.signals import held

EMA_NAME, START_NAME = "ema", "start"
"""What the names of files in a checkpoint begin with: of an average, of weights that stay."""
PIECE = 2**24
"""Elements of a weight that change places with their averages at once: 64 MiB of float32."""


class WeightAverage:
    """Averages the weights over optimizer steps: average = decay * average + (1 - decay) * weight.

    It begins as a copy of the weights, in float32 or better, and holds of each what this process
    does: all of it in one process, DDP, ZeRO-1 and ZeRO-2, a shard under ZeRO-3 and FSDP2. Nothing
    is exchanged between processes.

    Attributes:
        name: What the names of its files in a checkpoint begin with.
        decay: Share of the average that a step keeps, in [0, 1]; with 1 it stays what it was.
        values: Averages by the names of the weights in `QuietStarForCausalLM`.
    """

    def __init__(
        self, strategy: Strategy, model: nn.Module, decay: float, name: str = EMA_NAME
    ) -> None:
        assert 0 <= decay <= 1, decay
        self.name = name
        self.decay, self._strategy, self._is_applied = decay, strategy, False
        self.values: dict[str, Tensor] = {}
        with torch.no_grad(), strategy.writable_weights(model) as weights:
            for name, weight in weights.items():
                dtype = torch.promote_types(weight.dtype, torch.float32)
                self.values[name] = torch.empty_like(weight, dtype=dtype)
        for name, weight in strategy.trained_weights(model):
            self.values[name].copy_(weight)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the weights; to be called once after every optimizer step."""
        assert not self._is_applied, "the model holds the average itself"
        if self.decay == 1:
            return
        for name, weight in self._strategy.trained_weights(model):
            average = self.values[name]
            average.mul_(self.decay).add_(weight.to(average.device), alpha=1 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model computes with the average; after it, the weights are exact again.

        For passes without gradient of the wrapped module, and not between a forward pass and its
        backward pass. Weight and average change places, which takes no memory but for a piece, and
        all processes must do it together.
        """
        assert not self._is_applied, "the model holds the average already"
        try:
            with held():
                self._exchange(model)
            yield
        finally:
            if self._is_applied:
                with held():
                    self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        swap = _take_back if self._is_applied else _put
        with self._strategy.writable_weights(model) as weights:
            for name, weight in weights.items():
                for pair in zip(_pieces(weight), _pieces(self.values[name]), strict=True):
                    swap(*pair)
        torch.clear_autocast_cache()  # it knows weights by their places
        self._is_applied = not self._is_applied

    def save(self, folder: Path, model: nn.Module) -> None:
        """Adds the average to a checkpoint."""
        assert not self._is_applied, "the values are those of the weights"
        self._strategy.save_average(folder, model, self.values, self.name)

    def load(self, folder: Path, model: nn.Module) -> bool:
        """Reads what `save` wrote; returns False if the checkpoint holds no average.

        Raises:
            ValueError: It does not fit the weights, or is not finite.
        """
        if not any(folder.glob(f"{self.name}*")):
            return False
        self._strategy.load_average(folder, model, self.values, self.name)
        return True


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    rows = torch.atleast_1d(tensor)
    return rows.split(max(1, PIECE // max(1, rows[:1].numel())))


def _put(weight: Tensor, average: Tensor) -> None:
    """Writes the average into the weight's place, and keeps both in the places of both."""
    if weight.dtype == average.dtype:
        kept = weight.clone()
        weight.copy_(average)
        average.copy_(kept)
        return
    # A float32 is a bfloat16 with 16 more bits. Rounded by half up, the average's upper half is a
    # function of what lies in the weight's place and of its lower half, so the place of the upper
    # half is free for the weight.
    assert (weight.dtype, average.dtype) == (torch.bfloat16, torch.float32), weight.dtype
    short, long = weight.view(torch.int16), average.view(torch.int32)
    rounded = (long + 0x8000) >> 16
    long.bitwise_and_(0xFFFF).bitwise_or_(short.int() << 16)
    short.copy_(rounded)


def _take_back(weight: Tensor, average: Tensor) -> None:
    """Undoes `_put` bit by bit."""
    if weight.dtype == average.dtype:
        _put(weight, average)
        return
    short, long = weight.view(torch.int16), average.view(torch.int32)
    kept, low = long >> 16, long & 0xFFFF
    long.copy_(((short.int() - (low >= 0x8000).int()) << 16) | low)
    short.copy_(kept)
