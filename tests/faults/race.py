"""Two processes in one run folder: one works, the other is told who does, nothing is lost.

python tests/faults/race.py --times 20
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import forking
from cases import PREFIX, SAID_BEFORE
from forking import Child, say
from runs import differences, how_ended, run_whole, short_config, train_line

TOGETHER = 0.02
"""Seconds between two processes that start together."""
KINDS = ("new", "new, --resume auto", "resume", "resume by another name", "finished")


def race(kind: str, folder: Path, whole: Path, stagger: float, real: bool) -> list[str]:
    """Start two processes; returns what is wrong.

    The second may begin when the first is done with the folder; then it works, too.
    """
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    resume = [] if kind == "new" else ["--resume", "auto"]
    if kind.startswith("resume"):
        shutil.copytree(whole, run)
        shutil.rmtree(run / "checkpoints" / "step-000024")
        shutil.rmtree(run / "final")
    elif kind == "finished":
        shutil.copytree(whole, run)
    names = ["run", "run"]
    if "another name" in kind:
        (folder / "other").unlink(missing_ok=True)
        (folder / "other").symlink_to("run")
        names[1] = "other"
    lines = [train_line("config.yaml", name, *resume) for name in names]
    children = [Child(lines[0], folder, as_root=True, real=real)]
    time.sleep(stagger)
    children.append(Child(lines[1], folder, as_root=True, real=real))
    outcomes = [child.wait(120) for child in children]
    wrong = []
    codes = sorted(outcome.code if outcome.code is not None else -1 for outcome in outcomes)
    together = stagger < TOGETHER
    if codes != [0, 2] and (together or codes != [0, 0]):
        wrong.append(f"codes {codes}: {[how_ended(o) for o in outcomes]}")
    for outcome, other in zip(outcomes, reversed(children), strict=True):
        if outcome.code == 2:
            said = [s for s in outcome.err.strip().splitlines() if not SAID_BEFORE.match(s)]
            if len(said) != 1 or not said[0].startswith(PREFIX):
                wrong.append(f"not one line: {said}")
            elif together and str(other.pid) not in said[0]:
                wrong.append(f"does not say who ({other.pid}): {said[0]}")
    return wrong + differences(run, whole)


def main() -> int:
    """Race, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", action="store_true", help="new processes in place of forks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    forking.preload()
    rng = random.Random(args.seed)
    folder = forking.new_place() / "work"
    folder.mkdir()
    short_config(folder, training__max_steps=24, training__save_total_limit=20)
    began = time.monotonic()
    whole = run_whole(folder, "config.yaml", "whole")
    seconds = time.monotonic() - began
    report: dict[str, Any] = {}
    for kind in KINDS:
        counts: Counter[str] = Counter()
        problems: list[str] = []
        for number in range(args.times):
            stagger = rng.uniform(0, TOGETHER if number % 2 == 0 else 0.8 * seconds)
            wrong = race(kind, folder, whole, stagger, args.real)
            counts["sound" if not wrong else "wrong"] += 1
            problems += [f"{number} (after {stagger:.3f} s): {problem}" for problem in wrong]
        report[kind] = {**counts, "problems": problems} if problems else dict(counts)
        say(f"{kind}: {report[kind]}")
    if args.json is not None:
        args.json.write_text(json.dumps(report))
    shutil.rmtree(folder.parent, ignore_errors=True)
    return 1 if any("wrong" in counts for counts in report.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
