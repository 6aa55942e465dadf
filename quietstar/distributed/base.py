"""One process, and DDP: every process holds everything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from quietstar.config import Config
from quietstar.distributed.trainee import Trainee
from quietstar.errors import UserError
from quietstar.training.optimizer import GROUPS, group_of

WEIGHTS_FILE = "trainable.safetensors"
IN_PIECES = {
    "galore": "projects whole gradients, which lie in pieces",
    "qlora": "keeps 4-bit weights, which cannot be cut",
}
"""Ways to tune that engines refuse which cut weights or gradients, and why."""
FOUR_BIT_DEVICES = ("cpu", "cuda", "xpu")
"""Where gradients flow through 4-bit weights."""


@runtime_checkable
class Check(Protocol):
    """Raises if the weights must not change, or should not have."""

    def __call__(self, norms: Mapping[str, Tensor], *, stepped: bool = False) -> None:
        """See `quietstar.training.loop.check_finite`."""
        ...


class Engine:
    """How a run's module is wrapped, its gradients exchanged, its state saved.

    Args:
        accelerator: Of the run.

    Attributes:
        kind: Written into checkpoints; those of one kind are not read by another.
        any_world: Whether its checkpoints can be read by another number of processes.
    """

    kind: ClassVar[str] = "whole"
    any_world: ClassVar[bool] = True
    in_pieces: bool = False
    """Whether it holds weights in pieces."""
    reasons: ClassVar[Mapping[str, str]] = {}
    """Ways to tune that cannot work, and why."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def check(self, config: Config) -> None:
        """Refuse a way to tune that cannot work.

        Raises:
            UserError: It cannot; the message says why.
        """
        method = config.tuning.method
        if method in self.reasons:
            raise UserError(
                f"tuning.method: {method} {self.reasons[method]} under {self.kind}. "
                "Launch with configs/accelerate/ddp.yaml, or set tuning.method: lora."
            )
        device = self.accelerator.device.type
        if method == "qlora" and device not in FOUR_BIT_DEVICES:
            raise UserError(
                f"tuning.method: qlora has no 4-bit weights on {device}, only on "
                f"{', '.join(FOUR_BIT_DEVICES)}. Set tuning.method: lora, or train on the CPU with "
                "ACCELERATE_USE_CPU=true."
            )

    # --- Wrapping ---------------------------------------------------------------------------------

    def keep_trainable_only(self, model: nn.Module) -> None:
        """Make checkpoints hold what trains in any stage; frozen weights come from the base model.

        Call it before a stage freezes anything.
        """
        names = [name for name, p in model.named_parameters() if p.requires_grad]

        def save(models: list[nn.Module], weights: list[dict], folder: str) -> None:
            weights.clear()  # tells accelerate that the weights are taken care of
            if self.accelerator.is_main_process:
                kept = {n: p.detach().contiguous() for n, p in _named(model, names)}
                save_file(kept, Path(folder) / WEIGHTS_FILE)

        def load(models: list[nn.Module], folder: str) -> None:
            models.clear()
            weights = load_file(Path(folder) / WEIGHTS_FILE)
            for name, parameter in _named(model, names):
                parameter.data.copy_(weights[name])

        self.accelerator.register_save_state_pre_hook(save)
        self.accelerator.register_load_state_pre_hook(load)

    def release(self) -> None:
        """Let go of the stage before."""
        self.accelerator.free_memory()

    def cut(self, trainee: Trainee) -> Trainee:
        """Cut the weights in place, before an optimiser sees them; returns what to prepare."""
        return trainee

    def prepare(
        self, trainee: Trainee, optimizer: Optimizer, config: Config
    ) -> tuple[nn.Module, Optimizer]:
        """The engine around the trainee, and the optimiser that goes with it."""
        return self.accelerator.prepare(trainee, optimizer)

    # --- A step -----------------------------------------------------------------------------------

    def accumulate(
        self, prepared: nn.Module, last: bool
    ) -> contextlib.AbstractContextManager[object]:
        """Context of one micro-batch: gradients are exchanged after the last one only."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(prepared)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Backward of a micro-batch's part of the loss.

        Engines average gradients over processes; the parts are to be added up, so the factor undoes
        it.
        """
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def update(
        self, prepared: nn.Module, optimizer: Optimizer, clip_norm: float, check: Check
    ) -> dict[str, Tensor]:
        """Clip and take the optimiser's step.

        Args:
            prepared: The engine around the `Trainee`.
            optimizer: As prepared.
            clip_norm: Longest gradient.
            check: Called with the norms before the weights change where that can be.

        Returns:
            The gradient norms before clipping, of each group where they are known, and ``total``.
        """
        norms = self.clip(prepared, clip_norm)
        check(norms)
        optimizer.step()
        optimizer.zero_grad()
        return norms

    def clip(self, prepared: nn.Module, clip_norm: float) -> dict[str, Tensor]:
        """Gradient norm of each group and in total, before clipping; then clip."""
        by_group: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
        for name, parameter in prepared.named_parameters():
            if parameter.grad is not None:
                by_group[group_of(name)].append(parameter.grad)
        norms = {group: _norm(grads) for group, grads in by_group.items()}
        parameters = [p for p in prepared.parameters() if p.grad is not None]
        norms["total"] = _norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norms["total"])
        return norms

    # --- Weights and checkpoints ------------------------------------------------------------------

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Give a parameter another value, before `prepare`. To be called on all processes."""
        parameter.copy_(value)

    def full_weights(self, prepared: nn.Module) -> dict[str, Tensor] | None:
        """All weights of the model in one piece on the main process; None where they are so anyway.

        To be called on all processes.
        """
        return None

    def save(self, folder: Path, prepared: nn.Module, optimizer: Optimizer) -> None:
        """Write weights, optimiser, schedule and random state. To be called on all processes."""
        self.accelerator.save_state(str(folder), safe_serialization=True)

    def load(self, folder: Path, prepared: nn.Module, optimizer: Optimizer) -> None:
        """Read what `save` wrote. To be called on all processes."""
        self.accelerator.load_state(str(folder))


def _named(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
    parameters = dict(model.named_parameters())
    return ((name, parameters[name]) for name in names)


def _norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm over all of them, and over all processes that hold pieces."""
    norm = torch.nn.utils.get_total_norm(gradients)
    full = getattr(norm, "full_tensor", None)  # of a distributed tensor
    return norm if full is None else full()
