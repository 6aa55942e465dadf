"""Where records come from: local files, a hub data set, or generated problems."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.features import Value

from quietstar.config import DataConfig
from quietstar.config.rules import SYNTHETIC
from quietstar.data.files import (
    ENDINGS,
    check_file_ending,
    did_you_mean,
    files_of,
    iterate_files,
    neighbours,
)
from quietstar.data.records import Layout, Record, missing_field, read_record
from quietstar.data.synthetic import chain_sum_steps, synthetic_records
from quietstar.data.tokenizer import first_line
from quietstar.errors import UserError

GYM = "reasoning_gym:"
# Files up to this size are kept in memory; larger ones go to an arrow file, mapped into memory.
IN_MEMORY_BYTES = 64 * 2**20


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
    value: str, config: DataConfig, seed: int, key: str = "data.train", size: int | None = None
) -> Source:
    """Finds out what a name means and opens it.

    Args:
        value: A file or folder, a hub id (`owner/name`, or `owner/name:split`),
            `reasoning_gym:<task>` or `synthetic:<task>` (as data.eval its held-out problems).
        config: Fields, format and options of the records.
        seed: Seed of generated problems; problem i of seed s is problem 0 of seed s + i.
        key: The config key that named it.
        size: Generated problems, instead of `config.size`.

    Raises:
        UserError: If there is no such data, or it is empty or malformed.
    """
    label = f"{key}: {value}"
    if value.startswith(GYM):
        return _open_gym(label, value.removeprefix(GYM), config, seed, size or config.size)
    if value.startswith(SYNTHETIC):
        task = value.removeprefix(SYNTHETIC)
        held_out = key == "data.eval"
        return _open_synthetic(label, task, config, seed, size or config.size, held_out)
    path = Path(value).expanduser()
    if path.exists():
        return _open_local(label, path, config)
    if path.suffix in ENDINGS or path.is_absolute() or value.startswith((".", "~")):
        raise UserError(
            f"{label}: no such file or folder{did_you_mean(path.name, neighbours(path))}"
        )
    if value.count("/") > 1:
        raise UserError(f"{label}: no such file or folder, and a hub id has at most one '/'")
    return _open_hub(label, value, config)


def _open_local(label: str, path: Path, config: DataConfig) -> Source:
    if path.is_file():
        check_file_ending(label, path)
    files = files_of(label, path)
    layout = Layout.of(config)
    if all(file.suffix == ".txt" for file in files) and layout.format != "text":
        raise UserError(f"{label}: .txt files hold raw text: set data.format: text")
    names = [str(file) for file in files]
    rows = partial(iterate_files, names, layout)
    if next(rows(), None) is None:
        raise UserError(f"{label}: holds no record: give a file with at least one")
    if config.streaming:
        return Source(label, rows, None)
    if sum(file.stat().st_size for file in files) <= IN_MEMORY_BYTES:
        return Source(label, rows, Dataset.from_list(list(rows())))
    return Source(label, rows, _arrow_table(files, names, layout))


def _arrow_table(files: list[Path], names: list[str], layout: Layout) -> Dataset:
    """Writes the records to a cached arrow file once; a changed file is read again."""
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    try:
        table = Dataset.from_generator(
            _stamped_rows, gen_kwargs={"names": names, "layout": layout, "stamps": (stamps,)}
        )
    except Exception as error:  # datasets wraps what the generator raised
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        raise cause or error from None
    assert isinstance(table, Dataset), type(table)
    return table


def _stamped_rows(names: list[str], layout: Layout, stamps: Any) -> Iterator[Record]:
    del stamps  # only part of the cache's key
    return iterate_files(names, layout)


def _open_hub(label: str, value: str, config: DataConfig) -> Source:
    name, _, split = value.partition(":")
    split = split or config.split
    try:
        data: Any = load_dataset(name, config.subset, split=split, streaming=config.streaming)
    except Exception as error:  # offline, no such set, no such subset, a broken script, ...
        hint = did_you_mean(Path(name).name, neighbours(Path(name)))
        raise UserError(
            f"{label}: no such file or folder here, and not to be had as a hub data set (split"
            f" {split!r}, subset {config.subset!r}: {first_line(error)}): check the path, or the id"
            f" and the connection{hint}"
        ) from error
    layout = Layout.of(config)
    if not config.streaming:
        table = canonical_table(data, layout, label)
        return Source(label, partial(iter, table), table)  # pyright: ignore[reportArgumentType]

    def rows() -> Iterator[Record]:
        for number, raw in enumerate(data, 1):
            yield read_record(raw, layout, f"{label}, record {number}")

    return Source(label, rows, None)


def canonical_table(data: Dataset, layout: Layout, label: str) -> Dataset:
    """Selects and renames the columns of a table, without copying them.

    Raises:
        UserError: If the table is empty, lacks a column, or a text column holds no strings.
    """
    if len(data) == 0:
        raise UserError(f"{label}: holds no record: choose another split or subset")
    for name, field in layout.fields:
        if field not in data.column_names:
            raise missing_field(field, data.column_names, label, name)
        kind = data.features[field]
        is_text = isinstance(kind, Value) and kind.dtype in ("string", "large_string", "null")
        if name != "messages" and not is_text:
            raise UserError(f"{label}: field {field!r} must hold strings, not {kind}")
    columns = {field: name for name, field in layout.fields}
    return data.select_columns(list(columns)).rename_columns(columns)


def _open_gym(label: str, task: str, config: DataConfig, seed: int, size: int) -> Source:
    problems = _create_problems(label, task, config, seed, size)
    rows = partial(_gym_rows, problems, config.format, _gym_steps(label, task, config))
    return Source(label, rows, None if config.streaming else Dataset.from_list(list(rows())))


def _create_problems(label: str, task: str, config: DataConfig, seed: int, size: int) -> Any:
    try:
        with _silence():
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(
            f"{label}: needs the package reasoning-gym: run `pip install reasoning-gym`"
        ) from error
    if task not in DATASETS:
        hint = did_you_mean(task, list(DATASETS))
        raise UserError(f"{label}: reasoning_gym has no task {task!r}{hint}")
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **config.task_options)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"data.task_options: {config.task_options} is refused by the task {task!r}"
            f" ({first_line(error)}): correct the options"
        ) from error


_STEPS: dict[str, Callable[[str], str]] = {"chain_sum": chain_sum_steps}
"""From a question of a reasoning_gym task to the steps to its answer."""


def _check_rationale_field(config: DataConfig) -> None:
    if config.rationale_field not in (None, "rationale"):
        raise UserError(
            f"data.rationale_field: {config.rationale_field!r} is no "
            "field of generated problems: set"
            " data.rationale_field: rationale, or leave it out"
        )


def _gym_steps(label: str, task: str, config: DataConfig) -> Callable[[str], str] | None:
    if config.rationale_field is None:
        return None
    _check_rationale_field(config)
    if task not in _STEPS:
        raise UserError(
            f"data.rationale_field: {config.rationale_field!r} needs "
            "problems with steps, but those of"
            f" {label} have none (known: {', '.join(_STEPS)}): leave it out"
        )
    return _STEPS[task]


def _gym_rows(
    problems: Any, record_format: str, steps_of: Callable[[str], str] | None = None
) -> Iterator[Record]:
    """Yields problems in the format of the run; one without an answer is empty."""
    for problem in problems:
        question, answer = str(problem["question"]), str(problem["answer"] or "")
        if record_format == "qa":
            rationale = {} if steps_of is None else {"rationale": steps_of(question)}
            yield {"question": question, "answer": answer, **rationale}
        elif record_format == "text":
            yield {"text": f"{question}\n{answer}" if answer else ""}
        else:
            turns = (("user", question), ("assistant", answer))
            messages = [{"role": role, "content": content} for role, content in turns]
            yield {"messages": messages if answer else []}


def _open_synthetic(
    label: str, task: str, config: DataConfig, seed: int, size: int, held_out: bool
) -> Source:
    _check_rationale_field(config)
    records = synthetic_records(label, task, config.task_options, size, seed, held_out)
    names = [name for name, _ in Layout.of(config).fields]
    if "messages" in names:
        raise UserError(f"{label}: holds no chats: set data.format: qa or text")

    def rows() -> Iterator[Record]:
        for record in records():
            text = {"text": f"{record['question']} {record['answer']}"}
            yield {name: (record | text)[name] for name in names}

    return Source(label, rows, None if config.streaming else Dataset.from_list(list(rows())))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drops what a package prints and warns of while it is imported."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
