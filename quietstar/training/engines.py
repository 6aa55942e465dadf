"""What DDP, DeepSpeed and FSDP do differently from one process, in one place.

An engine wraps a module and acts in its forward: it gathers weights that lie in pieces, and gets
ready for gradients. So everything that reads weights goes through the forward of one outer module,
the `Trainee`, not only the training step.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import Tensor, nn
from torch.optim import Optimizer

from quietstar.config import Config
from quietstar.errors import UserError
from quietstar.model import QuietStarForCausalLM
from quietstar.outputs import PlainScores, Thoughts
from quietstar.training.optimizer import GROUPS, group_of


class Trainee(nn.Module):
    """The module that an engine wraps: its forward calls a method of the model.

    Args:
        model: That trains.
    """

    def __init__(self, model: QuietStarForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, *args: Any, **keywords: Any) -> Any:
        """``model.method(...)``; ``forward`` itself is called as a module, with its hooks."""
        if method == "forward":
            return self.model(*args, **keywords)
        return getattr(self.model, method)(*args, **keywords)


class ThroughEngine:
    """The model's methods, called through the engine around it.

    Args:
        prepared: The engine around a `Trainee`, or the trainee itself.
    """

    def __init__(self, prepared: nn.Module) -> None:
        self.prepared = prepared

    @property
    def pause_token_id(self) -> int:
        """Of the model."""
        return self._model.pause_token_id

    @property
    def _model(self) -> QuietStarForCausalLM:
        trainee = extract_model_from_parallel(self.prepared)
        assert isinstance(trainee, Trainee), type(trainee)
        return trainee.model

    def think(self, *args: Any, **keywords: Any) -> Thoughts:
        """`QuietStarForCausalLM.think`."""
        return self.prepared("think", *args, **keywords)

    def sample(self, *args: Any, **keywords: Any) -> Tensor:
        """`QuietStarForCausalLM.sample`."""
        return self.prepared("sample", *args, **keywords)

    def score_plain(self, *args: Any, **keywords: Any) -> PlainScores:
        """`QuietStarForCausalLM.score_plain`."""
        return self.prepared("score_plain", *args, **keywords)

    def choose_positions(self, *args: Any, **keywords: Any) -> Tensor | None:
        """`QuietStarForCausalLM.choose_positions`."""
        return self.prepared("choose_positions", *args, **keywords)


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed steps, clips and accumulates."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def configure_engine(accelerator: Accelerator, config: Config) -> None:
    """Tell DeepSpeed what the config says: its own file only says how to cut.

    Raises:
        UserError: A way to tune that the engine cannot serve.
    """
    sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    if sharded and config.tuning.method in ("galore", "qlora"):
        reason = {
            "galore": "projects whole gradients, which lie in pieces",
            "qlora": "keeps 4-bit weights, which cannot be cut",
        }[config.tuning.method]
        raise UserError(
            f"tuning.method: {config.tuning.method} {reason} under {accelerator.distributed_type}. "
            "Launch with configs/accelerate/ddp.yaml, or set tuning.method: lora."
        )
    if not is_deepspeed(accelerator):
        return
    plugin = accelerator.state.deepspeed_plugin
    assert plugin is not None, "DeepSpeed comes with its plugin"
    plugin.deepspeed_config["gradient_clipping"] = config.optim.clip_norm
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.training.micro_batch_size
    plugin.deepspeed_config["gradient_accumulation_steps"] = 1  # the loop accumulates


def accumulate(accelerator: Accelerator, prepared: nn.Module, last: bool):
    """Context of one micro-batch: gradients are exchanged after the last one only."""
    if last or is_deepspeed(accelerator):
        return contextlib.nullcontext()
    return accelerator.no_sync(prepared)


def backward(accelerator: Accelerator, loss: Tensor, last: bool) -> None:
    """Backward of a micro-batch's part of the loss.

    Engines average gradients over processes; the parts are to be added up, so the factor undoes it.
    """
    loss = loss * accelerator.num_processes
    if not is_deepspeed(accelerator):
        accelerator.backward(loss)
        return
    engine = _engine(accelerator)
    engine.set_gradient_accumulation_boundary(is_boundary=last)
    engine.backward(loss)


def update(
    accelerator: Accelerator,
    prepared: nn.Module,
    optimizer: Optimizer,
    clip_norm: float,
    check: Any,
) -> dict[str, Tensor]:
    """Clip and take the optimiser's step; returns the gradient norms before clipping.

    Args:
        accelerator: Of the run.
        prepared: The engine around the `Trainee`.
        optimizer: As prepared.
        clip_norm: Longest gradient.
        check: Called with the norms before the weights change; raises if they must not. DeepSpeed
            knows the norm only after its step, and only in total.
    """
    if is_deepspeed(accelerator):
        check({})
        engine = _engine(accelerator)
        engine.step()
        norm = torch.as_tensor(engine.get_global_grad_norm(), device=accelerator.device)
        norms = {"total": norm.float()}
        check(norms)
        return norms
    norms = gradient_norms(accelerator, prepared, clip_norm)
    check(norms)
    optimizer.step()
    optimizer.zero_grad()
    return norms


def gradient_norms(
    accelerator: Accelerator, prepared: nn.Module, clip_norm: float
) -> dict[str, Tensor]:
    """Gradient norm of each group and in total, before clipping; then clip."""
    by_group: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
    for name, parameter in prepared.named_parameters():
        if parameter.grad is not None:
            by_group[group_of(name)].append(parameter.grad)
    norms = {group: torch.nn.utils.get_total_norm(grads) for group, grads in by_group.items()}
    total = accelerator.clip_grad_norm_(prepared.parameters(), clip_norm)
    assert total is not None, "this engine reports no gradient norm"
    norms["total"] = total
    return norms


def _engine(accelerator: Accelerator) -> Any:
    wrapped = accelerator.deepspeed_engine_wrapped
    assert wrapped is not None, "prepare comes first"
    return wrapped.engine


def gather_outer_weights(accelerator: Accelerator, trainee: Trainee) -> None:
    """Under ZeRO-3, have some weights gathered during the whole of the trainee's forward.

    The fused cross entropy reads the output layer's weight outside that layer, and a method other
    than forward the two vectors outside their module's forward.
    """
    plugin = accelerator.state.deepspeed_plugin if is_deepspeed(accelerator) else None
    if plugin is None or plugin.zero_stage < 3:
        return
    import deepspeed  # pyright: ignore[reportMissingImports]  (an extra)

    model = trainee.model
    head = model.output_head
    for weight in (head.weight, head.bias, model.start_embedding, model.end_embedding):
        if weight is not None:
            deepspeed.zero.register_external_parameter(trainee, weight)


def full_weights(accelerator: Accelerator, prepared: nn.Module) -> dict[str, Tensor] | None:
    """All weights of the model, in one piece on the main process; None where they are so anyway.

    To be called on all processes.
    """
    plugin = accelerator.state.deepspeed_plugin if is_deepspeed(accelerator) else None
    in_pieces = accelerator.distributed_type == DistributedType.FSDP
    if plugin is not None:
        in_pieces = plugin.zero_stage == 3
    if not in_pieces:
        return None
    weights: Any = accelerator.get_state_dict(prepared) or {}
    return {name.removeprefix("model."): weight for name, weight in weights.items()}
