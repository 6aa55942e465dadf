"""Tasks: where their items come from, and how a prompt is made of one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from quietstar.data.tokenizer import check_unicode
from quietstar.errors import UserError

Kind = Literal["answer", "text", "votes"]
Candidates = Literal["digits", "labels"]
STEP_BY_STEP = "Let's think step by step."
DEMO_OPTIONS = {"num_steps": 4, "num_moves": 8}
DEMO_ITEMS = 512


@dataclass(frozen=True)
class Item:
    """One question (or text) of a task.

    Attributes:
        id: Its name in the data set, or its number there.
        prompt: What the model reads.
        answer: What follows the prompt, without the blank between.
        where: Names it in messages.
        labels: The answers to choose from, where there are such.
    """

    id: str
    prompt: str
    answer: str
    where: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: As in ``--tasks``.
        kind: ``answer``: the tokens of the answer are scored; ``text``: all tokens; ``votes``: a
            chain of thought is generated several times.
        read: An item from a record, its number and the place that messages name.
        file: Of ``--data-dir``; None for items that the project makes.
        hub: Repository, configuration and split, where there is no ``--data-dir``.
        candidates: What the gold answer is renormalised over; None scores whole texts.
        end: Follows the answer, and the published accuracy scores it too.
        separator: Between prompt and answer.
    """

    name: str
    kind: Kind
    read: Callable[[Mapping[str, Any], int, str], Item]
    file: str | None = None
    hub: tuple[str, str | None, str] | None = None
    candidates: Candidates | None = None
    end: str = ""
    separator: str = " "

    @property
    def main_metric(self) -> str:
        """The metric that verdicts and warnings are about."""
        return "nll" if self.candidates is None else "gold_probability"

    def items(self, data_dir: Path | None, limit: int | None) -> list[Item]:
        """The first items.

        Raises:
            UserError: A missing file, or a record that cannot be read.
        """
        records = islice(self._records(data_dir), limit)
        items = [self.read(record, number, where) for number, (record, where) in enumerate(records)]
        if not items:
            raise UserError(f"{self.name}: no items; is the file empty?")
        return items

    def _records(self, data_dir: Path | None) -> Iterator[tuple[Mapping[str, Any], str]]:
        if self.file is None:
            yield from _demo_records()
        elif self.file == self.name:
            yield from read_lines(Path(self.file), self.name)
        elif data_dir is not None or self.hub is None:
            yield from read_lines((data_dir or Path()) / self.file, self.name)
        else:
            yield from _hub_records(self.name, *self.hub)


def read_lines(path: Path, task: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Records of a JSONL file, each with its place.

    Raises:
        UserError: No such file, or a line that is no object.
    """
    if not path.is_file():
        own = task == str(path)
        remedy = "" if own else f"; give the folder that holds {path.name} as --data-dir"
        raise UserError(f"{task}: there is no file {path}{remedy}")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line) if line.strip() else None
            except ValueError as problem:
                raise UserError(f"{where}: no valid JSON ({problem}); mend the line") from None
            if record is None:
                continue
            if not isinstance(record, dict):
                raise UserError(f"{where}: must be an object with fields, such as {{...}}")
            yield record, where


def _hub_records(
    task: str, name: str, configuration: str | None, split: str
) -> Iterator[tuple[Mapping[str, Any], str]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, configuration, split=split)
    except Exception as problem:  # of any kind: network, hub, format
        line = str(problem).strip().partition("\n")[0]
        raise UserError(
            f"{task}: {name} could not be read from the hub ({line}); give --data-dir, a folder "
            "with the JSONL file"
        ) from None
    for number, row in enumerate(rows):
        assert isinstance(row, Mapping)
        yield row, f"{name}, {split} item {number}"


def _demo_records() -> Iterator[tuple[Mapping[str, Any], str]]:
    from quietstar.data.synthetic import synthetic_records

    start = synthetic_records("demo", "moves", DEMO_OPTIONS, DEMO_ITEMS, seed=0, held_out=True)
    for number, record in enumerate(start()):
        yield record, f"demo problem {number}"


# --- From records to items ------------------------------------------------------------------------


def _field(record: Mapping[str, Any], path: str, where: str) -> Any:
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, Mapping) or value.get(part) is None:
            known = ", ".join(record) or "none"
            raise UserError(f"{where}: field {path} is missing; the record has {known}")
        value = value[part]
    return value


def _text(record: Mapping[str, Any], path: str, where: str) -> str:
    value = _field(record, path, where)
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{where}: field {path} must be a text in quotes that is not empty, not {value!r}"
        )
    return check_unicode(value, f"{where}: field {path}")


def final_answer(solution: str, where: str) -> str:
    """The number behind ``####``, without its thousands separators.

    Raises:
        UserError: There is none.
    """
    _, mark, answer = solution.rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not any(character.isdigit() for character in answer):
        raise UserError(f"{where}: field answer must end in `#### NUMBER`, as GSM8K's do")
    return answer


def _gsm8k(record: Mapping[str, Any], number: int, where: str) -> Item:
    question = _text(record, "question", where)
    answer = final_answer(_text(record, "answer", where), where)
    return Item(str(number), f"Q: {question}\nA:", answer, where)


def _gsm8k_solution(record: Mapping[str, Any], number: int, where: str) -> Item:
    item, solution = _gsm8k(record, number, where), _text(record, "answer", where)
    return Item(item.id, item.prompt, solution, where)


def _gsm8k_cot(record: Mapping[str, Any], number: int, where: str) -> Item:
    item = _gsm8k(record, number, where)
    return Item(item.id, f"{item.prompt} {STEP_BY_STEP}", item.answer, where)


def _commonsense_qa(record: Mapping[str, Any], number: int, where: str) -> Item:
    """The original layout, or the hub's, which is flat."""
    nested = isinstance(record.get("question"), Mapping)
    stem = _text(record, "question.stem" if nested else "question", where)
    choices = _field(record, "question.choices" if nested else "choices", where)
    if isinstance(choices, Mapping):
        labels, texts = choices.get("label", ()), choices.get("text", ())
        choices = [{"label": a, "text": b} for a, b in zip(labels, texts, strict=False)]
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{where}: field choices must list at least two choices, not {choices!r}")
    labels = tuple(_text(choice, "label", where) for choice in choices)
    lines = [f"({label}) {_text(choice, 'text', where)}"
             for label, choice in zip(labels, choices, strict=True)]  # fmt: skip
    answer = _text(record, "answerKey", where)
    if answer not in labels:
        raise UserError(
            f"{where}: field answerKey is {answer!r}, which is none of {', '.join(labels)}"
        )
    prompt = "\n".join([f"Q: {stem}", *lines, "A:"])
    return Item(str(record.get("id", number)), prompt, answer, where, labels)


def _demo(record: Mapping[str, Any], number: int, where: str) -> Item:
    return Item(str(number), record["question"], record["answer"], where)


def _own(record: Mapping[str, Any], number: int, where: str) -> Item:
    """A user's own: a prompt and an answer, or a text."""
    name = str(record.get("id", number))
    if "text" in record:
        return Item(name, "", _text(record, "text", where), where)
    return Item(name, _text(record, "prompt", where), _text(record, "answer", where), where)


_GSM8K: dict[str, Any] = {"file": "gsm8k_test.jsonl", "hub": ("openai/gsm8k", "main", "test")}
TASKS = {
    task.name: task
    for task in (
        Task("gsm8k", "answer", _gsm8k, **_GSM8K, candidates="digits", end="\n"),
        Task(
            "commonsense_qa", "answer", _commonsense_qa, "commonsenseqa_validation.jsonl",
            ("tau/commonsense_qa", None, "validation"), "labels", "\n",
        ),
        Task("gsm8k_cot", "votes", _gsm8k_cot, **_GSM8K, candidates="digits"),
        Task("gsm8k_solution", "text", _gsm8k_solution, **_GSM8K),
        Task("demo", "answer", _demo, candidates="digits"),
    )
}  # fmt: skip


def find_task(name: str) -> Task | None:
    """A task by its name, or the user's own by its file; None if there is none."""
    if name.endswith(".jsonl"):
        return Task(name, "text", _own, name)
    return TASKS.get(name)
