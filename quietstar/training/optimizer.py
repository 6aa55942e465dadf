"""AdamW with own learning rates for the mixing head and the two learned vectors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from quietstar.config import OptimConfig

GROUPS = ("language_model", "mixing_head", "embeddings")
"""Parameter groups, in the optimiser's order; the names are used in logs too."""


def group_of(name: str) -> str:
    """Group of a parameter of `QuietStarForCausalLM`, perhaps wrapped by an engine."""
    name = name.removeprefix("module.")
    if name.startswith("language_model."):
        return "language_model"
    return "mixing_head" if name.startswith("mixing_head.") else "embeddings"


def build_optimizer(model: torch.nn.Module, config: OptimConfig) -> AdamW:
    """AdamW over all parameters that train; biases, norms and the two vectors do not decay."""
    rates = dict(zip(GROUPS, (config.lr, config.mixing_head_lr, config.embedding_lr), strict=True))
    groups = []
    for group in GROUPS:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        params = [p for n, p in named if group_of(n) == group]
        for decays in (True, False):
            chosen = [p for p in params if (p.ndim >= 2) == decays]
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "lr": rates[group] or config.lr,
                        "weight_decay": config.weight_decay if decays else 0.0,
                        "name": group,
                    }
                )
    return AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps)


def build_scheduler(optimizer: AdamW, config: OptimConfig, steps: int) -> LRScheduler:
    """Linear warm-up, then constant or falling to 0 at the last step."""
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return get_scheduler(name, optimizer, config.warmup_steps, steps)


def gradient_norms(
    accelerator: Accelerator, model: torch.nn.Module, clip_norm: float
) -> dict[str, Tensor]:
    """Gradient norm of each group and in total, before clipping; then clip."""
    by_group: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            by_group[group_of(name)].append(parameter.grad)
    norms = {group: _norm(grads) for group, grads in by_group.items()}
    total = accelerator.clip_grad_norm_(model.parameters(), clip_norm)
    assert total is not None, "this engine reports no gradient norm"
    norms["total"] = total
    return norms


def _norm(grads: Iterable[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(list(grads))
