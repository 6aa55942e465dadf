"""Records to tokens: each token of a document, and whether it is a target."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from quietstar.config import DataConfig
from quietstar.data.records import Layout, Record, is_empty, read_record
from quietstar.data.tokenizer import first_line
from quietstar.errors import UserError

Segment = tuple[str, bool]  # a piece of text, and whether it is (part of) an answer


@dataclass(frozen=True)
class Encoded:
    """Tokens of a document, or of a span of one.

    Attributes:
        ids: Token ids.
        targets: True where the token is to be predicted.
        answers: True where the token belongs to an answer, what the template adds apart.
        answer_start: Index of the first token of the (last) answer; -1 where there is none.
        rationale: Tokens of the gold reasoning, which no text shows.
    """

    ids: Int[np.ndarray, " tokens"]
    targets: Bool[np.ndarray, " tokens"]
    answers: Bool[np.ndarray, " tokens"]
    answer_start: int = -1
    rationale: Int[np.ndarray, " rationale"] = field(default_factory=lambda: np.zeros(0, np.int32))

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return len(self.ids)

    def span(self, start: int, length: int) -> "Encoded":
        """Cuts out at most `length` tokens from `start` on."""
        stop = start + length
        cut = slice(start, stop)
        kept = self.answer_start - start if self.answer_start >= start else -1
        return Encoded(self.ids[cut], self.targets[cut], self.answers[cut], kept, self.rationale)

    def without_targets(self, first: int) -> "Encoded":
        """The same with none of the `first` tokens as target."""
        if first <= 1:  # the very first one is not predicted in any case
            return self
        return replace(self, targets=self.targets & (np.arange(len(self)) >= first))


EMPTY = Encoded(np.zeros(0, np.int32), np.zeros(0, np.bool_), np.zeros(0, np.bool_))


class Encoder:
    """Encodes records; an empty record gives no tokens.

    Text and question/answer documents get what the tokenizer adds to a text by itself (for some
    a bos at the start) and end with end-of-text; a chat has what its template writes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        """Checks that tokenizer, format and loss go together.

        Raises:
            UserError: For chats without a chat template, a template without its two places, or
                a loss on answers where there are none.
        """
        if config.format == "chat" and not tokenizer.chat_template:
            raise UserError(
                "data.format: 'chat' needs a tokenizer with a chat template and this one has none:"
                " use an instruction-tuned model's tokenizer, or data.format: qa"
            )
        if config.format == "text" and config.loss_on == "answer":
            raise UserError(
                "data.loss_on: 'answer' needs records with answers and data.format is 'text':"
                " set data.loss_on: all, or data.format: qa or chat"
            )
        before, answer, after = config.template.partition("{answer}")
        if not answer or "{question}" not in before or after.strip():
            raise UserError(
                f"data.template: {config.template!r} must hold {{question}}, then {{answer}}, then"
                " nothing but white space"
            )
        self._tokenizer = tokenizer
        self._layout = Layout.of(config).canonical
        # A space before an answer goes with it: most tokenizers join it to the first word, and so
        # whether they do (for a word) or not (for a digit), the answer begins at the same place.
        self._before = before.rstrip(" ")
        self._space, self._after = before[len(self._before) :], after
        self._answers_only = config.loss_on == "answer"

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> list[Encoded]:
        """Encodes a batch of canonical records."""
        checked = [read_record(record, self._layout, "data") for record in records]
        filled = [record for record in checked if not is_empty(record)]
        encoded = self._encode([self._segments(record) for record in filled])
        in_order = iter(self._with_rationale(encoded, filled))
        return [EMPTY if is_empty(record) else next(in_order) for record in checked]

    def _with_rationale(self, encoded: list[Encoded], records: list[Record]) -> list[Encoded]:
        if not records or "rationale" not in records[0]:
            return encoded
        texts = [record["rationale"] for record in records]
        all_ids: Any = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        pairs = zip(encoded, all_ids, strict=True)
        return [replace(one, rationale=np.asarray(ids, np.int32)) for one, ids in pairs]

    def _segments(self, record: Record) -> list[Segment]:
        if self._layout.format == "text":
            return [(record["text"], False)]
        if self._layout.format == "chat":
            return chat_segments(self._tokenizer, record["messages"], self._answers_only)
        prompt = self._before.replace("{question}", record["question"])
        return [(prompt, False), (self._space + record["answer"], True), (self._after, False)]

    def _encode(self, batch: list[list[Segment]]) -> list[Encoded]:
        if not batch:
            return []
        tokenize = _tokenize_fast if self._tokenizer.is_fast else _tokenize_slow
        with_special = self._layout.format != "chat"
        pairs = tokenize(self._tokenizer, batch, with_special)
        return [self._finish(ids, in_answer) for ids, in_answer in pairs]

    def _finish(self, ids: list[int], in_answer: Bool[np.ndarray, " tokens"]) -> Encoded:
        eos: Any = self._tokenizer.eos_token_id
        if self._layout.format != "chat" and eos is not None and (not ids or ids[-1] != eos):
            ids, in_answer = [*ids, eos], np.append(in_answer, False)
        if self._answers_only and not in_answer.any():
            return EMPTY  # such as a chat without an assistant message
        targets = in_answer.copy() if self._answers_only else np.ones(len(ids), np.bool_)
        if self._layout.format == "qa" and in_answer.any():
            targets[int(in_answer.argmax()) :] = True  # what ends an answer is to be learned too
        answer_start = last_answer(in_answer)
        return Encoded(np.asarray(ids, np.int32), targets, in_answer, answer_start)


def last_answer(in_answer: Bool[np.ndarray, " tokens"]) -> int:
    """Returns the index at which the last run of answer tokens starts, -1 without one."""
    starts = np.flatnonzero(in_answer & ~np.concatenate([[False], in_answer[:-1]]))
    return int(starts[-1]) if len(starts) else -1


def _tokenize_fast(
    tokenizer: PreTrainedTokenizerBase, batch: list[list[Segment]], with_special: bool
) -> list[tuple[list[int], np.ndarray]]:
    """Tokenises whole texts: a token belongs to an answer if it ends inside or behind its start.

    The text is cut as the tokenizer would by itself: a token across the joint of question and
    answer counts as the answer's.
    """
    with_offsets = any(in_answer for segments in batch for _, in_answer in segments)
    tokens = tokenizer(
        ["".join(text for text, _ in segments) for segments in batch],
        add_special_tokens=with_special,
        return_offsets_mapping=with_offsets,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # long documents are meant to be long
    )
    all_ids: Any = tokens["input_ids"]
    if not with_offsets:
        return [(ids, np.zeros(len(ids), np.bool_)) for ids in all_ids]
    pairs = zip(all_ids, tokens["offset_mapping"], batch, strict=True)
    return [(ids, _inside_answers(offsets, segments)) for ids, offsets, segments in pairs]


def _inside_answers(offsets: Any, segments: list[Segment]) -> np.ndarray:
    bounds = np.asarray(offsets, np.int64).reshape(-1, 2)
    starts, ends = bounds[:, 0], bounds[:, 1]
    inside = np.zeros(len(bounds), np.bool_)
    cursor = 0
    for text, in_answer in segments:
        stop = cursor + len(text)
        if in_answer:  # tokens that the tokenizer adds by itself have empty offsets
            inside |= (ends > cursor) & (starts < stop) & (ends > starts)
        cursor = stop
    return inside


def _tokenize_slow(
    tokenizer: PreTrainedTokenizerBase, batch: list[list[Segment]], with_special: bool
) -> list[tuple[list[int], np.ndarray]]:
    """Tokenises segment by segment, for tokenizers that give no character offsets."""
    special = tokenizer.encode("", add_special_tokens=True) if with_special else []
    bos = special[:1] if special and special[0] == tokenizer.bos_token_id else []
    pairs: list[tuple[list[int], np.ndarray]] = []
    for segments in batch:
        ids, inside = list(bos), [False] * len(bos)
        for text, in_answer in segments:
            piece = tokenizer.encode(text, add_special_tokens=False)
            ids += piece
            inside += [in_answer] * len(piece)
        pairs.append((ids, np.asarray(inside, np.bool_)))
    return pairs


def chat_segments(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], mark_answers: bool
) -> list[Segment]:
    """Renders a chat and, where asked, marks what the assistant writes.

    An answer is what the rendering up to and with an assistant message adds to the rendering of
    what precedes it, white space at its end apart.

    Raises:
        UserError: If the template refuses the messages, or the rendering of the first messages
            is no prefix of the whole, so that answers cannot be told apart.
    """
    whole = _render(tokenizer, messages)
    if not mark_answers:
        return [(whole, False)]
    segments: list[Segment] = []
    cursor = 0
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:place], add_generation_prompt=True)
        through = _render(tokenizer, messages[: place + 1])
        start, stop = len(prompt), len(through.rstrip())
        if not (whole.startswith(through) and through.startswith(prompt) and stop > start):
            raise UserError(
                "data.loss_on: 'answer' cannot be used with this chat template: the chat up to"
                f" message {place + 1}, an answer, is no prefix of the whole: set data.loss_on: all"
            )
        segments += [(whole[cursor:start], False), (whole[start:stop], True)]
        cursor = stop
    return [*segments, (whole[cursor:], False)]


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    add_generation_prompt: bool = False,
) -> str:
    render: Callable[..., Any] = tokenizer.apply_chat_template
    try:
        return render(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, IndexError) as error:
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise UserError(
            f"the tokenizer's chat template refuses a chat ({first_line(error)}; roles: {roles}):"
            " correct the record, or set data.loss_on: all if the chat opens with the assistant"
        ) from error
