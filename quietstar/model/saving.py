"""What a saved Quiet-STaR model is: a folder of safetensors and JSON.

``quietstar.json`` holds the settings, ``quietstar.safetensors`` the two vectors, the mixing head
and what was trained beside a frozen language model. Beside them lies, with full tuning, a complete
Hugging Face model, which `AutoModelForCausalLM` loads as a plain one; with LoRA and its kin the
PEFT adapter. A frozen base itself is only named.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from quietstar.backbone.loading import load_base
from quietstar.config import MixingHeadConfig, ThoughtsConfig, TuningConfig
from quietstar.errors import UserError
from quietstar.model.self_check import check_architecture, use_thinking_attention
from quietstar.model.tuning import (
    PEFT_METHODS,
    WHOLE,
    apply_tuning,
    quantization,
    require_peft,
    unfreeze,
)

SETTINGS_FILE = "quietstar.json"
WEIGHTS_FILE = "quietstar.safetensors"
FORMAT_VERSION = 3
"""1 knew full tuning and LoRA only; 2 carried the loss of its training, and other names."""
LANGUAGE_MODEL = "language_model."
_OLD_NAMES = {
    "thoughts": {"source": "sampler", "share": "position_fraction"},
    "tuning": {
        "lora_rank": "lora_r",
        "lora_targets": "lora_target_modules",
        "virtual_tokens": "num_virtual_tokens",
        "galore_update_every": "galore_update_proj_gap",
    },
}

Model = TypeVar("Model", bound=nn.Module)


def save_pretrained(  # noqa: D417  (a method of the model, as the next one)
    self: Any,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Save everything that was learned, as safetensors and JSON (`quietstar.model.saving`).

    Args:
        folder: Folder to write; created if need be.
        tokenizer: Tokenizer to save beside the model.
        weights: Full weights, where the model's own are sharded.
    """
    folder, method = Path(folder), self.tuning.method
    folder.mkdir(parents=True, exist_ok=True)
    if method in (*WHOLE, *PEFT_METHODS):
        inner = None
        if weights is not None:
            names = [name for name in weights if name.startswith(LANGUAGE_MODEL)]
            inner = {name.removeprefix(LANGUAGE_MODEL): weights[name] for name in names}
        self.language_model.save_pretrained(folder, state_dict=inner)
    settings = {
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": self.causal_lm.config.name_or_path,
        "base_revision": vars(self.causal_lm.config).get("_commit_hash"),  # of a hub model
        "dtype": str(self.causal_lm.dtype).removeprefix("torch."),
        "vocab_size": self.vocab_size,
        "pause_token_id": self.pause_token_id,
        "thoughts": self.thoughts.model_dump(),
        "mixing_head": self.mixing_head_config.model_dump(),
        "texts_seen": self.texts_seen,
        "tuning": self.tuning.model_dump(),
    }
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    # The language model's weights that were trained and lie in no other file.
    trained = {name for name, p in self.named_parameters() if p.requires_grad}
    if method in WHOLE:
        trained = set()
    elif method in PEFT_METHODS:
        trained = {name for name in trained if "lora_" not in name and "ia3_" not in name}
    own = {
        name: value.detach().contiguous()
        for name, value in (self.state_dict() if weights is None else weights).items()
        if name in trained or not name.startswith(LANGUAGE_MODEL)
    }
    save_file(own, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def from_pretrained(  # noqa: D417
    cls: type[Model],
    folder: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    trainable: bool = False,
    **hub: Any,
) -> Model:
    """Load a saved Quiet-STaR model: what was saved is what is used.

    Args:
        folder: Folder that `save_pretrained` wrote.
        dtype: Type of the language model's weights; by default the one they were trained in.
        trainable: Whether adapters can be trained further.
        **hub: ``revision`` (of an adapter's base; the one trained on by default) and
            ``trust_remote_code``.

    Raises:
        UserError: The folder holds no Quiet-STaR model, or one of a newer format.
    """
    settings = read_settings(Path(folder))
    return load(cls, Path(folder), settings, dtype=dtype, trainable=trainable, **hub)


def load(
    cls: type[Model],
    folder: Path,
    settings: dict[str, Any],
    *,
    dtype: torch.dtype | str,
    trainable: bool,
    **hub: Any,
) -> Model:
    """Load a saved model by these settings; arguments as in `from_pretrained`."""
    tuning = TuningConfig.model_validate(settings["tuning"])
    source = str(folder)
    if tuning.method not in WHOLE:
        source = settings["base_model_name_or_path"]
        hub.setdefault("revision", settings["base_revision"])
    dtype = getattr(torch, settings["dtype"]) if dtype == "auto" else dtype
    base = load_base(source, dtype=dtype, quantization=quantization(tuning), **hub)
    check_architecture(base)
    use_thinking_attention(base)
    if tuning.method in PEFT_METHODS:
        tuned = require_peft().PeftModel.from_pretrained(base, folder, is_trainable=trainable)
        if trainable:
            unfreeze(tuned, tuning.unfreeze)
    else:
        tuned = apply_tuning(base, tuning)
    thoughts = ThoughtsConfig.model_validate(settings["thoughts"])
    mixing_head = MixingHeadConfig.model_validate(settings["mixing_head"])
    sizes = (settings["vocab_size"], settings["pause_token_id"])
    model: Any = cls(tuned, thoughts, mixing_head, None, *sizes, tuning)
    model.texts_seen = settings["texts_seen"]
    own = load_file(folder / WEIGHTS_FILE)
    missing, unexpected = model.load_state_dict(own, strict=False)
    missing = [name for name in missing if not name.startswith(LANGUAGE_MODEL)]
    if missing or unexpected:
        raise UserError(f"{folder / WEIGHTS_FILE}: tensors missing {missing}, unknown {unexpected}")
    if not trainable and tuning.method not in WHOLE:
        tuned.requires_grad_(False)
    return model.eval()


def read_settings(folder: Path) -> dict[str, Any]:
    """``quietstar.json`` of a saved model, in today's names.

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
    for section, names in _OLD_NAMES.items():
        settings[section] = {names.get(k, k): v for k, v in settings[section].items()}
    if settings["thoughts"].get("sampler") == "sampled":
        settings["thoughts"]["sampler"] = "rollout"
    settings.setdefault("texts_seen", 0)
    return settings
