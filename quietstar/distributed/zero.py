"""DeepSpeed ZeRO, whose engine steps, clips and saves by itself."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
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


class DeepSpeedStrategy(Strategy):
    """Runs ZeRO-1, 2 or 3, as the launcher's file says."""

    kind = "deepspeed"
    reshardable = False
    refused = NOT_SHARDED

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._plugin: Any = accelerator.deepspeed_plugin
        self.sharded = self._plugin.zero_stage == 3  # the one stage that shards weights

    @property
    def _engine(self) -> Any:
        wrapped: Any = self.accelerator.deepspeed_engine_wrapped
        return wrapped.engine

    def keep_trainable_only(self, model: nn.Module) -> None:
        """Does nothing: DeepSpeed's engine saves all that it holds."""

    def shard(self, wrapped: WrappedModule) -> WrappedModule:
        """As `Strategy.shard`; later stages go on with the shards of the first."""
        if not self.sharded:
            return wrapped
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
        """As `Strategy.prepare`; DeepSpeed's own file only says how to shard."""
        micro_batch_size = config.training.micro_batch_size
        self._plugin.deepspeed_config.update(
            gradient_clipping=config.optim.max_grad_norm,
            train_micro_batch_size_per_gpu=micro_batch_size,
            gradient_accumulation_steps=1,  # the loop accumulates
            train_batch_size=micro_batch_size * self.accelerator.num_processes,
        )
        prepared = super().prepare(wrapped, optimizer, config)
        if self.sharded:
            import deepspeed  # pyright: ignore[reportMissingImports]  (an extra)

            # DeepSpeed's hooks gather a weight for the forward of the module that owns it. But the
            # fused cross entropy reads the output layer's weight outside that layer, and methods
            # other than forward read the two vectors outside their module's forward: these are
            # gathered for the whole forward of the wrapped module.
            model, head = wrapped.model, wrapped.model.output_head
            for weight in (head.weight, head.bias, model.start_embedding, model.end_embedding):
                if weight is not None:
                    deepspeed.zero.register_external_parameter(wrapped, weight)
        return prepared

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

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """As `Strategy.write`, also for a sharded parameter."""
        import deepspeed  # pyright: ignore[reportMissingImports]  (an extra)

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if parameter.numel():
                parameter.copy_(value)

    def full_weights(self, prepared: nn.Module) -> dict[str, Tensor] | None:
        """As `Strategy.full_weights`: only ZeRO-3 shards weights."""
        if not self.sharded:
            return None
        weights: Any = self.accelerator.get_state_dict(prepared) or {}
        return {name.removeprefix("model."): weight for name, weight in weights.items()}
