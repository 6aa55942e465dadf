"""A tiny, randomly initialised copy of a model's own architecture, made to show differences."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

WINDOW = 4
"""Sliding window of the copy: shorter than the text of the check."""
SOFTCAP = 3.0
"""Soft caps of the copy: low enough to bend its logits."""

_SIZES = {
    "intermediate_size": 48,
    "ffn_dim": 48,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "vocab_size": 61,
    "vocab_size_per_layer_input": 61,
    "rotary_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention")
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
_PEAKED = ("q_proj", "k_proj", "query", "key", "qkv", "c_attn", "q_b_proj", "kv_b_proj", "Wqkv")


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same architecture, small: few layers (one of each kind), heads, experts and words."""
    tiny = copy.deepcopy(config)
    for name, value in _SIZES.items():
        if _number(tiny, name):
            setattr(tiny, name, min(value, getattr(tiny, name)))
    for name in _TOKEN_IDS:
        setattr(tiny, name, None)
    _shrink_heads(tiny)
    _shrink_layers(tiny)
    for name in list(vars(tiny)):
        if name in _WINDOWS and _number(tiny, name):
            setattr(tiny, name, min(WINDOW, getattr(tiny, name)))
        elif "softcapping" in name and _number(tiny, name):
            setattr(tiny, name, SOFTCAP)
    return tiny


def _number(config: PreTrainedConfig, name: str) -> bool:
    value = getattr(config, name, None)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shrink_heads(config: PreTrainedConfig) -> None:
    """Keep whether and how query heads share keys; 2 key/value heads at most, heads of 16."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None)
    new_kv = 1 if kv_heads == 1 else 2
    groups = 1 if kv_heads in (None, heads) else 2
    old_width = config.hidden_size
    config.num_attention_heads = new_kv * groups if kv_heads is not None else 4
    if kv_heads is not None:
        config.num_key_value_heads = new_kv
    fixed_size = _has_long_rope(config)  # its factor lists have the length of the real head
    head_size = old_width // heads if fixed_size else 16
    latent = _number(config, "qk_rope_head_dim")  # latent attention: small sizes of its own
    if "head_dim" in vars(config) and _number(config, "head_dim") and not latent:
        head_size = config.head_dim if fixed_size else 16
        config.head_dim = head_size
    config.hidden_size = config.num_attention_heads * head_size
    if _number(config, "word_embed_proj_dim"):
        same = config.word_embed_proj_dim == old_width
        config.word_embed_proj_dim = config.hidden_size if same else config.hidden_size // 2


def _has_long_rope(config: PreTrainedConfig) -> bool:
    parameters = getattr(config, "rope_parameters", None) or {}
    return any(isinstance(v, list) for v in parameters.values())


def _shrink_layers(config: PreTrainedConfig) -> None:
    """The first layer of each kind, two layers at least."""
    old = config.num_hidden_layers
    kinds: list[Any] = list(getattr(config, "layer_types", None) or [None] * old)
    chosen = sorted({kinds.index(kind) for kind in set(kinds)})
    for index in range(old):
        if len(chosen) < 2 and index not in chosen:
            chosen.append(index)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == old:
            setattr(config, name, [value[i] for i in sorted(chosen)])
    config.num_hidden_layers = len(chosen)


@torch.no_grad()
def tiny_model(model: PreTrainedModel) -> PreTrainedModel:
    """A tiny copy of a causal LM in float32 on the CPU, with weights that make faults show.

    Matrices have unit gain, queries and keys twice that (so that attention is peaked), and
    biases, norms and sinks are not at their neutral values.
    """
    config = tiny_config(model.config)
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        tiny = type(model)(config).float().eval()
    for name, parameter in tiny.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            gain = 0.5 if "sink" in name else 0.1
            parameter.add_(noise * gain)
        elif "embed" in name or "wte" in name or "wpe" in name:
            parameter.copy_(noise)
        else:
            gain = 2.0 if any(part in name for part in _PEAKED) else 1.0
            parameter.copy_(noise * gain * parameter.shape[-1] ** -0.5)
    return tiny
