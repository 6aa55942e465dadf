"""Checkpoints inside a run folder: everything to go on from, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from quietstar.errors import UserError

if TYPE_CHECKING:
    from quietstar.training.loop import Run

STATE_FILE = "trainer_state.json"
WEIGHTS_FILE = "trainable.safetensors"
_NAME = re.compile(r"step-(\d{6,})")


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """``checkpoints/step-000123`` of a run folder."""
    return output_dir / "checkpoints" / f"step-{step:06d}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints of a run folder, oldest first."""
    folders = (output_dir / "checkpoints").glob("step-*")
    whole = [f for f in folders if _NAME.fullmatch(f.name) and (f / STATE_FILE).exists()]
    return sorted(whole, key=lambda f: int(f.name.removeprefix("step-")))


def keep_trainable_only(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Make checkpoints hold what trains in any stage; frozen weights come from the base model.

    Call it before a stage freezes anything.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def save(models: list[torch.nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()  # tells accelerate that the weights are taken care of
        if accelerator.is_main_process:
            kept = {n: p.detach().contiguous() for n, p in _named(model, names)}
            save_file(kept, Path(folder) / WEIGHTS_FILE)

    def load(models: list[torch.nn.Module], folder: str) -> None:
        models.clear()
        weights = load_file(Path(folder) / WEIGHTS_FILE)
        for name, parameter in _named(model, names):
            parameter.data.copy_(weights[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _named(
    model: torch.nn.Module, names: Sequence[str]
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    parameters = dict(model.named_parameters())
    return ((name, parameters[name]) for name in names)


def save_checkpoint(run: Run, step: int) -> Path:
    """Save the state after ``step`` steps: written beside, renamed when whole; drop old ones."""
    output_dir = Path(run.config.training.output_dir)
    final = checkpoint_folder(output_dir, step)
    partial = final.with_name(final.name + ".partial")
    if run.accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    run.accelerator.wait_for_everyone()
    run.accelerator.save_state(str(partial), safe_serialization=True)
    if run.accelerator.is_main_process:
        (partial / STATE_FILE).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in list_checkpoints(output_dir)[: -run.config.training.keep_checkpoints]:
            shutil.rmtree(old)
    run.accelerator.wait_for_everyone()
    return final


def checkpoint_step(folder: Path) -> int:
    """Steps of the run that a checkpoint has behind it.

    Raises:
        UserError: The folder holds no whole checkpoint.
    """
    state = folder / STATE_FILE
    if not state.exists():
        raise UserError(
            f"--resume: {folder} is no whole checkpoint ({STATE_FILE} is missing). Give a folder "
            "like runs/x/checkpoints/step-000100, or auto for the newest."
        )
    return json.loads(state.read_text(encoding="utf-8"))["step"]
