"""Finished pieces of work by key in one SQLite file: each is whole or not there."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path

from quietstar.errors import UserError, reason_of


class Store:
    """Keeps pieces by key, so that work that was interrupted goes on where it ended.

    Args:
        path: The file.
        writable: Whether pieces are added; the file is then made if need be.

    Raises:
        sqlite3.Error: It cannot be opened, or is something else.
    """

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        self._path, mode = path, "rwc" if writable else "ro"
        self._database = sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True)
        if writable:
            table = "pieces (key TEXT PRIMARY KEY, content BLOB NOT NULL)"
            self._database.execute(f"CREATE TABLE IF NOT EXISTS {table}")

    def __len__(self) -> int:
        """Count the pieces."""
        return self._database.execute("SELECT COUNT(*) FROM pieces").fetchone()[0]

    def __getitem__(self, key: str) -> bytes:
        """Return a piece that is there."""
        query = "SELECT content FROM pieces WHERE key = ?"
        return self._database.execute(query, (key,)).fetchone()[0]

    def __contains__(self, key: str) -> bool:
        """Tell whether a piece is there."""
        query = "SELECT 1 FROM pieces WHERE key = ?"
        return self._database.execute(query, (key,)).fetchone() is not None

    def add(self, pieces: Mapping[str, bytes]) -> None:
        """Add all pieces or, where that fails, none; those that are there already stay.

        Raises:
            UserError: The disk is full, or the like.
        """
        try:
            with self._database:
                statement = "INSERT OR IGNORE INTO pieces VALUES (?, ?)"
                self._database.executemany(statement, pieces.items())
        except sqlite3.Error as problem:
            raise UserError(
                f"{self._path}: cannot be written ({reason_of(problem)}). Free some space there, "
                "or give another place."
            ) from problem
