"""Finished items on the disk, a line each: what an interrupted evaluation goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quietstar.errors import UserError

Key = tuple[str, int, str]
"""Task, number of the item, variant."""


class ItemStore:
    """Records of items, in memory and, with a path, in a JSONL file that only grows.

    The first line says under which settings the others were made.

    Args:
        path: Of the file; None keeps nothing.
        settings: Of this evaluation.
        overwrite: Begin anew.

    Raises:
        UserError: The file was made under other settings, or is none of these.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], overwrite: bool) -> None:
        self.path = path
        self.records: dict[Key, dict[str, Any]] = {}
        if path is None:
            return
        if overwrite or not path.exists() or b"\n" not in path.read_bytes():
            path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
            return
        first, *rest = self._lines(path)
        check_settings(path, first["settings"], settings)
        for record in rest:
            self.records[record["task"], record["item"], record["variant"]] = record

    @staticmethod
    def _lines(path: Path) -> list[dict[str, Any]]:
        """All whole lines; what was cut off by an interrupt is cut off the file too.

        Raises:
            UserError: A line that is none of an evaluation.
        """
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            path.write_bytes(whole)
        lines = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not _is_line(record, number == 1):
                raise UserError(
                    f"--out-items: {path}, line {number} is no line of an evaluation; remove it, "
                    "give another file, or --overwrite to begin anew"
                )
            lines.append(record)
        return lines

    def has(self, task: str, numbers: Sequence[int], variants: Sequence[str]) -> bool:
        """Whether all of these are finished."""
        return all((task, n, variant) in self.records for n in numbers for variant in variants)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Keep finished items; those of a batch that was cut short are there already."""
        records = [r for r in records if (r["task"], r["item"], r["variant"]) not in self]
        for record in records:
            self.records[record["task"], record["item"], record["variant"]] = record
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def __contains__(self, key: Key) -> bool:
        """Whether an item is finished in a variant."""
        return key in self.records

    def of(self, task: str, variant: str, count: int) -> list[dict[str, Any]]:
        """Records of all items of a task, in order."""
        return [self.records[task, number, variant] for number in range(count)]


def _is_line(record: Any, is_first: bool) -> bool:
    if not isinstance(record, dict):
        return False
    if is_first:
        return isinstance(record.get("settings"), dict)
    kinds = {"task": str, "item": int, "variant": str, "metrics": dict}
    return all(isinstance(record.get(key), kind) for key, kind in kinds.items())


def check_settings(path: Path, found: Any, wanted: Mapping[str, Any]) -> None:
    """Refuse items that were made under other settings.

    Raises:
        UserError: They were.
    """
    keys = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if keys:
        shown = ", ".join(f"{key} ({found.get(key)}, now {wanted.get(key)})" for key in keys)
        raise UserError(
            f"{path}: its items were made with another {shown}; give another --out, or "
            "--overwrite to begin anew"
        )
