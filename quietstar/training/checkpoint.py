"""Checkpoints inside a run folder: everything to go on from, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.optim import Optimizer

from quietstar.distributed import Strategy
from quietstar.errors import UserError
from quietstar.training.manifest import find_damage, write_manifest
from quietstar.training.state import StageRun

STATE_FILE = "trainer_state.json"
PARTIAL = ".partial"
LAUNCHERS = {
    "replicated": "one process or DDP (configs/accelerate/ddp.yaml)",
    "deepspeed": "DeepSpeed (configs/accelerate/zero*.yaml)",
    "fsdp2": "FSDP2 (configs/accelerate/fsdp2.yaml)",
}
_NAME = re.compile(r"step-(\d{6,})")


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """``checkpoints/step-000123`` of a run folder."""
    return output_dir / "checkpoints" / f"step-{step:06d}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints of a run folder that were written to the end, oldest first."""
    folders = (output_dir / "checkpoints").glob("step-*")
    whole = [f for f in folders if _NAME.fullmatch(f.name) and (f / STATE_FILE).exists()]
    return sorted(whole, key=lambda f: int(f.name.removeprefix("step-")))


def save_checkpoint(run: StageRun, step: int) -> Path:
    """Save the state after ``step`` steps: written beside, renamed when whole; drop old ones.

    Raises:
        UserError: It cannot be written (a full disk); the earlier ones stay as they are.
    """
    output_dir = Path(run.config.training.output_dir)
    final = checkpoint_folder(output_dir, step)
    partial = final.with_name(final.name + PARTIAL)
    accelerator = run.accelerator
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        run.strategy.save(partial, run.model, run.optimizer)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _complete(partial, _state(run, step))
    except (OSError, RuntimeError, SafetensorError) as problem:
        shutil.rmtree(partial, ignore_errors=True)
        raise _unwritten(run, final, problem) from problem
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        drop_old(output_dir, run.config.training.save_total_limit)
    accelerator.wait_for_everyone()
    return final


def _complete(folder: Path, state: dict[str, Any]) -> None:
    (folder / STATE_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")
    write_manifest(folder)
    for path in folder.rglob("*"):  # on disk before the name says that it is whole
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _state(run: StageRun, step: int) -> dict[str, Any]:
    strategy = run.strategy
    return {
        "step": step,
        "stage": run.stage.name,
        "mixed_nll": _nll(run, step),
        "strategy": strategy.kind,
        "num_processes": strategy.accelerator.num_processes,
    }


def _nll(run: StageRun, step: int) -> float | None:
    """Held-out NLL (mixed, where the stage thinks) of an evaluation at this very step."""
    evaluations = run.reporter.evaluations
    if not evaluations or evaluations[-1][0] != step:
        return None
    figures = evaluations[-1][1]
    return figures.get("mixed_nll", figures["base_nll"])


def _unwritten(run: StageRun, folder: Path, problem: Exception) -> UserError:
    """One line about a checkpoint that could not be written."""
    needed = sum(x.numel() * x.element_size() for x in _tensors(run))
    free = shutil.disk_usage(folder.parent).free
    whole = list_checkpoints(folder.parent.parent)
    earlier = f"{whole[-1]} is whole" if whole else "there is no earlier one"
    return UserError(
        f"{folder} cannot be written ({' '.join(str(problem).split())[:200]}): it needs about "
        f"{needed / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free; {earlier}. Free some "
        "space and go on with --resume auto."
    )


def _tensors(run: StageRun) -> Iterator[torch.Tensor]:
    """What makes up nearly all of a checkpoint: trainable weights and optimiser state."""
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            yield parameter
    for state in run.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def drop_old(output_dir: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints and the best by held-out NLL.

    The best is the one of the newest one's stage whose evaluation was lowest.
    """
    folders = list_checkpoints(output_dir)
    states = {folder: read_state(folder) for folder in folders}
    stage = states[folders[-1]].get("stage")
    scored = [f for f in folders if states[f].get("stage") == stage]
    scored = [f for f in scored if states[f].get("mixed_nll") is not None]
    best = min(scored, key=lambda f: states[f]["mixed_nll"], default=None)
    for folder in folders[:-keep]:
        if folder != best:
            shutil.rmtree(folder)


def find_whole(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without damage, and a line about every damaged one passed over."""
    damaged = []
    for folder in reversed(list_checkpoints(output_dir)):
        damage = find_damage(folder)
        if damage is None:
            return folder, damaged
        damaged.append(f"{folder} is damaged and passed over: {damage}")
    return None, damaged


def load_checkpoint(
    folder: Path, strategy: Strategy, prepared: torch.nn.Module, optimizer: Optimizer
) -> None:
    """Loads weights, optimizer state and random state; settings stay those of the config.

    Optimizers save their settings (learning rates, decay, betas) beside their state, but a run
    resumed under other settings must train with its own.
    """
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    with _without_pickled_schedule(folder) as readable:
        strategy.load(readable, prepared, optimizer)
    for group, of_config in zip(optimizer.param_groups, settings, strict=True):
        group.update(of_config)


@contextmanager
def _without_pickled_schedule(folder: Path) -> Iterator[Path]:
    """Shows a checkpoint without the schedule that earlier versions pickled into it.

    accelerate unpickles every ``custom_checkpoint_*.pkl``, and a pickle may run any code.
    """
    if not any(folder.glob("custom_checkpoint_*")):
        yield folder
        return
    with tempfile.TemporaryDirectory() as view:
        for path in folder.iterdir():
            if not path.name.startswith("custom_checkpoint_"):
                (Path(view) / path.name).symlink_to(path.resolve())
        yield Path(view)


def read_state(folder: Path) -> dict[str, Any]:
    """``trainer_state.json`` of a checkpoint: step, stage, and the NLL of an evaluation there."""
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))


def checkpoint_step(folder: Path) -> int:
    """Steps of the run that a checkpoint has behind it."""
    return read_state(folder)["step"]


def check_whole(folder: Path) -> None:
    """Refuse a folder that is no checkpoint, or a damaged one.

    Raises:
        UserError: It is one of these; the message names the file.
    """
    if not (folder / STATE_FILE).exists():
        raise UserError(
            f"--resume: {folder} is no whole checkpoint ({STATE_FILE} is missing). Give a folder "
            "like runs/x/checkpoints/step-000100, or auto for the newest."
        )
    damage = find_damage(folder)
    if damage is not None:
        raise UserError(
            f"--resume: {folder} is damaged: {damage}. Give an earlier checkpoint, or auto for "
            "the newest whole one."
        )


def check_world(folder: Path, strategy: Strategy) -> None:
    """Refuse a checkpoint that this launch cannot read.

    Raises:
        UserError: Another strategy wrote it, or as many processes as this strategy cannot read.
    """
    state = read_state(folder)
    now = strategy.accelerator.num_processes
    kind = state.get("strategy", state.get("engine", strategy.kind))  # "engine": an older name
    kind = "replicated" if kind == "whole" else kind
    processes = state.get("num_processes", now)
    if kind != strategy.kind:
        raise UserError(
            f"--resume: {folder} was written under {LAUNCHERS[kind]}; this launch, "
            f"{LAUNCHERS[strategy.kind]}, cannot read it. Launch as before."
        )
    if processes != now and not strategy.reshardable:
        raise UserError(
            f"--resume: {folder} was written by {processes} processes under {kind}, which only as "
            f"many can read; there are {now}. Launch {processes}, or train under ddp or fsdp2, "
            "whose checkpoints any number of processes reads."
        )
