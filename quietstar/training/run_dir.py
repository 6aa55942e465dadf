"""The run folder: whose it is, who works in it, and what of it a new run may replace.

A run marks the folder that it begins with `MARKER_FILE` and holds a lock on it while it works. A
folder without the marker is never written into, whatever it holds.
"""

from __future__ import annotations

import os
import re
import socket
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import quietstar
from quietstar.config import Config
from quietstar.config.loading import load_config
from quietstar.errors import ConfigError, UserError, reason_of
from quietstar.registry import importing_nothing
from quietstar.system import files
from quietstar.system.locks import locked
from quietstar.training.reporter import METRICS_FILE, read_metrics

MARKER_FILE, LOCK_FILE, CONFIG_FILE = "quietstar-run.json", "quietstar.lock", "config.yaml"
PREEMPTED_FILE = "preempted"
FINAL_FOLDER, CHECKPOINTS_FOLDER, TRACKERS_FOLDER = "final", "checkpoints", "tensorboard"
WRITTEN_FILES = (METRICS_FILE, PREEMPTED_FILE, "results.json", "samples.json", "report.html")
CHECKPOINT_NAME = re.compile(r"step-\d{6,}(\.partial|\.replaced)?")
FREE_ON_RESUME = (
    *("training.max_steps", "training.micro_batch_size", "training.cpu_threads"),
    *("training.learn_chunk_tokens", "training.gradient_checkpointing", "training.eval_steps"),
    *("training.torch_compile", "training.save_steps"),
    *("training.save_total_limit", "training.overwrite_output_dir", "training.output_dir"),
    *("data.eval_sequences", "logging.report_to", "logging.logging_steps", "logging.thought_steps"),
)
"""Keys that may change between stop and resume: the run stays the same one, or is prolonged."""


# --- Whose folder it is ---------------------------------------------------------------------------
def check_own(output_dir: Path) -> bool:
    """Returns True if the folder holds a run; False if there is none, or nothing in it.

    Raises:
        UserError: It holds anything else, or cannot be written.
    """
    key = f"training.output_dir ({output_dir})"
    try:
        ancestor = next(f for f in (output_dir, *output_dir.absolute().parents) if f.exists())
        names = sorted(os.listdir(output_dir)) if ancestor == output_dir else []
    except (OSError, ValueError) as problem:
        raise UserError(
            f"{key}: cannot be a folder ({reason_of(problem)}). Give another."
        ) from problem
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        what = "cannot be written" if ancestor.is_dir() else "is a file"
        raise UserError(f"{key}: cannot be made, since {ancestor} {what}. Give another folder.")
    if set(names) <= {LOCK_FILE}:
        return False
    if MARKER_FILE not in names and not _is_earlier_version(output_dir):
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise UserError(
            f"{key}: holds {shown} but no {MARKER_FILE}, so no run of quietstar began it, and "
            f"nothing in it is touched. Give a folder that is new or empty, as {output_dir}/run."
        )
    for folder in (output_dir, output_dir / CHECKPOINTS_FOLDER):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{key}: {folder} cannot be written. Change its permissions.")
    written = (MARKER_FILE, LOCK_FILE, CONFIG_FILE, *WRITTEN_FILES, FINAL_FOLDER)
    for name in written:
        expected = "folder" if name == FINAL_FOLDER else "file"
        kind = files.file_kind(output_dir / name)
        if kind not in ("none", expected):
            raise UserError(
                f"{key}: its {name} is a {kind}, not a {expected}, and is not replaced. Remove it, "
                "or give another folder."
            )
    return True


def has_steps(output_dir: Path) -> bool:
    """Returns True if the run in a folder has done a step or left a model."""
    if any((output_dir / name).exists() for name in (FINAL_FOLDER, CHECKPOINTS_FOLDER)):
        return True
    records, _ = read_metrics(output_dir / METRICS_FILE)
    return any(record["kind"] == "train" for record in records)


def _is_earlier_version(output_dir: Path) -> bool:
    """Returns True for the folder of a run of a version that did not mark its folders."""
    try:
        with importing_nothing():
            load_config(output_dir / CONFIG_FILE)
        has_records = bool(read_metrics(output_dir / METRICS_FILE)[0])
    except (UserError, OSError):
        return False
    return has_records or (output_dir / CHECKPOINTS_FOLDER).is_dir()


def hold(output_dir: Path) -> AbstractContextManager[None]:
    """Makes the folder if need be; returns the lock on it, to be entered.

    Raises:
        UserError: It cannot be made; entered, also where another process holds the lock.
    """
    key = f"training.output_dir ({output_dir})"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as problem:
        raise UserError(
            f"{key}: cannot be made ({reason_of(problem)}). Give another folder."
        ) from problem
    return locked(output_dir / LOCK_FILE, key, "Wait for its end, or give another folder.")


def drop_unused(output_dir: Path) -> None:
    """Deletes a folder in which nothing but the lock was made, while the lock is held."""
    if [path.name for path in _entries(output_dir)] == [LOCK_FILE]:
        files.remove(output_dir / LOCK_FILE)
        with suppress(OSError):
            output_dir.rmdir()


def mark(output_dir: Path) -> None:
    """Says in the marker who works here now."""
    began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    content = {"version": quietstar.__version__, "host": socket.gethostname(), "pid": os.getpid(),
               "start": began}  # fmt: skip
    files.write_json(output_dir / MARKER_FILE, content)


def clear(output_dir: Path) -> None:
    """Deletes what an earlier run wrote here, and nothing else.

    Raises:
        UserError: Some of it cannot be deleted.
    """
    paths = [output_dir / name for name in (*WRITTEN_FILES, FINAL_FOLDER)]
    paths += [output_dir / f"{FINAL_FOLDER}{end}" for end in (".partial", ".replaced")]
    paths += [p for p in _entries(output_dir) if p.name.endswith(files.PARTIAL)]
    checkpoints = _entries(output_dir / CHECKPOINTS_FOLDER)
    paths += [path for path in checkpoints if CHECKPOINT_NAME.fullmatch(path.name)]
    paths.append(output_dir / TRACKERS_FOLDER / "quietstar")
    for path in paths:
        if reason := files.remove(path):
            raise UserError(
                f"training.overwrite_output_dir: {path} of the earlier run cannot be deleted "
                f"({reason}). Remove it, or give another training.output_dir."
            )
    for name in (CHECKPOINTS_FOLDER, TRACKERS_FOLDER):
        with suppress(OSError):  # others' files in it
            (output_dir / name).rmdir()


def recover(output_dir: Path) -> None:
    """Tidies up after a kill: drops what is half written, restores what was just being replaced."""
    for folder in (output_dir, output_dir / CHECKPOINTS_FOLDER):
        for path in _entries(folder):
            name = path.name.removesuffix(".replaced")
            is_known = name == FINAL_FOLDER or CHECKPOINT_NAME.fullmatch(name)
            if path.name.endswith(".replaced") and is_known:
                if path.with_name(name).exists():
                    files.remove(path)
                else:
                    os.replace(path, path.with_name(name))
            elif path.name.endswith(files.PARTIAL) and files.file_kind(path) in ("file", "folder"):
                files.remove(path)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


# --- Whether it is the same run -------------------------------------------------------------------
def check_same_run(output_dir: Path, config: Config, allow_changes: bool = False) -> list[str]:
    """Returns a line for each changed key.

    Raises:
        UserError: The run would be another one with the changes, or its settings are lost.
    """
    path = output_dir / CONFIG_FILE
    if not path.exists():
        if allow_changes:
            return [f"{path} is missing, so changes of settings are not noticed"]
        raise UserError(
            f"--resume: {path} is missing, so nobody knows whether these are the settings of the "
            "run. Restore it, or insist with --allow-changes."
        )
    try:
        with importing_nothing():
            before = flat(load_config(path))
    except ConfigError as error:
        raise UserError(f"--resume: {error.problems[0]}") from error
    now, last_stage = flat(config), list(config.stage_configs())[-1]
    changes, binding = [], []
    for key in {**before, **now}:
        if before.get(key) == now.get(key):
            continue
        changes.append(f"{key} was {before.get(key)}, is {now.get(key)}")
        stage, name = last_stage, key
        if key.startswith("stages."):
            _, stage, name = key.split(".", 2)
        # Other steps of an earlier stage are binding: the stages behind it would begin elsewhere.
        prolongs_earlier = name == "training.max_steps" and stage != last_stage
        # A stream holds its first texts out, so another number moves where training begins.
        moves_data = name == "data.eval_sequences" and config.data.streaming
        if name not in FREE_ON_RESUME or prolongs_earlier or moves_data:
            binding.append(" ".join(changes[-1].split()))
    if binding and not allow_changes:
        more = f"; and {len(binding) - 5} more" if len(binding) > 5 else ""
        raise UserError(
            f"--resume: {'; '.join(binding[:5])}{more}: that would be another run. Take the values "
            f"of {path}, start a new run in another folder, replace this one with "
            "--training.overwrite_output_dir true, or insist with --allow-changes true."
        )
    return changes


def flat(config: Config) -> dict[str, str]:
    """Returns dotted keys and values as text, as trackers take them; of each stage if several."""
    values = {}
    for stage, stage_config in config.stage_configs().items():
        prefix = f"stages.{stage}." if config.stages else ""
        for section, part in stage_config.model_dump(exclude={"stages"}).items():
            for key, value in part.items():
                entries = value.items() if isinstance(value, dict) else [("", value)]
                for entry, inner in entries:
                    name = f"{prefix}{section}.{key}" + (f".{entry}" if entry else "")
                    values[name] = str(inner)
    return values
