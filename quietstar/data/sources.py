"""Where records come from: local files, a hub data set, or generated problems.

A record is a dict with canonical fields, checked as it is read: `text`; or `question` and `answer`,
perhaps `rationale`; or `messages` (dicts with `role` and `content`). Where records say at which
characters the model thinks, these are `positions`, and `where` is the record's place in its file.
Where rewards read the raw record, `record` is its JSON.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet
from datasets import Dataset, Features, List, load_dataset
from datasets.features import Value
from datasets.fingerprint import Hasher

from quietstar.config import DataConfig
from quietstar.config.messages import (
    MOST_NAMES,
    SIMILAR_NAME,
    closest,
    did_you_mean,
    did_you_mean_file,
    shortened,
)
from quietstar.config.schema import GYM, SYNTHETIC, compile_field, is_template
from quietstar.data.choices import resolve
from quietstar.data.synthetic import chain_sum_steps, import_reasoning_gym, synthetic_records
from quietstar.data.tokenizer import check_unicode
from quietstar.errors import UserError, reading, reason_of
from quietstar.system.inputs import open_input, parse_json
from quietstar.system.limits import limited

Record = dict[str, Any]

# Files up to this size are kept in memory; larger ones go to an arrow file, mapped into memory.
IN_MEMORY_BYTES = 64 * 2**20
# A .txt file is cut at blank lines into documents of about this many characters, so that a part
# of one long file can be held out. Where no blank line comes, a line's end does at four times it.
TEXT_DOCUMENT_CHARS = 32_000
MESSAGE_FIELDS = ("role", "content")
# A tokenizer takes about 100 bytes of memory for a character, and where there is no more it ends
# the process without a word.
MOST_CHARACTERS = 10_000_000
MOST_LINE_BYTES = 64 * 2**20  # of MOST_CHARACTERS, even if escaped
MOST_LIST_BYTES = 2**30  # of a .json file that is one list, which is parsed as a whole
PARQUET_ROWS = 256  # decoded at once
RECORDS_VERSION = 2  # to be raised when `read_record` makes other records of the same rows
MEND = "Mend the file, write it again, or leave it out."
MOST_PROBLEMS = 10**7  # more would fill the memory
WHOLE = "record"  # canonical field of the whole raw record


# --- Records --------------------------------------------------------------------------------------
def record_fields(config: DataConfig, whole: bool = False) -> dict[str, str]:
    """Returns the canonical fields of the config's format with their names in raw records.

    With ``whole`` among them one for the whole raw record.
    """
    fields = {
        "text": {"text": config.text_field},
        "chat": {"messages": "messages"},
        "qa": {"question": config.question_field, "answer": config.answer_field},
    }[config.format]
    if config.format == "qa" and config.rationale_field is not None:
        fields["rationale"] = config.rationale_field
    if config.positions_field is not None:
        fields["positions"] = config.positions_field
    return fields | ({WHOLE: ""} if whole else {})


def read_record(raw: object, fields: Mapping[str, str], where: str) -> Record:
    """Picks the canonical fields, given with their raw names or templates, out of a raw record.

    A null becomes empty, also in a template, and the answer among choices a text (`resolve`).
    Raises `UserError`, which names the record by `where` (such as `train.jsonl, line 3`), if it is
    no object, lacks a field, a field has the wrong type, or a template fails.
    """
    if not isinstance(raw, Mapping):
        raise UserError(
            f"{where}: a record must be an object with fields, not {_kind(raw)}. Write "
            '{"text": ...} on every line.'
        )
    record: Record = {}
    given, _ = resolve(raw, fields, where)
    for name, field in fields.items():
        if name == WHOLE:
            record[name] = json.dumps(raw, ensure_ascii=False, default=str)
            continue
        if is_template(field):
            text = _render(field, given, where, name)
            record[name] = check_unicode(text, f"{where}: data.{name}_field")
            continue
        if field not in given:
            raise missing_field(field, list(raw), where, name)
        value, what = given[field], f"{where}: field {field!r}"
        if name == "messages":
            record[name] = _read_messages([] if value is None else value, where, what)
        elif name == "positions":
            record[name] = _read_positions([] if value is None else value, what)
            record["where"] = where
        elif value is None or isinstance(value, str):
            record[name] = check_unicode(value or "", what)
        else:
            raise UserError(f"{what} must be a string, not {_kind(value)}")
    if (size := count_characters(record)) > MOST_CHARACTERS:
        raise UserError(
            f"{where}: a record of {size:,} characters is longer than {MOST_CHARACTERS:,}, for"
            f" which a tokenizer needs about {MOST_CHARACTERS // 10**7} GB of memory: split it"
        )
    return record


def _render(template: str, raw: Mapping[str, Any], where: str, name: str) -> str:
    try:
        with limited():
            return compile_field(template).render(raw)
    except Exception as error:  # a template may do anything that data allow
        names = shortened(", ".join(map(str, islice(raw, MOST_NAMES))) or "none", 200)
        raise UserError(
            f"{where}: the template of data.{name}_field fails ({reason_of(error)}; the record's"
            f" fields: {names}): correct the template, or the record"
        ) from error


def count_characters(record: Record) -> int:
    """Counts the characters of all texts in a canonical record."""
    apart = ("where", WHOLE)
    texts = [text for name, text in record.items() if isinstance(text, str) and name not in apart]
    texts += [message["content"] for message in record.get("messages", ())]
    return sum(map(len, texts))


def _read_messages(messages: object, where: str, what: str) -> list[Record]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise UserError(f"{what} must be a list of messages, not {_kind(messages)}")
    for message in messages:
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: a message must be an object, not {_kind(message)}")
    fields = {name: name for name in MESSAGE_FIELDS}
    return [read_record(m, fields, f"{where}, message {n}") for n, m in enumerate(messages, 1)]


def _read_positions(positions: object, what: str) -> list[int]:
    """Checks character offsets; those beyond the text are found when it is made of the record."""
    if not isinstance(positions, Sequence) or isinstance(positions, str):
        raise UserError(f"{what} must be a list of character offsets, not {_kind(positions)}")
    for offset in positions:
        if not isinstance(offset, int) or isinstance(offset, bool):
            raise UserError(f"{what} must hold whole numbers, not {_kind(offset)}")
        if not 0 <= offset <= MOST_CHARACTERS:
            raise UserError(
                f"{what} holds {offset}: an offset must be from 0 to the last character of the text"
            )
    return list(positions)


def missing_field(field: str, present: Sequence[str], where: str, name: str) -> UserError:
    """Builds the error for a record (or table) without a raw field of this canonical name."""
    names = shortened(", ".join(map(str, islice(present, MOST_NAMES))) or "none", 200)
    key = "" if name in MESSAGE_FIELDS else f": set data.{name}_field, or data.format"
    return UserError(f"{where}: no field {field!r} (its fields: {names}){key}")


def is_empty(record: Record) -> bool:
    """Tells whether a record has nothing to learn from: no text, no answer, or no messages."""
    if "messages" in record:
        return not any(message["content"].strip() for message in record["messages"])
    return not (record["answer"] if "answer" in record else record["text"]).strip()


def _kind(value: object) -> str:
    names = {"dict": "an object", "list": "a list", "int": "a number", "float": "a number"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")


# --- Files ----------------------------------------------------------------------------------------
# A reader yields raw records, each with its place in the file for error messages.

RawRecords = Iterator[tuple[object, str]]


def _read_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    while line := file.readline(MOST_LINE_BYTES + 1):
        number += 1
        if len(line) > MOST_LINE_BYTES:
            raise UserError(
                f"{path}, line {number}: is longer than {MOST_LINE_BYTES // 2**20} MiB, more than a"
                " tokenizer has memory for: split it into several"
            )
        yield number, _decode(line, path, number)


def _decode(content: bytes, path: Path, first: int) -> str:
    """Decodes what begins at this line of a file."""
    try:
        return content.decode("utf-8-sig" if first == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first + content.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}, line {line}: byte {content[error.start]:#04x} is no UTF-8: save the file as"
            " UTF-8"
        ) from error


def _read_json(file: BinaryIO, path: Path, fields: Mapping[str, str]) -> RawRecords:
    """Reads JSON lines, or the list of records that a .json file may hold instead."""
    start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    if path.suffix == ".json" and start.startswith(b"["):
        content = file.read(MOST_LIST_BYTES + 1)
        if len(content) > MOST_LIST_BYTES:
            raise UserError(
                f"{path}: is a list of more than {MOST_LIST_BYTES // 2**30} GiB, which can only be"
                " read as a whole: write one record a line instead, as .jsonl"
            )
        records = _parse_json(_decode(content, path, 1), path, None, "a list of objects")
        yield from ((record, f"{path}, record {n}") for n, record in enumerate(records, 1))
        return
    for number, text in _read_lines(file, path):
        if text.strip():
            yield (
                _parse_json(text, path, number, "one JSON object a line"),
                f"{path}, line {number}",
            )


def _parse_json(text: str, path: Path, line: int | None, rule: str) -> Any:
    """Parses a line, or a whole file (None); what is wrong is a `UserError` that says where."""
    try:
        return parse_json(text.rstrip(), numbers_only=False)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {(line or 1) + error.lineno - 1}: malformed JSON ({error.msg} at"
            f" column {error.colno}): it must hold {rule}"
        ) from error
    except (ValueError, RecursionError) as error:  # such as a number of 5,000 digits
        reason = str(error).partition(";")[0] if isinstance(error, ValueError) else reason_of(error)
        where = path if line is None else f"{path}, line {line}"
        raise UserError(f"{where}: malformed JSON ({reason}): it must hold {rule}") from error


def _read_text(file: BinaryIO, path: Path, fields: Mapping[str, str]) -> RawRecords:
    if "text" not in fields:
        raise UserError(f"{path}: .txt files hold raw text: set data.format: text")
    field = "text" if is_template(fields["text"]) else fields["text"]
    lines: list[str] = []
    size = 0
    for number, line in _read_lines(file, path):
        lines.append(line)
        size += len(line)
        at_blank = not line.strip() and size >= TEXT_DOCUMENT_CHARS
        if at_blank or size >= 4 * TEXT_DOCUMENT_CHARS:
            yield {field: "".join(lines)}, f"{path}, to line {number}"
            lines, size = [], 0
    if size:
        yield {field: "".join(lines)}, f"{path}, last lines"


def _read_parquet(file: BinaryIO, path: Path, fields: Mapping[str, str]) -> RawRecords:
    with reading(f"{path}: is no parquet file or a damaged one", "Write it again, or rename it."):
        table = pyarrow.parquet.ParquetFile(file)
        present = list(table.schema_arrow.names)
    named = {n: field for n, field in fields.items() if n != WHOLE and not is_template(field)}
    for name, field in named.items():
        if field not in present:
            raise missing_field(field, present, str(path), name)
        if present.count(field) > 1:
            raise UserError(f"{path}: field {field!r} stands twice: rename one of them")
    number = 0
    # A template reads any, as does a reward.
    is_all = len(named) < len(fields) or _may_choose(fields, present)
    columns = None if is_all else list(named.values())
    for batch in table.iter_batches(PARQUET_ROWS, columns=columns):
        for raw in batch.to_pylist():
            number += 1
            yield raw, f"{path}, record {number}"


READERS: dict[str, Callable[[BinaryIO, Path, Mapping[str, str]], RawRecords]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}
ENDINGS = f"{', '.join(list(READERS)[:-1])} or {list(READERS)[-1]}"


def _may_choose(fields: Mapping[str, str], present: Sequence[str]) -> bool:
    """Tells whether records of these columns may have choices, which are read with the answer."""
    return "answer" in fields and ("choices" in present or fields["answer"] == "answerKey")


def raw_records(value: str, key: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yields the raw records of a file or folder, with all their fields and their places.

    Raises:
        UserError: There is none, or it is malformed.
    """
    path = find_local(value, key)
    if path is None:
        raise UserError(f"{key} ({value}): is no file or folder here. Give one.")
    fields = {"text": "text", WHOLE: ""}
    for file in _find_files(path) if path.is_dir() else [path]:
        if file.suffix not in READERS:
            raise UserError(f"{key} ({file}): must end in {ENDINGS}. Convert the file.")
        for raw, where in _read_file(file, {WHOLE: ""} if file.suffix == ".parquet" else fields):
            if not isinstance(raw, Mapping):
                raise UserError(f"{where}: a record must be an object with fields.")
            yield raw, where


def _read_file(path: Path, fields: Mapping[str, str]) -> RawRecords:
    # A stream opens its files again for every pass, long after they were found.
    with reading(str(path), MEND), open_input(path) as file:
        yield from READERS[path.suffix](file, path, fields)


def _read_files(names: list[str], fields: dict[str, str], stamps: Any) -> Iterator[Record]:
    """Yields the canonical records of files; `stamps` are only part of a cache's key.

    Raises:
        UserError: A file is malformed, or it has gone or fails while it is read.
    """
    for path in map(Path, names):
        for raw, where in _read_file(path, fields):
            yield read_record(raw, fields, where)


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


def open_source(
    value: str,
    config: DataConfig,
    seed: int,
    key: str = "data.train",
    size: int | None = None,
    whole: bool = False,
) -> Source:
    """Finds out what a name means and opens it.

    Args:
        value: A file or folder, a hub id (`owner/name`, `:split` or `:subset:split` after it),
            `reasoning_gym:<task>` or `synthetic:<task>` (as data.eval its held-out problems).
        config: Fields, format and options of the records.
        seed: Seed of generated problems; problem i of seed s is problem 0 of seed s + i.
        key: Config key that named it.
        size: Number of generated problems, instead of `num_problems`.
        whole: Whether records keep the raw ones that they are made of.

    Raises:
        UserError: If there is no such data, or it is empty or malformed.
    """
    label = f"{key}: {value}"
    if value.startswith((GYM, SYNTHETIC)):
        held_out, size = key == "data.eval", size or num_problems(config)
        return _open_generated(label, value, config, seed, size, held_out, whole)
    path, fields = find_local(value, key), record_fields(config, whole)
    if path is None:
        return _open_hub(label, value, config, fields)
    return _open_local(label, path, config, fields)


def num_problems(config: DataConfig) -> int:
    """Returns the number of generated problems, the option ``size`` of all tasks.

    Raises:
        UserError: It is no number of problems.
    """
    size = config.task_options.get("size", 10_000)
    if type(size) is not int or not 1 <= size <= MOST_PROBLEMS:
        raise UserError(
            f"data.task_options: size: {size!r} must be a number from 1 to {MOST_PROBLEMS:,}; "
            "correct it or leave it out"
        )
    return size


def find_local(value: str, key: str) -> Path | None:
    """Returns the file or folder that a config key names; None for generated data and a hub id.

    Raises:
        UserError: Nothing is there, and the name can be no hub id.
    """
    if value.startswith((GYM, SYNTHETIC)):
        return None
    label = f"{key}: {value}"
    with reading(label, "Give another file or folder."):
        path = Path(value).expanduser()
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            is_local = path.is_symlink()  # one that leads nowhere is no hub id either
        else:
            is_local = True
    if is_local:
        return path
    if path.suffix in READERS or path.is_absolute() or value.startswith((".", "~")):
        hint = did_you_mean_file(path) or ". Check the path."
        raise UserError(f"{label}: no such file or folder{hint}")
    if value.count("/") > 1:
        raise UserError(f"{label}: no such file or folder, and a hub id has at most one '/'")
    return None


def _open_local(label: str, path: Path, config: DataConfig, fields: Mapping[str, str]) -> Source:
    """Opens a file, or the readable files of a folder and its subfolders, sorted."""
    try:
        is_folder = path.is_dir()
        if not is_folder and path.suffix not in READERS:
            raise UserError(
                f"{label}: unsupported ending {path.suffix!r}: must be {ENDINGS}; convert the file"
            )
        files = _find_files(path) if is_folder else [path]
        if not files:
            raise UserError(f"{label}: the folder holds no file that ends in {ENDINGS}")
        for file in files:
            open_input(file).close()
        sizes = {str(file): file.stat() for file in files}
    except OSError as error:
        raise UserError(
            f"{label}: {error.filename or path} cannot be read ({reason_of(error)}). Make it"
            " readable, or leave it out."
        ) from error
    stats = {name: status for name, status in sizes.items() if status.st_size > 0}
    if not stats:
        raise UserError(f"{label}: is empty (0 bytes): give a file with at least one record")
    stamps = [(status.st_size, status.st_mtime_ns) for status in stats.values()]
    arguments = {"names": list(stats), "fields": fields, "stamps": (stamps,)}
    rows = partial(_read_files, **arguments)
    if next(rows(), None) is None:
        raise UserError(f"{label}: holds no record: give a file with at least one")
    if config.streaming or sum(size for size, _ in stamps) <= IN_MEMORY_BYTES:
        return Source(label, rows, None if config.streaming else Dataset.from_list(list(rows())))
    # Write the records to a cached arrow file once; a changed file is read again.
    try:
        # The first thousand records may have no positions, and would leave their type open.
        kinds = None
        if "positions" in fields:
            messages = List({name: Value("string") for name in MESSAGE_FIELDS})
            typed = {"messages": messages, "positions": List(Value("int64"))}
            kinds = Features({n: typed.get(n, Value("string")) for n in (*fields, "where")})
        table: Any = Dataset.from_generator(_read_files, features=kinds, gen_kwargs=arguments)
    except Exception as error:  # datasets wraps what the generator raised
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        raise cause or UserError(
            f"{label}: cannot be copied to the cache of data sets ({reason_of(error)}). Make room"
            " there, or set HF_DATASETS_CACHE to another folder."
        ) from error
    return Source(label, rows, table)


def _find_files(folder: Path) -> list[Path]:
    """Finds the data files of a folder and its subfolders, without hidden ones, sorted.

    Raises:
        OSError: A subfolder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    paths: list[Path] = []
    for place, subfolders, names in os.walk(folder, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        shown = (name for name in names if not name.startswith("."))
        paths += [Path(place) / name for name in shown if Path(name).suffix in READERS]
    return sorted(paths)


def _open_hub(label: str, value: str, config: DataConfig, fields: Mapping[str, str]) -> Source:
    """Opens a hub data set; a table's columns are renamed, and copied only through templates."""
    name, *parts = value.split(":")
    if len(parts) > 2 or not all((name, *parts)):
        raise UserError(
            f"{label}: must be owner/name, owner/name:split, or owner/name:subset:split"
        )
    split = parts[-1] if parts else "train"
    subset = parts[0] if len(parts) > 1 else None
    try:
        data: Any = load_dataset(name, subset, split=split, streaming=config.streaming)
    except Exception as error:  # offline, no such set, no such subset, a broken script, ...
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{label}: no such file or folder here, and no hub data set to be found, either (split"
            f" {split!r}, subset {subset!r}: {reason}): check the path, or the id"
            f" and the connection{did_you_mean_file(Path(name))}"
        ) from error
    if config.streaming:

        def rows() -> Iterator[Record]:
            with reading(label, "Check the connection, and start again with --resume auto."):
                for number, raw in enumerate(data, 1):
                    yield read_record(raw, fields, f"{label}, record {number}")

        return Source(label, rows, None)
    if len(data) == 0:
        raise UserError(f"{label}: holds no record: choose another split or subset")
    is_made = WHOLE in fields or any(map(is_template, fields.values()))
    if is_made or _may_choose(fields, data.column_names):

        def read(raw: Mapping[str, Any], number: int) -> Record:
            return read_record(raw, fields, f"{label}, record {number + 1}")

        # What `read` depends on names the cache; datasets would hash all that its code reaches.
        parts = (RECORDS_VERSION, data._fingerprint, label, sorted(fields.items()))
        table = data.map(
            read,
            with_indices=True,
            remove_columns=data.column_names,
            new_fingerprint=Hasher.hash(parts),
        )
        return Source(label, partial(iter, table), table)
    for name, field in fields.items():
        if field not in data.column_names:
            raise missing_field(field, data.column_names, label, name)
        kind = data.features[field]
        is_text = isinstance(kind, Value) and kind.dtype in ("string", "large_string", "null")
        if name not in ("messages", "positions") and not is_text:
            raise UserError(f"{label}: field {field!r} must hold strings, not {kind}")
    columns = {field: name for name, field in fields.items()}
    table = data.select_columns(list(columns)).rename_columns(columns)
    return Source(label, partial(iter, table), table)


def _open_generated(
    label: str,
    value: str,
    config: DataConfig,
    seed: int,
    size: int,
    held_out: bool,
    whole: bool,
) -> Source:
    """Opens the problems of a synthetic task or of reasoning_gym, in the config's format."""
    if config.rationale_field not in (None, "rationale"):
        raise UserError(
            f"data.rationale_field: {config.rationale_field!r} is no field of generated"
            " problems: set data.rationale_field: rationale, or leave it out"
        )
    if config.positions_field is not None:
        raise UserError(
            f"data.positions_field: {config.positions_field!r} is no field of generated problems:"
            " leave it out, or set thoughts.positions: pattern"
        )
    task = value.partition(":")[2]
    options = {k: v for k, v in config.task_options.items() if k != "size"}
    if value.startswith(SYNTHETIC):
        separator = " "
        problems = synthetic_records(label, task, options, size, seed, held_out)
        if config.format == "chat":
            raise UserError(f"{label}: holds no chats: set data.format: qa or text")
    else:
        separator = "\n"
        gym = import_reasoning_gym(label)
        tasks = list(gym.factory.DATASETS)
        if task not in tasks:
            hint = did_you_mean(closest(task, tasks, SIMILAR_NAME))
            raise UserError(f"{label}: reasoning_gym has no task {task!r}{hint}")
        with _blaming_options(config, task):
            dataset = gym.create_dataset(task, size=size, seed=seed, **options)
        if config.rationale_field is not None and task != "chain_sum":
            raise UserError(
                f"data.rationale_field: {config.rationale_field!r} needs problems with known"
                f" reasoning, but those of {label} have none (known: chain_sum): leave it out"
            )
        problems = partial(iter, dataset)
    names = list(record_fields(config, whole))

    def rows() -> Iterator[Record]:
        with _blaming_options(config, task):
            for problem in problems():  # one without an answer gives an empty record
                question, answer = str(problem["question"]), str(problem["answer"] or "")
                turns = (("user", question), ("assistant", answer)) if answer else ()
                forms: Record = {
                    "question": question,
                    "answer": answer,
                    "text": f"{question}{separator}{answer}" if answer else "",
                    "messages": [{"role": role, "content": content} for role, content in turns],
                    WHOLE: json.dumps(dict(problem), ensure_ascii=False, default=str),
                }
                if "rationale" in names:
                    forms["rationale"] = problem.get("rationale") or chain_sum_steps(question)
                yield {name: forms[name] for name in names}

    return Source(label, rows, None if config.streaming else Dataset.from_list(list(rows())))


@contextmanager
def _blaming_options(config: DataConfig, task: str) -> Iterator[None]:
    """Blame the options of a task, which checks little, for what fails inside."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"data.task_options: {config.task_options} is refused by the task {task!r}"
            f" ({reason_of(error)}): correct the options"
        ) from error
