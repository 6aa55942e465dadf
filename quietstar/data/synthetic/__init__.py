"""Synthetic tasks: text made by the project, whose answers need several serial steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pydantic import ValidationError

from quietstar.config import Section
from quietstar.data.records import Record
from quietstar.data.synthetic.moves import VOCABULARY, MovesOptions, moves_records
from quietstar.data.synthetic.sums import SumsOptions, chain_sum_steps, sums_records
from quietstar.errors import UserError

__all__ = ["VOCABULARY", "chain_sum_steps", "check_task", "synthetic_records"]


class Task(NamedTuple):
    """A synthetic task: its options, and its problems (options, size, seed, held out)."""

    options: type[Section]
    records: Callable[[Any, int, int, bool], Iterator[Record]]


TASKS = {"moves": Task(MovesOptions, moves_records), "sums": Task(SumsOptions, sums_records)}


def check_task(label: str, task: str) -> None:
    """Refuse an unknown task.

    Raises:
        UserError: It is no synthetic task.
    """
    if task not in TASKS:
        raise UserError(f"{label}: there is no synthetic task {task!r}; known: {', '.join(TASKS)}")


def synthetic_records(
    label: str, task: str, options: dict[str, Any], size: int, seed: int, held_out: bool
) -> Callable[[], Iterator[Record]]:
    """What starts a pass over the problems of a task.

    Args:
        label: Key and value that named the data, for messages.
        task: Name of the task.
        options: ``data.task_options``.
        size: Number of problems.
        seed: Of the problems.
        held_out: Problems of the held-out part, or of the training part.

    Raises:
        UserError: Unknown task, or options that it does not take.
    """
    check_task(label, task)
    read = read_options(TASKS[task].options, options)
    return lambda: TASKS[task].records(read, size, seed, held_out)


def read_options(kind: type[Section], options: dict[str, Any]) -> Section:
    """Options of a task from the config.

    Raises:
        UserError: Unknown option, or a value that is out of range.
    """
    try:
        return kind.model_validate(options)
    except ValidationError as problems:
        problem = problems.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            rule = f"is unknown; known are {', '.join(kind.model_fields)}"
        else:
            rule = problem["msg"].replace("Input should", "should")
        raise UserError(
            f"data.task_options: {name}: {problem['input']!r} {rule}; correct it or leave it out"
        ) from None
