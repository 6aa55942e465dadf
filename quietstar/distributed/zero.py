"""DeepSpeed ZeRO: it steps, clips and accumulates by itself, and saves what it holds in pieces."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quietstar.config import Config
from quietstar.distributed.base import IN_PIECES, Check, Engine
from quietstar.distributed.trainee import Trainee


class DeepSpeedEngine(Engine):
    """ZeRO-1, 2 and 3, as the launcher's file says."""

    kind = "deepspeed"
    any_world = False
    reasons = IN_PIECES

    @property
    def _engine(self) -> Any:
        wrapped = self.accelerator.deepspeed_engine_wrapped
        assert wrapped is not None, "prepare comes first"
        return wrapped.engine

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        plugin = self.accelerator.state.deepspeed_plugin
        assert plugin is not None, "DeepSpeed comes with its plugin"
        return plugin.zero_stage

    @property
    def in_pieces(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether it holds weights in pieces."""
        return self.stage == 3

    def keep_trainable_only(self, model: nn.Module) -> None:
        """Nothing to do: the engine saves what it holds."""

    def prepare(
        self, trainee: Trainee, optimizer: Optimizer, config: Config
    ) -> tuple[nn.Module, Optimizer]:
        """As `Engine.prepare`; DeepSpeed's own file only says how to cut."""
        plugin = self.accelerator.state.deepspeed_plugin
        assert plugin is not None, "DeepSpeed comes with its plugin"
        settings = plugin.deepspeed_config
        settings["gradient_clipping"] = config.optim.max_grad_norm
        settings["train_micro_batch_size_per_gpu"] = config.training.micro_batch_size
        settings["gradient_accumulation_steps"] = 1  # the loop accumulates
        settings["train_batch_size"] = (
            config.training.micro_batch_size * self.accelerator.num_processes
        )
        prepared = super().prepare(trainee, optimizer, config)
        if self.stage == 3:
            _gather_outer_weights(trainee)
        return prepared

    def accumulate(
        self, prepared: nn.Module, last: bool
    ) -> contextlib.AbstractContextManager[object]:
        """Nothing to do: `backward` says which micro-batch is the last."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """As `Engine.backward`."""
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        self._engine.backward(loss * self.accelerator.num_processes)

    def update(
        self, prepared: nn.Module, optimizer: Optimizer, clip_norm: float, check: Check
    ) -> dict[str, Tensor]:
        """As `Engine.update`; the norm is known after the step only, and in total only."""
        check({})
        self._engine.step()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self.accelerator.device)
        norms = {"total": norm.float()}
        check(norms, stepped=True)
        return norms

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """As `Engine.write`, also where the parameter lies in pieces."""
        import deepspeed  # pyright: ignore[reportMissingImports]  (an extra)

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if parameter.numel():
                parameter.copy_(value)

    def full_weights(self, prepared: nn.Module) -> dict[str, Tensor] | None:
        """As `Engine.full_weights`: ZeRO-3 alone cuts weights."""
        if self.stage < 3:
            return None
        weights: Any = self.accelerator.get_state_dict(prepared) or {}
        return {name.removeprefix("model."): weight for name, weight in weights.items()}


def _gather_outer_weights(trainee: Trainee) -> None:
    """Have some weights gathered during the whole of the trainee's forward.

    The fused cross entropy reads the output layer's weight outside that layer, and a method other
    than forward the two vectors outside their module's forward.
    """
    import deepspeed  # pyright: ignore[reportMissingImports]  (an extra)

    model = trainee.model
    head = model.output_head
    for weight in (head.weight, head.bias, model.start_embedding, model.end_embedding):
        if weight is not None:
            deepspeed.zero.register_external_parameter(trainee, weight)
