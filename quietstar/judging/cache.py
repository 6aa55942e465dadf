"""What judges have said, on disk, by the hash of all that decides it."""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietstar.errors import UserError, reading, reason_of
from quietstar.system.files import check_output
from quietstar.system.inputs import parse_json

FILE = "judge.sqlite3"
APPLICATION_ID = 0x71734A31
"""Says of an SQLite file that it is ours."""
VERSION = 1
"""Of what is hashed and stored; entries of another version are never found."""
LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class Verdict:
    """What a judge's model gave for one text.

    Attributes:
        logprobs: Of the labels' tokens, over the whole vocabulary; for ratings with a "10" of two
            tokens, that of "0" after "1" stands last.
        rationale: What was written before, if asked for.
    """

    logprobs: tuple[float, ...]
    rationale: str = ""


def key_of(parts: Mapping[str, Any]) -> str:
    """Hash what decides a verdict: the model's fingerprint, the texts, and settings."""
    content = json.dumps({"version": VERSION, **parts}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


class VerdictCache:
    """Verdicts in an SQLite file of a folder, which several processes may use at once.

    Args:
        folder: Made if need be.

    Raises:
        UserError: It cannot be written, or the file there is something else.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = check_output(Path(folder).expanduser() / FILE, "--cache", force=True)
        with self._open() as database:
            (mark,) = database.execute("PRAGMA application_id").fetchone()
            (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if tables and mark != APPLICATION_ID:
                raise UserError(f"--cache ({self.path}): is no cache of judges. Give another.")
            if not tables:
                database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            database.execute(
                "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, value TEXT NOT NULL)"
            )

    def get(self, keys: Sequence[str], count: int) -> dict[str, Verdict]:
        """Find verdicts of ``count`` log-probabilities.

        Raises:
            UserError: An entry is none that was written by `put`.
        """
        query = "SELECT value FROM verdicts WHERE key = ?"
        with self._open() as database:
            rows = {key: database.execute(query, (key,)).fetchone() for key in keys}
        return {key: self._parse(row[0], count) for key, row in rows.items() if row is not None}

    def put(self, verdicts: Mapping[str, Verdict]) -> None:
        """Store verdicts, all or none of them; those that are there already stay."""
        rows = [(key, json.dumps([v.logprobs, v.rationale])) for key, v in verdicts.items()]
        with self._open() as database:
            database.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", rows)

    def _parse(self, value: Any, count: int) -> Verdict:
        with reading(f"--cache ({self.path})", "Delete it."):
            logprobs, rationale = parse_json(value)
            are_numbers = all(type(x) is float and math.isfinite(x) and x <= 0 for x in logprobs)
            if not are_numbers or len(logprobs) != count or not isinstance(rationale, str):
                raise ValueError("an entry was changed")
            return Verdict(tuple(logprobs), rationale)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Connect for one transaction, so that a cache may be used in forked processes, too."""
        try:
            with closing(sqlite3.connect(self.path, timeout=LOCK_SECONDS)) as database, database:
                yield database
        except sqlite3.Error as problem:
            raise UserError(
                f"--cache ({self.path}): cannot be used ({reason_of(problem)}). Delete it, give "
                "another, or none."
            ) from problem
