"""Records to tokens: which of them are targets, which make a sequence, and documents of them.

A table of up to `EXACT_BYTES` is tokenized once at the start and counted exactly; a larger one is
tokenized document by document as training asks for it, unless an option needs every length.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, List
from datasets.features import Value
from datasets.fingerprint import generate_random_fingerprint
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from quietstar.config import DataConfig
from quietstar.data.sources import (
    MOST_CHARACTERS,
    Record,
    Source,
    count_characters,
    is_empty,
    read_record,
    record_fields,
)
from quietstar.errors import UserError, reason_of
from quietstar.system.limits import limited

Segment = tuple[str, bool]  # a piece of text, and whether it is (part of) an answer


@dataclass(frozen=True)
class Encoded:
    """Tokens of a document, or of a span of one.

    Attributes:
        ids: Token ids of the document.
        targets: True where the token is to be predicted.
        answers: True where the token belongs to an answer, what the template adds apart.
        answer_start: Index of the first token of the (last) answer; -1 where there is none.
        rationale: Tokens of the gold reasoning, which no text shows.
        marked: True where the token holds a character before which the model thinks; empty where no
            field of the records names any.
    """

    ids: Int[np.ndarray, " tokens"]
    targets: Bool[np.ndarray, " tokens"]
    answers: Bool[np.ndarray, " tokens"]
    answer_start: int = -1
    rationale: Int[np.ndarray, " rationale"] = field(default_factory=lambda: np.zeros(0, np.int32))
    marked: Bool[np.ndarray, " marked"] = field(default_factory=lambda: np.zeros(0, np.bool_))

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return len(self.ids)

    def span(self, start: int, length: int) -> "Encoded":
        """Cuts out at most `length` tokens from `start` on."""
        cut = slice(start, start + length)
        kept = self.answer_start - start if self.answer_start >= start else -1
        masks = (self.targets[cut], self.answers[cut])
        return Encoded(self.ids[cut], *masks, kept, self.rationale, self.marked[cut])

    def without_targets(self, first: int) -> "Encoded":
        """The same with none of the `first` tokens as target."""
        if first <= 1:  # the very first one is not predicted in any case
            return self
        return replace(self, targets=self.targets & (np.arange(len(self)) >= first))


EMPTY = Encoded(np.zeros(0, np.int32), np.zeros(0, np.bool_), np.zeros(0, np.bool_))


def split_template(template: str) -> tuple[str, str, str]:
    """Splits ``data.template`` into what stands before an answer, a space, and what stands after.

    A space before an answer goes with it: most tokenizers join it to the first word, and so whether
    they do (for a word) or not (for a digit), the answer begins at the same place. Raises
    `UserError` if the template has no place for a question, and then one for an answer.
    """
    before, answer, after = template.partition("{answer}")
    if not answer or "{question}" not in before or after.strip():
        raise UserError(
            f"data.template: {template!r} must hold {{question}}, then {{answer}}, then nothing but"
            " white space"
        )
    opening = before.rstrip(" ")
    return opening, before[len(opening) :], after


class Encoder:
    """Encodes records; an empty record gives no tokens.

    Text and question/answer documents get what the tokenizer adds to a text by itself (for some
    a bos at the start) and end with end-of-text; a chat has what its template writes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        """Raises `UserError` where tokenizer, template, format and loss do not go together."""
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
        self._before, self._space, self._after = split_template(config.template)
        self._tokenizer, self._format = tokenizer, config.format
        self._fields = {name: name for name in record_fields(config)}
        self._answers_only = config.loss_on == "answer"
        self._positions_field = config.positions_field

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> list[Encoded]:
        """Encodes a batch of canonical records.

        Raises:
            UserError: A chat template that refuses a chat, or an offset beyond the text.
        """
        checked = [
            read_record(record, self._fields, record.get("where", "data")) for record in records
        ]
        return [encoded for part in _portions(checked) for encoded in self._encode(part)]

    def _encode(self, checked: list[Record]) -> list[Encoded]:
        texts = [[] if is_empty(record) else self._segments(record) for record in checked]
        positions = [
            self._offsets(record, segments) for record, segments in zip(checked, texts, strict=True)
        ]
        encoded = [
            self._finish(*tokens) if segments else EMPTY
            for segments, tokens in zip(texts, self._tokenize(texts, positions), strict=True)
        ]
        if "rationale" in self._fields:
            rationales = [record["rationale"] for record in checked]
            all_ids: Any = self._tokenizer(rationales, add_special_tokens=False)["input_ids"]
            encoded = [
                replace(e, rationale=np.asarray(ids, np.int32)) if segments else EMPTY
                for e, ids, segments in zip(encoded, all_ids, texts, strict=True)
            ]
        return encoded

    def _offsets(self, record: Record, segments: list[Segment]) -> list[int]:
        """Returns the offsets of a record, which must lie in its text."""
        offsets, length = record.get("positions", []), sum(len(text) for text, _ in segments)
        if segments and offsets and max(offsets) >= length:
            raise UserError(
                f"{record['where']}: field {self._positions_field!r} holds {max(offsets)}: an"
                f" offset must be less than {length:,}, the number of characters of the text"
            )
        return offsets

    def _segments(self, record: Record) -> list[Segment]:
        if self._format == "text":
            return [(record["text"], False)]
        if self._format == "chat":
            return self._chat_segments(record["messages"])
        prompt = self._before.replace("{question}", record["question"])
        return [(prompt, False), (self._space + record["answer"], True), (self._after, False)]

    def _chat_segments(self, messages: list[dict[str, str]]) -> list[Segment]:
        """Renders a chat and, where only answers are learned, marks what the assistant writes.

        An answer is what the rendering up to and with an assistant message adds to the rendering of
        what precedes it, white space at its end apart.
        """

        def render(count: int, prompt: bool = False) -> str:
            apply: Callable[..., Any] = self._tokenizer.apply_chat_template
            try:
                with limited():
                    text = apply(messages[:count], tokenize=False, add_generation_prompt=prompt)
            except Exception as error:  # a template may do anything that data allow
                roles = ", ".join(message["role"] for message in messages[:count]) or "none"
                raise UserError(
                    f"the tokenizer's chat template refuses a chat ({reason_of(error)}; roles:"
                    f" {roles}): correct the record, or set data.loss_on: all if the chat opens"
                    " with the assistant"
                ) from error
            if len(text) > MOST_CHARACTERS:
                raise UserError(
                    f"the tokenizer's chat template makes {len(text):,} characters of a chat: at"
                    f" most {MOST_CHARACTERS:,} fit into memory once tokenized. Give the tokenizer"
                    " another template"
                )
            return text

        whole = render(len(messages))
        segments: list[Segment] = []
        cursor = 0
        for place, message in enumerate(messages):
            if not self._answers_only or message["role"] != "assistant":
                continue
            prompt, through = render(place, prompt=True), render(place + 1)
            start, stop = len(prompt), len(through.rstrip())
            if not (whole.startswith(through) and through.startswith(prompt) and stop > start):
                raise UserError(
                    "data.loss_on: 'answer' cannot be used with this chat template: the chat up to"
                    f" message {place + 1}, an answer, is no prefix of the whole: set"
                    " data.loss_on: all"
                )
            segments += [(whole[cursor:start], False), (whole[start:stop], True)]
            cursor = stop
        return [*segments, (whole[cursor:], False)]

    def _tokenize(
        self, texts: list[list[Segment]], positions: list[list[int]]
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Yields the ids of each text, which belong to an answer, and which hold a position.

        A text is cut as the tokenizer would by itself: a token belongs to an answer if it ends
        inside or after its start, so one across the joint of question and answer is the answer's.
        """
        with_special = self._format != "chat"
        if not self._tokenizer.is_fast:  # it gives no character offsets: segment by segment
            special = self._tokenizer.encode("", add_special_tokens=True) if with_special else []
            bos = special[:1] if special and special[0] == self._tokenizer.bos_token_id else []
            for segments, places in zip(texts, positions, strict=True):
                ids, inside, begun = list(bos), [False] * len(bos), [False] * len(bos)
                for text, in_answer, is_place in _cut_at(segments, places):
                    piece = self._tokenizer.encode(text, add_special_tokens=False)
                    ids += piece
                    inside += [in_answer] * len(piece)
                    begun += [is_place and n == 0 for n in range(len(piece))]
                yield ids, np.asarray(inside, np.bool_), np.asarray(begun, np.bool_)
            return
        with_offsets = any(in_answer for segments in texts for _, in_answer in segments)
        with_offsets = with_offsets or any(positions)
        tokens: Any = self._tokenizer(
            ["".join(text for text, _ in segments) for segments in texts],
            add_special_tokens=with_special,
            return_offsets_mapping=with_offsets,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # long documents are meant to be long
        )
        all_offsets = tokens["offset_mapping"] if with_offsets else [()] * len(texts)
        rows = zip(tokens["input_ids"], all_offsets, texts, positions, strict=True)
        for ids, offsets, segments, places in rows:
            starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
            inside = np.zeros(len(ids), np.bool_)
            cursor = 0
            for text, in_answer in segments:
                stop = cursor + len(text)
                if in_answer:  # tokens that the tokenizer adds by itself have empty offsets
                    inside |= (ends > cursor) & (starts < stop) & (ends > starts)
                cursor = stop
            marked = np.zeros(len(ids), np.bool_)
            if places:  # a character belongs to the first token that ends after it
                real = np.flatnonzero(ends > starts)
                index = np.searchsorted(ends[real], places, side="right")
                marked[real[index[index < len(real)]]] = True
            yield ids, inside, marked

    def _finish(
        self,
        ids: list[int],
        in_answer: Bool[np.ndarray, " tokens"],
        marked: Bool[np.ndarray, " tokens"],
    ) -> Encoded:
        eos: Any = self._tokenizer.eos_token_id
        if self._format != "chat" and eos is not None and (not ids or ids[-1] != eos):
            ids, in_answer = [*ids, eos], np.append(in_answer, False)
            marked = np.append(marked, False)
        if self._positions_field is None:
            marked = marked[:0]
        if self._answers_only and not in_answer.any():
            return EMPTY  # such as a chat without an assistant message
        targets = in_answer.copy() if self._answers_only else np.ones(len(ids), np.bool_)
        if self._format == "qa" and in_answer.any():
            targets[int(in_answer.argmax()) :] = True  # what ends an answer is to be learned too
        starts = np.flatnonzero(in_answer & ~np.concatenate([[False], in_answer[:-1]]))
        answer_start = int(starts[-1]) if len(starts) else -1
        return Encoded(np.asarray(ids, np.int32), targets, in_answer, answer_start, marked=marked)


def _cut_at(segments: list[Segment], places: list[int]) -> Iterator[tuple[str, bool, bool]]:
    """Cuts segments at the places; yields each piece, its answer flag, and if it begins at one."""
    cursor = 0
    for text, in_answer in segments:
        stop = cursor + len(text)
        cuts = sorted({cursor, stop, *(place for place in places if cursor < place < stop)})
        for begin, end in pairwise(cuts):
            yield text[begin - cursor : end - cursor], in_answer, begin in places
        cursor = stop


def _portions(records: list[Record]) -> Iterator[list[Record]]:
    """Cuts records into lists that a tokenizer has memory for at once."""
    portion, size = [], 0
    for record in records:
        length = count_characters(record)
        if portion and size + length > MOST_CHARACTERS:
            yield portion
            portion, size = [], 0
        portion.append(record)
        size += length
    if portion:
        yield portion


def chunks(documents: Iterable[Encoded], seq_len: int) -> Iterator[Encoded]:
    """Joins documents and cuts the whole into chunks of seq_len; the last one may be shorter."""
    rest = EMPTY
    for document in documents:
        joined = Encoded(
            np.concatenate([rest.ids, document.ids]),
            np.concatenate([rest.targets, document.targets]),
            np.concatenate([rest.answers, document.answers]),
            marked=np.concatenate([rest.marked, document.marked]),
        )
        whole = len(joined) - len(joined) % seq_len
        for start in range(0, whole, seq_len):
            yield joined.span(start, seq_len)
        rest = joined.span(whole, seq_len)
    if len(rest) > 1:  # a single token has nothing to predict
        yield rest


# --- Documents ------------------------------------------------------------------------------------
EXACT_BYTES = 64 * 2**20  # half a minute of tokenization on one slow core
BATCH_ROWS, BATCH_BYTES = 1000, 256 * 2**20  # of a table that are looked at together
ENCODED = Features(
    {
        "ids": List(Value("int32")),
        "targets": List(Value("bool")),
        "answers": List(Value("bool")),
        "answer_start": Value("int64"),
        "rationale": List(Value("int32")),
        "marked": List(Value("bool")),
    }
)


@dataclass(frozen=True)
class Documents:
    """A table of documents: tokenized once, or (without lengths) each when it is asked for.

    Attributes:
        table: Rows with the columns `ENCODED`.
        lengths: Tokens of every document; an empty one has none.
        dropped: Number of empty documents that were left out, 0 where they are tokenized on demand.
        records: The records that the documents are made of.
        rows: Row of each document there; None for chunks, which are of several.
    """

    table: Dataset
    lengths: Int[np.ndarray, " documents"] | None = None
    dropped: int = 0
    records: Dataset | None = None
    rows: Int[np.ndarray, " documents"] | None = None

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self.table)

    def __getitem__(self, index: int) -> Encoded:
        """Returns one document."""
        return _encoded(self.table[int(index)])

    def select(self, indices: Int[np.ndarray, " chosen"], dropped: int = 0) -> "Documents":
        """Returns the documents at these indices, where others were dropped."""
        lengths = None if self.lengths is None else self.lengths[indices]
        rows = None if self.rows is None else self.rows[indices]
        table, dropped = self.table.select(indices), self.dropped + dropped
        return Documents(table, lengths, dropped, self.records, rows)

    def join(self, config: DataConfig) -> "Documents":
        """Joins the documents, a thousand at a time, into chunks, where `spans` asks for it."""
        if config.spans == "random":
            return self

        def join(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
            return _columns(chunks(map(_encoded, _rows(batch)), config.seq_len))

        table, lengths = _map(self.table, join)
        return Documents(table, lengths, self.dropped)


def prepare(source: Source, config: DataConfig, encoder: Encoder) -> Documents:
    """Makes documents of a source's table; raises `UserError` if none is left."""
    records = source.table
    assert records is not None, "a stream has no table"

    def encode(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        return _columns(encoder(_rows(batch)))

    rows = {"records": records, "rows": np.arange(len(records))}
    if config.spans == "random" and records.data.nbytes > EXACT_BYTES:
        return Documents(records.with_transform(encode), **rows)
    row_bytes = max(1, records.data.nbytes // len(records))
    table, lengths = _map(records, encode, max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes)))
    filled = lengths > 0
    if not filled.any():
        raise UserError(f"{source.label}: every record is empty: give text to learn from")
    documents = Documents(table, lengths, **rows)
    return documents.select(np.flatnonzero(filled), int((~filled).sum()))


def _encoded(row: Mapping[str, Any]) -> Encoded:
    ids = {name: np.asarray(row[name], np.int32) for name in ("ids", "rationale")}
    masks = {name: np.asarray(row[name], np.bool_) for name in ("targets", "answers", "marked")}
    return Encoded(**ids, **masks, answer_start=int(row["answer_start"]))


def _rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _columns(documents: Iterable[Encoded]) -> dict[str, list[Any]]:
    encoded = list(documents)
    return {name: [getattr(document, name) for document in encoded] for name in ENCODED}


def _map(
    table: Dataset, function: Any, batch_rows: int = BATCH_ROWS
) -> tuple[Dataset, Int[np.ndarray, " documents"]]:
    """Returns a table with the columns `ENCODED`, and the numbers of its tokens."""
    # The fingerprint of function and tokenizer names a cache file; in memory there is none.
    fingerprint = None if table.cache_files else generate_random_fingerprint()
    hide_bar = table.data.nbytes <= EXACT_BYTES and not datasets.are_progress_bars_disabled()
    if hide_bar:
        datasets.disable_progress_bars()
    try:
        encoded = table.map(
            function,
            batched=True,
            batch_size=batch_rows,
            remove_columns=table.column_names,
            features=ENCODED,
            new_fingerprint=fingerprint,
        ).with_format("numpy")
    finally:
        if hide_bar:
            datasets.enable_progress_bars()
    batches: Any = encoded.select_columns(["ids"]).iter(batch_size=1000)
    lengths = np.asarray([len(ids) for batch in batches for ids in batch["ids"]], np.int64)
    return encoded, lengths
