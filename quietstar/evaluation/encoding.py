"""From items to tokens: which are scored, and what each is compared with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.attention.layout import IGNORE_INDEX, NO_POSITION
from quietstar.errors import UserError
from quietstar.evaluation.tasks import Item, Task

MIN_CONTEXT = 8
"""Tokens at the beginning of a text that are not scored: there any second pass would help."""
TEXT_TOKENS = 256
DIGITS = re.compile(r"[0-9]+")


@dataclass(frozen=True)
class Candidates:
    """Tokens that answers are renormalised over.

    Attributes:
        ids: The digit tokens, or the labels, and behind them the end of the answer.
        num_answers: How many of them are not the end.
    """

    ids: Int[Tensor, " candidates"]
    num_answers: int

    @property
    def has_end(self) -> bool:
        """Whether the end of an answer is one of them."""
        return len(self.ids) > self.num_answers


@dataclass(frozen=True)
class EncodedItem:
    """An item as tokens.

    Attributes:
        number: Its index in the task.
        item: As it was read.
        ids: The text, prompt and answer; its beginning is cut off where it is too long.
        num_scored: So many last tokens are scored, a thought before each.
        num_cut: Tokens that were cut off.
    """

    number: int
    item: Item
    ids: list[int]
    num_scored: int
    num_cut: int


def encode(
    task: Task,
    items: Sequence[Item],
    tokenizer: PreTrainedTokenizerBase,
    longest: int | None,
    text_tokens: int = TEXT_TOKENS,
) -> list[EncodedItem]:
    """Tokens of all items of a task whose tokens are scored.

    Args:
        task: It.
        items: Its items.
        tokenizer: The model's.
        longest: Tokens that the model takes; what is longer loses its beginning.
        text_tokens: Of a text without a prompt only the first so many are read.

    Raises:
        UserError: An answer that the tokenizer does not keep apart from its prompt.
    """
    encoded = []
    for number, item in enumerate(items):
        prompt, answer = split_answer(task, item, tokenizer)
        ids = prompt + answer
        if len(ids) < 2:
            raise UserError(f"{item.where}: the text has no token to score; give a longer one")
        if not item.prompt:
            longest = min(longest or text_tokens, text_tokens)
        cut = 0 if longest is None else max(0, len(ids) - longest)
        if not item.prompt:
            ids = ids[: len(ids) - cut]
            scored = len(ids) - min(MIN_CONTEXT, len(ids) - 1)
        else:
            ids, scored = ids[cut:], min(len(answer), len(ids) - cut - 1)
        encoded.append(EncodedItem(number, item, ids, scored, cut))
    return encoded


def split_answer(
    task: Task, item: Item, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the answer, as they stand in the whole text.

    A token of white space alone between the two belongs to the prompt.

    Raises:
        UserError: A token lies in both.
    """
    if not item.prompt:
        return [], _ids(tokenizer, item.answer)
    prompt = _ids(tokenizer, item.prompt)
    whole = _ids(tokenizer, item.prompt + task.separator + item.answer + task.end)
    if whole[: len(prompt)] != prompt:
        shown = [tokenizer.decode([i]) for i in whole[max(0, len(prompt) - 2) : len(prompt) + 2]]
        raise UserError(
            f"{item.where}: the tokenizer joins the end of the prompt and the answer "
            f"{item.answer!r} into one token (around {shown}), so the answer cannot be scored "
            "alone; choose another model, or score the task with quietstar lm-eval"
        )
    answer = whole[len(prompt) :]
    while len(answer) > 1 and not _text(tokenizer, [answer[0]]).strip():
        prompt, answer = [*prompt, answer[0]], answer[1:]
    return prompt, answer


def find_candidates(
    task: Task, encoded: Sequence[EncodedItem], tokenizer: PreTrainedTokenizerBase
) -> Candidates | None:
    """What the task's answers are renormalised over; None for whole texts.

    Raises:
        UserError: A label, or digit, that is not one token.
    """
    if task.candidates is None:
        return None
    answers = _digit_tokens(tokenizer)
    if task.candidates == "labels":
        answers = _label_tokens(task, encoded, tokenizer)
    known = set(answers)
    for one in encoded:
        tokens = one.ids[len(one.ids) - one.num_scored :]
        if known.isdisjoint(tokens):
            shown = [tokenizer.decode([token]) for token in tokens]
            raise UserError(
                f"{one.item.where}: the tokenizer splits the answer {one.item.answer!r} into "
                f"{shown}, none of which is a {task.candidates[:-1]} token; choose another model"
            )
    ends = {one.ids[-1] for one in encoded} if task.end else set()
    end = [token for token in ends if tokenizer.decode([token]) == task.end]
    all_end = len(ends) == len(end) == 1
    return Candidates(torch.tensor(answers + (end if all_end else [])), len(answers))


def _label_tokens(
    task: Task, encoded: Sequence[EncodedItem], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    labels = sorted({label for one in encoded for label in one.item.labels})
    tokens = []
    for label in labels:
        asked = Item("", encoded[0].item.prompt, label, encoded[0].item.where)
        _, answer = split_answer(task, asked, tokenizer)
        if _text(tokenizer, answer[:1]).strip() != label:
            shown = [tokenizer.decode([token]) for token in answer]
            raise UserError(
                f"{asked.where}: the tokenizer splits the answer {label!r} into {shown}: a label "
                "must be one token; choose another model, or score it with quietstar lm-eval"
            )
        tokens.append(answer[0])
    return tokens


def _digit_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [i for i, text in enumerate(texts) if DIGITS.fullmatch(text.strip())]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]  # pyright: ignore[reportReturnType]


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids)  # pyright: ignore[reportReturnType]


# --- Batches --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerBatch:
    """Texts whose last tokens are scored.

    Attributes:
        ids: The texts, padded on the right.
        mask: False at padding.
        labels: The scored tokens, IGNORE_INDEX elsewhere.
        positions: Those before them, NO_POSITION behind the last.
        targets: The scored tokens, anything behind the last.
    """

    ids: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    positions: Int[Tensor, "batch positions"]
    targets: Int[Tensor, "batch positions"]

    @property
    def valid(self) -> Bool[Tensor, "batch positions"]:
        """Where there is a token to score."""
        return self.positions != NO_POSITION

    def to(self, device: torch.device) -> AnswerBatch:
        """The same on a device."""
        parts = (self.ids, self.mask, self.labels, self.positions, self.targets)
        return AnswerBatch(*(part.to(device) for part in parts))


def answer_batch(texts: Sequence[list[int]], counts: Sequence[int], pad: int) -> AnswerBatch:
    """Pad texts.

    Args:
        texts: Token ids.
        counts: So many last tokens of each are scored, at most all but the first.
        pad: Fills texts up.
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
    return AnswerBatch(ids, mask, labels, positions, ids.gather(1, (positions + 1).clamp(min=0)))
