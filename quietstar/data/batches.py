"""Deterministic batches of training and held-out sequences.

The sample at a row of a step depends on the seed and on step * batch_size + row only, so a run is
the same for every cut of its batches into micro-batches and ranks, and after every resume.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.config import DataConfig, ThoughtsConfig
from quietstar.config.schema import SYNTHETIC
from quietstar.data.encoding import Documents, Encoded, Encoder, chunks, prepare
from quietstar.data.marking import PatternMarker
from quietstar.data.sources import WHOLE, Record, Source, is_empty, num_problems, open_source
from quietstar.data.tokenizer import padding_id
from quietstar.errors import UserError

IGNORED = -100  # the label of what is no target, as in torch's cross entropy
FIRST_SAMPLES = 16  # of a stream that has none with a target, the rest will not be read
ESTIMATE_DOCUMENTS = 256  # tokenized to estimate the figures of a table that is not counted
EVAL_SEQUENCES = 64  # of an evaluation, where neither a config nor a run says
WIDTH_MULTIPLE = 8  # of a batch: products on GPUs are faster with it


@dataclass(frozen=True)
class Batch:
    """Sequences of one width, that of the longest (or a little more).

    Attributes:
        input_ids: Token ids, padded on the right.
        attention_mask: True at a real token.
        labels: The id where the token is a target, -100 elsewhere; not shifted.
        sample_ids: Index of each sample in the run (or in the evaluation).
        answers: True at a token of an answer.
        rationale: Tokens of the gold reasoning, -100 after them.
        marked: True at a token before which the model thinks, by a pattern or a field of the data.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Bool[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    sample_ids: Int[Tensor, " batch"]
    answers: Bool[Tensor, "batch seq"]
    rationale: Int[Tensor, "batch rationale"]
    marked: Bool[Tensor, "batch seq"]

    def to(self, device: torch.device) -> "Batch":
        """Returns the same batch on another device."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return Batch(*[tensor.to(device, non_blocking=True) for tensor in tensors])


@dataclass(frozen=True)
class DataReport:
    """What the data are, for the log; figures of the training part unless said otherwise.

    Attributes:
        source: Key and value that named the data.
        documents: Documents to train on, without those dropped; None for a stream.
        held_out_documents: Documents kept from training, or read from `data.eval`.
        eval_sequences: Sequences of an evaluation.
        sequences: Sequences of an epoch; None for a stream.
        dropped_empty: Records without text or answer, in both parts.
        padded: Sequences of an epoch that need padding.
        truncated: Question/answer or chat records longer than a sequence.
        tokens: Tokens of the documents.
        exact: Whether all was counted. If not, `padded`, `truncated` and `tokens` are estimates
            (None for a stream), and a large table keeps empty records as samples without targets.
    """

    source: str
    documents: int | None
    held_out_documents: int
    eval_sequences: int
    sequences: int | None = None
    dropped_empty: int = 0
    padded: int | None = None
    truncated: int | None = None
    tokens: int | None = None
    exact: bool = False

    def summary(self) -> str:
        """Returns one line for the log."""
        held_out = f"{self.held_out_documents:,} held out ({self.eval_sequences:,} sequences)"
        if self.documents is None:
            return f"{self.source}: a stream; {held_out}"
        about = "" if self.exact else "about "
        counts = {f"{about}%s padded": self.padded, f"{about}%s truncated": self.truncated,
                  "%s empty ones dropped": self.dropped_empty}  # fmt: skip
        return ", ".join([
            f"{self.source}: {self.documents:,} documents, {about}{self.tokens:,} tokens",
            f"{self.sequences:,} sequences an epoch, {held_out}",
            *(text % f"{count:,}" for text, count in counts.items() if count),
        ])  # fmt: skip


# --- Samples --------------------------------------------------------------------------------------
# First key of every random stream, so that no two uses of one seed share their numbers.
ORDER, SPAN, HELD_OUT, EVAL_ORDER, EVAL_SPAN, ESTIMATE = range(6)


def keyed_rng(seed: int, *keys: int) -> np.random.Generator:
    """Returns a generator that depends on the seed and the keys only."""
    return np.random.default_rng([seed, *keys])


def answer_span(document: Encoded, seq_len: int) -> Encoded:
    """Shortens a record so that its last answer survives.

    The question loses its start; an answer of more than seq_len - 1 tokens keeps one token before
    it and loses its end. Without a known answer the end of the record is kept.
    """
    start = max(len(document) - seq_len, 0)
    if document.answer_start >= 0:
        start = min(start, max(document.answer_start - 1, 0))
    return document.span(start, seq_len)


def cut(document: Encoded, config: DataConfig, seed: int, index: int) -> Encoded:
    """Cuts the sample of this index in the run out of its document (or chunk)."""
    room = len(document) - config.seq_len
    if config.format != "text":
        document = answer_span(document, config.seq_len)
    elif room > 0:
        start = keyed_rng(seed, SPAN, index).integers(room + 1)
        document = document.span(int(start), config.seq_len)
    return document.without_targets(config.min_context)


class MapSamples:
    """Samples in a new order every epoch: index i is place i % n in the order of epoch i // n.

    Nothing repeats within an epoch, and a sample depends on the seed and its index only.
    """

    def __init__(self, documents: Documents, config: DataConfig, seed: int) -> None:
        self._documents, self._config, self._seed = documents, config, seed
        self._order = lru_cache(maxsize=2)(  # a batch may cross two epochs
            lambda epoch: keyed_rng(seed, ORDER, epoch).permutation(len(documents))
        )

    def __len__(self) -> int:
        """Returns the number of samples of an epoch."""
        return len(self._documents)

    def read(self, first: int, size: int, rows: range) -> list[Encoded]:
        """Returns these rows of the batch of `size` samples that starts at index `first`."""
        samples = []
        for index in (first + row for row in rows):
            epoch, place = divmod(index, len(self._documents))
            document = self._documents[int(self._order(epoch)[place])]
            samples.append(cut(document, self._config, self._seed, index))
        return samples

    def record(self, index: int) -> dict[str, Any] | None:
        """Returns the raw record of the sample of this index, where it was kept and is one."""
        documents, (epoch, place) = self._documents, divmod(index, len(self._documents))
        records, rows = documents.records, documents.rows
        if records is None or rows is None or WHOLE not in records.column_names:
            return None
        return json.loads(records[int(rows[self._order(epoch)[place]])][WHOLE])


class StreamSamples:
    """Samples of a stream: index i is the i-th after the held-out head, over and over again.

    Rows are read in order and the last batch is kept, so any cut of a batch costs one pass. To
    go on at a later index reads and drops what lies before; to go back starts the stream again.
    """

    def __init__(self, source: Source, encoder: Encoder, config: DataConfig, seed: int) -> None:
        self._source, self._encoder, self._config = source, encoder, config
        self._seed, self._head = seed, 0
        self._items = enumerate(self._endless())
        self._first, self._kept = 0, {}

    def hold_out(self) -> tuple[list[Encoded], int]:
        """Takes the sequences of an evaluation from the head, which is then kept from training.

        Returns them, and how many (non-empty) documents they came from.
        """
        used = 0

        def count() -> Iterator[Record]:
            nonlocal used
            for record in self._records(0):
                used += 1
                yield record

        head = islice(self._sequences(count()), self._config.eval_sequences)
        samples = [cut(document, self._config, self._seed, n) for n, document in enumerate(head)]
        if not samples:
            raise self._nothing_left()
        self._head = used
        return samples, used

    def read(self, first: int, size: int, rows: range) -> list[Encoded]:
        """As `MapSamples.read`."""
        if first < self._first:
            self._items, self._kept = enumerate(self._endless()), {}
        self._first = first
        self._kept = {index: item for index, item in self._kept.items() if index >= first}
        while first + size - 1 not in self._kept:
            index, item = next(self._items)
            if index >= first:
                self._kept[index] = item
        samples = []
        for index in (first + row for row in rows):
            item = self._kept[index]  # a record where a row that nobody reads need cost nothing
            document = item if isinstance(item, Encoded) else self._encoder([item])[0]
            samples.append(cut(document, self._config, self._seed, index))
        return samples

    def _endless(self) -> Iterator[Record | Encoded]:
        while True:
            item = None
            records = self._records(self._head)
            for item in records if self._config.spans == "random" else self._sequences(records):
                yield item
            if item is None:
                raise self._nothing_left()

    def _records(self, start: int) -> Iterator[Record]:
        """Starts a pass over the non-empty records, from one of them on."""
        filled = (record for record in self._source.rows() if not is_empty(record))
        return islice(filled, start, None)

    def _sequences(self, records: Iterator[Record]) -> Iterator[Encoded]:
        """Encodes records: documents to cut spans from, or joined chunks."""
        encoded = (self._encoder([record])[0] for record in records)
        documents = (document for document in encoded if len(document))
        joined = self._config.spans == "concatenate"
        return chunks(documents, self._config.seq_len) if joined else documents

    def _nothing_left(self) -> UserError:
        label = self._source.label
        if self._head == 0:
            return UserError(f"{label}: every record is empty: give text to learn from")
        return UserError(
            f"{label}: the stream holds nothing after the {self._head} documents held out for"
            " evaluation: lower data.eval_sequences, or set data.eval"
        )


# --- Batches --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TrainData:
    """Training batches by step."""

    samples: MapSamples | StreamSamples
    seq_len: int
    pad_id: int
    marker: PatternMarker | None = None

    @property
    def epoch(self) -> int | None:
        """Number of sequences of an epoch; None for a stream."""
        return None if isinstance(self.samples, StreamSamples) else len(self.samples)

    def batch(self, step: int, batch_size: int, rows: range | None = None) -> Batch:
        """Builds the batch of a step, or some of its rows.

        Args:
            step: Optimizer step, from 0.
            batch_size: Sequences of the whole step, over ranks and accumulation.
            rows: The rows wanted, such as one rank's micro-batch; all by default.
        """
        rows = range(batch_size) if rows is None else rows
        assert rows.stop <= batch_size, f"rows {rows} of a batch of {batch_size}"
        first = step * batch_size
        samples = mark_samples(self.samples.read(first, batch_size, rows), self.marker)
        width = batch_width(samples, self.seq_len)
        return collate(samples, [first + row for row in rows], width, self.pad_id)

    def records(self, sample_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Returns the raw records of samples by their index in the run, for rewards that read them.

        Raises:
            UserError: A sample is not one record: the data are a stream, or texts in one piece.
        """
        found = []
        for index in sample_ids:
            samples = self.samples
            record = None if isinstance(samples, StreamSamples) else samples.record(index)
            if record is None:
                raise UserError(
                    "loss.reward: reads fields of records, but a sequence is none of these with"
                    " data.streaming, or with data.spans: concatenate. Turn these off, or name a"
                    " reward that reads the texts alone."
                )
            found.append(record)
        return found


@dataclass(frozen=True)
class EvalData:
    """The held-out sequences, the same at every evaluation."""

    samples: list[Encoded]
    seq_len: int
    pad_id: int

    def __len__(self) -> int:
        """Returns the number of sequences."""
        return len(self.samples)

    def batches(self, micro_batch_size: int) -> Iterator[Batch]:
        """Yields the sequences in order; the last batch may be smaller."""
        # One width for all: processes exchange thoughts of their batches.
        width = batch_width(self.samples, self.seq_len)
        for start in range(0, len(self), micro_batch_size):
            samples = self.samples[start : start + micro_batch_size]
            places = range(start, start + len(samples))
            yield collate(samples, places, width, self.pad_id)


def mark_samples(samples: Sequence[Encoded], marker: PatternMarker | None) -> list[Encoded]:
    """Marks the tokens of samples by a pattern, if there is one."""
    if marker is None:
        return list(samples)
    return [replace(sample, marked=marker(sample.ids.tolist())) for sample in samples]


def batch_width(samples: Sequence[Encoded], seq_len: int) -> int:
    """Returns the width of a batch: the longest sample's, rounded up, and at most `seq_len`."""
    longest = max(map(len, samples), default=0)
    return min(seq_len, max(1, -(-longest // WIDTH_MULTIPLE)) * WIDTH_MULTIPLE)


def collate(
    samples: Sequence[Encoded], sample_ids: Sequence[int], width: int, pad_id: int
) -> Batch:
    """Pads samples on the right to one width."""
    longest = max(map(len, samples), default=0)
    assert longest <= width, f"sample of {longest} tokens in a batch of width {width}"

    def pad(rows: list[np.ndarray], fill: int | bool, width: int) -> Tensor:
        padded = np.full((len(rows), width), fill, np.bool_ if fill is False else np.int64)
        for line, row in zip(padded, rows, strict=True):
            line[: len(row)] = row
        return torch.from_numpy(padded)

    rationales = [sample.rationale for sample in samples]
    labels = [np.where(sample.targets, sample.ids, IGNORED) for sample in samples]
    return Batch(
        input_ids=pad([sample.ids for sample in samples], pad_id, width),
        attention_mask=pad([np.ones(len(sample)) for sample in samples], False, width),
        labels=pad(labels, IGNORED, width),
        sample_ids=torch.tensor(list(sample_ids), dtype=torch.int64),
        answers=pad([sample.answers for sample in samples], False, width),
        rationale=pad(rationales, IGNORED, max(map(len, rationales), default=0)),
        marked=pad([sample.marked for sample in samples], False, width),
    )


# --- Building both parts --------------------------------------------------------------------------
def build_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    thoughts: ThoughtsConfig | None = None,
    whole: bool = False,
) -> tuple[TrainData, EvalData, DataReport]:
    """Opens the data of a run; ``whole`` keeps the raw records for `TrainData.records`.

    Without `data.eval`, a random share of the documents is held out (of a stream, its head); a
    document never is in both parts. Order, spans, held-out part and generated problems depend on
    the seed. Where ``thoughts`` are at positions that the data mark, batches have the marks. A
    `UserError` says what to do if the data cannot be read or used.
    """
    if config.eval_sequences is None:
        config = config.model_copy(update={"eval_sequences": EVAL_SEQUENCES})
    if config.train is None:
        raise UserError("data.train: is not set: give a file, a folder, a hub id or a task")
    encoder = Encoder(tokenizer, config)
    source = open_source(config.train, config, seed, whole=whole)
    held_out = given = None
    if config.eval is None and config.train.startswith(SYNTHETIC):
        config = config.model_copy(update={"eval": config.train})  # its own held-out problems
    if config.eval is not None:
        # Seeds of generated problems overlap when they are close: start after the training ones.
        behind, size = seed + num_problems(config), config.eval_sequences
        held_out = open_source(config.eval, config, behind, "data.eval", size)
        if held_out.table is None:
            given = StreamSamples(held_out, encoder, config, seed).hold_out()
        else:
            given = held_out_samples(prepare(held_out, config, encoder), config, seed)
    if source.table is None:
        samples = StreamSamples(source, encoder, config, seed)
        eval_samples, eval_count = given or samples.hold_out()
        report = DataReport(source.label, None, eval_count, len(eval_samples))
    else:
        documents = prepare(source, config, encoder)
        if given is None:
            count = len(documents)
            if count < 2:
                raise UserError(
                    f"{source.label}: one document cannot be split into a training and a held-out"
                    " part: give more documents, or set data.eval"
                )
            held = min(max(round(config.eval_fraction * count), 1), count - 1)
            order = keyed_rng(seed, HELD_OUT).permutation(count)
            apart = documents.select(np.sort(order[:held]))
            documents = documents.select(np.sort(order[held:]))
            given = held_out_samples(apart, config, seed)
        eval_samples, eval_count = given
        sequences = documents.join(config)
        samples = MapSamples(sequences, config, seed)
        lengths, scale = sequences.lengths, 1.0
        if lengths is None:  # estimated from a few: to tokenize all of them would take long
            count = min(len(sequences), ESTIMATE_DOCUMENTS)
            chosen = keyed_rng(seed, ESTIMATE).choice(len(sequences), count, replace=False)
            lengths = np.asarray([len(sequences[int(index)]) for index in chosen])
            scale = len(sequences) / count
        if scale == 1.0 and lengths.max() <= config.min_context:
            raise no_targets(source.label, config)
        longer = int((lengths > config.seq_len).sum() * scale)
        report = DataReport(
            source=source.label,
            documents=len(documents),
            held_out_documents=eval_count,
            eval_sequences=len(eval_samples),
            sequences=len(sequences),
            dropped_empty=sequences.dropped,
            padded=int((lengths < config.seq_len).sum() * scale),
            truncated=0 if config.format == "text" else longer,
            tokens=int(lengths.sum() * scale),
            exact=sequences.lengths is not None,
        )
    assert eval_samples, "a source that opens gives a sequence"
    scored = (s.targets & s.answers if config.format == "qa" else s.targets for s in eval_samples)
    if not any(is_scored[1:].any() for is_scored in scored):
        raise no_targets(source.label if held_out is None else held_out.label, config)
    pad_id, marker = padding_id(tokenizer), None
    if thoughts is not None and thoughts.positions == "pattern" and thoughts.pattern is not None:
        marker = PatternMarker(thoughts.pattern, tokenizer)
        eval_samples = mark_samples(eval_samples, marker)
    if thoughts is not None and thoughts.positions in ("pattern", "field"):
        check_marks(eval_samples, config, thoughts)
    train_data = TrainData(samples, config.seq_len, pad_id, marker)
    # An unusable stream is an error now, not in the first step.
    first = samples.read(0, FIRST_SAMPLES, range(FIRST_SAMPLES))
    if source.table is None and not any(sample.targets[1:].any() for sample in first):
        raise no_targets(source.label, config)
    return train_data, EvalData(eval_samples, config.seq_len, pad_id), report


def check_marks(samples: Sequence[Encoded], config: DataConfig, thoughts: ThoughtsConfig) -> None:
    """Raises `UserError` if the sequences of an evaluation have no position to think at."""
    if any(sample.targets[n] for sample in samples for n in np.flatnonzero(sample.marked) if n):
        return
    if thoughts.positions == "pattern":
        key, rule = f"thoughts.pattern ({thoughts.pattern!r})", "matches nowhere"
        remedy = "Correct it (it is matched on what the tokens of a sequence decode to)"
    else:
        key, rule = f"data.positions_field ({config.positions_field!r})", "names no character"
        remedy = "Give the records offsets"
    raise UserError(
        f"{key}: {rule} at a target of the held-out sequences (of which there are {len(samples):,})"
        f", so an evaluation would have nothing to think about. {remedy}, or raise"
        " data.eval_sequences."
    )


def no_targets(label: str, config: DataConfig) -> UserError:
    """Builds the error for texts of which nothing is a target."""
    what = "no answer" if config.format == "qa" else "no text"
    return UserError(
        f"{label}: {what} reaches beyond the first data.min_context ({config.min_context}) tokens,"
        " which are no targets: lower it, or give longer texts"
    )


def held_out_samples(
    documents: Documents, config: DataConfig, seed: int
) -> tuple[list[Encoded], int]:
    """Chooses the sequences of an evaluation, at most `eval_sequences`.

    One sequence of every held-out document, in random order; while there are too few and raw
    text is left, further disjoint spans of the same documents. Returns the number of documents too.
    """
    joined = documents.join(config)
    seq_len, limit = config.seq_len, config.eval_sequences
    spans = []
    for place in keyed_rng(seed, EVAL_ORDER).permutation(len(joined))[:limit].tolist():
        document = joined[place]
        count = len(document) // seq_len
        if config.format != "text":
            spans.append([answer_span(document, seq_len)])
        elif count == 0:
            spans.append([document])
        else:
            rng = keyed_rng(seed, EVAL_SPAN, place)
            shift = int(rng.integers(len(document) - count * seq_len + 1))
            starts = (shift + int(n) * seq_len for n in rng.permutation(count))
            spans.append([document.span(start, seq_len) for start in starts])
    chosen = [span for one_each in zip_longest(*spans) for span in one_each if span is not None]
    return [span.without_targets(config.min_context) for span in chosen[:limit]], len(documents)
