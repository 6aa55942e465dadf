"""Tasks: where their items come from, how a prompt is made of one, and which tokens are scored."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import regex
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from quietstar.attention.layout import IGNORE_INDEX, NO_POSITION
from quietstar.config import DataConfig
from quietstar.config.messages import did_you_mean_file
from quietstar.data.choices import read_choices, read_labeled, resolve, text_field
from quietstar.data.encoding import split_template
from quietstar.data.marking import PATTERN_SECONDS
from quietstar.data.sources import read_record, record_fields
from quietstar.data.synthetic import synthetic_records
from quietstar.data.tokenizer import check_unicode
from quietstar.errors import UserError, reading
from quietstar.system.inputs import open_input, parse_json

TEXT_FILES = (".txt", ".md")
MIN_CONTEXT = 8
"""Tokens at the beginning of a text that are not scored: there any second pass would help."""
TEXT_TOKENS = 256
MAX_BYTES = 16 * 2**20
"""Most bytes of a text: tokenizers take more than a hundred times as much memory."""
TOO_LONG = f"more than {MAX_BYTES >> 20} MiB, for which tokenizers take gigabytes; split it"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One question (or text) of a task."""

    id: str  # in the data set, or its number there
    prompt: str  # what the model reads first; empty for a plain text
    answer: str  # what is scored, without the task's separator
    where: str  # place of the record, for messages
    labels: tuple[str, ...] = ()  # labels to choose from, each a token, if there are any
    choices: tuple[str, ...] = ()  # whole answers to choose from, of which one is the answer
    tokens: tuple[int, ...] = ()  # a span of a longer text, which stands in for the answer
    groups: Mapping[str, str] = field(default_factory=dict)  # what items are told apart by


@dataclass(frozen=True)
class Task:
    """A task of our own; `runner.HarnessTask` is one of lm-evaluation-harness.

    ``answer`` scores the tokens of the answer, ``text`` all tokens; ``votes`` generates a chain of
    thought several times.
    """

    name: str  # in --tasks
    kind: Literal["answer", "text", "votes"]
    read: Callable[[Record, int, str], Item]  # from a record, its number and its place
    file: str | None = None  # in --data-dir, or the user's own; None: the project makes the items
    hub: tuple[str, str | None, str] | None = None  # repository, configuration and split
    candidates: Literal["digits", "labels"] | None = None  # what answers are renormalized over
    end: str = ""  # text after the answer, which the published accuracy scores too
    separator: str = ""  # text between prompt and answer
    extract: str | None = None  # pattern of the answer in what is generated; of kind ``votes``

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
        """Read the first ``limit`` items, or all; without a data folder from the hub.

        A text file is cut into spans of ``text_tokens`` of the model's tokenizer.

        Raises:
            UserError: The file is missing or empty, or a record cannot be read.
        """
        if self.file is not None and self.file.endswith(TEXT_FILES):
            assert tokenizer is not None, "a text file is cut by tokens"
            return list(islice(_spans(self.file, tokenizer, text_tokens), limit))
        if self.file is None:
            options = {"num_steps": 4, "num_moves": 8}
            start = synthetic_records("demo", "moves", options, 512, seed=0, held_out=True)
            records = ((record, f"demo problem {n}") for n, record in enumerate(start()))
        elif self.file == self.name:
            records = _records(Path(self.file), self.name)
        elif data_dir is not None or self.hub is None:
            records = _records((data_dir or Path()) / self.file, self.name)
        else:
            from datasets import load_dataset

            repository, configuration, split = self.hub
            try:
                rows = load_dataset(repository, configuration, split=split)
            except Exception as problem:  # of any kind: network, hub, format
                line = str(problem).strip().partition("\n")[0]
                raise UserError(
                    f"{self.name}: {repository} could not be read from the hub ({line}); give "
                    "--data-dir, a folder with the JSONL file"
                ) from None
            records = ((dict(row), f"{repository}, {split} item {n}") for n, row in enumerate(rows))
        items = []
        for number, (record, where) in enumerate(islice(records, limit)):
            with reading(where, "Mend the record."):
                items.append(self.read(record, number, where))
        if not items:
            raise UserError(f"{self.name}: no items; is the file empty?")
        with_choices = [bool(item.choices) for item in items]
        if any(with_choices) and not all(with_choices):
            raise UserError(
                f"{items[with_choices.index(False)].where}: has no choices, but other records of "
                "the file have. Put them into a file of their own."
            )
        if self.extract is not None and not all(item.prompt and item.answer for item in items):
            raise UserError(
                f"--extract: {self.name} has texts without a prompt, after which nothing is "
                "generated. Give them in another evaluation."
            )
        return items


def read_document(name: str, option: str) -> str:
    """Read a UTF-8 text file, which an option names.

    Raises:
        UserError: It cannot be read, is no text, or is too large.
    """
    with reading(f"{option} ({name})", "Give a text file, in UTF-8."):
        with open_input(Path(name).expanduser()) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has {TOO_LONG}")
        text = content.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError(f"character {text.index(chr(0))} is NUL, so it is no text")
    return text


def parse_object(line: bytes) -> dict[str, Any]:
    """Parse a line of JSON that must hold an object, each of whose fields stands there once.

    Raises:
        ValueError: It holds something else.
    """
    record = parse_json(line.decode())
    if not isinstance(record, dict):
        raise ValueError("it must be an object with fields, such as {...}")
    return record


def read_objects(path: Path, what: str) -> Iterator[tuple[dict[str, Any], bytes, str]]:
    """Read the objects of a JSONL file; yields each with its line and place.

    Raises:
        UserError: ``what`` cannot be read, or a line is no object.
    """
    with reading(what, "Give a JSONL file."):
        file = open_input(path)
    with file:
        for number in itertools.count(1):
            where = f"{what}, line {number}"
            with reading(where, "Mend the line."):
                line = file.readline(MAX_BYTES + 1)
                if len(line) > MAX_BYTES:
                    raise ValueError(f"it has {TOO_LONG}")
                if not line:
                    return
                if not line.strip():
                    continue
                record = parse_object(line.removeprefix(b"\xef\xbb\xbf"))
            yield record, line, where


def _records(path: Path, task: str) -> Iterator[tuple[Record, str]]:
    """Read the records of a task's file, each with its place."""
    own, path = task == str(path), path.expanduser()
    with reading(task, "Check the name."):
        is_there = path.exists()
    if not is_there:
        lack = f"file {path}. Give the folder that holds {path.name} as --data-dir."
        if own:
            lack = f"such file{did_you_mean_file(path) or '; check the name'}"
        raise UserError(f"--tasks ({task}): there is no {lack}")
    for record, _, where in read_objects(path, str(path)):
        yield record, where


def _spans(name: str, tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[Item]:
    """Cut a text file into consecutive spans of ``size`` tokens, the last one as it comes."""
    ids = tokenizer.encode(read_document(name, "--tasks"))
    if len(ids) < 2:
        raise UserError(f"{name}: holds no token to score; give a longer text")
    for start in range(0, max(1, len(ids) - MIN_CONTEXT), size):
        span = ids[start : start + size]
        where = f"{name}, tokens {start} to {start + len(span) - 1}"
        yield Item(str(start), "", str(tokenizer.decode(span)), where, tokens=tuple(span))


# --- From records to items ------------------------------------------------------------------------
def _gsm8k(record: Record, number: int, where: str) -> Item:
    """Ask for the number after ``####``, without its thousands separators.

    The solution before it has one line a step.
    """
    question = text_field(record, "question", where)
    solution, mark, answer = text_field(record, "answer", where).rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not any(character.isdigit() for character in answer):
        raise UserError(f"{where}: field answer must end in `#### NUMBER`, as GSM8K's do")
    num_steps = sum(bool(line.strip()) for line in solution.splitlines())
    num_digits = sum(character.isdigit() for character in answer)
    groups = {"steps of the solution": str(num_steps), "digits of the answer": str(num_digits)}
    return Item(str(number), f"Q: {question}\nA:", answer, where, groups=groups)


def _gsm8k_solution(record: Record, number: int, where: str) -> Item:
    return replace(_gsm8k(record, number, where), answer=record["answer"])


def _gsm8k_cot(record: Record, number: int, where: str) -> Item:
    item = _gsm8k(record, number, where)
    return replace(item, prompt=f"{item.prompt} Let's think step by step.")


def _commonsense_qa(record: Record, number: int, where: str) -> Item:
    question, labels, answer = read_labeled(record, where)
    return Item(str(record.get("id", number)), f"Q: {question}\nA:", answer, where, labels)


def _demo(record: Record, number: int, where: str) -> Item:
    return Item(str(number), record["question"], record["answer"], where)


def _own(record: Record, number: int, where: str) -> Item:
    """Read a user's own record: a prompt and an answer, or a text; perhaps groups it is of."""
    name, groups = str(record.get("id", number)), _groups(record, where)
    if "text" in record:
        return Item(name, "", text_field(record, "text", where), where, groups=groups)
    if "answerKey" in record:
        question, labels, answer = read_labeled(record, where)
        choices = tuple(f" {label}" for label in labels)
        prompt, answer = f"Q: {question}\nA:", f" {answer}"
        return Item(name, prompt, answer, where, choices=choices, groups=groups)
    if "prompt" not in record:
        raise UserError(
            f"{where}: has neither prompt nor text; its fields are {', '.join(record) or 'none'}. "
            "Say by --question-field and --answer-field which hold question and answer, or by "
            "--config FILE that they are those of a training."
        )
    prompt = text_field(record, "prompt", where)
    if "choices" in record:
        choices, answer = read_choices(record, where)
        return Item(name, prompt, answer, where, choices=choices, groups=groups)
    return Item(name, prompt, text_field(record, "answer", where), where, groups=groups)


def _questions(data: DataConfig, keeps_space: bool) -> Callable[[Record, int, str], Item]:
    """Make a reader of records that are questions and answers by the rules of training.

    A space before the answer is part of it, as in training, if ``keeps_space``.
    """
    opening, space, _ = split_template(data.template)
    names = record_fields(data)

    def read(record: Record, number: int, where: str) -> Item:
        try:
            _, choices = resolve(record, names, where)
            texts = read_record(record, names, where)
        except UserError as problem:  # of a part that knows the keys of a config only
            message = str(problem).replace(", or data.format", "")
            for name in ("question", "answer"):
                message = message.replace(f"data.{name}_field", f"--{name}-field")
            raise UserError(message) from problem
        question, answer = texts["question"], texts["answer"]
        if not answer.strip():
            raise UserError(
                f"{where}: its answer ({names['answer']}) is empty. Leave the record out, or name "
                "another field or template by --answer-field."
            )
        before = space if keeps_space else ""
        answer, choices = before + answer, tuple(before + choice for choice in choices)
        prompt, groups = opening.replace("{question}", question), _groups(record, where)
        name = str(record.get("id", number))
        return Item(name, prompt, answer, where, choices=choices, groups=groups)

    return read


def _groups(record: Record, where: str) -> dict[str, str]:
    groups = record.get("groups", {})
    is_plain = isinstance(groups, Mapping) and all(
        isinstance(value, str | int | float) for value in groups.values()
    )
    if not is_plain:
        raise UserError(
            f"{where}: field groups must be an object of texts and numbers, such as "
            f'{{"hops": 2}}, not {groups!r}'
        )
    return {check_unicode(k, where): check_unicode(str(v), where) for k, v in groups.items()}


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


def find_task(
    name: str, separator: str = "", extract: str | None = None, data: DataConfig | None = None
) -> Task | None:
    """Find a task by its name, or make one of a .jsonl, .txt or .md file; None if there is none.

    By default nothing separates prompt and answer of the user's own records: what is scored is
    exactly the text that the user wrote. With a pattern to ``extract`` answers by, a .jsonl file is
    answered by generation. With ``data``, a .jsonl file holds questions and answers, of which its
    fields and template make prompts and answers as in training.
    """
    read = _own if data is None else _questions(data, keeps_space=extract is None)
    if name.endswith(".jsonl") and extract is not None:
        return Task(name, "votes", read, name, extract=extract)
    if name.endswith(".jsonl"):
        return Task(name, "text", read, name, separator=separator)
    if name.endswith(TEXT_FILES):
        return Task(name, "text", _own, name)
    return TASKS.get(name)


def extract_answer(pattern: str, text: str) -> str | None:
    """Find the last match of a pattern in a text: its first group that took part, or all of it.

    Whole numbers lose their thousands separators, as the answer that it is compared with does.
    """
    try:
        matches = list(regex.finditer(pattern, text, timeout=PATTERN_SECONDS))
    except TimeoutError:
        raise UserError(
            f"--extract ({pattern!r}): takes more than {PATTERN_SECONDS:g} seconds for one text, "
            "as a pattern does that backtracks without end. Write another one."
        ) from None
    if not matches:
        return None
    last = matches[-1]
    found = next((group for group in last.groups() if group is not None), last.group())
    return without_separators(found.strip())


def without_separators(text: str) -> str:
    """Take the commas out of whole numbers in groups of three digits: 18,000 becomes 18000."""
    grouped = r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!,?\d)"
    return re.sub(grouped, lambda number: number[0].replace(",", ""), text)


def read_number(text: str) -> str | None:
    """Read the first integer of a text, without thousands separators."""
    match = re.search(r"-?\d+", text.replace(",", ""))
    return None if match is None else str(int(match.group()))


def read_answer(task: Task, item: Item, text: str) -> str | None:
    """Read what a model answers: the first number or label of its text, or else the first line.

    The first line equals the item's answer where both are the same but for white space around them.
    """
    if task.candidates == "digits":
        return read_number(text)
    if task.candidates == "labels":
        match = re.search(rf"\b({'|'.join(map(re.escape, item.labels))})\b", text)
        return match and match.group()
    line = text.strip().partition("\n")[0].strip()
    return item.answer if line == item.answer.strip() else line


# --- From items to tokens -------------------------------------------------------------------------
@dataclass(frozen=True)
class Candidates:
    """Tokens over which answers are renormalized: digits or labels, after them any end."""

    ids: Int[Tensor, " candidates"]
    num_answers: int  # candidates that are not the end of an answer


@dataclass(frozen=True)
class EncodedItem:
    """An item as tokens."""

    number: int  # index in the task
    item: Item
    ids: list[int]  # prompt and answer; a text that is too long lost its beginning
    num_scored: int  # tokens at the end that are scored
    num_thinking: int  # the scored tokens, from the first on, that follow a thought
    num_cut: int  # tokens that were cut off
    choice: int | None = None  # index of the answer to choose that stands here

    @property
    def is_answer(self) -> bool:
        """Say whether what is scored is the answer, not another choice."""
        return self.choice is None or self.item.choices[self.choice] == self.item.answer

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
    """Encode all items of a task whose tokens are scored; each choice of one by itself.

    A text with a prompt that is longer than ``max_length`` loses its beginning; of one without,
    ``text_tokens`` are read. With ``thinks_once`` only the first token of an answer follows a
    thought.

    Raises:
        UserError: The tokenizer does not keep an answer apart from its prompt.
    """
    encoded = []
    rows = (
        (number, item, choice)
        for number, item in enumerate(items)
        for choice in (range(len(item.choices)) if item.choices else [None])
    )
    for number, item, choice in rows:
        text = item if choice is None else replace(item, answer=item.choices[choice])
        prompt, answer = _split(task, text, tokenizer)
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
        encoded.append(EncodedItem(number, item, ids, scored, thinking, cut, choice))
    return encoded


def _split(
    task: Task, item: Item, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokenize the whole text and split it into prompt and answer.

    With a separator, tokens of white space alone between the two belong to the prompt.
    """
    if not item.prompt:
        return [], list(item.tokens) or tokenizer.encode(item.answer)
    prompt = tokenizer.encode(item.prompt)
    whole = tokenizer.encode(item.prompt + task.separator + item.answer + task.end)
    if whole[: len(prompt)] != prompt:
        around = [tokenizer.decode([i]) for i in whole[max(0, len(prompt) - 2) : len(prompt) + 2]]
        raise UserError(
            f"{item.where}: the tokenizer joins the end of the prompt and the answer "
            f"{item.answer!r} into one token (around {around}), so the answer cannot be scored "
            "alone; move a blank at the end of the prompt to the beginning of the answer, set "
            "--separator, choose another model, or score the task with quietstar eval lm-eval"
        )
    answer = whole[len(prompt) :]
    while task.separator and len(answer) > 1 and not str(tokenizer.decode(answer[:1])).strip():
        prompt, answer = prompt + answer[:1], answer[1:]
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
    answers = []
    if task.candidates == "digits":
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        answers = [i for i, text in enumerate(texts) if re.fullmatch("[0-9]+", text.strip())]
    else:
        first = encoded[0].item
        for label in sorted({label for one in encoded for label in one.item.labels}):
            _, ids = _split(task, replace(first, answer=label), tokenizer)
            pieces = tokenizer.batch_decode([[token] for token in ids])
            if "".join(pieces[:1]).strip() != label:
                raise UserError(
                    f"{first.where}: the tokenizer splits the answer {label!r} into {pieces}: a "
                    "label must be one token; choose another model, or score it with quietstar "
                    "lm-eval"
                )
            answers.append(ids[0])
    for one in encoded:
        if set(answers).isdisjoint(one.scored_ids):
            pieces = tokenizer.batch_decode([[token] for token in one.scored_ids])
            raise UserError(
                f"{one.item.where}: the tokenizer splits the answer {one.item.answer!r} into "
                f"{pieces}, none of which is a {task.candidates[:-1]} token; choose another model"
            )
    # The end is a candidate only if every answer ends in the same token of its own.
    ends = {one.ids[-1] for one in encoded} if task.end else set()
    end = list(ends) if [tokenizer.decode([token]) for token in ends] == [task.end] else []
    return Candidates(torch.tensor(answers + end), len(answers))


@dataclass(frozen=True)
class AnswerBatch:
    """Texts whose last tokens are scored, padded on the right."""

    ids: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]  # the scored tokens, IGNORE_INDEX elsewhere
    positions: Int[Tensor, "batch positions"]  # before the scored tokens, NO_POSITION after them
    thinking: Int[Tensor, "batch thinking"]  # those that think, NO_POSITION after the last
    targets: Int[Tensor, "batch positions"]  # the scored tokens; after the last anything

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
    """Pad texts whose last ``counts`` tokens are scored, at most all but the first.

    Of these the first ``thinking`` follow a thought; None thinks before all.
    """
    ids = pad_sequence([torch.tensor(text) for text in texts], True, pad)
    lengths = torch.tensor([[len(text)] for text in texts])  # (B, 1)
    scored = torch.tensor(counts)[:, None].minimum(lengths - 1)
    thinks = scored if thinking is None else torch.tensor(thinking)[:, None]
    column, place = torch.arange(ids.shape[1]), torch.arange(int(scored.max()))
    labels = ids.where((column >= lengths - scored) & (column < lengths), IGNORE_INDEX)
    positions = (lengths - scored + place - 1).where(place < scored, NO_POSITION)
    thinks = positions.where(place < thinks, NO_POSITION)[:, : int(thinks.max())]
    return AnswerBatch(ids, labels, positions, thinks, ids.gather(1, (positions + 1).clamp(min=0)))
