"""Low-rank adapters and their kin, by PEFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quietstar.config import TuningConfig
from quietstar.errors import UserError

PEFT_METHODS = ("lora", "rslora", "dora", "qlora", "ia3")

_KEYS_AND_VALUES = ("k_proj", "v_proj", "query_key_value", "c_attn", "qkv_proj", "Wqkv")
_MLP_OUTPUT = ("down_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "mlp.c_proj", "output.dense")


def require_peft() -> Any:
    """Import PEFT, which is an extra.

    Raises:
        UserError: It is not installed.
    """
    try:
        import peft
    except ImportError as problem:
        raise UserError(
            f"tuning.method: adapters need PEFT ({problem}): pip install 'quietstar[peft]', or set "
            "another method"
        ) from problem
    return peft


def add_peft(model: PreTrainedModel, tuning: TuningConfig) -> nn.Module:
    """The PEFT model of the method around ``model``.

    Raises:
        UserError: The targets fit no layer.
    """
    config = _ia3(model, tuning) if tuning.method == "ia3" else _lora(tuning)
    try:
        return require_peft().get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as problem:
        raise UserError(
            f"tuning.lora_target_modules: {tuning.lora_target_modules} fits no layer of "
            f"{type(model).__name__}; its linear layers are {', '.join(linear_names(model))}"
        ) from problem


def _lora(tuning: TuningConfig) -> Any:
    return require_peft().LoraConfig(
        task_type="CAUSAL_LM",
        r=tuning.lora_r,
        lora_alpha=tuning.lora_alpha,  # pyright: ignore[reportArgumentType]  (floats work)
        lora_dropout=0.0,
        target_modules=tuning.lora_target_modules or "all-linear",
        use_rslora=tuning.method == "rslora",
        use_dora=tuning.method == "dora",
    )


def _ia3(model: PreTrainedModel, tuning: TuningConfig) -> Any:
    """Scales of keys, values and the MLP's inner activations (Liu et al. 2022)."""
    names = [name for name, module in model.named_modules() if is_linear(module)]
    inner = _ending(names, _MLP_OUTPUT)
    targets = tuning.lora_target_modules or [*_ending(names, _KEYS_AND_VALUES), *inner]
    return require_peft().IA3Config(
        task_type="CAUSAL_LM",
        target_modules=targets,
        feedforward_modules=[name for name in inner if name in targets],
    )


def _ending(names: list[str], endings: tuple[str, ...]) -> list[str]:
    """Of the endings those that some module has."""
    return [end for end in endings if any(n == end or n.endswith(f".{end}") for n in names)]


def is_linear(module: nn.Module) -> bool:
    """Whether adapters can sit beside this layer."""
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit")


def linear_names(model: nn.Module) -> list[str]:
    """Last names of all linear layers."""
    return sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if is_linear(m)})


def keep_gradients_of_4bit(model: nn.Module) -> None:
    """Keep 4-bit layers trainable after a forward pass in eval mode, as a rollout may be.

    On a CPU bitsandbytes repacks them for inference there, and from then on no gradient flows.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # pyright: ignore


def quantization(tuning: TuningConfig):
    """How to load the frozen weights: None, or 4-bit NormalFloat for ``qlora``.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if tuning.method != "qlora":
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as problem:
        raise UserError(
            "tuning.method: qlora needs bitsandbytes: pip install 'quietstar[qlora]', or set "
            "tuning.method: lora"
        ) from problem
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
