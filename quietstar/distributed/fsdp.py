"""FSDP2: torch's ``fully_shard``, applied here, so that it is the same on GPUs and on CPUs.

accelerate wraps models for FSDP on GPUs only; its launcher's settings are read all the same.
Checkpoints are torch's distributed ones, which another number of processes can read.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from quietstar.config import Config
from quietstar.distributed.base import IN_PIECES, Check, Engine
from quietstar.distributed.trainee import Trainee
from quietstar.errors import UserError
from quietstar.model.tuning.bottleneck import decoder_layers

PIECES_FOLDER = "pieces"


def wants_fsdp() -> bool:
    """Whether this was launched with an FSDP file.

    Raises:
        UserError: With FSDP1.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    version = os.environ.get("FSDP_VERSION", "2")
    if version != "2":
        raise UserError(
            f"fsdp_config.fsdp_version: {version} is not supported; set 2 in the launcher's file "
            "(configs/accelerate/fsdp2.yaml)"
        )
    return True


class FullyShardEngine(Engine):
    """Weights, gradients and the optimiser's state cut over the processes, layer by layer."""

    kind = "fsdp2"
    in_pieces = True
    reasons = IN_PIECES

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._trainee: Trainee | None = None
        self._kept: list[str] = []

    def check(self, config: Config) -> None:
        """As `Engine.check`; all that trains must be of one type.

        Raises:
            UserError: It is not.
        """
        super().check(config)
        if config.tuning.method == "full" and config.model.dtype != "float32":
            raise UserError(
                f"model.dtype: {config.model.dtype} with tuning.method: full cannot be cut by "
                "fsdp2, which wants one type for all that trains (the mixing head is float32). "
                "Set model.dtype: float32; training.mixed_precision: bf16 computes in bfloat16."
            )

    def keep_trainable_only(self, model: nn.Module) -> None:
        """As `Engine.keep_trainable_only`."""
        self._kept = [f"model.{n}" for n, p in model.named_parameters() if p.requires_grad]
        # The weights are saved by `save`: accelerate keeps the rest.
        self.accelerator.register_save_state_pre_hook(
            lambda models, weights, folder: weights.clear()
        )
        self.accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def cut(self, trainee: Trainee) -> Trainee:
        """As `Engine.cut`; what was cut for an earlier stage stays as it is."""
        if self._trainee is not None:
            return self._trainee
        device = self.accelerator.device.type
        if not dist.is_initialized():  # one process
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(device, (self.accelerator.num_processes,)),
            "reshard_after_forward": _flag("FSDP_RESHARD_AFTER_FORWARD", default=True),
        }
        if _flag("FSDP_OFFLOAD_PARAMS"):
            settings["offload_policy"] = CPUOffloadPolicy()
        for layer in decoder_layers(trainee.model.causal_lm):
            fully_shard(layer, **settings)
        fully_shard(trainee, **settings)
        # On its device already; this gives it autocast.
        self.accelerator.prepare_model(trainee, device_placement=False, evaluation_mode=True)
        self._trainee = trainee
        return trainee

    def prepare(
        self, trainee: Trainee, optimizer: Optimizer, config: Config
    ) -> tuple[nn.Module, Optimizer]:
        """As they are: `cut` has done it all."""
        return trainee, optimizer

    def accumulate(
        self, prepared: nn.Module, last: bool
    ) -> contextlib.AbstractContextManager[object]:
        """As `Engine.accumulate`."""
        _sharded(prepared).set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def update(
        self, prepared: nn.Module, optimizer: Optimizer, clip_norm: float, check: Check
    ) -> dict[str, Tensor]:
        """As `Engine.update`."""
        _sharded(prepared).reshard()
        return super().update(prepared, optimizer, clip_norm, check)

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """As `Engine.write`, into the piece that this process holds."""
        if not isinstance(parameter, DTensor):
            parameter.copy_(value)
            return
        value = value.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))

    def full_weights(self, prepared: nn.Module) -> dict[str, Tensor] | None:
        """As `Engine.full_weights`."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(prepared, options=options)
        whole: dict[str, Any] = {n.removeprefix("model."): w for n, w in weights.items()}
        return whole

    def save(self, folder: Path, prepared: nn.Module, optimizer: Optimizer) -> None:
        """As `Engine.save`; pieces go into a folder of their own."""
        super().save(folder, prepared, optimizer)
        save(self._state(prepared, optimizer), checkpoint_id=folder / PIECES_FOLDER)

    def load(self, folder: Path, prepared: nn.Module, optimizer: Optimizer) -> None:
        """As `Engine.load`, whatever the number of processes that saved."""
        super().load(folder, prepared, optimizer)
        state = self._state(prepared, optimizer)
        load(state, checkpoint_id=folder / PIECES_FOLDER)  # weights are read in place
        set_optimizer_state_dict(prepared, optimizer, state["optimizer"])

    def _state(self, prepared: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        _sharded(prepared).reshard()
        weights = prepared.state_dict()
        return {
            "weights": {name: weights[name] for name in self._kept},
            "optimizer": get_optimizer_state_dict(prepared, optimizer),
        }


def _sharded(prepared: nn.Module) -> FSDPModule:
    assert isinstance(prepared, FSDPModule), type(prepared)
    return prepared


def _flag(name: str, default: bool = False) -> bool:
    return os.environ.get(name, str(default)).lower() == "true"
