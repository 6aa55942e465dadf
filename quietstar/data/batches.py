"""Deterministic batches of training and held-out sequences.

The sample at a row of a step depends on the seed and on step * batch_size + row only, so a run is
the same for every cut of its batches into micro-batches and ranks, and after every resume.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.config import DataConfig
from quietstar.config.schema import SYNTHETIC
from quietstar.data.encoding import (
    ESTIMATE,
    EVAL_ORDER,
    HELD_OUT,
    ORDER,
    Documents,
    Encoded,
    EncodedTable,
    Encoder,
    answer_span,
    chunks,
    held_out_spans,
    join_documents,
    keyed_rng,
    no_text_long_enough,
    prepare,
    random_span,
)
from quietstar.data.sources import Record, Source, is_empty, open_source
from quietstar.data.tokenizer import padding_id
from quietstar.errors import UserError

IGNORED = -100  # the label of what is no target, as in torch's cross entropy
ESTIMATE_DOCUMENTS = 256  # tokenized to estimate the figures of a table that is not counted


@dataclass(frozen=True)
class Batch:
    """Sequences of one width.

    Attributes:
        input_ids: Token ids, padded on the right.
        attention_mask: True at a real token.
        labels: The id where the token is a target, -100 elsewhere; not shifted.
        sample_ids: Index of each sample in the run (or in the evaluation).
        answers: True at a token of an answer.
        rationale: Tokens of the gold reasoning, -100 behind them.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Bool[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    sample_ids: Int[Tensor, " batch"]
    answers: Bool[Tensor, "batch seq"]
    rationale: Int[Tensor, "batch rationale"]

    def to(self, device: torch.device) -> "Batch":
        """Returns the same batch on another device."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return Batch(*[tensor.to(device, non_blocking=True) for tensor in tensors])


@dataclass(frozen=True)
class DataReport:
    """What the data are, for the log; figures of the training part unless said otherwise.

    Attributes:
        source: Key and value that named the data.
        documents: Documents to train on, without those dropped or skipped; None for a stream.
        held_out_documents: Documents kept from training, or read from `data.eval`.
        eval_sequences: Sequences of an evaluation.
        sequences: Sequences of an epoch; None for a stream.
        dropped_empty: Records without text or answer, in both parts.
        skipped_short: Texts (in both parts) or last chunks shorter than a sequence, skipped.
        padded: Sequences of an epoch that need padding.
        truncated: Question/answer or chat records longer than a sequence.
        tokens: Tokens of the documents.
        exact: Whether all of it was counted. If not, `padded`, `truncated` and `tokens` are
            estimates from a random sample (None for a stream), and empty records of a large
            table stay in it as samples without targets.
    """

    source: str
    documents: int | None
    held_out_documents: int
    eval_sequences: int
    sequences: int | None = None
    dropped_empty: int = 0
    skipped_short: int = 0
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
        return (
            f"{self.source}: {self.documents:,} documents, {about}{self.tokens:,} tokens,"
            f" {self.sequences:,} sequences an epoch, {held_out}; {about}{self.padded:,} padded,"
            f" {about}{self.truncated:,} truncated, {self.skipped_short:,} short ones skipped,"
            f" {self.dropped_empty:,} empty ones dropped"
        )


# --- Samples --------------------------------------------------------------------------------------


def cut(document: Encoded, config: DataConfig, seed: int, index: int) -> Encoded:
    """Cuts the sample of this index in the run out of its document (or chunk)."""
    if config.format == "text":
        sample = random_span(document, config.seq_len, seed, index)
    else:
        sample = answer_span(document, config.seq_len)
    return sample.without_targets(config.min_context)


class MapSamples:
    """Samples in a new order every epoch: index i is place i % n in the order of epoch i // n.

    Nothing repeats within an epoch, and a sample depends on the seed and its index only.
    """

    def __init__(self, documents: Documents, config: DataConfig, seed: int) -> None:
        self._documents, self._config, self._seed = documents, config, seed
        self._order = lru_cache(maxsize=2)(self._permutation)  # a batch may cross two epochs

    def __len__(self) -> int:
        """Returns the number of samples in an epoch."""
        return len(self._documents)

    def read(self, first: int, size: int, rows: range) -> list[Encoded]:
        """Returns these rows of the batch of `size` samples that starts at index `first`."""
        assert rows.stop <= size, f"rows {rows} of a batch of {size}"
        return [self._sample(first + row) for row in rows]

    def _sample(self, index: int) -> Encoded:
        epoch, place = divmod(index, len(self))
        document = self._documents[int(self._order(epoch)[place])]
        return cut(document, self._config, self._seed, index)

    def _permutation(self, epoch: int) -> np.ndarray:
        return keyed_rng(self._seed, ORDER, epoch).permutation(len(self))


def held_out_samples(documents: Documents, config: DataConfig, seed: int) -> list[Encoded]:
    """Chooses the sequences of an evaluation, at most `eval_sequences`.

    One sequence of every held-out document, in random order; while there are too few and raw
    text is left, further disjoint spans of the same documents.
    """
    places = keyed_rng(seed, EVAL_ORDER).permutation(len(documents))[: config.eval_sequences]
    if config.format == "text":
        spans = [held_out_spans(documents[int(n)], config.seq_len, seed, int(n)) for n in places]
        rounds = range(max(map(len, spans), default=0))
        chosen = [of_one[n] for n in rounds for of_one in spans if n < len(of_one)]
    else:
        chosen = [answer_span(documents[int(place)], config.seq_len) for place in places]
    return [s.without_targets(config.min_context) for s in chosen[: config.eval_sequences]]


def stream_sequences(
    records: Iterator[Record], encoder: Encoder, config: DataConfig
) -> Iterator[Encoded]:
    """Encodes a stream: documents to cut spans from, or joined chunks."""
    encoded = (encoder([record])[0] for record in records)
    documents = (document for document in encoded if len(document))
    if config.spans == "concatenate":
        documents = chunks(documents, config.seq_len)
    shortest = config.seq_len if config.short_texts == "skip" else 1
    return (document for document in documents if len(document) >= shortest)


def stream_head(
    source: Source, encoder: Encoder, config: DataConfig, seed: int
) -> tuple[list[Encoded], int]:
    """Takes the sequences of an evaluation from the head of a stream.

    Returns:
        At most `eval_sequences` sequences, and how many (non-empty) documents they came from:
        those are kept from training.

    Raises:
        UserError: If the stream gives no sequence.
    """
    used = 0

    def count() -> Iterator[Record]:
        nonlocal used
        for record in filled_rows(source):
            used += 1
            yield record

    head = islice(stream_sequences(count(), encoder, config), config.eval_sequences)
    samples = [cut(document, config, seed, place) for place, document in enumerate(head)]
    if not samples:
        raise nothing_left(source, encoder, config, head=0)
    return samples, used


def nothing_left(source: Source, encoder: Encoder, config: DataConfig, head: int) -> UserError:
    """Builds the error for a stream that gives no sequence behind its first `head` documents."""
    rest = islice(filled_rows(source), head, None)
    longest = max((len(encoder([record])[0]) for record in rest), default=0)
    if longest:
        return no_text_long_enough(source.label, config.seq_len, longest)
    if head == 0:
        return UserError(f"{source.label}: every record is empty: give text to learn from")
    return UserError(
        f"{source.label}: the stream holds nothing behind the {head} documents held out for"
        " evaluation: lower data.eval_sequences, or set data.eval"
    )


def filled_rows(source: Source) -> Iterator[Record]:
    """Starts a pass over a source's records without the empty ones."""
    return (record for record in source.rows() if not is_empty(record))


class StreamSamples:
    """Samples of a stream: index i is the i-th behind the held-out head, over and over again.

    Rows are read in order and the last batch is kept, so any cut of a batch costs one pass. To
    go on at a later index reads and drops what lies before; to go back starts the stream again.
    """

    def __init__(
        self, source: Source, encoder: Encoder, config: DataConfig, seed: int, head: int
    ) -> None:
        self._source, self._encoder, self._config = source, encoder, config
        self._seed, self._head = seed, head
        self._restart()

    def read(self, first: int, size: int, rows: range) -> list[Encoded]:
        """Returns these rows of the batch of `size` samples that starts at index `first`."""
        assert rows.stop <= size, f"rows {rows} of a batch of {size}"
        self._fill(first, size)
        return [self._buffer[first + row]() for row in rows]

    def _restart(self) -> None:
        self._items = self._endless()
        self._position = 0
        self._buffer: dict[int, Callable[[], Encoded]] = {}

    def _fill(self, first: int, size: int) -> None:
        if first < self._position and first not in self._buffer:
            self._restart()
        self._buffer = {index: item for index, item in self._buffer.items() if index >= first}
        while self._position < first + size:
            item = next(self._items)
            if self._position >= first:
                self._buffer[self._position] = self._sampler(item, self._position)
            self._position += 1

    def _sampler(self, item: Record | Encoded, index: int) -> Callable[[], Encoded]:
        """Puts off tokenization, so that a row that is never asked for costs nothing."""

        def sample() -> Encoded:
            document = item if isinstance(item, Encoded) else self._encoder([item])[0]
            return cut(document, self._config, self._seed, index)

        return lru_cache(maxsize=1)(sample)

    def _endless(self) -> Iterator[Record | Encoded]:
        while True:
            empty = True
            records = islice(filled_rows(self._source), self._head, None)
            as_records = self._config.spans == "random" and self._config.short_texts == "pad"
            for item in (
                records if as_records else stream_sequences(records, self._encoder, self._config)
            ):
                empty = False
                yield item
            if empty:
                raise nothing_left(self._source, self._encoder, self._config, self._head)


# --- Batches --------------------------------------------------------------------------------------


class TrainData:
    """Training batches by step."""

    def __init__(self, samples: MapSamples | StreamSamples, seq_len: int, pad_id: int) -> None:
        self._samples, self._seq_len, self._pad_id = samples, seq_len, pad_id

    def batch(self, step: int, batch_size: int, rows: range | None = None) -> Batch:
        """Builds the batch of a step, or some of its rows.

        Args:
            step: Optimizer step, from 0.
            batch_size: Sequences of the whole step, over ranks and accumulation.
            rows: The rows wanted, such as one rank's micro-batch; all by default.
        """
        rows = range(batch_size) if rows is None else rows
        first = step * batch_size
        samples = self._samples.read(first, batch_size, rows)
        return collate(samples, [first + row for row in rows], self._seq_len, self._pad_id)


class EvalData:
    """The held-out sequences, the same at every evaluation."""

    def __init__(self, samples: Sequence[Encoded], seq_len: int, pad_id: int) -> None:
        self.samples, self._seq_len, self._pad_id = list(samples), seq_len, pad_id

    def __len__(self) -> int:
        """Returns the number of sequences."""
        return len(self.samples)

    def batches(self, micro_batch_size: int) -> Iterator[Batch]:
        """Yields the sequences in order; the last batch may be smaller."""
        for start in range(0, len(self), micro_batch_size):
            samples = self.samples[start : start + micro_batch_size]
            places = range(start, start + len(samples))
            yield collate(samples, places, self._seq_len, self._pad_id)


def collate(
    samples: Sequence[Encoded], sample_ids: Sequence[int], seq_len: int, pad_id: int
) -> Batch:
    """Pads samples on the right to one width."""
    shape = (len(samples), seq_len)
    ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    mask, answers = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    longest = max((len(sample.rationale) for sample in samples), default=0)
    rationale = np.full((len(samples), longest), IGNORED, np.int64)
    for row, sample in enumerate(samples):
        length = len(sample)
        assert length <= seq_len, f"sample of {length} tokens in a batch of width {seq_len}"
        ids[row, :length] = sample.ids
        mask[row, :length] = True
        labels[row, :length] = np.where(sample.targets, sample.ids, IGNORED)
        answers[row, :length] = sample.answers
        rationale[row, : len(sample.rationale)] = sample.rationale
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        torch.from_numpy(labels),
        torch.tensor(list(sample_ids), dtype=torch.int64),
        torch.from_numpy(answers),
        torch.from_numpy(rationale),
    )


def build_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[TrainData, EvalData, DataReport]:
    """Opens the data of a run.

    Without `data.eval`, a random share of the documents is held out (of a stream, its head); a
    document never is in both parts.

    Args:
        config: What to read and how to cut it.
        tokenizer: The model's tokenizer.
        seed: Seed of order, spans, held-out part and generated problems.

    Returns:
        Training data, held-out data, and what is known about them.

    Raises:
        UserError: If the data cannot be read or used; the message says what to do.
    """
    if config.train is None:
        raise UserError("data.train: is not set: give a file, a folder, a hub id or a task")
    encoder = Encoder(tokenizer, config)
    source = open_source(config.train, config, seed)
    held_out = None
    if config.eval is None and config.train.startswith(SYNTHETIC):
        config = config.model_copy(update={"eval": config.train})  # its own held-out problems
    if config.eval is not None:
        # Seeds of generated problems overlap when they are close: start behind the training ones.
        behind, size = seed + config.size, config.eval_sequences
        held_out = open_source(config.eval, config, behind, "data.eval", size)
    if source.table is None:
        eval_samples, count = _evaluation(held_out or source, config, encoder, seed)
        samples = StreamSamples(source, encoder, config, seed, head=0 if held_out else count)
        report = DataReport(source.label, None, count, len(eval_samples))
    else:
        samples, eval_samples, report = _build_map(source, held_out, config, encoder, seed)
    assert eval_samples, "a source that opens gives a sequence"
    pad_id = padding_id(tokenizer)
    train_data = TrainData(samples, config.seq_len, pad_id)
    train_data.batch(0, 1)  # an unusable stream is an error now, not in the first step
    return train_data, EvalData(eval_samples, config.seq_len, pad_id), report


def _evaluation(
    source: Source, config: DataConfig, encoder: Encoder, seed: int
) -> tuple[list[Encoded], int]:
    """Returns the sequences of an evaluation, and how many documents they came from."""
    if source.table is None:
        return stream_head(source, encoder, config, seed)
    documents, _, _ = prepare(source, config, encoder)
    joined, _ = _join(documents, config, source.label)
    return held_out_samples(joined, config, seed), len(documents)


def _build_map(
    source: Source, held_out: Source | None, config: DataConfig, encoder: Encoder, seed: int
) -> tuple[MapSamples, list[Encoded], DataReport]:
    documents, dropped, skipped = prepare(source, config, encoder)
    if held_out is not None:
        eval_samples, eval_count = _evaluation(held_out, config, encoder, seed)
    else:
        documents, apart = split(documents, config.eval_fraction, seed, source.label)
        joined, _ = _join(apart, config, source.label)
        eval_samples, eval_count = held_out_samples(joined, config, seed), len(apart)
    sequences, skipped_chunks = _join(documents, config, source.label)
    exact = isinstance(sequences, EncodedTable)
    if exact:
        lengths, scale = sequences.lengths, 1.0
    else:  # estimate from a few documents, since to tokenize all of them would take long
        count = min(len(sequences), ESTIMATE_DOCUMENTS)
        chosen = keyed_rng(seed, ESTIMATE).choice(len(sequences), count, replace=False)
        lengths = np.asarray([len(sequences[int(index)]) for index in chosen])
        scale = len(sequences) / count
    longer = int((lengths > config.seq_len).sum() * scale)
    report = DataReport(
        source=source.label,
        documents=len(documents),
        held_out_documents=eval_count,
        eval_sequences=len(eval_samples),
        sequences=len(sequences),
        dropped_empty=dropped,
        skipped_short=skipped + skipped_chunks,
        padded=int((lengths < config.seq_len).sum() * scale),
        truncated=0 if config.format == "text" else longer,
        tokens=int(lengths.sum() * scale),
        exact=exact,
    )
    return MapSamples(sequences, config, seed), eval_samples, report


def split(
    documents: Documents, fraction: float, seed: int, label: str
) -> tuple[Documents, Documents]:
    """Splits documents at random into a training and a held-out part, neither of them empty.

    Raises:
        UserError: If there is only one document.
    """
    count = len(documents)
    if count < 2:
        raise UserError(
            f"{label}: one document cannot be split into a training and a held-out part: give more"
            " documents, or set data.eval"
        )
    held = min(max(round(fraction * count), 1), count - 1)
    order = keyed_rng(seed, HELD_OUT).permutation(count)
    return documents.select(np.sort(order[held:])), documents.select(np.sort(order[:held]))


def _join(documents: Documents, config: DataConfig, label: str) -> tuple[Documents, int]:
    if config.spans == "random":
        return documents, 0
    assert isinstance(documents, EncodedTable), type(documents)
    return join_documents(documents, config, label)
