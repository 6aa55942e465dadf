"""The strategies that shard: DeepSpeed ZeRO, and FSDP2 by torch's ``fully_shard``.

DeepSpeed's engine steps, clips and saves by itself. ``fully_shard`` is applied here so that it is
the same on GPUs and CPUs, since accelerate wraps models for FSDP on GPUs only; the settings of its
launcher are read all the same. Checkpoints of FSDP2 are torch's distributed ones, which any number
of processes can read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
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
    bare_name,
    check_read,
)
from quietstar.errors import UserError

SHARDS_FOLDER = "pieces"


class DeepSpeedStrategy(Strategy):
    """Runs ZeRO-1 or 2, as the launcher's file says.

    Averages are of the weights that the model computes with, and in which it is saved: no process
    has all of the optimizer's float32 copies, and a gather in every step would cost as much as the
    optimizer's own. In bfloat16 they are averages of rounded weights.
    """

    kind = "deepspeed"
    reshardable = False
    refused = NOT_SHARDED

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._plugin: Any = accelerator.deepspeed_plugin
        self._engine: Any = None

    def keep_trainable_only(self, model: nn.Module) -> None:
        """Does nothing: DeepSpeed's engine saves all that it holds."""

    def prepare(self, wrapped: WrappedModule, optimizer: Optimizer, config: Config) -> Prepared:
        """As `Strategy.prepare`; DeepSpeed's own file only says how to shard."""
        micro_batch_size = config.training.micro_batch_size
        self._plugin.deepspeed_config.update(
            gradient_clipping=config.optim.max_grad_norm,
            train_micro_batch_size_per_gpu=micro_batch_size,
            gradient_accumulation_steps=1,  # the loop accumulates
            train_batch_size=micro_batch_size * self.accelerator.num_processes,
        )
        self._engine, optimizer = super().prepare(wrapped, optimizer, config)
        return self._engine, optimizer

    def accumulate(self, prepared: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Does nothing: `backward` tells the engine which micro-batch is the last."""
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """As `Strategy.backward`."""
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        self._engine.backward(loss * self.accelerator.num_processes)

    def update(
        self, prepared: nn.Module, optimizer: Optimizer, clip_norm: float, check: Check
    ) -> dict[str, Tensor]:
        """As `Strategy.update`; only the total norm is known, and only after the step."""
        check({})
        self._engine.step()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self.accelerator.device)
        norms = {"total": norm.float()}
        check(norms, stepped=True)
        return norms


class ZeRO3Strategy(DeepSpeedStrategy):
    """Runs ZeRO-3, the one stage that shards weights; averages are of the float32 copies."""

    sharded = True

    def shard(self, wrapped: WrappedModule) -> WrappedModule:
        """As `Strategy.shard`; later stages go on with the shards of the first."""
        import deepspeed  # pyright: ignore[reportMissingImports]  (an extra)

        for module in (*decoder_layers(wrapped.model.causal_lm), wrapped):
            self._cast(module)
            deepspeed.zero.Init(module=module, config_dict_or_path=self._plugin.deepspeed_config)
        for buffer in wrapped.buffers():  # DeepSpeed leaves them where they are
            buffer.data = buffer.data.to(self.accelerator.device)
        return wrapped

    @torch.no_grad()
    def _cast(self, module: nn.Module) -> None:
        """As `Strategy._cast`; under bf16 DeepSpeed shards parameters that are bfloat16 already."""
        super()._cast(module)
        if self.accelerator.mixed_precision == "bf16":
            for parameter in module.parameters():
                if not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.to(torch.bfloat16)

    def prepare(self, wrapped: WrappedModule, optimizer: Optimizer, config: Config) -> Prepared:
        """As `DeepSpeedStrategy.prepare`, and names the weights that are read elsewhere."""
        import deepspeed  # pyright: ignore[reportMissingImports]  (an extra)

        prepared = super().prepare(wrapped, optimizer, config)
        # DeepSpeed's hooks gather a weight for the forward of the module that owns it. But the
        # fused cross entropy reads the output layer's weight outside that layer, and methods other
        # than forward read the two vectors outside their module's forward: these are gathered for
        # the whole forward of the wrapped module.
        model, head = wrapped.model, wrapped.model.output_head
        for weight in (head.weight, head.bias, model.start_embedding, model.end_embedding):
            if weight is not None:
                deepspeed.zero.register_external_parameter(wrapped, weight)
        return prepared

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """As `Strategy.write`."""
        import deepspeed  # pyright: ignore[reportMissingImports]  (an extra)

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if parameter.numel():
                parameter.copy_(value)

    def full_weights(self, prepared: nn.Module) -> dict[str, Tensor] | None:
        """As `Strategy.full_weights`."""
        weights: Any = self.accelerator.get_state_dict(prepared) or {}
        return {name.removeprefix("model."): weight for name, weight in weights.items()}

    def trained_weights(self, prepared: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """As `Strategy.trained_weights`, of the optimizer's float32 copies."""
        for name, parameter in prepared.named_parameters():
            if parameter.requires_grad:
                yield bare_name(name), self._engine.optimizer.get_local_fp32_param(parameter)

    @contextmanager
    def writable_weights(self, prepared: nn.Module) -> Iterator[dict[str, Tensor]]:
        """As `Strategy.writable_weights`."""
        # Small weights stay gathered, so what is gathered is given up before and gathered anew
        # after, as DeepSpeed does it around a checkpoint.
        self._engine.optimizer.checkpoint_event_prologue()
        shards: list[tuple[str, Any]] = [
            (bare_name(name), p) for name, p in prepared.named_parameters() if p.requires_grad
        ]
        yield {name: parameter.ds_tensor.data for name, parameter in shards}
        self._engine.optimizer.checkpoint_event_epilogue()

    def _average_file(self, name: str) -> str:
        return f"{name}-{self.accelerator.process_index}.safetensors"


def wants_fsdp() -> bool:
    """True if the launcher's file asks for FSDP; raises `UserError` if for FSDP1."""
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
        if isinstance(parameter, DTensor):
            value = value.to(parameter.device, parameter.dtype)
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)

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
        for name, weight in state["weights"].items():
            check_read(name, weight.to_local(), weight.to_local())
        set_optimizer_state_dict(prepared, optimizer, state["optimizer"])

    def trained_weights(self, prepared: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """As `Strategy.trained_weights`."""
        for name, weight in self._shards(prepared).items():
            yield name, weight.to_local().data

    def save_average(
        self, folder: Path, prepared: nn.Module, average: dict[str, Tensor], name: str
    ) -> None:
        """As `Strategy.save_average`."""
        save(self._sharded(prepared, average), checkpoint_id=folder / name)

    def load_average(
        self, folder: Path, prepared: nn.Module, average: dict[str, Tensor], name: str
    ) -> None:
        """As `Strategy.load_average`, for any number of processes."""
        load(self._sharded(prepared, average), checkpoint_id=folder / name)  # in place
        for name, value in average.items():
            check_read(f"the average of {name}", value, value)

    def _sharded(self, prepared: nn.Module, average: dict[str, Tensor]) -> dict[str, Any]:
        """Declares the values of this process to be its shards of the whole."""
        return {
            name: DTensor.from_local(
                average[name], weight.device_mesh, weight.placements, run_check=False,
                shape=weight.shape, stride=weight.stride(),
            )
            for name, weight in self._shards(prepared).items()
        }  # fmt: skip

    def _shards(self, prepared: nn.Module) -> dict[str, DTensor]:
        """Gives up what is gathered; returns the weights that train, as DTensors."""
        for module in self._wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        named: Any = prepared.named_parameters()
        return {bare_name(name): weight for name, weight in named if weight.requires_grad}

    def _state(self, prepared: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        self._wrapped.reshard()
        weights = prepared.state_dict()
        return {
            "weights": {name: weights[name] for name in self._trained},
            "optimizer": get_optimizer_state_dict(prepared, optimizer),
        }


def _flag(name: str, default: bool = False) -> bool:
    return os.environ.get(name, str(default)).lower() == "true"
