"""metrics.jsonl of a run: a record for every step and evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quietstar.training.stages import Stage

METRICS_FILE = "metrics.jsonl"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Whole records of a metrics.jsonl; the last line of an interrupted run may be half written."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def forget_later(path: Path, step: int, stage: Stage) -> None:
    """Drop the records that a run resumed after ``step``, in ``stage``, writes again."""

    def is_kept(record: Mapping[str, Any]) -> bool:
        if record["step"] == step == stage.last_step:
            return record["kind"] == "train"  # the evaluation at the end comes again
        return record["step"] <= step

    kept = [json.dumps(record) + "\n" for record in read_records(path) if is_kept(record)]
    path.write_text("".join(kept), encoding="utf-8")
