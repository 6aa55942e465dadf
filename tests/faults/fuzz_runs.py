"""Malformed checkpoints and run folders, and folders that are no run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

from cases import Case
from material import command
from spoiling import (
    generator,
    odd_json,
    replace_entry,
    spoil_bytes,
    spoil_json,
    spoil_tensors,
)


@generator("resume/checkpoint", "resume/checkpoint-path")
def _checkpoint(rng: random.Random, work: Path, run: str) -> Case:
    """A damaged checkpoint, with a manifest that knows it or not."""
    newest = work / "run" / "checkpoints" / "step-000004"
    folder = rng.choice((newest, newest, newest.with_name("step-000002")))
    path = rng.choice(sorted(folder.iterdir()))
    kind = rng.random()
    refuse: bool | None = None
    listed = False
    if kind < 0.25:
        what = replace_entry(rng, path)
        damaged = True
    elif kind < 0.6:
        before = path.read_bytes()
        what = spoil_bytes(rng, path)
        damaged = path.read_bytes() != before
        listed = rng.random() < 0.5
    elif path.suffix == ".safetensors":
        what, _ = spoil_tensors(rng, path)
        damaged = listed = True
    elif path.suffix == ".json":
        what = odd_json(rng, path) if rng.random() < 0.4 else spoil_json(rng, path)
        damaged, listed = True, path.name != "manifest.json"
    else:
        what = spoil_bytes(rng, path)
        damaged, listed = True, True
    if listed and path.name != "manifest.json":
        relist(folder)
        what += ", with a manifest that fits"
    given = rng.random() < 0.4
    if damaged and not listed and path.name != "manifest.json" and given and folder == newest:
        refuse = True
    resume = str(newest.relative_to(work)) if given else "auto"
    if damaged and not listed and not given and path.name != "manifest.json":
        refuse = False  # an older one is whole, or this one is
    return Case(
        f"{folder.name}/{what}, --resume {resume}",
        command("resume", resume=resume),
        refuse,
        writes=("run/*", "run"),
    )


def relist(folder: Path) -> None:
    """Write a checkpoint's manifest anew, as whoever spoils a folder could."""
    path = folder / "manifest.json"
    files = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != path.name and os.access(file, os.R_OK):
            data = file.read_bytes()
            files[file.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps({"algorithm": "sha256", "files": files}))


@generator("resume/run-files")
def _run_files(rng: random.Random, work: Path, run: str) -> Case:
    """Damaged files of a run folder beside its checkpoints."""
    folder = work / "run"
    names = [p for p in folder.iterdir() if p.is_file()]
    path = rng.choice(sorted(names))
    kind = rng.random()
    refuse: bool | None = None
    if kind < 0.2:
        what = replace_entry(rng, path)
    elif path.name == "metrics.jsonl" or kind < 0.3:
        path = folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        bad = rng.choice(
            (
                b"\0" * 40 + b"\n",
                b"\xff\xfe\n",
                b"[1]\n",
                b'{"kind": "train"}\n',
                b"3\n",
                b'{"kind": "train", "step": "x"}\n',
                b'{"step": 1e999, "kind": "eval"}\n',
                b'{"kind": [], "step": 1}\n',
                b"{" * 50_000 + b"\n",
                b"\n",
                b"9" * 6000 + b"\n",
                b'{"kind": "train", "step": NaN}\n',
                b'{"kind": "\\u001b]0;x\\u0007", "step": 1}\n',
            )
        )
        lines.insert(rng.randrange(len(lines) + 1), bad)
        path.write_bytes(b"".join(lines))
        what, refuse = f"metrics.jsonl: a line {bad[:40]!r}", False
    else:
        what = spoil_bytes(rng, path)
    return Case(f"run/{what}", command("resume"), refuse, writes=("run/*",), several=True)


@generator("train/run-folder", "resume/run-folder")
def _run_folder(rng: random.Random, work: Path, run: str) -> Case:
    """A folder for the run that holds something else, or that cannot be written."""
    new = work / "new"
    kind = rng.choice(
        (
            "foreign config",
            "foreign checkpoints",
            "a file",
            "unwritable",
            "a run",
            "link to a run",
            "link to user files",
            "dangling link",
            "config is a link",
            "final is a link",
            "metrics is a pipe",
            "another run",
            "user files",
            "tilde",
            "long name",
            "hostile name",
            "checkpoints is a file",
            "unwritable checkpoints",
            "lock is a folder",
            "lock is a link",
        )
    )
    line = command("train", *(["--resume", "auto"] if run == "resume" else []))
    refuse: bool | None = True
    several = True
    writes: tuple[str, ...] = ()
    if kind in ("foreign config", "foreign checkpoints"):
        (new / "checkpoints").mkdir(parents=True)
        (new / "checkpoints" / "my_model.pt").write_bytes(b"weights")
        (new / "tensorboard").mkdir()
        (new / "tensorboard" / "events").write_text("mine")
        if kind == "foreign config":
            (new / "config.yaml").write_text("lr: 3\nmodel: resnet\n")
    elif kind == "a file":
        new.write_text("mine")
    elif kind == "unwritable":
        new.mkdir()
        new.chmod(0o555)
    elif kind == "a run":
        line += ["--training.output_dir", "run"]
        refuse = True if run == "train" else None
        writes = ("run/*",)
    elif kind == "link to a run":
        new.symlink_to("run")
        refuse = True if run == "train" else None
        writes = ("run/*",)
    elif kind == "link to user files":
        (work / "notes").mkdir()
        (work / "notes" / "report.html").write_text("mine")
        (work / "notes" / "config.yaml").write_text("lr: 3\n")
        new.symlink_to("notes")
    elif kind == "dangling link":
        new.symlink_to("nothing")
        refuse = None
    elif kind == "config is a link":
        new.mkdir()
        (new / "config.yaml").symlink_to("../user_notes.txt")
    elif kind == "final is a link":
        new.mkdir()
        (new / "final").symlink_to("../full")
    elif kind == "metrics is a pipe":
        new.mkdir()
        os.mkfifo(new / "metrics.jsonl")
    elif kind == "another run":
        shutil.copytree(work / "run", new)
        shutil.rmtree(new / "checkpoints")
        shutil.rmtree(new / "final")
        line += ["--optim.learning_rate", "0.5"]
    elif kind == "user files":
        new.mkdir()
        (new / "thesis.tex").write_text("mine")
        refuse = None
    elif kind == "tilde":
        line += ["--training.output_dir", "~/runs/x"]
        refuse = None
    elif kind == "long name":
        line += ["--training.output_dir", "x" * 300]
    elif kind == "hostile name":
        line += [
            "--training.output_dir",
            rng.choice(("a\x1b]0;x\x07", "a[/b]", "a\nb", "a\udcffb")),
        ]
        refuse = None
    elif kind == "checkpoints is a file":
        new.mkdir()
        (new / "checkpoints").write_text("mine")
    elif kind == "unwritable checkpoints":
        line += ["--training.output_dir", "run", "--training.max_steps", "6"]
        (work / "run" / "checkpoints").chmod(0o555)
        writes = ("run/*",)
    elif kind.startswith("lock"):
        new.mkdir()
        if kind.endswith("folder"):
            (new / "quietstar.lock").mkdir()
        else:
            (new / "quietstar.lock").symlink_to("../user_notes.txt")
    if rng.random() < 0.3 and kind in ("foreign config", "config is a link", "link to user files"):
        line += ["--overwrite"]
    return Case(f"output_dir: {kind}", line, refuse, several=several, writes=writes)
