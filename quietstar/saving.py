"""What a saved Quiet-STaR model is: a folder of safetensors and JSON.

``quietstar.json`` holds the settings, ``quietstar.safetensors`` the two vectors and the mixing
head. Beside them lies the language model: with full tuning a complete Hugging Face model, which
`AutoModelForCausalLM` loads as a plain one; with LoRA the adapter, which names its base.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from quietstar.config import LossConfig, MixingHeadConfig, ThoughtsConfig
from quietstar.engine.self_check import check_architecture, use_thinking_attention
from quietstar.errors import UserError
from quietstar.loading import load_base

if TYPE_CHECKING:
    from quietstar.model import QuietStarForCausalLM

SETTINGS_FILE = "quietstar.json"
WEIGHTS_FILE = "quietstar.safetensors"
FORMAT_VERSION = 1


def save_pretrained(
    model: QuietStarForCausalLM, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write ``model`` into ``folder`` (made if need be); see the module docstring."""
    folder.mkdir(parents=True, exist_ok=True)
    model.language_model.save_pretrained(folder)  # pyright: ignore  (PreTrainedModel, PeftModel)
    settings = {
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": model.causal_lm.config.name_or_path,
        "base_revision": vars(model.causal_lm.config).get("_commit_hash"),  # of a hub model
        "dtype": str(model.causal_lm.dtype).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        "pause_token_id": model.pause_token_id,
        "thoughts": model.thoughts.model_dump(),
        "mixing_head": model.mixing_head_config.model_dump(),
        "loss": model.loss.model_dump(),
    }
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(_own_weights(model), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _own_weights(model: QuietStarForCausalLM) -> dict[str, torch.Tensor]:
    """The two vectors and the mixing head: all that is not the language model."""
    return {
        name: value.detach().contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith("language_model.")
    }


def from_pretrained(
    cls: type[QuietStarForCausalLM],
    folder: Path,
    *,
    dtype: torch.dtype | str,
    trainable: bool,
    **hub: Any,
) -> QuietStarForCausalLM:
    """Load a folder that `save_pretrained` wrote.

    Raises:
        UserError: The folder holds no Quiet-STaR model, or one of a newer format.
    """
    settings = _read_settings(folder)
    adapter = folder / peft.utils.CONFIG_NAME
    source = str(folder)
    if adapter.exists():
        source = settings["base_model_name_or_path"]
        hub.setdefault("revision", settings["base_revision"])
    dtype = getattr(torch, settings["dtype"]) if dtype == "auto" else dtype
    base = load_base(source, dtype=dtype, **hub)
    check_architecture(base)
    use_thinking_attention(base)
    language_model = base
    if adapter.exists():
        language_model = peft.PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    model = cls(
        language_model,
        ThoughtsConfig.model_validate(settings["thoughts"]),
        MixingHeadConfig.model_validate(settings["mixing_head"]),
        LossConfig.model_validate(settings["loss"]),
        settings["vocab_size"],
        settings["pause_token_id"],
    )
    own = load_file(folder / WEIGHTS_FILE)
    missing, unexpected = model.load_state_dict(own, strict=False)
    missing = [name for name in missing if not name.startswith("language_model.")]
    if missing or unexpected:
        raise UserError(f"{folder / WEIGHTS_FILE}: tensors missing {missing}, unknown {unexpected}")
    return model.eval()


def _read_settings(folder: Path) -> dict:
    path = folder / SETTINGS_FILE
    if not path.exists():
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
    return settings
