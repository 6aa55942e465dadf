"""Runs killed at any moment: what is left is whole, and they go on to the same weights.

    python tests/faults/kill.py --kills 50 --seed 0
    python tests/faults/kill.py --kills 20 --strategies zero2,fsdp2

A run is killed and resumed several times before it may end. Half of the runs prolong a finished
one, so that another final model is already there.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import forking
import psutil
from forking import ROOT, Child, say
from launching import wrap
from runs import (
    differences,
    find_faults,
    how_ended,
    run_whole,
    short_config,
    steps_done,
    train_line,
    weights,
)
from watching import ANY, strike

PHASES = (ANY, ANY, "rollout", "learn", "evaluation", "save", "save", "export")
KILLS_OF_A_RUN = 6
HALF = 12


class OneProcess:
    """Runs of one process, forked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seconds = folder, 1.0

    def whole(self, output: str, *more: str) -> Path:
        """Run to the end."""
        began = time.monotonic()
        path = run_whole(self.folder, "config.yaml", output, *more)
        self.seconds = time.monotonic() - began
        return path

    def killed(self, output: str, phase: str, after: float, delay: float) -> tuple[str | None, str]:
        """Resume with a kill to come; returns the phase that it struck, and how the run ended."""
        marker = self.folder / f"{output}.marker"
        marker.unlink(missing_ok=True)
        before = partial(strike, phase, signal.SIGKILL, marker, after=after, delay=delay)
        line = train_line("config.yaml", output, "--resume", "auto")
        outcome = Child(line, self.folder, before=before, as_root=True).wait(300)
        struck = _read(marker) if outcome.signal == signal.SIGKILL else None
        return struck, "ended" if outcome.code == 0 else how_ended(outcome)


class Launched(OneProcess):
    """Runs of two processes under a launcher."""

    def __init__(self, folder: Path, strategy: str) -> None:
        super().__init__(folder)
        self.strategy = strategy

    def _start(self, output: str, *more: str, **environment: str) -> subprocess.Popen:
        line = train_line(str(self.folder / "config.yaml"), str(self.folder / output), *more)
        call, variables = wrap(self.strategy, [str(forking.HERE / "watched.py"), *line[1:]])
        data = ["--data.train", str(self.folder / "texts.jsonl")]
        log = (self.folder / f"{output}.log").open("wb")
        return subprocess.Popen(
            [*call, *data], cwd=ROOT, env={**variables, **environment}, stdout=log,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def whole(self, output: str, *more: str) -> Path:
        """Run to the end."""
        began = time.monotonic()
        code = self._start(output, *more).wait(600)
        if code != 0:
            raise RuntimeError((self.folder / f"{output}.log").read_text()[-4000:])
        self.seconds = time.monotonic() - began
        return self.folder / output

    def killed(self, output: str, phase: str, after: float, delay: float) -> tuple[str | None, str]:
        """Resume with a kill of all processes to come."""
        marker = self.folder / f"{output}.marker"
        marker.unlink(missing_ok=True)
        settings = {"phase": phase, "signal": "SIGKILL", "marker": str(marker), "after": after,
                    "delay": delay}  # fmt: skip
        process = self._start(output, "--resume", "auto", FAULTS_STRIKE=json.dumps(settings))
        ends = time.monotonic() + 300
        while process.poll() is None and not marker.exists() and time.monotonic() < ends:
            time.sleep(0.001)
        if process.poll() is None:
            everyone = [
                *psutil.Process(process.pid).children(recursive=True),
                psutil.Process(process.pid),
            ]
            for one in everyone:
                one.kill()
            psutil.wait_procs(everyone, timeout=20)
        code = process.wait()
        tail = (self.folder / f"{output}.log").read_text(errors="replace")[-400:]
        return (
            (_read(marker), "killed") if marker.exists() else (None, "ended" if code == 0 else tail)
        )


def _read(marker: Path) -> str:
    try:
        return str(json.loads(marker.read_text())["phase"])
    except (OSError, ValueError):  # it was killed while it wrote
        return "unknown"


def try_kills(machine: OneProcess, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill runs so many times in all; returns what was counted."""
    changes = {"training__micro_batch_size": 2, "training__save_total_limit": 2}
    short_config(machine.folder, **changes)
    half = machine.whole("half", "--training.max_steps", str(HALF))
    whole = machine.whole("whole")
    whole_steps = steps_done(whole)
    finals = [weights(half / "final"), weights(whole / "final")]
    phases: Counter[str] = Counter()
    counted: dict[str, Any] = {"kills": 0, "runs": 0, "corrupt": 0, "mixed": 0, "unreadable": 0,
                               "divergent": 0, "failed": 0, "problems": []}  # fmt: skip
    while counted["kills"] < kills:
        name = f"run-{counted['runs']}"
        counted["runs"] += 1
        folder = machine.folder / name
        prolongs = counted["runs"] % 2 == 0
        if prolongs:
            shutil.copytree(half, folder)
        allowed = finals if prolongs else finals[1:]
        for trial in range(KILLS_OF_A_RUN + 1):
            last = trial == KILLS_OF_A_RUN or counted["kills"] >= kills
            before = steps_done(folder)
            phase = rng.choice(PHASES)
            late = phase == "export" or last
            left = 1.0 - before / whole_steps
            after = 0.0 if late else rng.uniform(0, 0.8 * left * machine.seconds)
            delay = rng.choice((0.0, rng.uniform(0, 0.005), rng.uniform(0, 0.03)))
            if last:
                phase, after = ANY, 1e6
            struck, how = machine.killed(name, phase, after, 0.0 if phase == ANY else delay)
            where = f"{name}, trial {trial} ({phase} after {after:.2f} s, +{delay * 1000:.0f} ms)"
            if struck is None and how != "ended":
                counted["failed"] += 1
                counted["problems"].append(f"{where}: {how}")
                break
            if struck is not None:
                counted["kills"] += 1
                phases[struck] += 1
                for kind, found in find_faults(folder, allowed).items():
                    counted[kind] += 1
                    counted["problems"].append(f"{where}, struck in {struck}: {kind}: {found}")
                if steps_done(folder) < before - 2:  # save_steps: what is done again
                    counted["problems"].append(f"{where}: went back from {before}")
            else:
                if found := differences(folder, whole):
                    counted["divergent"] += 1
                    counted["problems"].append(f"{where}: {found}")
                break
        shutil.rmtree(folder, ignore_errors=True)
    return counted | {"phases": dict(phases)}


def main() -> int:
    """Kill, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", default="one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    forking.preload()
    report = {}
    for strategy in args.strategies.split(","):
        folder = forking.new_place() / "work"
        folder.mkdir()
        machine = OneProcess(folder) if strategy == "one" else Launched(folder, strategy)
        began = time.monotonic()
        counted = try_kills(machine, args.kills, random.Random(args.seed))
        for problem in counted["problems"]:
            say(f"{strategy}: {problem}")
        say(f"{strategy}: { {k: v for k, v in counted.items() if k != 'problems'} }, "
            f"{time.monotonic() - began:.0f} s")  # fmt: skip
        report[strategy] = counted
        shutil.rmtree(folder.parent, ignore_errors=True)
    if args.json is not None:
        args.json.write_text(json.dumps(report))
    return 1 if any(counted["problems"] for counted in report.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
