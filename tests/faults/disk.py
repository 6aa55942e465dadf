"""Full disks at every write: a line says so, what was whole stays whole, and it goes on after.

    python tests/faults/disk.py                # as root: mounts small tmpfs

Each command writes on a file system of its own with so many free bytes, from none to enough. So
the disk is full at every write once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forking
import material
from cases import LOCKS, PREFIX, SAID_BEFORE, UNFINISHED, _fits, snapshot
from forking import Child, Outcome, say
from runs import (
    differences,
    find_faults,
    how_ended,
    run_whole,
    short_config,
    train_line,
    weights,
)

PAGE = 4096
SIZE = 48 * 2**20


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a small file system there.

    Raises:
        OSError: It cannot be mounted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    call = ["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=777", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(call, capture_output=True, check=False).returncode:
        raise OSError("a file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def leave_free(folder: Path, free: int) -> Path:
    """Fill a disk up to so many bytes; returns the file that does."""
    filler = folder / "filler"
    status = os.statvfs(folder)
    size = max(0, status.f_bavail * status.f_frsize - free)
    with filler.open("wb") as file:
        while size > 0:
            size -= file.write(b"\0" * min(size, 2**20))
    return filler


def write_of(text: str, base: Path) -> str:
    """Name the write that failed, by the file that the message tells."""
    found = re.search(rf"{re.escape(str(base))}\S*|\brun/\S*|\bout/\S*", text)
    name = found.group().rstrip(".:,;)") if found else "?"
    name = re.sub(r"step-\d+", "step-N", name)
    return name.replace(str(base), "").lstrip("/") or "the folder"


def sound(outcome: Outcome) -> list[str]:
    """Return what is wrong with the end of a process on a full disk."""
    if outcome.code == 0:
        return []
    wrong = []
    lines = [s for s in outcome.err.strip().splitlines() if not SAID_BEFORE.match(s)]
    if outcome.code != 2:
        wrong.append(how_ended(outcome))
    elif len(lines) != 1 or not lines[0].startswith(PREFIX):
        wrong.append(f"not one line: {lines[:3]}")
    elif "error: a file:" in lines[0]:
        wrong.append(f"does not name the file: {lines[0]}")
    elif not re.search(r"(?i)space|full|disk", lines[0]):
        wrong.append(f"does not speak of the disk: {lines[0]}")
    return wrong


def train_on(
    base: Path,
    disk: Path,
    free: int,
    whole: Path,
    before: Path | None,
    finals: list[dict[str, str]],
) -> dict[str, Any]:
    """Train with so many free bytes, then go on with enough."""
    if before is not None:
        shutil.copytree(before, disk / "run")
    used = used_by(disk, False), used_by(disk, True)
    filler = leave_free(disk, free)
    records = disk / "run" / "metrics.jsonl"
    lines_before = len(records.read_bytes().splitlines()) if records.exists() else 0
    resume = ["--resume", "auto"] if before is not None else []
    line = train_line("config.yaml", str(disk / "run"), *resume)
    outcome = Child(line, base, as_root=True).wait(120)
    wrong = sound(outcome)
    for kind, found in find_faults(disk / "run", finals).items():
        wrong.append(f"{kind}: {found}")
    lines_after = len(records.read_bytes().splitlines()) if records.exists() else 0
    if before is not None and lines_after < lines_before // 2:
        wrong.append(f"metrics.jsonl had {lines_before} lines, has {lines_after}")
    filler.unlink()
    if outcome.code != 0:
        again = Child(train_line("config.yaml", str(disk / "run"), "--resume", "auto"), base,
                      as_root=True).wait(120)  # fmt: skip
        if again.code != 0:
            wrong.append(f"cannot go on: {how_ended(again)}")
    if not wrong:
        wrong += differences(disk / "run", whole)
    return _record(outcome, disk, free, wrong, used)


def _record(
    outcome: Outcome, disk: Path, free: int, wrong: list[str], before: tuple[int, int]
) -> dict[str, Any]:
    """Describe a trial; ``before`` are the bytes that were used, without pages and with them."""
    lines = [s for s in outcome.err.strip().splitlines() if not SAID_BEFORE.match(s)]
    line = "; ".join(lines).replace(str(disk), "DISK")
    write = "none" if outcome.code == 0 else write_of(line, Path("DISK"))
    used = used_by(disk, False), used_by(disk, True)
    # What is replaced or dropped on the way took space, too.
    small = max(used[0] - before[0], used[0] * 2 // 3)
    whole = used[1] - before[1]
    return {
        "free": free, "code": outcome.code, "write": write, "line": line[-500:], "wrong": wrong,
        "small": small + small // 3 + 8 * PAGE, "all": 2 * whole + small // 3 + 8 * PAGE,
    }  # fmt: skip


WRITERS: dict[str, list[str]] = {
    "eval": material.command("eval", "--out", "out/f.json", "--report", "out/page.html"),
    "eval again": material.command("eval", "--out", "out/f.json", "--controls"),
    "inspect json": material.command("inspect", "--out", "out/o.json"),
    "inspect html": material.command("inspect", "--out", "out/o.html"),
    "plan": material.command("plan", "--json", "out/p.json"),
    "export": material.command("export", out="out/merged"),
}


def write_on(name: str, good: Path, disk: Path, place: Path, free: int) -> dict[str, Any]:
    """Run a command that writes into ``out`` with so many free bytes."""
    work = material.copy(good, place)
    (work / "out").symlink_to(disk)
    if name == "eval again":  # an evaluation of fewer items, to go on with
        for path in good.glob("figures*"):
            shutil.copy(path, disk / path.name.replace("figures", "f"))
    (disk / "notes.json").write_text('{"mine": 1}\n')
    line = list(WRITERS[name])
    before, used = snapshot(disk), (used_by(disk, False), used_by(disk, True))
    filler = leave_free(disk, free)
    outcome = Child(line, work, as_root=True).wait(120)
    filler.unlink()
    after = snapshot(disk)
    wrong = sound(outcome)
    grows = ("f.items.jsonl", "f.json", *LOCKS)
    for path, text in before.items():
        if after.get(path) != text and not _fits(path, grows):
            wrong.append(f"{path} is changed or gone")
    for path in sorted(disk.rglob("*.json")):
        if path.stat().st_size == 0 or not _parses(path):
            wrong.append(f"{path.name} is cut")
    for path in disk.rglob("*.html"):
        if "</html>" not in path.read_text():
            wrong.append(f"{path.name} is cut")
    litter = [n for n in after if n not in before and _fits(Path(n).name, UNFINISHED)]
    if litter:
        wrong.append(f"left behind: {litter[:3]}")
    if (disk / "merged").exists() and outcome.code != 0 and any((disk / "merged").iterdir()):
        wrong.append("merged holds something")
    if outcome.code != 0:
        again = Child(line, work, as_root=True).wait(120)
        if again.code != 0:
            wrong.append(f"cannot go on: {how_ended(again)}")
    return _record(outcome, disk, free, wrong, used)


def _parses(path: Path) -> bool:
    with contextlib.suppress(ValueError):
        json.loads(path.read_text())
        return True
    return False


def levels(small: int, all_of_it: int, count: int) -> list[int]:
    """Return numbers of free bytes, in whole pages, from none to enough.

    Args:
        small: Bytes of all files but pages, of which one takes more than all the others.
        all_of_it: Bytes of all files, with those that are replaced.
        count: How many numbers.
    """
    few = count // 3
    sizes = [small * n / (count - few) for n in range(count - few)]
    sizes += [small + (all_of_it - small) * (n + 1) / few for n in range(few)]
    return [page * PAGE for page in sorted({round(size / PAGE) for size in sizes})]


def used_by(folder: Path, pages: bool) -> int:
    """Return the bytes of a folder's files in whole pages of memory, HTML pages as asked."""
    sizes = [p.stat().st_size for p in folder.rglob("*")
             if p.is_file() and (pages or p.suffix != ".html")]  # fmt: skip
    return sum(-(-size // PAGE) * PAGE for size in sizes)


def main() -> int:
    """Fill, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--levels", type=int, default=16, help="numbers of free bytes tried")
    parser.add_argument("--only", help="train, resume or a command")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    forking.preload()
    place = forking.new_place()
    base = place / "work"
    base.mkdir()
    short_config(base, training__max_steps=8, training__save_steps=2, training__eval_steps=4)
    whole = run_whole(base, "config.yaml", "whole")
    half = run_whole(base, "config.yaml", "half", "--training.max_steps", "4")
    finals = [weights(whole / "final"), weights(half / "final")]
    material.build(place / "good")
    report: dict[str, list[dict[str, Any]]] = {}
    for name in ("train", "resume", *WRITERS):
        if args.only not in (None, name.split()[0]):
            continue
        records = report.setdefault(name, [])

        def attempt(free: int, name: str = name) -> dict[str, Any]:
            trial = Path(forking.new_place())
            with small_disk(trial / "disk") as disk:
                if name in ("train", "resume"):
                    before = None if name == "train" else half
                    record = train_on(base, disk, free, whole, before, finals)
                else:
                    record = write_on(name, place / "good", disk, trial, free)
            shutil.rmtree(trial, ignore_errors=True)
            return record

        roomy = attempt(SIZE)
        for free in levels(roomy["small"], roomy["all"], args.levels):
            record = attempt(free)
            records.append(record)
            say(
                f"{name}, {free // 1024} KiB free: exit {record['code']}, {record['write']}: "
                f"{record['line'][:200]}"
            )
            for problem in record["wrong"]:
                say(f"    WRONG: {problem}")
    for name, records in report.items():
        writes = sorted({record["write"] for record in records})
        bad = sum(bool(record["wrong"]) for record in records)
        say(f"{name}: {len(records)} trials, {bad} wrong, full at: {', '.join(writes)}")
    if args.json is not None:
        args.json.write_text(json.dumps(report))
    shutil.rmtree(place, ignore_errors=True)
    return 1 if any(record["wrong"] for records in report.values() for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
