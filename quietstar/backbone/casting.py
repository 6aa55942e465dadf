"""Weights in the type that autocast wants, for as long as many small steps read them.

Autocast remembers how it cast weights that learn, but not what compiled code casts, nor frozen
weights: every step of a rollout would cast all of them anew, which costs as much as its products
where the steps are small.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def cast_weights(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers hold weights cast once, where autocast would cast them at each call.

    For passes without gradient. Sharded weights stay as they are, and all of
    them with activation checkpointing, which says that memory counts: the copies are half a model.
    """
    casts = []
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    is_checkpointed = getattr(model, "is_activation_checkpointing", None)
    if is_checkpointed is None:  # its older name, which newer versions warn of
        is_checkpointed = getattr(model, "is_gradient_checkpointing", False)
    if not is_checkpointed:
        for layer in model.modules():
            weight = layer.weight if type(layer) is nn.Linear else None
            # A sharded weight is of another type, or marked by ZeRO-3; one that a device map keeps
            # elsewhere is not here yet.
            if type(weight) is not nn.Parameter or hasattr(weight, "ds_id") or weight.is_meta:
                continue
            remembered = weight.requires_grad and not compiled
            autocast = torch.is_autocast_enabled(weight.device.type)
            if autocast and weight.dtype == torch.float32 and not remembered:
                casts.append((layer, weight))
    try:
        for layer, weight in casts:
            dtype = torch.get_autocast_dtype(weight.device.type)
            layer.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        yield
    finally:
        for layer, weight in casts:
            layer.weight = weight
