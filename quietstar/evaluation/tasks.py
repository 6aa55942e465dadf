"""Tasks: where their items come from, how a prompt is made of one, and which tokens are scored."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.attention.layout import IGNORE_INDEX, NO_POSITION
from quietstar.data.tokenizer import check_unicode
from quietstar.errors import UserError

Kind = Literal["answer", "text", "votes"]
STEP_BY_STEP = "Let's think step by step."
DEMO_OPTIONS = {"num_steps": 4, "num_moves": 8}
DEMO_ITEMS = 512
TEXT_FILES = (".txt", ".md")
MIN_CONTEXT = 8
"""Tokens at the beginning of a text that are not scored: there any second pass would help."""
TEXT_TOKENS = 256
DIGITS = re.compile(r"[0-9]+")


@dataclass(frozen=True)
class Item:
    """One question (or text) of a task.

    Attributes:
        id: Name of the item in the data set, or its number there.
        prompt: Text that the model reads first; empty for a plain text.
        answer: Text that is scored, without the task's separator.
        where: Place of the record, for messages.
        labels: Answers to choose from, if there are any.
        tokens: Token ids of a span of a longer text, which stand in for the answer.
    """

    id: str
    prompt: str
    answer: str
    where: str
    labels: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task of our own; `harness_tasks` has those of lm-evaluation-harness.

    Attributes:
        name: Name in ``--tasks``.
        kind: ``answer``: the tokens of the answer are scored; ``text``: all tokens; ``votes``: a
            chain of thought is generated several times.
        read: Function from a record, its number and its place to an item.
        file: File in ``--data-dir``, or the user's own; None for items that the project makes.
        hub: Repository, configuration and split, used without ``--data-dir``.
        candidates: Tokens over which the gold answer is renormalized; None scores whole texts.
        end: Text behind the answer, which the published accuracy scores too.
        separator: Text between prompt and answer.
    """

    name: str
    kind: Kind
    read: Callable[[Mapping[str, Any], int, str], Item]
    file: str | None = None
    hub: tuple[str, str | None, str] | None = None
    candidates: Literal["digits", "labels"] | None = None
    end: str = ""
    separator: str = ""

    @property
    def main_metric(self) -> str:
        """Name the metric that verdicts and warnings are about."""
        return "nll" if self.candidates is None else "gold_probability"

    def items(
        self,
        data_dir: Path | None,
        limit: int | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_tokens: int = TEXT_TOKENS,
    ) -> list[Item]:
        """Read the first items.

        Args:
            data_dir: Folder with the tasks' files; None reads from the hub.
            limit: Number of items; None reads all.
            tokenizer: Tokenizer of the model, which cuts a text file into spans.
            text_tokens: Tokens of a span of a text file.

        Raises:
            UserError: The file is missing or empty, or a record cannot be read.
        """
        if self.file is not None and self.file.endswith(TEXT_FILES):
            assert tokenizer is not None, "a text file is cut by tokens"
            return list(islice(_spans(Path(self.file), tokenizer, text_tokens), limit))
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
    """Read the records of a JSONL file, each with its place.

    Raises:
        UserError: There is no such file, or a line is no object.
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


def _spans(path: Path, tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[Item]:
    """Cut a text file into consecutive spans of ``size`` tokens, the last one as it comes."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UserError(
            f"{path}: is not UTF-8 (at byte {problem.start}); convert it, for example with iconv"
        ) from None
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror}); check the name") from None
    ids = _ids(tokenizer, text)
    if len(ids) < 2:
        raise UserError(f"{path}: holds no token to score; give a longer text")
    for start in range(0, max(1, len(ids) - MIN_CONTEXT), size):
        span = ids[start : start + size]
        where = f"{path}, tokens {start} to {start + len(span) - 1}"
        yield Item(str(start), "", _text(tokenizer, span), where, tokens=tuple(span))


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


def _text_field(record: Mapping[str, Any], path: str, where: str) -> str:
    value = _field(record, path, where)
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{where}: field {path} must be a text in quotes that is not empty, not {value!r}"
        )
    return check_unicode(value, f"{where}: field {path}")


def _gsm8k(record: Mapping[str, Any], number: int, where: str) -> Item:
    """Ask for the number behind ``####``, without its thousands separators."""
    question = _text_field(record, "question", where)
    _, mark, answer = _text_field(record, "answer", where).rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not any(character.isdigit() for character in answer):
        raise UserError(f"{where}: field answer must end in `#### NUMBER`, as GSM8K's do")
    return Item(str(number), f"Q: {question}\nA:", answer, where)


def _gsm8k_solution(record: Mapping[str, Any], number: int, where: str) -> Item:
    return replace(_gsm8k(record, number, where), answer=record["answer"])


def _gsm8k_cot(record: Mapping[str, Any], number: int, where: str) -> Item:
    item = _gsm8k(record, number, where)
    return replace(item, prompt=f"{item.prompt} {STEP_BY_STEP}")


def _commonsense_qa(record: Mapping[str, Any], number: int, where: str) -> Item:
    """Read the original layout, or the hub's, which is flat."""
    nested = isinstance(record.get("question"), Mapping)
    stem = _text_field(record, "question.stem" if nested else "question", where)
    choices = _field(record, "question.choices" if nested else "choices", where)
    if isinstance(choices, Mapping):
        labels, texts = choices.get("label", ()), choices.get("text", ())
        choices = [{"label": a, "text": b} for a, b in zip(labels, texts, strict=False)]
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{where}: field choices must list at least two choices, not {choices!r}")
    labels = tuple(_text_field(choice, "label", where) for choice in choices)
    lines = [f"({label}) {_text_field(choice, 'text', where)}"
             for label, choice in zip(labels, choices, strict=True)]  # fmt: skip
    answer = _text_field(record, "answerKey", where)
    if answer not in labels:
        raise UserError(
            f"{where}: field answerKey is {answer!r}, which is none of {', '.join(labels)}"
        )
    prompt = "\n".join([f"Q: {stem}", *lines, "A:"])
    return Item(str(record.get("id", number)), prompt, answer, where, labels)


def _demo(record: Mapping[str, Any], number: int, where: str) -> Item:
    return Item(str(number), record["question"], record["answer"], where)


def _own(record: Mapping[str, Any], number: int, where: str) -> Item:
    """Read a user's own record: a prompt and an answer, or a text."""
    name = str(record.get("id", number))
    if "text" in record:
        return Item(name, "", _text_field(record, "text", where), where)
    prompt, answer = (_text_field(record, key, where) for key in ("prompt", "answer"))
    return Item(name, prompt, answer, where)


_GSM8K: dict[str, Any] = {
    "file": "gsm8k_test.jsonl", "hub": ("openai/gsm8k", "main", "test"), "separator": " "
}  # fmt: skip
TASKS = {
    task.name: task
    for task in (
        Task("gsm8k", "answer", _gsm8k, **_GSM8K, candidates="digits", end="\n"),
        Task(
            "commonsense_qa", "answer", _commonsense_qa, "commonsenseqa_validation.jsonl",
            ("tau/commonsense_qa", None, "validation"), "labels", "\n", " ",
        ),
        Task("gsm8k_cot", "votes", _gsm8k_cot, **_GSM8K, candidates="digits"),
        Task("gsm8k_solution", "text", _gsm8k_solution, **_GSM8K),
        Task("demo", "answer", _demo, candidates="digits", separator=" "),
    )
}  # fmt: skip


def find_task(name: str, separator: str = "") -> Task | None:
    """Find a task by its name, or make one of the user's own file; None if there is none.

    Args:
        name: Name of a task, or a file that ends in .jsonl, .txt or .md.
        separator: Text between prompt and answer of the user's own records. By default none: what
            is scored is exactly the text that the user wrote.
    """
    if name.endswith((".jsonl", *TEXT_FILES)):
        return Task(name, "text", _own, name, separator=separator)
    return TASKS.get(name)


# --- From items to tokens -------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidates:
    """Tokens over which answers are renormalized.

    Attributes:
        ids: Digit tokens, or labels, and behind them the end of the answer if there is one.
        num_answers: Number of candidates that are not the end.
    """

    ids: Int[Tensor, " candidates"]
    num_answers: int

    @property
    def has_end(self) -> bool:
        """Say whether the end of an answer is a candidate."""
        return len(self.ids) > self.num_answers


@dataclass(frozen=True)
class EncodedItem:
    """An item as tokens.

    Attributes:
        number: Index of the item in the task.
        item: Item as it was read.
        ids: Tokens of prompt and answer; a text that is too long lost its beginning.
        num_scored: Number of tokens at the end that are scored.
        num_thinking: Number of the scored tokens, from the first on, that follow a thought.
        num_cut: Number of tokens that were cut off.
    """

    number: int
    item: Item
    ids: list[int]
    num_scored: int
    num_thinking: int
    num_cut: int

    @property
    def scored_ids(self) -> list[int]:
        """Give the tokens that are scored."""
        return self.ids[len(self.ids) - self.num_scored :]

    @property
    def swaps_within(self) -> bool:
        """Say whether its thoughts are swapped within its text: a plain text, no answer."""
        return not self.item.prompt and self.num_thinking > 1


def encode(
    task: Task,
    items: Sequence[Item],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    text_tokens: int = TEXT_TOKENS,
    thinks_once: bool = False,
) -> list[EncodedItem]:
    """Encode all items of a task whose tokens are scored.

    Args:
        task: Task of the items.
        items: Items to encode.
        tokenizer: Tokenizer of the model.
        max_length: Tokens that the model takes; a longer text with a prompt loses its beginning.
        text_tokens: Tokens that are read of a text without a prompt.
        thinks_once: Think before the first token of an answer only.

    Raises:
        UserError: The tokenizer does not keep an answer apart from its prompt.
    """
    encoded = []
    for number, item in enumerate(items):
        prompt, answer = split_answer(task, item, tokenizer)
        ids = prompt + answer
        if len(ids) < 2:
            raise UserError(f"{item.where}: the text has no token to score; give a longer one")
        if item.prompt:
            cut = 0 if max_length is None else max(0, len(ids) - max_length)
            ids = ids[cut:]
            scored = min(len(answer), len(ids) - 1)
            thinking = 1 if thinks_once else scored
        else:
            read = min(max_length or text_tokens, text_tokens)
            cut = max(0, len(ids) - read)
            ids = ids[:read]
            scored = thinking = len(ids) - min(MIN_CONTEXT, len(ids) - 1)
        encoded.append(EncodedItem(number, item, ids, scored, thinking, cut))
    return encoded


def split_answer(
    task: Task, item: Item, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokenize the whole text and split it into prompt and answer.

    With a separator, tokens of white space alone between the two belong to the prompt.

    Raises:
        UserError: A token lies in both.
    """
    if not item.prompt:
        return [], list(item.tokens) or _ids(tokenizer, item.answer)
    prompt = _ids(tokenizer, item.prompt)
    whole = _ids(tokenizer, item.prompt + task.separator + item.answer + task.end)
    if whole[: len(prompt)] != prompt:
        around = [tokenizer.decode([i]) for i in whole[max(0, len(prompt) - 2) : len(prompt) + 2]]
        raise UserError(
            f"{item.where}: the tokenizer joins the end of the prompt and the answer "
            f"{item.answer!r} into one token (around {around}), so the answer cannot be scored "
            "alone; move a blank at the end of the prompt to the beginning of the answer, set "
            "--separator, choose another model, or score the task with quietstar lm-eval"
        )
    answer = whole[len(prompt) :]
    while task.separator and len(answer) > 1 and not _text(tokenizer, [answer[0]]).strip():
        prompt, answer = [*prompt, answer[0]], answer[1:]
    return prompt, answer


def find_candidates(
    task: Task, encoded: Sequence[EncodedItem], tokenizer: PreTrainedTokenizerBase
) -> Candidates | None:
    """Find the tokens over which the task's answers are renormalized; None for whole texts.

    Raises:
        UserError: A label or a digit is not one token.
    """
    if task.candidates is None:
        return None
    if task.candidates == "labels":
        answers = _label_tokens(task, encoded, tokenizer)
    else:
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        answers = [i for i, text in enumerate(texts) if DIGITS.fullmatch(text.strip())]
    known = set(answers)
    for one in encoded:
        if known.isdisjoint(one.scored_ids):
            pieces = [tokenizer.decode([token]) for token in one.scored_ids]
            raise UserError(
                f"{one.item.where}: the tokenizer splits the answer {one.item.answer!r} into "
                f"{pieces}, none of which is a {task.candidates[:-1]} token; choose another model"
            )
    ends = {one.ids[-1] for one in encoded} if task.end else set()
    end = [token for token in ends if tokenizer.decode([token]) == task.end]
    # The end is a candidate only if every answer ends in the same token of its own.
    all_end = len(ends) == len(end) == 1
    return Candidates(torch.tensor(answers + (end if all_end else [])), len(answers))


def _label_tokens(
    task: Task, encoded: Sequence[EncodedItem], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    first, tokens = encoded[0].item, []
    for label in sorted({label for one in encoded for label in one.item.labels}):
        _, answer = split_answer(task, Item("", first.prompt, label, first.where), tokenizer)
        if _text(tokenizer, answer[:1]).strip() != label:
            pieces = [tokenizer.decode([token]) for token in answer]
            raise UserError(
                f"{first.where}: the tokenizer splits the answer {label!r} into {pieces}: a label "
                "must be one token; choose another model, or score it with quietstar lm-eval"
            )
        tokens.append(answer[0])
    return tokens


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]  # pyright: ignore[reportReturnType]


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class AnswerBatch:
    """Texts whose last tokens are scored.

    Attributes:
        ids: Texts, padded on the right.
        mask: False at padding.
        labels: Scored tokens, IGNORE_INDEX elsewhere.
        positions: Positions before the scored tokens, NO_POSITION behind the last.
        thinking: Those of them that think, NO_POSITION behind the last.
        targets: Scored tokens; behind the last anything.
    """

    ids: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    positions: Int[Tensor, "batch positions"]
    thinking: Int[Tensor, "batch thinking"]
    targets: Int[Tensor, "batch positions"]

    @property
    def valid(self) -> Bool[Tensor, "batch positions"]:
        """Say where there is a token to score."""
        return self.positions != NO_POSITION

    def to(self, device: torch.device) -> AnswerBatch:
        """Move the batch to a device."""
        return AnswerBatch(*(getattr(self, f.name).to(device) for f in fields(self)))


def answer_batch(
    texts: Sequence[list[int]],
    counts: Sequence[int],
    pad: int,
    thinking: Sequence[int] | None = None,
) -> AnswerBatch:
    """Pad texts whose last tokens are scored.

    Args:
        texts: Token ids.
        counts: Number of tokens scored at the end of each text; at most all but the first.
        pad: Token that fills texts up.
        thinking: Number of scored tokens of each text, from the first on, that follow a thought;
            None thinks before all.
    """
    counts = [min(count, len(text) - 1) for text, count in zip(texts, counts, strict=True)]
    ids = torch.full((len(texts), max(map(len, texts))), pad)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    labels = torch.full_like(ids, IGNORE_INDEX)
    positions = torch.full((len(texts), max(counts)), NO_POSITION)
    for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = True
        labels[row, len(text) - count : len(text)] = ids[row, len(text) - count : len(text)]
        positions[row, :count] = torch.arange(len(text) - count, len(text)) - 1
    targets = ids.gather(1, (positions + 1).clamp(min=0))
    thinks = positions
    if thinking is not None:
        behind = torch.arange(max(thinking)) >= torch.tensor(thinking)[:, None]
        thinks = positions[:, : max(thinking)].masked_fill(behind, NO_POSITION)
    return AnswerBatch(ids, mask, labels, positions, thinks, targets)
