"""Architectures that are supported and refused, and a tiny model of each."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

from quietstar.model.self_check import tiny_model

# The configs' own default leaves the head size unset, and their models cannot be built.
_HEAD_SIZE = {"head_dim": 64}

SUPPORTED: tuple[str, ...] = (
    *("llama", "mistral", "ministral", "ministral3", "mixtral", "qwen2", "qwen3", "qwen2_moe"),
    *("qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo", "olmo2", "olmo3"),
    *("gpt_neox", "gpt2", "opt", "granite", "smollm3", "cohere", "cohere2", "starcoder2", "glm"),
    *("glm4", "exaone4", "seed_oss", "hunyuan_v1_dense", "ernie4_5", "helium", "apertus", "arcee"),
    *("biogpt", "persimmon", "gpt_oss", "deepseek_v3"),
    *("gptj", "codegen"),  # use the attention interface from transformers 5.24 on
)
"""Model types that must come out right."""

REFUSED: tuple[str, ...] = tuple(
    name
    for name in (
        *("falcon", "bloom", "mpt", "gpt_neo", "xglm", "stablelm", "nemotron"),
        *("mamba2", "lfm2", "minicpm3"),
    )
    if name in CONFIG_MAPPING  # minicpm3 is not in every version of transformers
)
"""Model types that must be refused, never computed wrongly."""

_OPTIONS = {
    "ministral": _HEAD_SIZE,
    "hunyuan_v1_dense": _HEAD_SIZE,
    "nemotron": _HEAD_SIZE | {"num_key_value_heads": 8},
    "lfm2": {
        "layer_types": ["conv", "conv", "full_attention"] * 5 + ["conv"],
        "num_hidden_layers": 16,
    },
}


def meta_model(name: str) -> PreTrainedModel:
    """A model of the type's default config, without weights (on the meta device)."""
    config = AutoConfig.for_model(name, **_OPTIONS.get(name, {}))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def tiny_architecture(name: str) -> PreTrainedModel:
    """A tiny float32 model of the type with eager attention and weights that make faults show."""
    return tiny_model(meta_model(name))
