"""Adapters into their base: from a saved folder that names its base to one that holds it all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from quietstar.backbone.run import embedding_weight
from quietstar.config import TuningConfig
from quietstar.data.tokenizer import check_tokenizer_fits, load_tokenizer
from quietstar.errors import UserError, reason_of
from quietstar.model import saving
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.model.tuning import PEFT_METHODS, WHOLE
from quietstar.system.files import file_kind, whole_folder


@torch.no_grad()
def merge(folder: Path, out: Path, plain: bool = False, **hub: Any) -> Path:
    """Write the model of ``folder`` with its adapters merged; also loads as a plain model.

    Args:
        folder: Written by `QuietStarForCausalLM.save_pretrained`.
        out: Folder to write; it must be new or empty.
        plain: Whether to write the causal LM alone, without what makes it think: a student that
            has learned to do without.
        **hub: ``trust_remote_code``.

    Raises:
        UserError: Nothing to merge, or what cannot be merged, or ``out`` is not empty or cannot be
            written.
    """
    _check_new(out)
    settings = saving.read_settings(folder)
    tuning = settings.tuning
    if tuning.method not in PEFT_METHODS and not (plain and tuning.method in WHOLE):
        reason = "holds the whole model already; it needs no merging (but --plain leaves out what"
        reason += " makes it think)"
        if tuning.method not in WHOLE:
            is_virtual = tuning.method in ("prompt", "prefix")
            added = "virtual tokens" if is_virtual else "bottleneck adapters"
            reason = f"has {added}, which no weight of the base can stand for"
        raise UserError(f"--model: {folder} {reason}")
    if tuning.method == "qlora":  # adapters fit the base in full precision as well
        tuning = tuning.model_copy(update={"method": "lora"})
        settings = settings.model_copy(update={"tuning": tuning})
    model = saving.load(
        QuietStarForCausalLM, folder, settings, dtype="auto", trainable=False, **hub
    )
    tokenizer = None
    if (folder / "tokenizer_config.json").exists():
        tokenizer = load_tokenizer(str(folder), **hub)
        check_tokenizer_fits(tokenizer, embedding_weight(model.causal_lm).shape[0])
    if tuning.method in PEFT_METHODS:
        model.language_model = model.language_model.merge_and_unload()  # pyright: ignore
    model.tuning = TuningConfig(method="full")
    if not plain:
        model.save_pretrained(out, tokenizer)
        return out
    with whole_folder(out) as new:
        model.language_model.save_pretrained(new)  # pyright: ignore
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
    return out


def _check_new(out: Path) -> None:
    """Refuse a folder that is no new or empty one, or that cannot be written."""
    try:
        str(out).encode()  # which safetensors cannot do without
        if file_kind(out) not in ("none", "folder"):
            raise UserError(f"--out ({out}): is no folder. Give a new one.")
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"--out ({out}): already holds something. Give a new folder.")
        parent = Path(os.path.abspath(out)).parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix="."):
            pass
    except UnicodeEncodeError as problem:
        raise UserError(f"--out ({out}): is no UTF-8. Give another name.") from problem
    except OSError as problem:
        raise UserError(
            f"--out ({out}): cannot be made ({reason_of(problem)}). Give another place."
        ) from problem
