"""Adapters into their base: from a saved folder that names its base to one that holds it all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from quietstar.config import TuningConfig
from quietstar.errors import UserError
from quietstar.model import saving
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.model.tuning import PEFT_METHODS, WHOLE


@torch.no_grad()
def merge(folder: Path, out: Path, **hub: Any) -> Path:
    """Write the model of ``folder`` with its adapters merged; also loads as a plain model.

    Args:
        folder: Written by `QuietStarForCausalLM.save_pretrained`.
        out: Folder to write; it must be new or empty.
        **hub: ``trust_remote_code``.

    Raises:
        UserError: Nothing to merge, or what cannot be merged, or ``out`` is not empty.
    """
    settings = saving.read_settings(folder)
    tuning = TuningConfig.model_validate(settings["tuning"])
    if tuning.method not in PEFT_METHODS:
        reason = "holds the whole model already; it needs no merging"
        if tuning.method not in WHOLE:
            is_virtual = tuning.method in ("prompt", "prefix")
            added = "virtual tokens" if is_virtual else "bottleneck adapters"
            reason = f"has {added}, which no weight of the base can stand for"
        raise UserError(f"--model: {folder} {reason}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} already holds something; give a new folder")
    if tuning.method == "qlora":  # adapters fit the base in full precision as well
        settings["tuning"]["method"] = "lora"
    model = saving.load(
        QuietStarForCausalLM, folder, settings, dtype="auto", trainable=False, **hub
    )
    model.language_model = model.language_model.merge_and_unload()  # pyright: ignore
    model.tuning = TuningConfig(method="full")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"--out: {out} cannot be made ({problem.strerror}); give another") from None
    model.save_pretrained(out)
    if (folder / "tokenizer_config.json").exists():
        AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out
