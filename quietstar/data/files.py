"""Records of local files: JSON lines, JSON lists, plain text and parquet."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from rapidfuzz import process

from quietstar.data.records import Layout, Record, missing_field, read_record
from quietstar.errors import UserError

# A .txt file is cut at blank lines into documents of about this many characters, so that a part
# of one long file can be held out. Where no blank line comes, a line's end does at four times it.
TEXT_DOCUMENT_CHARS = 32_000


def files_of(label: str, path: Path) -> list[Path]:
    """Lists a file, or the files of a folder (with its subfolders) that can be read, sorted.

    Raises:
        UserError: If there is none, or every one is empty.
    """
    if path.is_file():
        files = [path]
    else:
        found = sorted(file for file in path.rglob("*") if file.suffix in ENDINGS)
        files = [file for file in found if file.is_file() and not _hidden(file, path)]
    if not files:
        raise UserError(f"{label}: the folder holds no file that ends in {_endings()}")
    filled = [file for file in files if file.stat().st_size > 0]
    if not filled:
        raise UserError(f"{label}: is empty (0 bytes): give a file with at least one record")
    return filled


def check_file_ending(label: str, path: Path) -> None:
    """Refuses a file that is of no known kind.

    Raises:
        UserError: If the ending is not one of `ENDINGS`.
    """
    if path.suffix not in ENDINGS:
        raise UserError(
            f"{label}: unsupported ending {path.suffix!r}: must be {_endings()}; convert the file"
        )


def iterate_files(names: Sequence[str], layout: Layout) -> Iterator[Record]:
    """Yields the canonical records of files, one file after the other.

    Raises:
        UserError: At a record that cannot be read, with file and line (or record) number.
    """
    for name in names:
        path = Path(name)
        if path.suffix == ".txt" and layout.format != "text":
            raise UserError(f"{path}: .txt files hold raw text: set data.format: text")
        yield from READERS[path.suffix](path, layout)


def neighbours(path: Path) -> list[str]:
    """Names beside a path, to suggest one of them."""
    return sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []


def did_you_mean(name: str, choices: Sequence[str]) -> str:
    """Returns `; did you mean X?` for the choice most like a name, or nothing."""
    best = process.extractOne(name, choices, score_cutoff=60)
    return f"; did you mean {best[0]}?" if best else ""


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: byte {error.object[error.start]:#04x} is no UTF-8:"
                    " save the file as UTF-8"
                ) from error


def _read_json_lines(path: Path, layout: Layout) -> Iterator[Record]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: malformed JSON ({error.msg} at column {error.colno}): a line must hold"
                " one JSON object"
            ) from error
        yield read_record(raw, layout, where)


def _read_json(path: Path, layout: Layout) -> Iterator[Record]:
    """Reads a list of records, or, as many .json files are, JSON lines."""
    first = next((line for _, line in _lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _read_json_lines(path, layout)
        return
    try:
        raws: Any = json.loads("".join(line for _, line in _lines(path)))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: malformed JSON ({error.msg} at column {error.colno}):"
            " the file must hold a list of objects"
        ) from error
    for number, raw in enumerate(raws, 1):
        yield read_record(raw, layout, f"{path}, record {number}")


def _read_text(path: Path, layout: Layout) -> Iterator[Record]:
    del layout  # raw text has no fields
    lines: list[str] = []
    size = 0
    for _, line in _lines(path):
        lines.append(line)
        size += len(line)
        at_blank = not line.strip() and size >= TEXT_DOCUMENT_CHARS
        if at_blank or size >= 4 * TEXT_DOCUMENT_CHARS:
            yield {"text": "".join(lines)}
            lines, size = [], 0
    if size:
        yield {"text": "".join(lines)}


def _read_parquet(path: Path, layout: Layout) -> Iterator[Record]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: is no parquet file: write it again, or rename it") from error
    with file:
        present = file.schema_arrow.names
        columns = [field for _, field in layout.fields]
        for name, field in layout.fields:
            if field not in present:
                raise missing_field(field, present, str(path), name)
        number = 0
        for batch in file.iter_batches(columns=columns):
            for raw in batch.to_pylist():
                number += 1
                yield read_record(raw, layout, f"{path}, record {number}")


READERS: dict[str, Callable[[Path, Layout], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}
ENDINGS = tuple(READERS)


def _endings() -> str:
    return f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)
