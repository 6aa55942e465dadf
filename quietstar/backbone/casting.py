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
    sparing = getattr(model, "is_gradient_checkpointing", False)
    found = [] if sparing else list(_cast_each_time(model))
    try:
        for layer, weight in found:
            dtype = torch.get_autocast_dtype(weight.device.type)
            cast = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
            layer.weight = cast
        yield
    finally:
        for layer, weight in found:
            layer.weight = weight


def _cast_each_time(model: nn.Module) -> Iterator[tuple[nn.Linear, nn.Parameter]]:
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    for layer in model.modules():
        if type(layer) is not nn.Linear:
            continue
        weight = layer.weight
        sharded = type(weight) is not nn.Parameter or hasattr(weight, "ds_id")
        remembered = weight.requires_grad and not compiled
        if (
            isinstance(weight, nn.Parameter)
            and weight.dtype == torch.float32
            and torch.is_autocast_enabled(weight.device.type)
            and not sharded
            and not remembered
        ):
            yield layer, weight
