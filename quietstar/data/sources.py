"""Where records come from: local files, a hub data set, or generated problems.

A record is a dict with canonical fields, checked as it is read: `text`; or `question` and `answer`,
perhaps `rationale`; or `messages` (dicts with `role` and `content`).
"""

import glob
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.features import Value

from quietstar.config import DataConfig
from quietstar.config.messages import closest, did_you_mean
from quietstar.config.schema import GYM, SYNTHETIC
from quietstar.data.synthetic import chain_sum_steps, import_reasoning_gym, synthetic_records
from quietstar.data.tokenizer import first_line
from quietstar.errors import UserError

Record = dict[str, Any]

# Files up to this size are kept in memory; larger ones go to an arrow file, mapped into memory.
IN_MEMORY_BYTES = 64 * 2**20
# A .txt file is cut at blank lines into documents of about this many characters, so that a part
# of one long file can be held out. Where no blank line comes, a line's end does at four times it.
TEXT_DOCUMENT_CHARS = 32_000
MESSAGE_FIELDS = ("role", "content")
SIMILAR_NAME = 60.0  # least similarity, of 100, of a file or task that is suggested


# --- Records --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordFields:
    """Where the canonical fields of a format lie in the raw records.

    Attributes:
        format: `text`, `qa` or `chat`.
        fields: Pairs of canonical name and name in the raw record.
    """

    format: str
    fields: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, config: DataConfig) -> "RecordFields":
        """Reads the field names of the config's format."""
        names = {"text": ("text",), "chat": ("messages",), "qa": ("question", "answer")}
        fields = [(name, getattr(config, f"{name}_field")) for name in names[config.format]]
        if config.format == "qa" and config.rationale_field is not None:
            fields.append(("rationale", config.rationale_field))
        return cls(config.format, tuple(fields))

    @property
    def canonical(self) -> "RecordFields":
        """The same format with every field under its canonical name."""
        return RecordFields(self.format, tuple((name, name) for name, _ in self.fields))


def read_record(raw: object, fields: RecordFields, where: str) -> Record:
    """Picks the canonical fields out of a raw record; a null becomes empty.

    Args:
        raw: Record as it was read.
        fields: Where the canonical fields lie.
        where: Name of the record for an error, such as `train.jsonl, line 3`.

    Raises:
        UserError: If it is no object, lacks a field, or a field has the wrong type.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: a record must be an object with fields, not {_kind(raw)}")
    read = _read_messages if fields.format == "chat" else _read_string
    return {name: read(raw, field, where, name) for name, field in fields.fields}


def missing_field(field: str, present: Sequence[str], where: str, name: str) -> UserError:
    """Builds the error for a record (or table) without a field.

    Args:
        field: Name of the field in the raw record.
        present: Fields that are there.
        where: Name of the record.
        name: Canonical name of the field.
    """
    names = ", ".join(map(str, present)) or "none"
    key = "" if name in MESSAGE_FIELDS else f": set data.{name}_field, or data.format"
    return UserError(f"{where}: no field {field!r} (its fields: {names}){key}")


def is_empty(record: Record) -> bool:
    """Tells whether a record has nothing to learn from: no text, no answer, or no messages."""
    if "messages" in record:
        return not any(message["content"].strip() for message in record["messages"])
    return not (record["answer"] if "answer" in record else record["text"]).strip()


def _read_string(raw: Mapping[str, Any], field: str, where: str, name: str) -> str:
    if field not in raw:
        raise missing_field(field, list(raw), where, name)
    value = raw[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} must be a string, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {field!r} holds half of a surrogate pair, which is no text:"
            " remove or replace it"
        ) from error
    return value


def _read_messages(
    raw: Mapping[str, Any], field: str, where: str, name: str
) -> list[dict[str, str]]:
    if field not in raw:
        raise missing_field(field, list(raw), where, name)
    messages = [] if raw[field] is None else raw[field]
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise UserError(
            f"{where}: field {field!r} must be a list of messages, not {_kind(messages)}"
        )
    for message in messages:
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: a message must be an object, not {_kind(message)}")
    return [
        {key: _read_string(message, key, f"{where}, message {n}", key) for key in MESSAGE_FIELDS}
        for n, message in enumerate(messages, 1)
    ]


def _kind(value: object) -> str:
    names = {"dict": "an object", "list": "a list", "int": "a number", "float": "a number"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")


# --- Files ----------------------------------------------------------------------------------------


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: byte {error.object[error.start]:#04x} is no UTF-8:"
                    " save the file as UTF-8"
                ) from error


def _read_json_lines(path: Path, fields: RecordFields) -> Iterator[Record]:
    for number, line in _read_lines(path):
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
        yield read_record(raw, fields, where)


def _read_json(path: Path, fields: RecordFields) -> Iterator[Record]:
    """Reads a list of records, or, as many .json files are, JSON lines."""
    first = next((line for _, line in _read_lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _read_json_lines(path, fields)
        return
    try:
        raws: Any = json.loads("".join(line for _, line in _read_lines(path)))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: malformed JSON ({error.msg} at column {error.colno}):"
            " the file must hold a list of objects"
        ) from error
    for number, raw in enumerate(raws, 1):
        yield read_record(raw, fields, f"{path}, record {number}")


def _read_text(path: Path, fields: RecordFields) -> Iterator[Record]:
    if fields.format != "text":
        raise UserError(f"{path}: .txt files hold raw text: set data.format: text")
    lines: list[str] = []
    size = 0
    for _, line in _read_lines(path):
        lines.append(line)
        size += len(line)
        at_blank = not line.strip() and size >= TEXT_DOCUMENT_CHARS
        if at_blank or size >= 4 * TEXT_DOCUMENT_CHARS:
            yield {"text": "".join(lines)}
            lines, size = [], 0
    if size:
        yield {"text": "".join(lines)}


def _read_parquet(path: Path, fields: RecordFields) -> Iterator[Record]:
    with path.open("rb") as file:  # datasets would log what is wrong before it raises
        is_parquet = file.read(4) == b"PAR1"
    try:
        if not is_parquet:
            raise ValueError(path)
        pattern = glob.escape(str(path))
        rows = load_dataset("parquet", data_files=pattern, split="train", streaming=True)
        present = list(rows.column_names or ())
    except Exception as error:  # nearly anything, from pyarrow's errors to those of datasets
        raise UserError(f"{path}: is no parquet file: write it again, or rename it") from error
    for name, field in fields.fields:
        if field not in present:
            raise missing_field(field, present, str(path), name)
    for number, raw in enumerate(rows.select_columns([field for _, field in fields.fields]), 1):
        yield read_record(raw, fields, f"{path}, record {number}")


READERS: dict[str, Callable[[Path, RecordFields], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}
ENDINGS = f"{', '.join(list(READERS)[:-1])} or {list(READERS)[-1]}"


def _read_files(names: Sequence[str], fields: RecordFields) -> Iterator[Record]:
    """Yields the canonical records of files, one file after the other."""
    for name in names:
        yield from READERS[Path(name).suffix](Path(name), fields)


def _find_files(label: str, path: Path) -> list[Path]:
    """Lists a file, or the readable files of a folder and its subfolders, sorted.

    Raises:
        UserError: If there is none, or every one is empty.
    """
    if path.is_file() and path.suffix not in READERS:
        raise UserError(
            f"{label}: unsupported ending {path.suffix!r}: must be {ENDINGS}; convert the file"
        )
    files = [path]
    if not path.is_file():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in READERS]
        files = [file for file in files if file.is_file() and not any(
            part.startswith(".") for part in file.relative_to(path).parts)]  # fmt: skip
    if not files:
        raise UserError(f"{label}: the folder holds no file that ends in {ENDINGS}")
    filled = [file for file in files if file.stat().st_size > 0]
    if not filled:
        raise UserError(f"{label}: is empty (0 bytes): give a file with at least one record")
    return filled


def _suggest_neighbor(path: Path) -> str:
    """Returns `; did you mean X?` for the file beside a missing path that is most like it."""
    names = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
    return did_you_mean(closest(path.name, names, SIMILAR_NAME))


# --- Sources --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Canonical records of one data set.

    Attributes:
        label: Key and value in the config, to open error messages with.
        rows: Starts a fresh pass over the records.
        table: Random access to the records; None for a stream.
    """

    label: str
    rows: Callable[[], Iterator[Record]]
    table: Dataset | None

    @classmethod
    def of_rows(cls, label: str, rows: Callable[[], Iterator[Record]], streaming: bool) -> "Source":
        """Makes a source of a few records: a stream, or a table in memory."""
        return cls(label, rows, None if streaming else Dataset.from_list(list(rows())))


def open_source(
    value: str, config: DataConfig, seed: int, key: str = "data.train", size: int | None = None
) -> Source:
    """Finds out what a name means and opens it.

    Args:
        value: A file or folder, a hub id (`owner/name`, or `owner/name:split`),
            `reasoning_gym:<task>` or `synthetic:<task>` (as data.eval its held-out problems).
        config: Fields, format and options of the records.
        seed: Seed of generated problems; problem i of seed s is problem 0 of seed s + i.
        key: Config key that named it.
        size: Number of generated problems, instead of `config.size`.

    Raises:
        UserError: If there is no such data, or it is empty or malformed.
    """
    label = f"{key}: {value}"
    if value.startswith((GYM, SYNTHETIC)):
        if config.rationale_field not in (None, "rationale"):
            raise UserError(
                f"data.rationale_field: {config.rationale_field!r} is no field of generated"
                " problems: set data.rationale_field: rationale, or leave it out"
            )
        if value.startswith(GYM):
            return _open_gym(label, value.removeprefix(GYM), config, seed, size or config.size)
        held_out = key == "data.eval"
        return _open_synthetic(label, value, config, seed, size or config.size, held_out)
    path = Path(value).expanduser()
    if path.exists():
        return _open_local(label, path, config)
    if path.suffix in READERS or path.is_absolute() or value.startswith((".", "~")):
        raise UserError(f"{label}: no such file or folder{_suggest_neighbor(path)}")
    if value.count("/") > 1:
        raise UserError(f"{label}: no such file or folder, and a hub id has at most one '/'")
    return _open_hub(label, value, config)


def _open_local(label: str, path: Path, config: DataConfig) -> Source:
    files = _find_files(label, path)
    fields = RecordFields.of(config)
    if all(file.suffix == ".txt" for file in files) and fields.format != "text":
        raise UserError(f"{label}: .txt files hold raw text: set data.format: text")
    names = [str(file) for file in files]
    rows = partial(_read_files, names, fields)
    if next(rows(), None) is None:
        raise UserError(f"{label}: holds no record: give a file with at least one")
    if config.streaming or sum(file.stat().st_size for file in files) <= IN_MEMORY_BYTES:
        return Source.of_rows(label, rows, config.streaming)
    # Write the records to a cached arrow file once; a changed file is read again.
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    arguments = {"names": names, "fields": fields, "stamps": (stamps,)}
    try:
        table = Dataset.from_generator(_stamped_rows, gen_kwargs=arguments)
    except Exception as error:  # datasets wraps what the generator raised
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        raise cause or error from None
    assert isinstance(table, Dataset), type(table)
    return Source(label, rows, table)


def _stamped_rows(names: list[str], fields: RecordFields, stamps: Any) -> Iterator[Record]:
    del stamps  # only part of the cache's key
    return _read_files(names, fields)


def _open_hub(label: str, value: str, config: DataConfig) -> Source:
    name, _, split = value.partition(":")
    split = split or config.split
    try:
        data: Any = load_dataset(name, config.subset, split=split, streaming=config.streaming)
    except Exception as error:  # offline, no such set, no such subset, a broken script, ...
        raise UserError(
            f"{label}: no such file or folder here, and not to be had as a hub data set (split"
            f" {split!r}, subset {config.subset!r}: {first_line(error)}): check the path, or the id"
            f" and the connection{_suggest_neighbor(Path(name))}"
        ) from error
    fields = RecordFields.of(config)
    if not config.streaming:
        table = _canonical_table(data, fields, label)
        return Source(label, partial(iter, table), table)  # pyright: ignore[reportArgumentType]

    def rows() -> Iterator[Record]:
        for number, raw in enumerate(data, 1):
            yield read_record(raw, fields, f"{label}, record {number}")

    return Source(label, rows, None)


def _canonical_table(data: Dataset, fields: RecordFields, label: str) -> Dataset:
    """Selects and renames the columns of a table, without copying them.

    Raises:
        UserError: If the table is empty, lacks a column, or a text column holds no strings.
    """
    if len(data) == 0:
        raise UserError(f"{label}: holds no record: choose another split or subset")
    for name, field in fields.fields:
        if field not in data.column_names:
            raise missing_field(field, data.column_names, label, name)
        kind = data.features[field]
        is_text = isinstance(kind, Value) and kind.dtype in ("string", "large_string", "null")
        if name != "messages" and not is_text:
            raise UserError(f"{label}: field {field!r} must hold strings, not {kind}")
    columns = {field: name for name, field in fields.fields}
    return data.select_columns(list(columns)).rename_columns(columns)


_RATIONALES: dict[str, Callable[[str], str]] = {"chain_sum": chain_sum_steps}
"""From a question of a reasoning_gym task to the reasoning that leads to its answer."""


def _open_gym(label: str, task: str, config: DataConfig, seed: int, size: int) -> Source:
    problems = _create_problems(label, task, config, seed, size)
    if config.rationale_field is not None and task not in _RATIONALES:
        raise UserError(
            f"data.rationale_field: {config.rationale_field!r} needs problems with known reasoning,"
            f" but those of {label} have none (known: {', '.join(_RATIONALES)}): leave it out"
        )

    def rows() -> Iterator[Record]:
        for problem in problems:  # one without an answer gives an empty record
            question, answer = str(problem["question"]), str(problem["answer"] or "")
            if config.format == "qa":
                record = {"question": question, "answer": answer}
                if config.rationale_field is not None:
                    record["rationale"] = _RATIONALES[task](question)
                yield record
            elif config.format == "text":
                yield {"text": f"{question}\n{answer}" if answer else ""}
            else:
                turns = (("user", question), ("assistant", answer))
                messages = [{"role": role, "content": content} for role, content in turns]
                yield {"messages": messages if answer else []}

    return Source.of_rows(label, rows, config.streaming)


def _create_problems(label: str, task: str, config: DataConfig, seed: int, size: int) -> Any:
    gym = import_reasoning_gym(label)
    tasks = list(gym.factory.DATASETS)
    if task not in tasks:
        hint = did_you_mean(closest(task, tasks, SIMILAR_NAME))
        raise UserError(f"{label}: reasoning_gym has no task {task!r}{hint}")
    try:
        return gym.create_dataset(task, size=size, seed=seed, **config.task_options)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"data.task_options: {config.task_options} is refused by the task {task!r}"
            f" ({first_line(error)}): correct the options"
        ) from error


def _open_synthetic(
    label: str, value: str, config: DataConfig, seed: int, size: int, held_out: bool
) -> Source:
    task = value.removeprefix(SYNTHETIC)
    records = synthetic_records(label, task, config.task_options, size, seed, held_out)
    names = [name for name, _ in RecordFields.of(config).fields]
    if "messages" in names:
        raise UserError(f"{label}: holds no chats: set data.format: qa or text")

    def rows() -> Iterator[Record]:
        for record in records():
            text = {"text": f"{record['question']} {record['answer']}"}
            yield {name: (record | text)[name] for name in names}

    return Source.of_rows(label, rows, config.streaming)
