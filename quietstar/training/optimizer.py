"""AdamW with separate learning rates for the mixing head and the two vectors; the schedule."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

from quietstar.config import OptimConfig, TuningConfig
from quietstar.distributed import GROUPS, Group, group_of
from quietstar.errors import UserError


def build_optimizer(
    model: torch.nn.Module, config: OptimConfig, tuning: TuningConfig | None = None
) -> Optimizer:
    """Builds AdamW over all parameters that train; biases, norms and the two vectors do not decay.

    With ``tuning.method: galore`` the gradients of the layers' matrices are projected to a low rank
    (Zhao et al. 2024), and so is what AdamW remembers of them. With ``optim.name: paged_*`` it is
    the AdamW of bitsandbytes (QLoRA, arXiv 2305.14314, section 3). Raises UserError if the package
    of either is not installed.
    """
    galore = None
    if tuning is not None and tuning.method == "galore":
        galore = tuning.method_options
    by_kind: dict[tuple[Group, bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            projected = galore is not None and is_projected(name, parameter, galore.rank)
            shape = getattr(parameter, "ds_shape", parameter.shape)  # of the whole under ZeRO-3
            group = group_of(name)
            kind = (group, len(shape) >= 2 and group != "embeddings", projected)
            by_kind.setdefault(kind, []).append(parameter)
    rates: dict[Group, float] = {
        "language_model": config.learning_rate,
        "mixing_head": config.mixing_head_learning_rate or config.learning_rate,
        "embeddings": config.embedding_learning_rate or config.learning_rate,
    }
    groups: list[Any] = []
    order = sorted(by_kind, key=lambda kind: (GROUPS.index(kind[0]), not kind[1], not kind[2]))
    for name, decays, projected in order:
        group = {
            "params": by_kind[name, decays, projected],
            "lr": rates[name],
            "initial_lr": rates[name],  # `set_learning_rates` multiplies it
            "weight_decay": config.weight_decay if decays else 0.0,
            "name": name,
        }
        if galore is not None and projected:
            group |= galore.model_dump() | {"proj_type": "std"}
        groups.append(group)
    betas = (config.betas[0], config.betas[1])
    if config.name != "adamw_torch":
        try:
            from bitsandbytes import optim
        except ImportError as problem:
            raise UserError(
                f"optim.name: {config.name} needs bitsandbytes: pip install 'quietstar[qlora]', or "
                "set optim.name: adamw_torch"
            ) from problem
        bits = "8bit" if config.name.endswith("8bit") else "32bit"
        return getattr(optim, f"PagedAdamW{bits}")(groups, betas=betas)
    if galore is None:
        return AdamW(groups, betas=betas)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from galore_torch import GaLoreAdamW
    except ImportError as problem:
        raise UserError(
            "tuning.method: galore needs galore-torch: pip install 'quietstar[galore]', or set "
            "tuning.method: full"
        ) from problem
    optimizer = GaLoreAdamW(groups, betas=betas, eps=1e-8, no_deprecation_warning=True)
    optimizer.register_state_dict_post_hook(_keep_projections)
    optimizer.register_load_state_dict_post_hook(_make_projectors)
    return optimizer


def _keep_projections(optimizer: Optimizer, content: dict[str, Any]) -> dict[str, Any]:
    """Puts the matrices of GaLore's projectors, which are objects, in their place.

    A checkpoint is read without running code, so it holds nothing but tensors and numbers.
    """
    content["state"] = {index: dict(parts) for index, parts in content["state"].items()}
    for parts in content["state"].values():
        if "projector" in parts:
            parts["projection"] = parts.pop("projector").ortho_matrix
    return content


def _make_projectors(optimizer: Optimizer) -> None:
    """Makes the projectors anew of what a checkpoint keeps of them."""
    from galore_torch.galore_projector import GaLoreProjector

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parts = optimizer.state.get(parameter, {})
            if "projection" in parts:
                names = ("update_proj_gap", "scale", "proj_type")
                projector = GaLoreProjector(group["rank"], **{name: group[name] for name in names})
                projector.ortho_matrix = parts.pop("projection")
                parts["projector"] = projector


def is_projected(name: str, parameter: torch.nn.Parameter, rank: int) -> bool:
    """Returns True for what GaLore projects: matrices of decoder layers larger than the rank."""
    in_layer = any(part.isdigit() for part in name.split("."))
    in_model = in_layer and group_of(name) == "language_model"
    return in_model and parameter.ndim == 2 and min(parameter.shape) > rank


def learning_rate_factor(config: OptimConfig, step: int, max_steps: int) -> float:
    """Returns the factor of every learning rate in a step: linear warm-up, then the schedule.

    It depends on the config alone, so a resumed run takes its learning rates from its own config
    and no checkpoint holds a schedule. As in transformers, a warm-up begins at 0 and ``linear`` and
    ``cosine`` fall to 0 after the last step. ``step`` counts those of the stage already done.
    """
    if step < config.warmup_steps:
        return step / config.warmup_steps
    decay_steps = max(1, max_steps - config.warmup_steps)
    if config.lr_scheduler_type == "linear":
        return max(0.0, (max_steps - step) / decay_steps)
    if config.lr_scheduler_type == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * ((step - config.warmup_steps) / decay_steps)))
    return 1.0


def set_learning_rates(
    optimizer: Optimizer, config: OptimConfig, step: int, max_steps: int
) -> float:
    """Gives every group its learning rate of a step; returns the first group's."""
    factor = learning_rate_factor(config, step, max_steps)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return optimizer.param_groups[0]["lr"]
