"""Signals in every phase: how soon a process ends, what it leaves, and that it goes on.

python tests/faults/stop.py
python tests/faults/stop.py --strategies fsdp2,zero2 --signals SIGTERM
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import forking
import material
import psutil
from cases import SAID_BEFORE
from forking import Child, say
from kill import Launched
from runs import (
    checkpoints,
    differences,
    find_faults,
    how_ended,
    run_whole,
    slow_config,
    steps_done,
    train_line,
    weights,
)
from watching import strike

TRAINING = ("setup", "rollout", "learn", "evaluation", "save", "export")
OTHERS = {"generation": "generate", "scoring": "eval", "loading": "inspect"}
CODES = {"SIGTERM": 75, "SIGUSR1": 75, "SIGINT": 130}
SECONDS = 5.0
DELAYS = {"rollout": 0.05, "learn": 0.05, "evaluation": 0.2}
"""Seconds from the beginning of a phase to the signal; the others are short."""
VISITS = {"rollout": 3, "learn": 4, "evaluation": 2}
"""Which of a phase's beginnings: with a step done before."""


def stop_training(folder: Path, phase: str, name: str, whole: Path) -> dict[str, Any]:
    """Signal a run in a phase, then let it go on."""
    run, marker = folder / "run", folder / "marker"
    shutil.rmtree(run, ignore_errors=True)
    marker.unlink(missing_ok=True)
    number = signal.Signals[name]
    when = {"delay": DELAYS.get(phase, 0.0), "visit": VISITS.get(phase, 1)}
    before = partial(strike, phase, number, marker, **when)
    outcome = Child(train_line("config.yaml", "run"), folder, before=before, as_root=True).wait(300)
    record: dict[str, Any] = {"phase": phase, "signal": name, "wrong": []}
    wrong = record["wrong"]
    if not marker.exists():
        wrong.append(f"the phase never came: {how_ended(outcome)}")
        return record
    struck = json.loads(marker.read_text())
    record["seconds"] = round(outcome.ended - struck["at"], 2)
    record["code"] = outcome.code
    if outcome.code != CODES[name]:
        wrong.append(f"not exit {CODES[name]}: {how_ended(outcome)}")
    if record["seconds"] > SECONDS:
        wrong.append(f"took {record['seconds']} s")
    lines = [s for s in outcome.err.strip().splitlines() if not SAID_BEFORE.match(s)]
    record["line"] = "; ".join(lines)[-400:]
    if len(lines) != 1:
        wrong.append(f"{len(lines)} lines: {lines[:3]}")
    for kind, found in find_faults(run, [weights(whole / "final")]).items():
        wrong.append(f"{kind}: {found}")
    done, saved = steps_done(run), checkpoints(run)
    record["done"], record["saved"] = done, [path.name for path in saved]
    if done and (not saved or int(saved[-1].name.removeprefix("step-")) < done):
        wrong.append(f"{done} steps were done, saved are {record['saved']}")
    return record


def go_on(folder: Path, whole: Path, record: dict[str, Any]) -> None:
    """Resume the stopped run and compare its end."""
    again = Child(train_line("config.yaml", "run", "--resume", "auto"), folder, as_root=True).wait(
        300
    )
    if again.code != 0:
        record["wrong"].append(f"cannot go on: {how_ended(again)}")
    else:
        record["wrong"] += differences(folder / "run", whole)


def stop_command(place: Path, good: Path, phase: str, name: str) -> dict[str, Any]:
    """Signal a command that does not train."""
    work = material.copy(good, place)
    command = OTHERS[phase]
    more = {"generate": {"max_new_tokens": "110", "num_thoughts": "4", "thought_temperature": "1"},
            "eval": {"tasks": "text.txt", "limit": None, "text_tokens": "60", "out": "new.json"},
            "inspect": {}}[command]  # fmt: skip
    if command == "eval":
        (work / "text.txt").write_text("two plus two is four, and so on. " * 400)
    before_files = sorted(p.name for p in work.iterdir())
    before = partial(strike, phase, signal.Signals[name], work.parent / "marker")
    outcome = Child(material.command(command, **more), work, before=before, as_root=True).wait(120)
    record: dict[str, Any] = {"phase": phase, "signal": name, "wrong": []}
    if not (work.parent / "marker").exists():
        record["wrong"].append(f"the phase never came: {how_ended(outcome)}")
        return record
    struck = json.loads((work.parent / "marker").read_text())
    record["seconds"] = round(outcome.ended - struck["at"], 2)
    record["code"], record["line"] = outcome.code, outcome.err.strip()[-400:]
    if outcome.code != CODES[name]:
        record["wrong"].append(f"not exit {CODES[name]}: {how_ended(outcome)}")
    if record["seconds"] > SECONDS:
        record["wrong"].append(f"took {record['seconds']} s")
    if "Traceback" in outcome.said:
        record["wrong"].append("a traceback")
    gone = [n for n in before_files if not (work / n).exists()]
    litter = [p.name for p in work.iterdir() if p.suffix in (".partial", ".new")]
    record["wrong"] += [f"lost {gone}"] * bool(gone) + [f"left {litter}"] * bool(litter)
    if command == "eval":
        again = Child(material.command(command, **more), work, as_root=True).wait(120)
        if again.code != 0:
            record["wrong"].append(f"cannot go on: {how_ended(again)}")
    return record


def stop_launched(machine: Launched, phase: str, name: str, whole: Path) -> dict[str, Any]:
    """Signal the launcher of a run of two processes while one is in a phase."""
    run, marker = machine.folder / "run", machine.folder / "marker"
    shutil.rmtree(run, ignore_errors=True)
    marker.unlink(missing_ok=True)
    settings = {
        "phase": phase,
        "signal": "SIGCONT",
        "marker": str(marker),
        "delay": DELAYS.get(phase, 0.0),
        "visit": VISITS.get(phase, 1),
    }
    process = machine._start("run", FAULTS_STRIKE=json.dumps(settings))
    while process.poll() is None and not marker.exists():
        time.sleep(0.002)
    record: dict[str, Any] = {"phase": phase, "signal": name, "wrong": []}
    wrong = record["wrong"]
    if not marker.exists():
        return record | {"wrong": [f"the phase never came: exit {process.returncode}"]}
    everyone = psutil.Process(process.pid).children(recursive=True)
    began = time.monotonic()
    process.send_signal(signal.Signals[name])
    psutil.wait_procs(everyone, timeout=60)
    record["seconds"] = round(time.monotonic() - began, 2)
    for one in everyone:
        if one.is_running() and one.status() != psutil.STATUS_ZOMBIE:
            wrong.append(f"still there after {record['seconds']} s")
            one.kill()
    process.wait()
    record["code"] = process.returncode
    if record["seconds"] > SECONDS:
        wrong.append(f"took {record['seconds']} s")
    log = (machine.folder / "run.log").read_text(errors="replace")
    record["line"] = "; ".join(line for line in log.splitlines() if "quietstar: " in line)[-300:]
    if name != "SIGINT" and steps_done(run) and not (run / "preempted").exists():
        wrong.append("the file preempted, which launch scripts ask for, was not written")
    for kind, found in find_faults(run, [weights(whole / "final")]).items():
        wrong.append(f"{kind}: {found}")
    done, saved = steps_done(run), checkpoints(run)
    record["done"], record["saved"] = done, [path.name for path in saved]
    if done and (not saved or int(saved[-1].name.removeprefix("step-")) < done):
        wrong.append(f"{done} steps were done, saved are {record['saved']}")
    try:
        machine.whole("run", "--resume", "auto")
        wrong += differences(run, whole)
    except RuntimeError as problem:
        wrong.append(f"cannot go on: {str(problem)[-300:]}")
    return record


def main() -> int:
    """Stop, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--signals", default="SIGTERM,SIGINT,SIGUSR1")
    parser.add_argument("--phases", default=",".join((*TRAINING, *OTHERS)))
    parser.add_argument("--strategies", default="one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    forking.preload()
    phases, signals = args.phases.split(","), args.signals.split(",")
    report: dict[str, list[dict[str, Any]]] = {}
    place = forking.new_place()
    for strategy in args.strategies.split(","):
        folder = place / strategy
        folder.mkdir()
        slow_config(folder)
        records = report.setdefault(strategy, [])
        machine = Launched(folder, strategy) if strategy != "one" else None
        began = time.monotonic()
        whole = machine.whole("whole") if machine else run_whole(folder, "config.yaml", "whole")
        say(f"{strategy}: the whole run takes {time.monotonic() - began:.1f} s")
        if machine is None and set(phases) & set(OTHERS):
            material.build(place / "good")
        for phase in phases:
            for name in signals:
                if machine is not None:
                    if phase not in TRAINING:
                        continue
                    record = stop_launched(machine, phase, name, whole)
                elif phase in TRAINING:
                    record = stop_training(folder, phase, name, whole)
                    if record.get("code") is not None:
                        go_on(folder, whole, record)
                else:
                    trial = forking.new_place()
                    record = stop_command(trial, place / "good", phase, name)
                    shutil.rmtree(trial, ignore_errors=True)
                records.append(record)
                say(f"{strategy}, {json.dumps(record)}")
    if args.json is not None:
        args.json.write_text(json.dumps(report))
    slowest = max((r.get("seconds", 0) for rs in report.values() for r in rs), default=0)
    bad = sum(bool(r["wrong"]) for rs in report.values() for r in rs)
    say(f"{sum(map(len, report.values()))} signals, {bad} wrong, slowest end {slowest} s")
    shutil.rmtree(place, ignore_errors=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
