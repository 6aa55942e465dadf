"""A checkpoint of a run as a model that loads by itself."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from quietstar.config.loading import load_config
from quietstar.distributed.strategies import WEIGHTS_FILE
from quietstar.errors import UserError, reading
from quietstar.registry import trusting
from quietstar.system import files
from quietstar.training.build import build_model, find_tokenizer
from quietstar.training.checkpoint import MANIFEST_FILE, STATE_FILE, find_damage, read_state
from quietstar.training.run_dir import CHECKPOINT_NAME, CONFIG_FILE, MODELS_FOLDER
from quietstar.training.stages import plan_stages, scheduled, stage_at

SOURCE_FILE = "checkpoint.sha256"
"""Says in the folder of an exported model which checkpoint it is from."""


def is_checkpoint(folder: Path) -> bool:
    """Tell a checkpoint of a run from other folders."""
    is_named = CHECKPOINT_NAME.fullmatch(folder.resolve().name) is not None
    return is_named and (folder / STATE_FILE).is_file()


def exported(folder: Path) -> Path | None:
    """Return the model that was written of this very checkpoint and config; None if none was."""
    model = _place(folder)
    if files.file_kind(model / SOURCE_FILE) != "file":
        return None
    return model if (model / SOURCE_FILE).read_bytes() == _source(folder) else None


def _source(folder: Path) -> bytes:
    """Hash what a checkpoint's model is made of: its manifest, and the config of its run."""
    run = folder.resolve().parent.parent
    content = (folder / MANIFEST_FILE).read_bytes() + (run / CONFIG_FILE).read_bytes()
    return hashlib.sha256(content).hexdigest().encode()


@torch.no_grad()
def export_checkpoint(folder: Path, trust_remote_code: bool = False) -> Path:
    """Write the model of a checkpoint into its run's folder (``models/step-000100``).

    What the run does not train comes from where the run took it.

    Args:
        folder: The checkpoint (``RUN/checkpoints/step-000100``).
        trust_remote_code: Whether code that comes with the base model may run; what the run's own
            config says of it does not count.

    Returns:
        The folder of the model; one that was written before is taken as it is.

    Raises:
        UserError: The checkpoint is damaged or holds shards, or its run cannot be read.
    """
    if (known := exported(folder)) is not None:
        return known
    if (damage := find_damage(folder)) is not None:
        raise UserError(f"--model ({folder}): is damaged: {damage}. Give another checkpoint.")
    state, run = read_state(folder), folder.resolve().parent.parent
    if state.strategy not in ("replicated", None):
        raise UserError(
            f"--model ({folder}): holds shards ({state.strategy}), which only the run itself puts "
            f"together. Train on with --resume auto, and give {run}."
        )
    source = _source(folder)
    with trusting(False):  # not by the model, either
        config = load_config(run / CONFIG_FILE)
        trusted = config.model.model_copy(update={"trust_remote_code": trust_remote_code})
        config = config.model_copy(update={"model": trusted})
        stages = plan_stages(config)
        named = {stage.name: stage for stage in stages}
        stage = named.get(state.stage) or stage_at(stages, state.step)
        settings = next((stage for stage in stages if stage.thinks), stages[0]).config
        tokenizer = find_tokenizer(config)
        model = build_model(settings, tokenizer)
        last = max(0, state.step - stage.first_step - 1)
        model.configure(scheduled(stage.config.thoughts, last))
    with reading(f"--model ({folder})", "Give another checkpoint."):
        weights, there = load_file(folder / WEIGHTS_FILE), dict(model.named_parameters())
        for name, weight in weights.items():
            if name not in there or there[name].shape != weight.shape:
                raise ValueError(f"its tensor {name} does not fit the model of {CONFIG_FILE}")
            there[name].copy_(weight)
    model.eval().save_pretrained(_place(folder), tokenizer)
    files.write_whole(_place(folder) / SOURCE_FILE, source)
    return _place(folder)


def _place(folder: Path) -> Path:
    folder = folder.resolve()
    return folder.parent.parent / MODELS_FOLDER / folder.name
