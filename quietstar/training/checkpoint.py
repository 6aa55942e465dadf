"""Checkpoints of a run: written whole or not at all, checked before they are read.

A checkpoint has a manifest of the sizes and SHA-256 digests of its files, and holds trainable
weights, optimizer state and random state.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import torch
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
)
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from quietstar.distributed import Strategy
from quietstar.errors import UserError, reading, reason_of
from quietstar.system import files
from quietstar.system.processes import is_connection_lost
from quietstar.system.signals import held
from quietstar.training.run_dir import CHECKPOINT_NAME, CHECKPOINTS_FOLDER
from quietstar.training.state import StageRun

STATE_FILE, MANIFEST_FILE = "trainer_state.json", "manifest.json"
MOST_MANIFEST_BYTES = 64 * 2**20  # a million files
LAUNCHERS = {
    "replicated": "one process or DDP (configs/accelerate/ddp.yaml)",
    "deepspeed": "DeepSpeed (configs/accelerate/zero*.yaml)",
    "fsdp2": "FSDP2 (configs/accelerate/fsdp2.yaml)",
}
UNPICKLED = {
    "deepspeed": "DeepSpeed reads all of its files",
    "fsdp2": "torch reads .metadata of its shards",
}
"""What of a checkpoint is unpickled, by strategy: a pickle may run any code."""
OTHER_RUN = "Give a checkpoint of a run with this model and these settings."
# Earlier versions had other names.
Kind = Annotated[
    Literal["replicated", "deepspeed", "fsdp2"],
    BeforeValidator(lambda kind: "replicated" if kind == "whole" else kind),
]


class TrainerState(BaseModel):
    """``trainer_state.json``: where the run was, and how it was launched."""

    model_config = ConfigDict(strict=True, extra="ignore")

    step: NonNegativeInt  # of the run
    stage: str = ""
    # Of an evaluation at this very step; rounding can take that of known texts below 0.
    mixed_nll: Annotated[float, Field(ge=-0.01, allow_inf_nan=False)] | None = None
    strategy: Kind | None = Field(None, validation_alias=AliasChoices("strategy", "engine"))
    num_processes: PositiveInt | None = None
    running: list[FiniteFloat] | None = None  # as in `StageRun`
    inner_epochs: PositiveInt = 1
    # Weights with a state in the optimizer: those that have had a gradient.
    num_optimized: NonNegativeInt | None = None


# --- Saving and loading ---------------------------------------------------------------------------
def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run folder that have their final name, oldest first."""
    folders = (output_dir / CHECKPOINTS_FOLDER).glob("step-*")
    named = [f for f in folders if (match := CHECKPOINT_NAME.fullmatch(f.name)) and not match[1]]
    return sorted(
        (folder for folder in named if (folder / STATE_FILE).exists()),
        key=lambda folder: int(folder.name.removeprefix("step-")),
    )


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Returns the final name of the checkpoint after so many steps of the run."""
    return output_dir / CHECKPOINTS_FOLDER / f"step-{step:06d}"


def save_checkpoint(run: StageRun) -> Path:
    """Saves the state after the steps that are done, then removes old checkpoints.

    It is written next to its final name, and renamed when whole; no signal interrupts that.
    To be called on all processes.

    Raises:
        UserError: It cannot be written (a full disk), or weights are not finite; the earlier ones
            stay as they are.
    """
    output_dir, accelerator = Path(run.config.training.output_dir), run.accelerator
    final = checkpoint_folder(output_dir, run.step)
    partial = final.with_name(f"{final.name}{files.PARTIAL}")
    check_finite(run, "no checkpoint of them is written")
    with held():
        if accelerator.is_main_process:
            files.remove(partial)
        accelerator.wait_for_everyone()
        evaluations = run.reporter.evaluations
        figures = evaluations[-1][1] if evaluations and evaluations[-1][0] == run.step else {}
        state = {
            "step": run.step,
            "stage": run.stage.name,
            "mixed_nll": figures.get("mixed_nll", figures.get("base_nll")),
            "strategy": run.strategy.kind,
            "num_processes": accelerator.num_processes,
            "inner_epochs": run.config.training.inner_epochs,
            "running": None if run.running is None else run.running.tolist(),
        }
        if run.strategy.kind == "replicated":  # the others notice by themselves what is missing
            state["num_optimized"] = len(run.optimizer.state)
        try:
            run.strategy.save(partial, run.model, run.optimizer)
            for average in run.averages:
                average.save(partial, run.model)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                files.write_json(partial / STATE_FILE, state, indent=None)
                write_manifest(partial)
                files.publish(partial, final)
        except (OSError, RuntimeError, SafetensorError, UserError, CheckpointException) as problem:
            if accelerator.is_main_process:  # others may be writing into it
                files.remove(partial)
            rank, cause = accelerator.process_index, problem
            if isinstance(problem, CheckpointException):  # torch's, on all ranks
                rank, (cause, _) = next(iter(problem.failures.items()))
            if is_connection_lost(cause):  # another rank has failed, and says why
                raise cause from None
            raise UserError(_describe_failure(run, final, cause, rank)) from problem
        if accelerator.is_main_process:
            drop_old(output_dir, run.config.training.save_total_limit)
        accelerator.wait_for_everyone()
        run.saved_step = run.step
    return final


def _describe_failure(run: StageRun, final: Path, problem: BaseException, rank: int) -> str:
    tensors: list[Tensor] = [p for p in run.model.parameters() if p.requires_grad]
    tensors += [value for average in run.averages for value in average.values.values()]
    for parts in run.optimizer.state.values():
        tensors += [value for value in parts.values() if isinstance(value, Tensor)]
    needed = sum(x.numel() * x.element_size() for x in tensors)
    free = shutil.disk_usage(next(f for f in final.parents if f.exists())).free
    whole = list_checkpoints(final.parent.parent)
    earlier = f"{whole[-1]} is whole" if whole else "there is no earlier one"
    who = f" by rank {rank}" if run.accelerator.num_processes > 1 else ""
    return (
        f"{final}: cannot be written{who} ({reason_of(problem)[:200]}): it needs about "
        f"{needed / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free; {earlier}. Free some "
        "space and go on with --resume auto."
    )


@torch.no_grad()
def check_finite(run: StageRun, consequence: str) -> None:
    """Raises a `UserError` on all processes if a weight that trains is NaN or infinite on one."""
    flags: dict[str, Tensor] = {}
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            # Sharded weights: what this process holds of them, under ZeRO-3 and under FSDP2.
            held_here = getattr(parameter, "ds_tensor", parameter)
            held_here = held_here.to_local() if isinstance(held_here, DTensor) else held_here
            is_bad = held_here.isfinite().all().logical_not()
            flags[name] = is_bad.to(run.accelerator.device, torch.float32)
    count = run.accelerator.reduce(torch.stack([*flags.values()]).sum(), "sum")
    if float(count) > 0:  # pyright: ignore[reportArgumentType]  (the only wait for the device)
        bad = [n.removeprefix("module.").removeprefix("model.") for n, x in flags.items() if x > 0]
        where = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "") or "of another process"
        whole = list_checkpoints(Path(run.config.training.output_dir))
        remedy = f", and resume from {whole[-1]}" if whole else ""
        raise UserError(
            f"step {run.step}: the weights are not finite ({where}), so {consequence}. Lower "
            f"optim.learning_rate or optim.max_grad_norm{remedy}."
        )


def drop_old(output_dir: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` checkpoints and the best one.

    The best is the one with the lowest held-out NLL in the stage of the newest. A damaged
    checkpoint, or one that cannot be removed, must not end a run: it stays or goes in silence.
    """
    folders = list_checkpoints(output_dir)
    states: dict[Path, TrainerState] = {}
    for folder in folders:
        with suppress(UserError):
            states[folder] = read_state(folder)
    stage = states[folders[-1]].stage if folders and folders[-1] in states else None
    of_stage = {f: state.mixed_nll for f, state in states.items() if state.stage == stage}
    scores = {f: nll for f, nll in of_stage.items() if nll is not None}
    best = min(scores, key=lambda folder: scores[folder], default=None)
    for folder in folders[:-keep]:
        if folder != best:
            files.remove(folder)


def load_checkpoint(
    folder: Path, strategy: Strategy, prepared: torch.nn.Module, optimizer: Optimizer
) -> None:
    """Loads weights, optimizer state and random state; settings stay those of the config.

    Optimizers save their settings (learning rates, decay, betas) next to their state, but a run
    resumed under other settings must train with its own.

    Raises:
        UserError: It does not fit the model, or cannot be read.
    """
    state = read_state(folder)
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    with tempfile.TemporaryDirectory() as view, reading(f"--resume ({folder})", OTHER_RUN):
        # Earlier versions pickled a schedule, which accelerate would unpickle, and a pickle may run
        # any code: their checkpoints are shown without it.
        if any(folder.glob("custom_checkpoint_*")):
            for path in folder.iterdir():
                if not path.name.startswith("custom_checkpoint_"):
                    (Path(view) / path.name).symlink_to(path.resolve())
            folder = Path(view)
        strategy.load(folder, prepared, optimizer)
        if strategy.kind != "deepspeed":  # which keeps a state of its own
            _check_optimizer(prepared, optimizer, state)
        for group, of_config in zip(optimizer.param_groups, settings, strict=True):
            group.update(of_config)


def _check_optimizer(prepared: torch.nn.Module, optimizer: Optimizer, state: TrainerState) -> None:
    """Raises a ValueError if what was loaded is not AdamW's state of these weights.

    torch takes anything into an optimizer.
    """
    if state.num_optimized not in (None, len(optimizer.state)):
        raise ValueError(
            f"its optimizer has a state for {len(optimizer.state)} weights, and had one for "
            f"{state.num_optimized}"
        )
    for name, weight in prepared.named_parameters():
        if weight not in optimizer.state:
            continue
        parts = optimizer.state[weight]
        most = state.step * state.inner_epochs
        if not 0 <= parts["step"] <= most:
            raise ValueError(f"the optimizer's step of {name} is {parts['step']} of {most}")
        for key in ("exp_avg", "exp_avg_sq"):
            if parts[key].shape != weight.shape and "projector" not in parts:  # GaLore's is smaller
                there, here = tuple(parts[key].shape), tuple(weight.shape)
                raise ValueError(f"the optimizer's {key} of {name} has shape {there}, not {here}")
            part = parts[key].to_local() if isinstance(parts[key], DTensor) else parts[key]
            if not part.isfinite().all() or (key == "exp_avg_sq" and (part < 0).any()):
                raise ValueError(f"the optimizer's {key} of {name} holds numbers that cannot be")


def read_state(folder: Path) -> TrainerState:
    """Reads ``trainer_state.json`` of a checkpoint.

    Raises:
        UserError: It is not what a run wrote.
    """
    path = folder / STATE_FILE
    with reading(
        f"--resume ({path})", "Give another checkpoint, or auto for the newest whole one."
    ):
        state = TrainerState.model_validate_json(path.read_text(encoding="utf-8"))
        named = CHECKPOINT_NAME.fullmatch(folder.name)
        if named and not named[1] and int(folder.name.removeprefix("step-")) != state.step:
            raise ValueError(f"its step is {state.step}, unlike the folder's")
        return state


# --- Damage ---------------------------------------------------------------------------------------
def write_manifest(folder: Path) -> None:
    """Writes ``manifest.json``: size and SHA-256 of every file below ``folder``."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILE)
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in paths
    }
    files.write_json(folder / MANIFEST_FILE, {"algorithm": "sha256", "files": entries})


def find_damage(folder: Path) -> str | None:
    """Says what is wrong with a checkpoint; None if it holds what was written and nothing else.

    A file that the manifest does not list, or that is a link, could bring anything into what is
    loaded, and a name that leaves the folder would have other files read.
    """
    path = folder / MANIFEST_FILE
    if files.file_kind(path) != "file":
        return f"{MANIFEST_FILE} is missing"
    try:
        if path.stat().st_size > MOST_MANIFEST_BYTES:
            return f"{MANIFEST_FILE} has more than {MOST_MANIFEST_BYTES} bytes"
        listed = json.loads(path.read_text(encoding="utf-8"))["files"]
        entries = {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()}
        outside = [n for n in entries if PurePosixPath(n).is_absolute() or ".." in Path(n).parts]
        if outside:
            return f"{MANIFEST_FILE} names {outside[0]!r}, which is not in the folder"
        present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
        if extra := sorted(present - {*entries, MANIFEST_FILE}):
            return f"{extra[0]} is not in {MANIFEST_FILE}"
        if STATE_FILE not in entries:
            return f"{MANIFEST_FILE} does not list {STATE_FILE}"
        for name, (size, digest) in entries.items():
            file = folder / name
            if files.file_kind(file) == "none":
                return f"{name} is missing"
            if files.file_kind(file) != "file" or folder.resolve() not in file.resolve().parents:
                return f"{name} is no file of this folder"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, not {size}"
            if _digest(file) != digest:
                return f"{name} is not what was written (its sha256 differs)"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST_FILE} cannot be read"
    except OSError as problem:
        return reason_of(problem)
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
        folder = Path(resume).expanduser()
        if not (folder / STATE_FILE).exists():
            raise UserError(
                f"--resume ({resume}): is no whole checkpoint ({STATE_FILE} is missing). Give a "
                "folder like runs/x/checkpoints/step-000100, or auto for the newest."
            )
        if (damage := find_damage(folder)) is not None:
            raise UserError(
                f"--resume ({resume}): is damaged: {damage}. Give an earlier checkpoint, or auto "
                "for the newest whole one."
            )
        read_state(folder)
        return folder, []
    damaged: list[str] = []
    for folder in reversed(list_checkpoints(output_dir)):
        damage = find_damage(folder)
        with suppress(UserError):
            if damage is None and read_state(folder):
                return folder, damaged
        damage = damage or f"{STATE_FILE} cannot be read"
        damaged.append(f"{folder} is damaged and passed over: {damage}")
    if damaged:
        raise UserError(
            f"--resume auto: {'; '.join(damaged)}; no whole checkpoint is left. Start a new run "
            "in another folder, or replace this one with --overwrite."
        )
    return None, []


def check_world(folder: Path, strategy: Strategy) -> None:
    """Raises UserError if the strategy, or that many processes of it, cannot read a checkpoint."""
    state = read_state(folder)
    now = strategy.accelerator.num_processes
    kind, processes = state.strategy or strategy.kind, state.num_processes or now
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
