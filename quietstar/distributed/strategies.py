"""The module that strategies wrap, and the strategy of one process and of DDP, base of others."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partialmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME, extract_model_from_parallel
from accelerate.utils import load as load_pickle
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from quietstar.backbone.loading import require_finite
from quietstar.config import Config, ThoughtsConfig
from quietstar.errors import UserError, reason_of
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.system.processes import Processes

logger = logging.getLogger(__name__)

T = TypeVar("T")
Prepared = tuple[nn.Module, Optimizer]
Group = Literal["language_model", "mixing_head", "embeddings"]
GROUPS: tuple[Group, ...] = ("language_model", "mixing_head", "embeddings")
"""Parameter groups in the optimizer's order; logs use the same names."""
WEIGHTS_FILE = "trainable.safetensors"
NOT_SHARDED = {
    "galore": "projects whole gradients, which are sharded",
    "qlora": "keeps 4-bit weights, which cannot be sharded",
}
"""Tuning methods that sharding strategies refuse, and why."""
FOUR_BIT_DEVICES = ("cpu", "cuda", "xpu")
"""Devices on which gradients flow through 4-bit weights."""


Check = Callable[..., None]
"""Raises if weights must not change, or should not have: `quietstar.training.loop.StepCheck`."""


def group_of(name: str) -> Group:
    """Returns the group of a parameter of `QuietStarForCausalLM`, wrapped or not."""
    name = bare_name(name)
    if name.startswith("language_model."):
        return "language_model"
    return "mixing_head" if name.startswith("mixing_head.") else "embeddings"


def bare_name(name: str) -> str:
    """Returns the name in `QuietStarForCausalLM` of a parameter of the wrapped module."""
    return name.removeprefix("module.").removeprefix("model.")


class WrappedModule(nn.Module):
    """Calls a method or a function of the model: the one door through DDP, FSDP2 and ZeRO."""

    def __init__(self, model: QuietStarForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: str | Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """Calls ``call(model, ...)``, or the model's method of that name.

        ``"forward"`` calls the module itself, with its hooks.
        """
        if callable(call):
            return call(self.model, *args, **keywords)
        method = self.model if call == "forward" else getattr(self.model, call)
        return method(*args, **keywords)


class ModelProxy:
    """Offers the methods of a model and calls each through its `WrappedModule`, itself wrapped."""

    def __init__(self, prepared: nn.Module) -> None:
        self.prepared = prepared

    @property
    def pause_token_id(self) -> int:
        """Token that stands for every thought token in the pause control."""
        return self._model.pause_token_id

    @property
    def thoughts(self) -> ThoughtsConfig:
        """Settings by which the model thinks."""
        return self._model.thoughts

    def configure(self, thoughts: ThoughtsConfig) -> None:
        """Has the model think by other settings, on this process."""
        self._model.configure(thoughts)

    @property
    def _model(self) -> QuietStarForCausalLM:
        wrapped: Any = extract_model_from_parallel(self.prepared)
        return wrapped.model

    def _call(self, method: str, *args: Any, **keywords: Any) -> Any:
        return self.prepared(method, *args, **keywords)

    run_text = partialmethod(_call, "run_text")
    draw = partialmethod(_call, "draw")
    score = partialmethod(_call, "score")
    score_plain = partialmethod(_call, "score_plain")
    choose_positions = partialmethod(_call, "choose_positions")


class Strategy:
    """Wraps a run's module, exchanges its gradients and saves its state.

    Attributes:
        kind: Name that checkpoints carry; those of another kind are refused.
        reshardable: True if any number of processes can read its checkpoints.
        sharded: True if no process holds all weights.
        refused: Tuning methods that cannot work, and why.
    """

    kind: ClassVar[str] = "replicated"
    reshardable: ClassVar[bool] = True
    sharded: bool = False
    refused: ClassVar[Mapping[str, str]] = {}

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._to_cast: set[nn.Parameter] = set()
        self._dtype: torch.dtype | None = None

    def check(self, config: Config) -> None:
        """Raises a `UserError` that says why, if tuning method or optimizer cannot work."""
        method, device = config.tuning.method, self.accelerator.device.type
        if config.optim.name != "adamw_torch" and (device != "cuda" or self.refused):
            where = f"under {self.kind}" if device == "cuda" else f"on {device}"
            raise UserError(
                f"optim.name: {config.optim.name} keeps its moments in pages of one CUDA GPU's "
                f"memory, and cannot work {where}. Set optim.name: adamw_torch."
            )
        if method in self.refused:
            raise UserError(
                f"tuning.method: {method} {self.refused[method]} under {self.kind}. "
                "Launch with configs/accelerate/ddp.yaml, or set tuning.method: lora."
            )
        if method == "qlora" and device not in FOUR_BIT_DEVICES:
            raise UserError(
                f"tuning.method: qlora has no 4-bit weights on {device}, only on "
                f"{', '.join(FOUR_BIT_DEVICES)}. Set tuning.method: lora, or train on the CPU with "
                "ACCELERATE_USE_CPU=true."
            )

    def keep_trainable_only(self, model: nn.Module) -> None:
        """Makes checkpoints hold the weights that train in any stage, and no frozen ones.

        Call it before a stage freezes anything.
        """
        names = [name for name, p in model.named_parameters() if p.requires_grad]

        def save(models: list[nn.Module], weights: list[dict], folder: str) -> None:
            weights.clear()  # accelerate then writes none itself
            if self.accelerator.is_main_process:
                parameters = dict(model.named_parameters())
                trained = {n: parameters[n].detach().contiguous() for n in names}
                save_file(trained, Path(folder) / WEIGHTS_FILE)

        def load(models: list[nn.Module], folder: str) -> None:
            models.clear()
            parameters = dict(model.named_parameters())
            weights = load_file(Path(folder) / WEIGHTS_FILE)
            if unknown := sorted(weights.keys() - set(names)):
                if group_of(unknown[0]) == "mixing_head":
                    raise UserError(
                        f"--resume ({folder}): holds a mixing head that trains, which none does "
                        "with mixing_head.fixed_weight. Set it to null, or go on with the version "
                        "of quietstar that began the run; --model takes the checkpoint as it is."
                    )
                raise ValueError(f"the run does not train its tensor {unknown[0]}")
            for name in names:
                check_read(name, weights[name], parameters[name], any_precision=True)
                parameters[name].data.copy_(weights[name])

        self.accelerator.register_save_state_pre_hook(save)
        self.accelerator.register_load_state_pre_hook(load)

    def cast_when_sharded(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Has `shard` cast the weights of a base model that still lie mapped on the disk.

        A mapped weight takes no memory until it is read. Cast and sharded layer by layer, no
        process ever holds more than its shards and a single layer.
        """
        self._to_cast, self._dtype = set(model.parameters()), dtype
        model.config.dtype = dtype

    @torch.no_grad()
    def _cast(self, module: nn.Module) -> None:
        """Casts what `cast_when_sharded` noted of this module, by a copy that is not mapped."""
        for name, parameter in module.named_parameters():
            if parameter in self._to_cast:
                self._to_cast.remove(parameter)
                parameter.data = parameter.data.to(self._dtype, copy=True)
                require_finite([(name, parameter)], "model.name_or_path")

    def shard(self, wrapped: WrappedModule) -> WrappedModule:
        """Shards the weights in place, before an optimizer is built; returns what to prepare."""
        return wrapped

    def prepare(self, wrapped: WrappedModule, optimizer: Optimizer, config: Config) -> Prepared:
        """Returns the module with the strategy's wrapper, and the optimizer that fits it."""
        return self.accelerator.prepare(wrapped, optimizer)

    def accumulate(self, prepared: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Opens the context of one micro-batch: only the last one exchanges gradients."""
        return nullcontext() if last else self.accelerator.no_sync(prepared)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Runs backward for a micro-batch's part of the step's loss.

        The wrappers average gradients over processes, but these parts must be summed: the factor
        undoes the division.
        """
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def update(
        self, prepared: nn.Module, optimizer: Optimizer, clip_norm: float, check: Check
    ) -> dict[str, Tensor]:
        """Clips the gradients and takes the optimizer's step.

        The norm of the whole gradient is clipped to `clip_norm`. `check` gets the norms, before the
        weights change where that is possible.

        Returns:
            Gradient norms before clipping: ``total``, and one a group where they are known.
        """
        norms = self.clip(prepared, clip_norm)
        check(norms)
        optimizer.step()
        optimizer.zero_grad()
        return norms

    def clip(self, prepared: nn.Module, clip_norm: float) -> dict[str, Tensor]:
        """Clips the gradients; returns the norms before, of each group and in total."""
        by_group: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
        for name, parameter in prepared.named_parameters():
            if parameter.grad is not None:
                by_group[group_of(name)].append(parameter.grad)
        norms = {group: _norm(grads) for group, grads in by_group.items()}
        norms["total"] = _norm([p.grad for p in prepared.parameters() if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(prepared.parameters(), clip_norm, norms["total"])
        return norms

    # --- Weights and checkpoints ------------------------------------------------------------------
    # All processes must call these together.

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Gives a parameter another value, before `prepare`."""
        parameter.copy_(value)

    def full_weights(self, prepared: nn.Module) -> dict[str, Tensor] | None:
        """Gathers sharded weights on the main process; None where every process has them all."""
        return None

    def trained_weights(self, prepared: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yields what this process holds of every weight that trains, to be read, and its name."""
        for name, parameter in prepared.named_parameters():
            if parameter.requires_grad:
                yield bare_name(name), parameter.data

    @contextmanager
    def writable_weights(self, prepared: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Opens what this process holds of every weight that trains, to be written in place.

        After the block the next forward computes with what was written.
        """
        yield dict(self.trained_weights(prepared))

    def _average_file(self, name: str) -> str:
        """File of a checkpoint with a moving average of the weights, or this process's part."""
        return f"{name}.safetensors"

    def save_average(
        self, folder: Path, prepared: nn.Module, average: dict[str, Tensor], name: str
    ) -> None:
        """Writes a moving average of what `writable_weights` opens into a checkpoint."""
        if self.sharded or self.accelerator.is_main_process:
            content = {name: value.contiguous() for name, value in average.items()}
            save_file(content, folder / self._average_file(name))

    def load_average(
        self, folder: Path, prepared: nn.Module, average: dict[str, Tensor], name: str
    ) -> None:
        """Reads what `save_average` wrote, in place; raises ValueError if it does not fit."""
        content = load_file(folder / self._average_file(name))
        if other := sorted(content.keys() ^ average.keys()):
            raise ValueError(f"its moving average is not one of what trains ({other[0]})")
        for weight, value in average.items():
            check_read(f"the average of {weight}", content[weight], value)
            value.copy_(content[weight])

    def save(self, folder: Path, prepared: nn.Module, optimizer: Optimizer) -> None:
        """Writes weights, optimizer and random state."""
        self.accelerator.save_state(str(folder), safe_serialization=True)

    def load(self, folder: Path, prepared: nn.Module, optimizer: Optimizer) -> None:
        """Reads what `save` wrote."""
        self.accelerator.load_state(str(folder))
        index = self.accelerator.process_index
        path = folder / f"{RNG_STATE_NAME}_{index}.pkl"
        if index > 0 and not path.exists():  # there were fewer processes
            return
        # accelerate says nothing of random states that it could not load. They are no error: numpy
        # 2 cannot read those of numpy 1, and the noise of thoughts and data depends on the config
        # alone.
        try:
            states = load_pickle(path)
            random.setstate(states["random_state"])
            np.random.set_state(states["numpy_random_seed"])
            torch.set_rng_state(states["torch_manual_seed"])
        except Exception as problem:  # of many kinds, as anything may be in it
            logger.warning(
                "--resume: %s: cannot be read (%s), so what draws from the global generators of "
                "Python, numpy or torch draws other numbers; quietstar itself does not",
                path.name, reason_of(problem),
            )  # fmt: skip


def from_main_process(accelerator: Accelerator, call: Callable[[], T]) -> T:
    """Calls a function on the main process; all return its result or raise its `UserError`."""
    return Processes(accelerator.process_index, accelerator.num_processes).from_main(call)


def check_read(what: str, there: Tensor, here: Tensor, any_precision: bool = False) -> None:
    """Raises a ValueError if what a checkpoint holds cannot take the place of a tensor."""
    is_kind = any_precision and there.is_floating_point()
    if there.shape != here.shape or (there.dtype != here.dtype and not is_kind):
        raise ValueError(  # `copy_` would broadcast
            f"{what} has shape {tuple(there.shape)} ({there.dtype}), not {tuple(here.shape)} "
            f"({here.dtype})"
        )
    if not there.isfinite().all():
        raise ValueError(f"{what} holds numbers that are not finite")


def _norm(gradients: list[Tensor]) -> Tensor:
    """Returns the Euclidean norm over all gradients, and over all shards of each."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
