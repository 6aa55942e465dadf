"""The run folder: whose it is, who works in it, and what of it a new run may replace.

A run marks the folder that it begins with `MARKER_FILE` and holds a lock on it while it works. A
folder without the marker is never emptied, whatever it holds, and never written into unless a run
of version 0.1.0, which made no marker, left a checkpoint in it to go on from.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from quietstar.config import Config
from quietstar.config.loading import load_config
from quietstar.errors import ConfigError, UserError, reason_of
from quietstar.registry import trusting
from quietstar.system import files
from quietstar.system.locks import locked
from quietstar.training.costs import with_eval_sequences
from quietstar.training.reporter import METRICS_FILE, THOUGHTS_FILE, read_metrics
from quietstar.version import __version__

MARKER_FILE, LOCK_FILE, CONFIG_FILE = "quietstar-run.json", "quietstar.lock", "config.yaml"
PREEMPTED_FILE = "preempted"
FINAL_FOLDER, EMA_FOLDER = "final", "ema"
CHECKPOINTS_FOLDER, TRACKERS_FOLDER = "checkpoints", "tensorboard"
MODELS_FOLDER = "models"
"""Models of checkpoints, written where a command is given one (`quietstar.training.export`)."""
WRITTEN_FILES = (
    METRICS_FILE,
    THOUGHTS_FILE,
    PREEMPTED_FILE,
    "results.json",
    "samples.json",
    "report.html",
)
MARKER_FIELDS = ("version", "host", "pid", "start")
TENSORBOARD_FOLDER = f"{TRACKERS_FOLDER}/quietstar"
CHECKPOINT_NAME = re.compile(r"step-\d{6,}(\.partial|\.replaced)?")
_WRITTEN_AT_ONCE = "|".join(map(re.escape, (MARKER_FILE, CONFIG_FILE, *WRITTEN_FILES)))
UNFINISHED_NAME = re.compile(
    rf"\.({_WRITTEN_AT_ONCE})\.\d+\.partial|({FINAL_FOLDER}|{EMA_FOLDER})\.(partial|replaced)"
)
"""What `files.write_whole` and `files.whole_folder` leave in a run folder when they are killed."""
FREE_ON_RESUME = (
    *("training.max_steps", "training.micro_batch_size", "training.cpu_threads"),
    *("training.learn_chunk_tokens", "training.gradient_checkpointing", "training.eval_steps"),
    *("training.eval_controls", "training.torch_compile", "training.save_steps"),
    *("training.stop_on_collapse", "training.rank_timeout"),
    *("training.save_total_limit", "training.output_dir"),
    *("data.eval_sequences", "logging.report_to", "logging.logging_steps"),
    "logging.thought_steps",
)
"""Keys that may change between stop and resume: the run stays the same one, or is prolonged."""


# --- Whose folder it is ---------------------------------------------------------------------------
def check_own(output_dir: Path, overwrite: bool = False) -> bool:
    """Returns True if the folder holds a run; False if there is none, or nothing in it.

    Args:
        output_dir: Folder of the run.
        overwrite: Whether what is in it is to be replaced, which takes the marker of a run.

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
    # A kill while the marker was written leaves its half next to the lock.
    begun = re.compile(rf"{re.escape(LOCK_FILE)}|\.{re.escape(MARKER_FILE)}\.\d+\.partial")
    if all(begun.fullmatch(name) for name in names):
        return False
    if not _is_marked(output_dir) and (overwrite or not _is_earlier_version(output_dir)):
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise UserError(
            f"{key}: holds {shown} but no {MARKER_FILE} as runs write it, so no run of quietstar "
            "began it, and nothing in it is touched. Give a folder that is new or empty, as "
            f"{output_dir}/run."
        )
    for folder in (output_dir, output_dir / CHECKPOINTS_FOLDER, output_dir / TRACKERS_FOLDER):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{key}: {folder} cannot be written. Change its permissions.")
    models = (FINAL_FOLDER, EMA_FOLDER)
    folders = (*models, CHECKPOINTS_FOLDER, TRACKERS_FOLDER, TENSORBOARD_FOLDER)
    for name in (MARKER_FILE, LOCK_FILE, CONFIG_FILE, *WRITTEN_FILES, *folders):
        expected = "folder" if name in folders else "file"
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


def _is_marked(output_dir: Path) -> bool:
    """Returns True if the folder holds a marker that a run wrote."""
    path = output_dir / MARKER_FILE
    try:
        content = json.loads(path.read_bytes()) if files.file_kind(path) == "file" else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and all(field in content for field in MARKER_FIELDS)


def _is_earlier_version(output_dir: Path) -> bool:
    """Returns True for the folder of a run of version 0.1.0 that can be gone on with."""
    try:
        with trusting(False):
            load_config(output_dir / CONFIG_FILE)
    except (UserError, OSError):
        return False
    # Its config and figures alone could be anybody's.
    return any(
        re.fullmatch(r"step-\d{6,}", folder.name)
        and all((folder / name).is_file() for name in ("manifest.json", "trainer_state.json"))
        for folder in _entries(output_dir / CHECKPOINTS_FOLDER)
    )


def check_inputs(output_dir: Path, config: Config) -> None:
    """Raises UserError if the run reads what it would delete or replace."""
    written = [Path(os.path.realpath(path)) for path in _written(output_dir) if path.exists()]
    for stage, stage_config in config.stage_configs().items():
        for key, name in inputs_of(stage_config):
            path = Path(os.path.realpath(name))
            if place := next((p for p in written if path.is_relative_to(p)), None):
                prefix = f"stages.{stage}." if config.stages else ""
                raise UserError(
                    f"{prefix}{key} ({name}): lies in what this run replaces ({place}). Move it "
                    "to another place, or give another training.output_dir."
                )


def inputs_of(config: Config) -> list[tuple[str, str]]:
    """Returns the keys that name what a stage reads, with their values."""
    data, model = config.data, config.model
    named = [
        *(("data.train", data.train), ("data.eval", data.eval)),
        *(("model.name_or_path", model.name_or_path), ("model.tokenizer", model.tokenizer)),
        *(("judge.model", config.judge.model), ("judge.template", config.judge.template)),
        ("loss.teacher", getattr(config.loss, "teacher", None)),
    ]
    return [(key, name) for key, name in named if name is not None]


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
    content = {"version": __version__, "host": socket.gethostname(), "pid": os.getpid(),
               "start": began}  # fmt: skip
    files.write_json(output_dir / MARKER_FILE, content)


def clear(output_dir: Path) -> None:
    """Deletes what an earlier run wrote here, and nothing else.

    Raises:
        UserError: Some of it cannot be deleted.
    """
    for path in _written(output_dir):
        if reason := files.remove(path):
            raise UserError(
                f"--overwrite: {path} of the earlier run cannot be deleted "
                f"({reason}). Remove it, or give another training.output_dir."
            )
    for name in (CHECKPOINTS_FOLDER, MODELS_FOLDER, TRACKERS_FOLDER):
        with suppress(OSError):  # others' files in it
            (output_dir / name).rmdir()


def _written(output_dir: Path) -> list[Path]:
    """Returns what a run writes here and the next one deletes, whether it exists or not."""
    folders = (FINAL_FOLDER, EMA_FOLDER, TENSORBOARD_FOLDER)
    paths = [output_dir / name for name in (*WRITTEN_FILES, *folders)]
    paths += [path for path in _entries(output_dir) if UNFINISHED_NAME.fullmatch(path.name)]
    of_steps = [*_entries(output_dir / CHECKPOINTS_FOLDER), *_entries(output_dir / MODELS_FOLDER)]
    return paths + [path for path in of_steps if CHECKPOINT_NAME.fullmatch(path.name)]


def recover(output_dir: Path) -> None:
    """Tidies up after a kill: drops what is half written, restores what was just being replaced."""
    for path in _written(output_dir):
        kind, whole = files.file_kind(path), path.with_name(path.name.removesuffix(".replaced"))
        if whole != path and not whole.exists():
            os.replace(path, whole)
        elif path.suffix in (files.PARTIAL, ".replaced") and kind in ("file", "folder"):
            files.remove(path)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


# --- Whether it is the same run -------------------------------------------------------------------
def check_same_run(
    output_dir: Path, config: Config, allow_changes: bool = False
) -> tuple[dict[str, int | None], list[str]]:
    """Returns how many texts each stage of the run holds out, and a line for each changed key.

    Raises:
        UserError: The run would be another one with the changes, or its settings are lost.
    """
    path = output_dir / CONFIG_FILE
    if not path.exists():
        if allow_changes:
            return {}, [f"{path} is missing, so changes of settings are not noticed"]
        raise UserError(
            f"--resume: {path} is missing, so nobody knows whether these are the settings of the "
            "run. Restore it, or insist with --allow-changes."
        )
    try:
        with trusting(False):
            earlier = load_config(path)
            before = flat(earlier)
            held_out = {
                name: stage.data.eval_sequences for name, stage in earlier.stage_configs().items()
            }
    except ConfigError as error:
        raise UserError(f"--resume: {error.problems[0]}") from error
    now, last_stage = flat(with_eval_sequences(config, held_out)), list(config.stage_configs())[-1]
    changes, binding = [], []
    stages = [", ".join(x.stages) or "none" for x in (earlier, config)]
    if stages[0] != stages[1]:
        changes.append(f"stages were {stages[0]}, are {stages[1]}")
        binding.append(changes[0])
        before = {key: value for key, value in before.items() if key in now}
        now = {key: value for key, value in now.items() if key in before}
    for key in {**before, **now}:
        # Trust is the user's of today: what the folder says of it never counts.
        if before.get(key) == now.get(key) or key.endswith("model.trust_remote_code"):
            continue
        changes.append(f"{key} was {before.get(key)}, is {now.get(key)}")
        stage, name = last_stage, key
        if key.startswith("stages."):
            _, stage, name = key.split(".", 2)
        # Other steps of an earlier stage are binding: the stages after it would begin elsewhere.
        prolongs_earlier = name == "training.max_steps" and stage != last_stage
        # A stream holds its first texts out, so another number moves where training begins.
        moves_data = name == "data.eval_sequences" and config.data.streaming
        if name not in FREE_ON_RESUME or prolongs_earlier or moves_data:
            binding.append(" ".join(changes[-1].split()))
    if binding and not allow_changes:
        more = f"; and {len(binding) - 5} more" if len(binding) > 5 else ""
        raise UserError(
            f"--resume: {'; '.join(binding[:5])}{more}: that would be another run. Give the run's "
            f"own --config {path}, start a new run in another folder, replace this one with "
            "--overwrite, or insist with --allow-changes true."
        )
    return held_out, changes


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
