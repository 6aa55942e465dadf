"""From names to models: base weights, adapters, and the vectors that open and close a thought."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from quietstar.backbone.run import embedding_weight
from quietstar.errors import UserError

logger = logging.getLogger(__name__)


def load_base(
    name_or_path: str | None,
    config: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype | str = torch.float32,
    vocab_size: int | None = None,
    seed: int = 0,
    quantization: Any = None,
    **hub: Any,
) -> PreTrainedModel:
    """Load a causal LM with dropout off, or build one with random weights.

    Args:
        name_or_path: Hub id or folder; None builds the model of ``config``.
        config: ``model_type`` and fields of its transformers config.
        dtype: Of the weights; "stored" keeps the dtype of the files, whose weights are then mapped
            into memory and not copied.
        vocab_size: Of the built model where ``config`` names none.
        seed: Seed of the random weights.
        quantization: How transformers shall quantize the weights, None for not at all.
        **hub: ``revision``, ``trust_remote_code``.

    Raises:
        UserError: No such model, no causal LM, or a config that cannot be built.
    """
    try:
        if name_or_path is None:
            settings = build_config(dict(config or {}), vocab_size)
            dropped = drop_dropout(settings)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
        else:
            settings = AutoConfig.from_pretrained(name_or_path, **hub)
            dropped = drop_dropout(settings)
            if quantization is not None:
                hub["quantization_config"] = quantization
            if dtype == "stored":
                settings.dtype, dtype = None, "auto"  # else transformers would believe the config
            model = AutoModelForCausalLM.from_pretrained(
                name_or_path, config=settings, dtype=dtype, **hub
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as problem:
        key = "model.config" if name_or_path is None else f"model.name_or_path: {name_or_path!r}"
        reason = " ".join(str(problem).split())[:300]
        raise UserError(
            f"{key}: cannot be loaded as a causal language model ({reason}). Give a folder with "
            "config.json and safetensors weights, or a hub id you can reach."
        ) from problem
    _say_dropped(dropped)
    return model


def build_config(fields: dict[str, Any], vocab_size: int | None) -> PreTrainedConfig:
    """The transformers config of ``model_type`` and its fields.

    Raises:
        ValueError: No model_type, or one unknown to transformers.
    """
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError("model_type is missing")
    if vocab_size is not None:
        fields.setdefault("vocab_size", vocab_size)
    return AutoConfig.for_model(model_type, **fields)


def drop_dropout(config: PreTrainedConfig) -> list[str]:
    """Set every dropout of a model config to 0; returns the names that were not."""
    floats = {n: x for n, x in vars(config).items() if "drop" in n and isinstance(x, float)}
    names = [name for name, value in floats.items() if value > 0]
    for name in names:
        setattr(config, name, 0.0)
    return names


def drop_dropout_layers(model: PreTrainedModel) -> None:
    """Set every dropout of a model that is already built to 0, and say so."""
    _say_dropped(drop_dropout(model.config))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # OPT and Llama keep plain numbers
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _say_dropped(names: list[str]) -> None:
    if names:
        logger.warning(
            "dropout is set to 0 (%s): with it the loss would not score the sampled thoughts",
            ", ".join(names),
        )


def stored_dtypes(model: PreTrainedModel) -> set[torch.dtype]:
    """Returns the floating-point dtypes in the safetensors files that a model was loaded from."""
    name = str(model.config.name_or_path)
    revision, folder = vars(model.config).get("_commit_hash"), Path(name)
    if not folder.is_dir():
        folder = Path(str(cached_file(name, "config.json", revision=revision))).parent
    dtypes = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            dtypes |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
             "BF16": torch.bfloat16}  # fmt: skip
    return {known[name] for name in dtypes if name in known}


@torch.no_grad()
def initial_embedding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, key: str
) -> Tensor:
    """Input embedding of ``text``, (embedding,); of several tokens the mean, and that is said.

    Messages name the config key ``key``.

    Raises:
        UserError: ``text`` has no tokens.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"{key}: {text!r} has no tokens in this tokenizer; choose another text")
    if len(ids) > 1:
        logger.warning(
            "%s: %r is %d tokens here; the vector starts as the mean of their embeddings",
            key, text, len(ids),
        )  # fmt: skip
    tokens = torch.tensor(ids, device=embedding_weight(model).device)
    return model.get_input_embeddings()(tokens).float().mean(0)
