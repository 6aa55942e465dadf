"""FSDP2 by torch's ``fully_shard``, applied here so that it is the same on GPUs and CPUs.

accelerate wraps models for FSDP on GPUs only; the settings of its launcher are read all the same.
Checkpoints are torch's distributed ones, which any number of processes can read.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
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
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from quietstar.backbone.run import decoder_layers
from quietstar.config import Config
from quietstar.distributed.strategies import (
    NOT_SHARDED,
    Check,
    Prepared,
    Strategy,
    WrappedModule,
)
from quietstar.errors import UserError

SHARDS_FOLDER = "pieces"


def wants_fsdp() -> bool:
    """True if the launcher's file asks for FSDP.

    Raises:
        UserError: It asks for FSDP1.
    """
    if not _flag("ACCELERATE_USE_FSDP"):
        return False
    version = os.environ.get("FSDP_VERSION", "2")
    if version != "2":
        raise UserError(
            f"fsdp_config.fsdp_version: {version} is not supported; set 2 in the launcher's file "
            "(configs/accelerate/fsdp2.yaml)"
        )
    return True


class FSDP2Strategy(Strategy):
    """Shards weights, gradients and the optimizer's state over the processes, layer by layer."""

    kind = "fsdp2"
    sharded = True
    refused = NOT_SHARDED

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._wrapped: Any = None  # the `WrappedModule`, once it is an FSDP module too
        self._trained: list[str] = []

    def check(self, config: Config) -> None:
        """As `Strategy.check`; all weights that train must have one dtype."""
        super().check(config)
        if config.tuning.method == "full" and config.model.dtype != "float32":
            raise UserError(
                f"model.dtype: {config.model.dtype} with tuning.method: full cannot be "
                "sharded by fsdp2: all that trains must have one dtype (the mixing head: float32). "
                "Set model.dtype: float32; training.mixed_precision: bf16 computes in bfloat16."
            )

    def keep_trainable_only(self, model: nn.Module) -> None:
        """As `Strategy.keep_trainable_only`."""
        self._trained = [f"model.{n}" for n, p in model.named_parameters() if p.requires_grad]
        # `save` writes the weights, accelerate the random state.
        self.accelerator.register_save_state_pre_hook(lambda _models, weights, _: weights.clear())
        self.accelerator.register_load_state_pre_hook(lambda models, _: models.clear())

    def shard(self, wrapped: WrappedModule) -> WrappedModule:
        """As `Strategy.shard`; later stages go on with the shards of the first."""
        if self._wrapped is not None:
            return self._wrapped
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
        policy = MixedPrecisionPolicy()
        if self.accelerator.mixed_precision == "bf16":
            # Layers are gathered in bfloat16; autocast would cast their weights to it anyway. Their
            # inputs are not cast, so that the residual stream has the dtypes of a single process.
            # The outer weights stay float32: the embeddings that begin the stream, the two vectors
            # and the mixing head.
            policy = MixedPrecisionPolicy(
                torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        for layer in decoder_layers(wrapped.model.causal_lm):
            self._cast(layer)
            fully_shard(layer, mp_policy=policy, **settings)
        self._cast(wrapped)
        fully_shard(wrapped, **settings)
        # fully_shard has moved it to its device; this only adds autocast.
        self.accelerator.prepare_model(wrapped, device_placement=False, evaluation_mode=True)
        self._wrapped = wrapped
        return wrapped

    def prepare(self, wrapped: WrappedModule, optimizer: Optimizer, config: Config) -> Prepared:
        """Returns both as they are: `shard` has done everything."""
        return wrapped, optimizer

    def accumulate(self, prepared: nn.Module, last: bool) -> AbstractContextManager[object]:
        """As `Strategy.accumulate`."""
        self._wrapped.set_requires_gradient_sync(last)
        return nullcontext()

    def update(
        self, prepared: nn.Module, optimizer: Optimizer, clip_norm: float, check: Check
    ) -> dict[str, Tensor]:
        """As `Strategy.update`."""
        self._wrapped.reshard()
        return super().update(prepared, optimizer, clip_norm, check)

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """As `Strategy.write`, into the shard that this process holds."""
        if not isinstance(parameter, DTensor):
            parameter.copy_(value)
            return
        value = value.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))

    def full_weights(self, prepared: nn.Module) -> dict[str, Tensor] | None:
        """As `Strategy.full_weights`."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(prepared, options=options)
        return {name.removeprefix("model."): weight for name, weight in weights.items()}

    def save(self, folder: Path, prepared: nn.Module, optimizer: Optimizer) -> None:
        """As `Strategy.save`; the shards go into a folder of their own."""
        super().save(folder, prepared, optimizer)
        save(self._state(prepared, optimizer), checkpoint_id=folder / SHARDS_FOLDER)

    def load(self, folder: Path, prepared: nn.Module, optimizer: Optimizer) -> None:
        """As `Strategy.load`, for any number of processes."""
        super().load(folder, prepared, optimizer)
        state = self._state(prepared, optimizer)
        load(state, checkpoint_id=folder / SHARDS_FOLDER)  # weights are read in place
        set_optimizer_state_dict(prepared, optimizer, state["optimizer"])

    def _state(self, prepared: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        self._wrapped.reshard()
        weights = prepared.state_dict()
        return {
            "weights": {name: weights[name] for name in self._trained},
            "optimizer": get_optimizer_state_dict(prepared, optimizer),
        }


def _flag(name: str, default: bool = False) -> bool:
    return os.environ.get(name, str(default)).lower() == "true"
