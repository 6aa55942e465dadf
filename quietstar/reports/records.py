"""The records of ``metrics.jsonl``, by kind and stage."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

KINDS = ("train", "eval")


@dataclass(frozen=True)
class Record:
    """One line of ``metrics.jsonl``.

    Attributes:
        kind: ``train`` or ``eval``.
        stage: Name of the stage; empty in runs without stages.
        step: Optimiser steps done, over all stages.
        figures: The finite numbers of the line, by key.
    """

    kind: str
    stage: str
    step: int
    figures: Mapping[str, float]


def read_records(path: Path) -> list[Record]:
    """The complete records, in order of steps; of several for one step the last one stays.

    Of two stages that meet at a step, the one that was written first comes first.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    found = (parse_record(line) for line in text.split("\n"))
    kept = {(record.kind, record.stage, record.step): record for record in found if record}
    return sorted(kept.values(), key=lambda record: record.step)


def parse_record(line: str) -> Record | None:
    """The record of a line, or None for a line that is half written or something else."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.get("kind") not in KINDS:
        return None
    step, stage = finite(entry.pop("step", None)), entry.pop("stage", None)
    if step is None:
        return None
    # Runs of earlier versions called swapped thoughts exchanged.
    numbers = {k.replace("exchanged", "swapped"): finite(v) for k, v in entry.items()}
    figures = {key: value for key, value in numbers.items() if value is not None}
    return Record(entry["kind"], "" if stage is None else str(stage), int(step), figures)


def finite(value: object) -> float | None:
    """``value`` if it is a finite number; NaN, infinities, texts and truth values give None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def find_stages(records: Iterable[Record]) -> list[str]:
    """The names of the stages in the order of their first steps."""
    return list(dict.fromkeys(record.stage for record in records))


def series(records: Iterable[Record], kind: str, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a figure, where it was measured."""
    points = [(r.step, r.figures[key]) for r in records if r.kind == kind and key in r.figures]
    return [step for step, _ in points], [value for _, value in points]
