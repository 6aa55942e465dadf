"""A case: a command line on spoilt material, what it did, and what of that is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import material
from forking import Child, Outcome, say

CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff"
    r"\ud800-\udfff]"
)
FOREIGN = re.compile(r"\x1b\]|\x1b\[2J|\x1bc|\x1bP|\x07|[\x80-\x9f\u202e\u2066\u200b\udc80-\udcff]")
"""On a terminal colors and cursor moves are the program's own; titles, links and bells are not."""
PREFIX = "quietstar: error: "
SAID_BEFORE = re.compile(
    r"thoughts\.(start|end)_init: |.* has no effect |the text has \d+ tokens|Generating test split"
    r"|\d{4}-\d\d-\d\d:|.*\d/\d"
)
"""Lines about what goes well: notes, the harness's log, finished progress bars."""
_LIBRARIES = re.compile(r"(?m)^(/.*Warning: .*\n( +.*\n)?|\[transformers\].*\n)")
"""Warnings of libraries, which are counted as noise and fail nothing."""
UNFINISHED = ("*.partial", "*.new", "*.tmp", "*.replaced", ".*")
LOCKS = ("*.lock",)
VERDICTS = ("crash", "hang", "traceback", "accepted", "refused", "ran", "changed", "lines", "raw",
            "litter", "code")  # fmt: skip
TIMEOUT = 60.0


@dataclass
class Case:
    """A command line in the folder that a generator has spoilt.

    Attributes:
        what: What is wrong there, in a few words.
        arguments: Command line.
        refuse: True where it must be refused, False where it must work, None where both is right.
        stdin: What the command can read.
        writes: Patterns of files that it may replace if it is not refused.
        several: Whether several problems may be told, each on a line of its own.
        codes: Exit codes that are right beside 0 and 2.
        canary: File that only code of the material's would write.
        hides: Text that must not be printed, since it lies outside the material.
        environment: Variables of the command.
    """

    what: str
    arguments: list[str]
    refuse: bool | None = None
    stdin: bytes = b""
    writes: tuple[str, ...] = ()
    several: bool = False
    codes: tuple[int, ...] = ()
    as_root: bool = False
    terminal: bool = False
    canary: str | None = None
    hides: str | None = None
    environment: dict[str, str] | None = None


Maker = Callable[[random.Random, Path], Case]


def snapshot(folder: Path) -> dict[str, str]:
    """Describe everything below a folder by name: kind, permissions and content."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            status = path.lstat()
            text = oct(status.st_mode)
            if stat.S_ISLNK(status.st_mode):
                text += " -> " + os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                with suppress(PermissionError):
                    text += " " + hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = text
    return found


def run_case(
    make: Maker, rng: random.Random, good: Path, place: Path, *, real: bool = False
) -> dict[str, Any]:
    """Spoil a copy of the good material, run the command, judge it; returns a record."""
    work = material.copy(good, place)
    case = make(rng, work)
    before = snapshot(work)
    real = real and not any("\x00" in argument for argument in case.arguments)
    child = Child(case.arguments, work, stdin=case.stdin, real=real, terminal=case.terminal,
                  as_root=case.as_root, environment=case.environment)  # fmt: skip
    outcome = child.wait(TIMEOUT)
    after = snapshot(work)
    verdicts = judge(case, outcome, before, after)
    return {
        "what": case.what, "arguments": case.arguments, "refuse": case.refuse, "real": real,
        "code": outcome.code, "signal": outcome.signal, "seconds": round(outcome.seconds, 2),
        "verdicts": verdicts, "out": outcome.out[-2000:], "err": outcome.err[-4000:],
        "traceback": outcome.traceback[-3000:],
        "noise": bool(outcome.code == 2 and _LIBRARIES.search(outcome.err)),
        "before": before if verdicts else {}, "after": after if verdicts else {},
    }  # fmt: skip


def judge(
    case: Case, outcome: Outcome, before: dict[str, str], after: dict[str, str]
) -> dict[str, str]:
    """Return what is wrong, by verdict, with a few words on each."""
    wrong: dict[str, str] = {}
    refused = outcome.code == 2
    worked = outcome.code == 0 or outcome.code in case.codes
    if outcome.timed_out:
        wrong["hang"] = f"ended after {outcome.seconds:.0f} s"
    elif outcome.signal is not None:
        wrong["crash"] = f"signal {outcome.signal}"
    elif outcome.traceback or "Traceback (most recent call last)" in outcome.said:
        text = outcome.traceback or outcome.said
        wrong["traceback"] = ([line for line in text.splitlines() if line.strip()] or [""])[-1]
    elif not refused and not worked:
        wrong["code"] = f"exit code {outcome.code}"
    if worked and case.refuse:
        wrong["accepted"] = f"exit code {outcome.code}"
    if refused and case.refuse is False:
        wrong["refused"] = outcome.err.strip()[-300:]
    if refused and (
        problem := _wrong_lines(outcome.err if not case.terminal else outcome.out, case)
    ):
        wrong["lines"] = problem
    raw = (FOREIGN if case.terminal else CONTROL).search(outcome.said)
    if raw:
        wrong["raw"] = repr(outcome.said[max(0, raw.start() - 30) : raw.end() + 20])
    if case.canary is not None and any(Path(name).name == case.canary for name in after):
        wrong["ran"] = f"{case.canary} was written"
    if case.hides is not None and case.hides in outcome.said:
        wrong["ran"] = f"{case.hides!r} was printed"
    free = LOCKS + (case.writes if worked or outcome.timed_out else ())
    lost = [n for n, text in before.items() if after.get(n) != text and not _fits(n, free)]
    if lost:
        wrong["changed"] = ", ".join(lost[:4]) + (" ..." if len(lost) > 4 else "")
    new = [name for name in after if name not in before]
    litter = [name for name in new if _fits(Path(name).name, UNFINISHED)]
    if litter and not outcome.timed_out:
        wrong["litter"] = ", ".join(litter[:4])
    return wrong


def _wrong_lines(text: str, case: Case) -> str | None:
    """Say what is wrong with the lines of a refusal."""
    lines = [line.strip() for line in _LIBRARIES.sub("", text).splitlines() if line.strip()]
    if case.terminal:
        lines = [line for line in lines if PREFIX in line]
    others = [line for line in lines if PREFIX not in line[:60] and not SAID_BEFORE.match(line)]
    if not any(PREFIX in line for line in lines):
        return f"nothing was said: {lines[-1:]}"
    if others:
        return f"also said: {others[0][:200]}"
    lines = [line for line in lines if PREFIX in line]
    if len(lines) > 1 and not case.several:
        return f"{len(lines)} lines"
    longest = max(lines, key=len)
    if len(longest) > 1500:
        return f"a line of {len(longest)} characters"
    if not re.search(r"[.;:)?]\s", longest[len(PREFIX) :] + " "):
        return f"neither rule nor remedy: {longest[:200]}"
    return None


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def table(records: Sequence[dict[str, Any]]) -> str:
    """Count verdicts by command."""
    commands = list(dict.fromkeys(record["command"] for record in records))
    used = [v for v in VERDICTS if any(v in r["verdicts"] for r in records)]
    rows = [["command", "cases", "fine", "noise", *used]]
    for command in [*commands, "all"]:
        of = [r for r in records if command in ("all", r["command"])]
        counts = Counter(verdict for record in of for verdict in record["verdicts"])
        fine = sum(not record["verdicts"] for record in of)
        noise = sum(record.get("noise", False) for record in of) or ""
        rows.append([command, len(of), fine, noise, *(counts[verdict] or "" for verdict in used)])
    return "\n".join("  ".join(f"{cell!s:>9}" for cell in row) for row in rows)


def report(records: Sequence[dict[str, Any]], path: Path | None) -> None:
    """Print the table and the failing cases; write all records as JSON."""
    for record in records:
        if record["verdicts"]:
            line = " ".join(record["arguments"])
            said = (record["err"] or record["out"]).strip().splitlines()[-3:]
            say(f"\n{record['name']}: {record['what']}\n  {line!r}, exit {record['code']}")
            for verdict, text in record["verdicts"].items():
                say(f"  {verdict}: {text!r}")
            for one in said:
                say(f"  | {one[:300]!r}")
    say("\n" + table(records))
    if path is not None:
        path.write_text(json.dumps(records, indent=1, default=str))


def clear(place: Path) -> None:
    """Delete a case's folder, whatever permissions it has."""
    shutil.rmtree(place, ignore_errors=True)
