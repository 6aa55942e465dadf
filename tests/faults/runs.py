"""Training runs as the programs here need them: configs, and what must be true of a run folder."""

from __future__ import annotations

import hashlib
import json
import re
import signal
from pathlib import Path
from typing import Any

import yaml
from forking import Child, Outcome
from material import CONFIG, write_lines

CLOCK = ("seconds", "text_tokens_per_second", "thought_tokens_per_second", "peak_memory_mb")
SHORT: dict[str, Any] = {"max_steps": 24, "eval_steps": 4, "save_steps": 2}
"""Training settings of a run that is cheap to repeat, and does everything often."""
SLOW_MODEL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
              "num_attention_heads": 4, "num_key_value_heads": 2,
              "max_position_embeddings": 128}  # fmt: skip


def write_config(
    folder: Path, name: str = "config.yaml", *, texts: int = 40, **changes: Any
) -> str:
    """Write a config and so many texts into a folder; changes name keys with ``__``."""
    tree = yaml.safe_load(CONFIG)
    for key, value in changes.items():
        section, _, name_of_key = key.partition("__")
        tree[section][name_of_key] = value
    (folder / name).write_text(yaml.safe_dump(tree, sort_keys=False))
    lines = [f"{n % 8} plus {n // 8} is {n % 8 + n // 8}" for n in range(texts)]
    endings = ("", ", and so on", ", and so on, and so on")
    records = [{"text": line + endings[n % 3]} for n, line in enumerate(lines)]
    write_lines(folder / "texts.jsonl", records)
    return name


def short_config(folder: Path, name: str = "config.yaml", **more: Any) -> str:
    """Write the config of a short run."""
    settings = {f"training__{key}": value for key, value in SHORT.items()}
    return write_config(folder, name, **{**settings, **more})


def slow_config(folder: Path, **more: Any) -> str:
    """Write the config of a run whose phases take a second or more each."""
    settings = {
        "model__config": yaml.safe_load(CONFIG)["model"]["config"] | SLOW_MODEL,
        "data__seq_len": 96,
        "data__spans": "concatenate",
        "data__eval_sequences": 8,
        "thoughts__length": 12,
        "thoughts__num_thoughts": 4,
        "training__max_steps": 3,
        "training__global_batch_size": 8,
        "training__micro_batch_size": 4,
        "training__eval_steps": 2,
        "training__save_steps": 2,
    }
    return write_config(folder, texts=320, **{**settings, **more})


def train_line(config: str, output: str, *more: str) -> list[str]:
    """Return the command line of a run."""
    return ["train", "--config", config, "--training.output_dir", output, *more]


def run_whole(folder: Path, config: str, output: str, *more: str, timeout: float = 600) -> Path:
    """Run to the end without a disturbance; returns the run folder."""
    outcome = Child(train_line(config, output, *more), folder, as_root=True).wait(timeout)
    if outcome.code != 0:
        raise RuntimeError(f"{output}: exit {outcome.code}\n{outcome.said}\n{outcome.traceback}")
    return folder / output


def records_of(folder: Path) -> list[dict[str, Any]]:
    """Read the whole lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def steps_done(folder: Path) -> int:
    """Return the last step that metrics.jsonl tells of."""
    return max((r["step"] for r in records_of(folder) if r["kind"] == "train"), default=0)


def trajectory(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run without figures of clock and memory."""
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in records_of(folder)]


def weights(folder: Path) -> dict[str, str]:
    """Return the digests of a saved model's weights and settings."""
    paths = [*folder.rglob("*.safetensors"), *folder.glob("quietstar.json")]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(paths)}


def checkpoints(folder: Path) -> list[Path]:
    """Return what bears the name of a checkpoint."""
    found = [p for p in folder.glob("checkpoints/*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def find_faults(folder: Path, finals: list[dict[str, str]]) -> dict[str, list[str]]:
    """Return what is wrong with a run folder that was left in the middle of something.

    Args:
        folder: The run folder.
        finals: Digests of every final model that may lie there.
    """
    from quietstar.training.checkpoint import find_damage

    faults: dict[str, list[str]] = {"corrupt": [], "mixed": [], "unreadable": []}
    for checkpoint in checkpoints(folder):
        if (damage := find_damage(checkpoint)) is not None:
            faults["corrupt"].append(f"{checkpoint.name}: {damage}")
    final = folder / "final"
    if final.exists() and weights(final) not in finals:
        faults["mixed"].append(f"final holds {sorted(p.name for p in final.iterdir())}")
    try:
        steps_done(folder)
    except (ValueError, KeyError, TypeError) as problem:
        faults["unreadable"].append(f"metrics.jsonl: {problem!r}")
    for path in [*folder.glob("*.json"), *folder.glob("*.yaml")]:
        try:
            whole = (
                json.loads(path.read_text())
                if path.suffix == ".json"
                else yaml.safe_load(path.read_text())
            )
            assert whole is not None
        except Exception as problem:
            faults["unreadable"].append(f"{path.name}: {problem!r}")
    page = folder / "report.html"
    if page.exists() and "</html>" not in page.read_text(errors="replace"):
        faults["unreadable"].append("report.html is cut")
    return {kind: found for kind, found in faults.items() if found}


def differences(folder: Path, whole: Path) -> list[str]:
    """Return what tells a finished run from an undisturbed one."""
    found = []
    if weights(folder / "final") != weights(whole / "final"):
        found.append("final weights differ")
    ours, theirs = trajectory(folder), trajectory(whole)
    if len(ours) != len(theirs):
        steps = [(r["kind"], r["step"]) for r in ours]
        found.append(f"{len(ours)} records, not {len(theirs)}: {steps[-8:]}")
    changed = [b for a, b in zip(ours, theirs, strict=False) if a != b]
    if changed:
        found.append(f"{changed[0]['kind']} record of step {changed[0]['step']} differs")
    left = [
        p.relative_to(folder)
        for p in folder.rglob("*")
        if p.suffix in (".partial", ".replaced", ".new")
    ]
    if left:
        found.append(f"left behind: {', '.join(map(str, left[:4]))}")
    return found


def how_ended(outcome: Outcome) -> str:
    """Say how a process ended, with its last words."""
    how = f"exit {outcome.code}"
    if outcome.timed_out:
        how = "did not end"
    elif outcome.signal is not None:
        how = signal.Signals(outcome.signal).name
    last = (outcome.traceback or outcome.err or outcome.out).strip().splitlines()[-1:]
    return f"{how}: {''.join(last)[:400]}"
