"""Learned virtual tokens in front of every text: prompt tuning and prefix tuning.

``prompt`` (Lester et al. 2021) learns the input embeddings of n tokens. ``prefix`` (P-tuning v2,
Liu et al. 2022) learns keys and values of n tokens in every layer. Both are laid out as n text
tokens in front of the text (`quietstar.backbone.run.embed_text`), which every text token and
every thought sees; with ``prefix`` each attention layer puts the learned keys and values in the
place of theirs (`quietstar.attention.interface`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.attention.passes import VIRTUAL_TOKENS
from quietstar.config import TuningConfig
from quietstar.errors import UserError
from quietstar.model.tuning.bottleneck import decoder_layers


class VirtualTokens(nn.Module):
    """Input embeddings of the virtual tokens.

    Args:
        embeddings: (n, embedding), where they start.
        learned: Whether they train; with ``prefix`` nothing reads what comes of them.
    """

    embeddings: Tensor

    def __init__(self, embeddings: Tensor, learned: bool) -> None:
        super().__init__()
        if learned:
            self.embeddings = nn.Parameter(embeddings.float())
        else:
            self.register_buffer("embeddings", torch.zeros_like(embeddings), persistent=False)


class VirtualKeyValues(nn.Module):
    """Keys and values of the virtual tokens in one layer, (Hkv, n, head size) each.

    Args:
        shape: Of the keys.
        device: Of the layer.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(shape, device=device) * 0.02)
        self.values = nn.Parameter(torch.randn(shape, device=device) * 0.02)


def add_virtual_tokens(model: PreTrainedModel, tuning: TuningConfig) -> None:
    """Give the model learned virtual tokens, as its child ``virtual_tokens``.

    Raises:
        UserError: With ``prefix``, keys and values whose sizes the config does not tell.
    """
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor), type(model).__name__
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(weight.shape[0], (tuning.num_virtual_tokens,), generator=generator)
    start = weight.detach()[chosen.to(weight.device)]  # as Lester et al.: of real tokens
    learned = tuning.method == "prompt"
    model.add_module(VIRTUAL_TOKENS, VirtualTokens(start, learned))
    if not learned:
        for layer in decoder_layers(model):
            _add_key_values(model, layer, tuning.num_virtual_tokens)


def _add_key_values(model: PreTrainedModel, layer: nn.Module, count: int) -> None:
    config = model.config.get_text_config()
    attention = next(
        m for _, m in layer.named_children() if "attention" in type(m).__name__.lower()
    )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "qk_rope_head_dim", None):
        raise UserError(
            f"tuning.method: prefix does not fit {type(model).__name__}, whose keys and values are "
            "made from a latent; set tuning.method: prompt or lora"
        )
    device = next(attention.parameters()).device
    attention.add_module(VIRTUAL_TOKENS, VirtualKeyValues((heads, count, size), device))
