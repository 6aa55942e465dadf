"""The run folder and its checkpoints: what may be written there, and what a run goes on from.

A checkpoint is written whole or not at all, with a manifest of the sizes and SHA-256 digests of
its files, and holds trainable weights, optimizer state and random state.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.optim import Optimizer

from quietstar.config import Config
from quietstar.config.loading import load_config
from quietstar.distributed import Strategy
from quietstar.errors import ConfigError, UserError
from quietstar.training.reporter import METRICS_FILE
from quietstar.training.state import PREEMPTED_FILE, StageRun

CONFIG_FILE, STATE_FILE, MANIFEST_FILE = "config.yaml", "trainer_state.json", "manifest.json"
FINAL_FOLDER, CHECKPOINTS_FOLDER, TRACKERS_FOLDER = "final", "checkpoints", "tensorboard"
CONTENTS = (
    *(METRICS_FILE, CHECKPOINTS_FOLDER, FINAL_FOLDER, TRACKERS_FOLDER, PREEMPTED_FILE),
    *("results.json", "samples.json", "report.html"),
)
"""What a run writes beside `CONFIG_FILE`."""
LAUNCHERS = {
    "replicated": "one process or DDP (configs/accelerate/ddp.yaml)",
    "deepspeed": "DeepSpeed (configs/accelerate/zero*.yaml)",
    "fsdp2": "FSDP2 (configs/accelerate/fsdp2.yaml)",
}
FREE_ON_RESUME = (
    *("training.max_steps", "training.micro_batch_size", "training.cpu_threads"),
    *("training.learn_chunk_tokens", "training.gradient_checkpointing", "training.eval_steps"),
    *("training.torch_compile", "training.save_steps"),
    *("training.save_total_limit", "training.overwrite_output_dir", "training.output_dir"),
    *("data.eval_sequences", "logging.report_to", "logging.logging_steps", "logging.thought_steps"),
)
"""Keys that may change between stop and resume: the run stays the same one, or is prolonged."""


# --- Saving and loading ---------------------------------------------------------------------------
def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run folder that were written to the end, oldest first."""
    folders = (output_dir / CHECKPOINTS_FOLDER).glob("step-*")
    whole = [
        f for f in folders if re.fullmatch(r"step-\d{6,}", f.name) and (f / STATE_FILE).exists()
    ]
    return sorted(whole, key=lambda f: int(f.name.removeprefix("step-")))


def save_checkpoint(run: StageRun, step: int) -> Path:
    """Saves the state after ``step`` steps of the run, then removes old checkpoints.

    It is written beside its final name and renamed when it is whole. To be called on all processes.
    Raises UserError if it cannot be written (a full disk); the earlier ones stay as they are.
    """
    output_dir, accelerator = Path(run.config.training.output_dir), run.accelerator
    final = output_dir / CHECKPOINTS_FOLDER / f"step-{step:06d}"
    partial = final.with_name(final.name + ".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    evaluations = run.reporter.evaluations
    figures = evaluations[-1][1] if evaluations and evaluations[-1][0] == step else {}
    state = {
        "step": step,
        "stage": run.stage.name,
        "mixed_nll": figures.get("mixed_nll", figures.get("base_nll")),  # at this very step
        "strategy": run.strategy.kind,
        "num_processes": accelerator.num_processes,
    }
    try:
        run.strategy.save(partial, run.model, run.optimizer)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / STATE_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")
            write_manifest(partial)
            for path in partial.rglob("*"):  # on disk before the name says that it is whole
                if path.is_file():
                    with path.open("rb") as stream:
                        os.fsync(stream.fileno())
    except (OSError, RuntimeError, SafetensorError) as problem:
        shutil.rmtree(partial, ignore_errors=True)
        tensors = [p for p in run.model.parameters() if p.requires_grad]
        for parts in run.optimizer.state.values():
            tensors += [value for value in parts.values() if isinstance(value, torch.Tensor)]
        needed = sum(x.numel() * x.element_size() for x in tensors)
        free = shutil.disk_usage(final.parent).free
        whole = list_checkpoints(output_dir)
        earlier = f"{whole[-1]} is whole" if whole else "there is no earlier one"
        raise UserError(
            f"{final} cannot be written ({' '.join(str(problem).split())[:200]}): it needs about "
            f"{needed / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free; {earlier}. Free some "
            "space and go on with --resume auto."
        ) from problem
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        drop_old(output_dir, run.config.training.save_total_limit)
    accelerator.wait_for_everyone()
    return final


def drop_old(output_dir: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` checkpoints and the best one.

    The best is the one with the lowest held-out NLL in the stage of the newest. A damaged
    checkpoint, or one that cannot be removed, must not end a run: it stays or goes in silence.
    """
    folders = list_checkpoints(output_dir)
    states: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        with suppress(OSError, ValueError, TypeError):
            states[folder] = dict(read_state(folder))
    stage = states.get(folders[-1], {}).get("stage")
    of_stage = {f: state for f, state in states.items() if state.get("stage") == stage}
    scored = [f for f, state in of_stage.items() if state.get("mixed_nll") is not None]
    best = min(scored, key=lambda f: states[f]["mixed_nll"], default=None)
    for folder in folders[:-keep]:
        if folder != best:
            shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(
    folder: Path, strategy: Strategy, prepared: torch.nn.Module, optimizer: Optimizer
) -> None:
    """Loads weights, optimizer state and random state; settings stay those of the config.

    Optimizers save their settings (learning rates, decay, betas) beside their state, but a run
    resumed under other settings must train with its own.
    """
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    with tempfile.TemporaryDirectory() as view:
        # Earlier versions pickled a schedule, which accelerate would unpickle, and a pickle may run
        # any code: their checkpoints are shown without it.
        if any(folder.glob("custom_checkpoint_*")):
            for path in folder.iterdir():
                if not path.name.startswith("custom_checkpoint_"):
                    (Path(view) / path.name).symlink_to(path.resolve())
            folder = Path(view)
        strategy.load(folder, prepared, optimizer)
    for group, of_config in zip(optimizer.param_groups, settings, strict=True):
        group.update(of_config)


def read_state(folder: Path) -> dict[str, Any]:
    """Reads ``trainer_state.json``: step, stage, strategy, and the NLL of an evaluation there."""
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))


# --- Damage ---------------------------------------------------------------------------------------
def write_manifest(folder: Path) -> None:
    """Writes ``manifest.json``: size and SHA-256 of every file below ``folder``."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILE)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in paths
    }
    text = json.dumps({"algorithm": "sha256", "files": files}, indent=2) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """Says what is wrong with a checkpoint; None if every file is as it was written."""
    path = folder / MANIFEST_FILE
    if not path.exists():
        return f"{MANIFEST_FILE} is missing"
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        entries = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} cannot be read"
    for name, (size, digest) in entries.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if _digest(file) != digest:
            return f"{name} is not what was written (its sha256 differs)"
    return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# --- What a launch finds --------------------------------------------------------------------------
def find_checkpoint(output_dir: Path, resume: str | None) -> tuple[Path | None, list[str]]:
    """Returns the checkpoint to go on from, None for a new run, and a line for each damaged one.

    Raises UserError if the one asked for is damaged or none, or all of the run's are damaged.
    """
    if resume is None:
        return None, []
    if resume != "auto":
        if not (Path(resume) / STATE_FILE).exists():
            raise UserError(
                f"--resume: {resume} is no whole checkpoint ({STATE_FILE} is missing). Give a "
                "folder like runs/x/checkpoints/step-000100, or auto for the newest."
            )
        if (damage := find_damage(Path(resume))) is not None:
            raise UserError(
                f"--resume: {resume} is damaged: {damage}. Give an earlier checkpoint, or auto for "
                "the newest whole one."
            )
        return Path(resume), []
    damaged: list[str] = []
    for folder in reversed(list_checkpoints(output_dir)):
        if (damage := find_damage(folder)) is None:
            return folder, damaged
        damaged.append(f"{folder} is damaged and passed over: {damage}")
    if damaged:
        raise UserError(
            f"--resume auto: {'; '.join(damaged)}; no whole checkpoint is left. Start a new run "
            "in another folder, or replace this one with --training.overwrite_output_dir true."
        )
    return None, []


def check_world(folder: Path, strategy: Strategy) -> None:
    """Raises UserError if the strategy, or that many processes of it, cannot read a checkpoint."""
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


def check_free(output_dir: Path, overwrite: bool) -> None:
    """Raises UserError for a folder that cannot be written, or already holds what a run writes.

    ``training.overwrite_output_dir`` only replaces what a run wrote.
    """
    key = f"training.output_dir: {output_dir}"
    ancestor = next(f for f in (output_dir, *output_dir.absolute().parents) if f.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        what = "cannot be written" if ancestor.is_dir() else "is a file"
        raise UserError(f"{key} cannot be made, since {ancestor} {what}; give another folder")
    is_run = (output_dir / CONFIG_FILE).exists()
    if is_run and not overwrite:
        raise UserError(
            f"{key} already holds a run. Choose another folder, go on with --resume auto, or "
            "replace it with --training.overwrite_output_dir true."
        )
    others = [name for name in CONTENTS if (output_dir / name).exists()]
    if others and not is_run:
        raise UserError(
            f"{key} holds {', '.join(others)} but no {CONFIG_FILE}, so no run of quietstar wrote "
            "it and it would be lost. Choose another folder."
        )


def start_run_dir(output_dir: Path) -> None:
    """Makes the run folder, without what an overwritten run left; UserError if it cannot."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(
            f"training.output_dir: {output_dir} cannot be made ({problem.strerror}); give another "
            "folder"
        ) from problem
    for name in CONTENTS:
        path = output_dir / name
        if path.is_file():
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)


def check_same_run(output_dir: Path, config: Config, allow_changes: bool = False) -> list[str]:
    """Returns a line for each changed key; UserError if the run would be another one with them."""
    path = output_dir / CONFIG_FILE
    try:
        before = flat(load_config(path)) if path.exists() else {}
    except ConfigError as error:
        raise UserError(f"--resume: {error.problems[0]}") from error
    now, last_stage = flat(config), list(config.stage_configs())[-1]
    changes, binding = [], []
    for key in {**before, **now} if before else ():
        if before.get(key) == now.get(key):
            continue
        changes.append(f"{key} was {before.get(key)}, is {now.get(key)}")
        stage, name = last_stage, key
        if key.startswith("stages."):
            _, stage, name = key.split(".", 2)
        # Other steps of an earlier stage are binding: the stages behind it would begin elsewhere.
        prolongs_earlier = name == "training.max_steps" and stage != last_stage
        if name not in FREE_ON_RESUME or prolongs_earlier:
            binding.append(" ".join(changes[-1].split()))
    if binding and not allow_changes:
        more = f"; and {len(binding) - 5} more" if len(binding) > 5 else ""
        raise UserError(
            f"--resume: {'; '.join(binding[:5])}{more}: that would be another run. Take the values "
            f"of {path}, start a new run in another folder, or insist with --allow-changes true."
        )
    return changes


def flat(config: Config) -> dict[str, str]:
    """Returns dotted keys and values as text, as trackers take them; of each stage if several."""
    values = {}
    for stage, stage_config in config.stage_configs().items():
        prefix = f"stages.{stage}." if config.stages else ""
        for section, part in stage_config.model_dump(exclude={"stages"}).items():
            values |= {f"{prefix}{section}.{key}": str(value) for key, value in part.items()}
    return values
