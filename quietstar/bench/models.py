"""What benchmarks run on: built-in models with random weights, or folders."""

from __future__ import annotations

import argparse
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quietstar.config import LossConfig, MixingHeadConfig, ThoughtsConfig
from quietstar.engine.self_check import use_thinking_attention
from quietstar.loading import load_base
from quietstar.model import QuietStarForCausalLM

MODELS: dict[str, dict[str, Any]] = {
    "mistral-tiny": {
        "model_type": "mistral",
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 688,
        "vocab_size": 2048,
        "sliding_window": None,
        "max_position_embeddings": 8192,
    }
}


def load_model(name: str, vocab_size: int | None = None) -> PreTrainedModel:
    """A model of `MODELS` with random weights, or one of a folder."""
    if name not in MODELS:
        return load_base(name)
    fields = dict(MODELS[name])
    if vocab_size is not None:
        fields["vocab_size"] = vocab_size
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields)
    )


def make_thinker(
    base: PreTrainedModel, args: argparse.Namespace, **thoughts: Any
) -> QuietStarForCausalLM:
    """A Quiet-STaR model around a plain one."""
    use_thinking_attention(base)
    config = ThoughtsConfig(length=args.thought_length, **thoughts)
    size = base.config.vocab_size
    return QuietStarForCausalLM(base, config, MixingHeadConfig(), LossConfig(), size)
