"""Tables and lines of pages in a terminal, which has room for the texts of cells alone."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column
from rich.table import Table as Grid
from rich.text import Text

from quietstar.errors import visible
from quietstar.reports.pages import Cell, Line, Table

STYLES = {
    "verdict": "bold",
    "verdict as-is": "bold",
    "note": "yellow",
    "dim": "dim",
    "title": "italic",
}


def view(parts: Iterable[Table | Line]) -> RenderableType:
    """Show parts one below the other; a row is bold whose first cell is strong."""
    return Group(*(_grid(part) if isinstance(part, Table) else _line(part) for part in parts))


def _line(line: Line) -> Text:
    indent = "" if line.kind == "title" else "  "
    return Text(f"{indent}{visible(line.text).replace(chr(10), '⏎')}", STYLES.get(line.kind, ""))


def _grid(table: Table) -> Grid:
    columns = [
        Column(Text(visible(heading)), justify="right" if place >= table.numbers else "left",
               no_wrap=place >= table.numbers)
        for place, heading in enumerate(table.headings)
    ]  # fmt: skip
    grid = Grid(*columns, box=box.SIMPLE_HEAD)
    for row in table.rows:
        cells = [cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row]
        texts = [Text(visible(cell.text)) for cell in cells]
        grid.add_row(*texts, style="bold" if "strong" in cells[0].kind else "")
    return grid
