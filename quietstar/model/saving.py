"""What a saved Quiet-STaR model is: a folder of safetensors and JSON.

``quietstar.json`` holds the settings, ``quietstar.safetensors`` the two vectors, the mixing head
and what was trained beside a frozen language model. Beside them lies, with full tuning, a complete
Hugging Face model, which `AutoModelForCausalLM` loads as a plain one; with LoRA and its kin the
PEFT adapter. A frozen base itself is only named.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quietstar.backbone.loading import load_base
from quietstar.config import MixingHeadConfig, ThoughtsConfig, TuningConfig
from quietstar.errors import UserError
from quietstar.model.self_check import check_architecture, use_thinking_attention
from quietstar.model.tuning import (
    PEFT_METHODS,
    WHOLE,
    apply_tuning,
    beside_peft,
    keep_gradients_of_4bit,
    quantization,
    require_peft,
    unfreeze,
)

SETTINGS_FILE = "quietstar.json"
WEIGHTS_FILE = "quietstar.safetensors"
FORMAT_VERSION = 3
"""1 knew full tuning and LoRA only; 2 carried the loss of its training, and other names."""
LANGUAGE_MODEL = "language_model."


def save_pretrained(
    model: Any,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write ``model`` into ``folder`` (made if need be); see the module docstring."""
    folder.mkdir(parents=True, exist_ok=True)
    if model.tuning.method in (*WHOLE, *PEFT_METHODS):
        inner = None
        if weights is not None:
            names = [name for name in weights if name.startswith(LANGUAGE_MODEL)]
            inner = {name.removeprefix(LANGUAGE_MODEL): weights[name] for name in names}
        model.language_model.save_pretrained(folder, state_dict=inner)  # pyright: ignore
    settings = {
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": model.causal_lm.config.name_or_path,
        "base_revision": vars(model.causal_lm.config).get("_commit_hash"),  # of a hub model
        "dtype": str(model.causal_lm.dtype).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        "pause_token_id": model.pause_token_id,
        "thoughts": model.thoughts.model_dump(),
        "mixing_head": model.mixing_head_config.model_dump(),
        "texts_seen": model.texts_seen,
        "tuning": model.tuning.model_dump(),
    }
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    own = _trained_weights(model, model.state_dict() if weights is None else weights)
    save_file(own, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _trained_weights(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The two vectors, the mixing head, and trained weights that lie in no other file."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {
        name: value.detach().contiguous()
        for name, value in weights.items()
        if not name.startswith(LANGUAGE_MODEL) or (name in trained and _is_beside(model, name))
    }


def _is_beside(model: Any, name: str) -> bool:
    method = model.tuning.method
    if method in WHOLE:
        return False
    return method not in PEFT_METHODS or beside_peft(name)


def from_pretrained(
    cls: type[Any],
    folder: Path,
    *,
    dtype: torch.dtype | str,
    trainable: bool,
    **hub: Any,
) -> Any:
    """Load a folder that `save_pretrained` wrote.

    Raises:
        UserError: The folder holds no Quiet-STaR model, or one of a newer format.
    """
    settings = read_settings(folder)
    tuning = TuningConfig.model_validate(settings["tuning"])
    source = str(folder)
    if tuning.method not in WHOLE:
        source = settings["base_model_name_or_path"]
        hub.setdefault("revision", settings["base_revision"])
    dtype = getattr(torch, settings["dtype"]) if dtype == "auto" else dtype
    base = load_base(source, dtype=dtype, quantization=quantization(tuning), **hub)
    check_architecture(base)
    use_thinking_attention(base)
    keep_gradients_of_4bit(base)
    model = rebuild(cls, _tuned(base, tuning, folder, trainable), settings, tuning)
    own = load_file(folder / WEIGHTS_FILE)
    missing, unexpected = model.load_state_dict(own, strict=False)
    missing = [name for name in missing if not name.startswith(LANGUAGE_MODEL)]
    if missing or unexpected:
        raise UserError(f"{folder / WEIGHTS_FILE}: tensors missing {missing}, unknown {unexpected}")
    if not trainable and tuning.method not in WHOLE:
        model.language_model.requires_grad_(False)
    return model.eval()


def rebuild(
    cls: type[Any],
    language_model: torch.nn.Module,
    settings: dict[str, Any],
    tuning: TuningConfig,
) -> Any:
    """The model around a language model, by the settings of ``quietstar.json``."""
    model = cls(
        language_model,
        ThoughtsConfig.model_validate(settings["thoughts"]),
        MixingHeadConfig.model_validate(settings["mixing_head"]),
        None,
        settings["vocab_size"],
        settings["pause_token_id"],
        tuning,
    )
    model.texts_seen = settings["texts_seen"]
    return model


def _tuned(
    base: PreTrainedModel, tuning: TuningConfig, folder: Path, trainable: bool
) -> torch.nn.Module:
    """The language model as it was trained; what is not PEFT's is loaded with the own weights."""
    if tuning.method not in PEFT_METHODS:
        return apply_tuning(base, tuning)
    model = require_peft().PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    if trainable:
        unfreeze(model, tuning.unfreeze)
    return model


def read_settings(folder: Path) -> dict[str, Any]:
    """``quietstar.json`` of a saved model.

    Raises:
        UserError: There is none, or one of a newer format.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        if (folder / "final" / SETTINGS_FILE).exists():
            raise UserError(f"{folder} is the folder of a run; its model is in {folder / 'final'}")
        if not folder.exists():
            raise UserError(f"{folder}: there is no such folder")
        raise UserError(
            f"{folder}: no Quiet-STaR model lies here ({SETTINGS_FILE} is missing). For a plain "
            "model use QuietStarForCausalLM.from_base."
        )
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {settings['format_version']} is newer than this quietstar "
            f"reads ({FORMAT_VERSION}). Upgrade quietstar."
        )
    if settings["format_version"] == 1:  # knew full tuning and LoRA only
        is_lora = (folder / "adapter_config.json").exists()
        settings["tuning"] = {"method": "lora" if is_lora else "full"}
    return _translated(settings)


_OLD_NAMES = {
    "thoughts": {"source": "sampler", "share": "position_fraction"},
    "tuning": {
        "lora_rank": "lora_r",
        "lora_targets": "lora_target_modules",
        "virtual_tokens": "num_virtual_tokens",
        "galore_update_every": "galore_update_proj_gap",
    },
}


def _translated(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an older format in today's names."""
    for section, names in _OLD_NAMES.items():
        settings[section] = {names.get(k, k): v for k, v in settings[section].items()}
    if settings["thoughts"].get("sampler") == "sampled":
        settings["thoughts"]["sampler"] = "rollout"
    settings.setdefault("texts_seen", 0)
    return settings
