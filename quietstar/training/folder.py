"""The run folder: what a new run finds there, and whether a resumed run is the same."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from quietstar.config import Config
from quietstar.config.loading import load_config
from quietstar.errors import ConfigError, UserError
from quietstar.training.checkpoint import check_whole, find_whole
from quietstar.training.metrics_file import METRICS_FILE
from quietstar.training.preemption import PREEMPTED_FILE

CONFIG_FILE = "config.yaml"
FINAL_FOLDER = "final"
TRACKERS_FOLDER = "tensorboard"
REPORT_FILES = ("results.json", "samples.json", "report.html")
CONTENTS = (
    *(METRICS_FILE, "checkpoints", FINAL_FOLDER, TRACKERS_FOLDER, PREEMPTED_FILE),
    *REPORT_FILES,
)

_FREE_ON_RESUME = (
    *("training.max_steps", "training.micro_batch_size", "training.cpu_threads"),
    *("training.learn_chunk_tokens", "training.gradient_checkpointing", "training.eval_steps"),
    *("training.torch_compile", "training.save_steps"),
    *("training.save_total_limit", "training.overwrite_output_dir", "training.output_dir"),
    *("data.eval_sequences", "logging.report_to", "logging.logging_steps", "logging.thought_steps"),
)
"""Keys that may change between stop and resume: they leave the run what it is, or prolong it."""


def find_checkpoint(output_dir: Path, resume: str | None) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from (None for a new run), and what is to be said about others.

    Raises:
        UserError: The checkpoint asked for is damaged or none, or all of the run's are damaged.
    """
    if resume is None:
        return None, []
    if resume != "auto":
        check_whole(Path(resume))
        return Path(resume), []
    checkpoint, damaged = find_whole(output_dir)
    if checkpoint is None and damaged:
        raise UserError(
            f"--resume auto: {'; '.join(damaged)}; no whole checkpoint is left. Start a new run "
            "in another folder, or replace this one with --training.overwrite_output_dir true."
        )
    return checkpoint, damaged


def check_free(output_dir: Path, overwrite: bool) -> None:
    """Refuse a folder that cannot be written, or holds a run or anything else under its names.

    Raises:
        UserError: One of these; ``training.overwrite_output_dir`` only replaces what a run wrote.
    """
    ancestor = next(f for f in (output_dir, *output_dir.absolute().parents) if f.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        what = "cannot be written" if ancestor.is_dir() else "is a file"
        raise UserError(
            f"training.output_dir: {output_dir} cannot be made, since {ancestor} {what}; give "
            "another folder"
        )
    is_run = (output_dir / CONFIG_FILE).exists()
    if is_run and not overwrite:
        raise UserError(
            f"training.output_dir: {output_dir} already holds a run. Choose another folder, go on "
            "with --resume auto, or replace it with --training.overwrite_output_dir true."
        )
    found = [name for name in CONTENTS if (output_dir / name).exists()]
    if found and not is_run:
        raise UserError(
            f"training.output_dir: {output_dir} holds {', '.join(found)} but no {CONFIG_FILE}, so "
            "no run of quietstar wrote it and it would be lost. Choose another folder."
        )


def check_same_run(output_dir: Path, config: Config, allow_changes: bool = False) -> list[str]:
    """Refuse to go on with a run under settings that would make it another one.

    Args:
        output_dir: Of the run.
        config: With which it shall go on.
        allow_changes: Go on all the same.

    Returns:
        What changed, a line a key.

    Raises:
        UserError: They do; names every changed key with its old and new value.
    """
    path = output_dir / CONFIG_FILE
    try:
        before = flat(load_config(path)) if path.exists() else {}
    except ConfigError as error:
        raise UserError(f"--resume: {error.problems[0]}") from error
    now = flat(config)
    last = list(config.stage_configs())[-1]
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)] if before else []
    changed = {key: f"{key} was {before.get(key)}, is {now.get(key)}" for key in keys}
    binding = [line for key, line in changed.items() if not _is_free_on_resume(key, last)]
    if binding and not allow_changes:
        raise UserError(
            f"--resume: {_few(binding)}: that would be another run. Take the values of "
            f"{path}, start a new run in another folder, or insist with --allow-changes true."
        )
    return list(changed.values())


def _few(changes: list[str], most: int = 5) -> str:
    """The first changes on one line, and how many more there are."""
    shown = "; ".join(" ".join(change.split()) for change in changes[:most])
    more = len(changes) - most
    return f"{shown}; and {more} more" if more > 0 else shown


def _is_free_on_resume(key: str, last_stage: str) -> bool:
    """Steps of a stage that others follow are not free: what follows would begin elsewhere."""
    if not key.startswith("stages."):
        return key in _FREE_ON_RESUME
    _, stage, name = key.split(".", 2)
    return name in _FREE_ON_RESUME and (name != "training.max_steps" or stage == last_stage)


def start_folder(output_dir: Path) -> None:
    """Make the run folder, without what an overwritten run left.

    Raises:
        UserError: The folder cannot be made.
    """
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


def flat(config: Config) -> dict[str, str]:
    """Dotted keys and values as text, which every tracker takes too; of each stage if several."""
    if not config.stages:
        sections = config.model_dump(exclude={"stages"}).items()
        pairs = ((f"{name}.{key}", value) for name, part in sections for key, value in part.items())
        return {key: str(value) for key, value in pairs}
    return {
        f"stages.{stage}.{key}": value
        for stage, stage_config in config.stage_configs().items()
        for key, value in flat(stage_config).items()
    }
