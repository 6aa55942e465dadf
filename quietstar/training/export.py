"""A checkpoint of a run as a model that loads by itself."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from quietstar.config.loading import load_config
from quietstar.distributed.strategies import WEIGHTS_FILE
from quietstar.errors import UserError, reading
from quietstar.model.saving import SETTINGS_FILE
from quietstar.registry import importing_nothing
from quietstar.training.build import build_model, find_tokenizer
from quietstar.training.checkpoint import MANIFEST_FILE, STATE_FILE, find_damage, read_state
from quietstar.training.run_dir import CHECKPOINT_NAME, CONFIG_FILE, MODELS_FOLDER
from quietstar.training.schedule import scheduled
from quietstar.training.stages import plan_stages, stage_at


def is_checkpoint(folder: Path) -> bool:
    """Tell a checkpoint of a run from other folders."""
    is_named = CHECKPOINT_NAME.fullmatch(folder.resolve().name) is not None
    return is_named and (folder / STATE_FILE).is_file()


def exported(folder: Path) -> Path | None:
    """Return the model that was written of a checkpoint as it is; None if there is none."""
    model = _place(folder)
    settings, manifest = model / SETTINGS_FILE, folder / MANIFEST_FILE
    if not settings.is_file() or settings.stat().st_mtime < manifest.stat().st_mtime:
        return None
    return model


@torch.no_grad()
def export_checkpoint(folder: Path) -> Path:
    """Write the model of a checkpoint into its run's folder (``models/step-000100``).

    What the run does not train comes from where the run took it.

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
    with importing_nothing():  # not by the model, either
        config = load_config(run / CONFIG_FILE)
        stages = plan_stages(config)
        named = {stage.name: stage for stage in stages}
        stage = named.get(state.stage) or stage_at(stages, state.step)
        settings = next((stage for stage in stages if stage.thinks), stages[0]).config
        tokenizer = find_tokenizer(config)
        model = build_model(settings, tokenizer)
        place = state.schedule_place
        place = state.step - stage.first_step if place is None else place
        model.configure(scheduled(stage.config.thoughts, place))
    with reading(f"--model ({folder})", "Give another checkpoint."):
        weights, there = load_file(folder / WEIGHTS_FILE), dict(model.named_parameters())
        for name, weight in weights.items():
            if name not in there or there[name].shape != weight.shape:
                raise ValueError(f"its tensor {name} does not fit the model of {CONFIG_FILE}")
            there[name].copy_(weight)
    model.eval().save_pretrained(_place(folder), tokenizer)
    return _place(folder)


def _place(folder: Path) -> Path:
    folder = folder.resolve()
    return folder.parent.parent / MODELS_FOLDER / folder.name
