"""Bottleneck adapters (Houlsby et al. 2019): x + up(relu(down(x))) behind a frozen sub-layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.config import TuningConfig
from quietstar.errors import UserError

_MLP_NAMES = ("mlp", "feed_forward", "fc2", "ffn", "block_sparse_moe")


class Bottleneck(nn.Module):
    """The adapter of one sub-layer; adds nothing at the start.

    Args:
        width: Of the model.
        size: Of the bottleneck.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        nn.init.normal_(self.down.weight, std=1e-2)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as the input."""
        inner = x.to(self.down.weight.dtype)
        return x + self.up(torch.relu(self.down(inner))).to(x.dtype)


def add_bottlenecks(model: PreTrainedModel, tuning: TuningConfig) -> None:
    """Put adapters behind the MLP of every layer, and behind its attention with ``houlsby``.

    They are children of the sub-layers named ``adapter``, in float32.

    Raises:
        UserError: The layers are built in another way.
    """
    width = model.config.get_text_config().hidden_size
    for layer in decoder_layers(model):
        parts = [_mlp(layer)]
        if tuning.method == "houlsby":
            parts.append(_attention(layer))
        if None in parts:
            raise UserError(
                f"tuning.method: {tuning.method} finds no MLP or attention in a layer of "
                f"{type(model).__name__} (it has {', '.join(n for n, _ in layer.named_children())}"
                "); set tuning.method: lora"
            )
        for part in parts:
            assert part is not None
            device = next(part.parameters()).device
            part.add_module("adapter", Bottleneck(width, tuning.adapter_size).to(device))
            part.register_forward_hook(_apply)


def _apply(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook: the adapter on the sub-layer's hidden states."""
    adapter = module.adapter
    assert isinstance(adapter, Bottleneck)
    if isinstance(output, tuple):  # attention returns its weights too
        return (adapter(output[0]), *output[1:])
    return adapter(output)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers.

    Raises:
        UserError: There is no list as long as the config says.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    lists = [m for m in lists if _attention(m[0]) is not None]
    if not lists:
        raise UserError(
            f"the decoder layers of {type(model).__name__} are not to be found; set "
            "tuning.method: lora or full"
        )
    return lists[0]


def _attention(layer: nn.Module) -> nn.Module | None:
    parts = (m for _, m in layer.named_children() if "attention" in type(m).__name__.lower())
    return next(parts, None)


def _mlp(layer: nn.Module) -> nn.Module | None:
    children = dict(layer.named_children())
    return next((children[name] for name in _MLP_NAMES if name in children), None)
