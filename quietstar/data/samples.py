"""The samples of a run by index: from documents with random access, or from a stream."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice

import numpy as np

from quietstar.config import DataConfig
from quietstar.data.documents import Documents, no_text_long_enough
from quietstar.data.encoding import Encoded, Encoder
from quietstar.data.records import Record, is_empty
from quietstar.data.sources import Source
from quietstar.data.spans import (
    EVAL_ORDER,
    ORDER,
    answer_span,
    chunks,
    held_out_spans,
    keyed_rng,
    random_span,
)
from quietstar.errors import UserError


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
        """Keeps the documents (or chunks) of the training part."""
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
    chosen = _held_out(documents, config, seed)
    return [sample.without_targets(config.min_context) for sample in chosen]


def _held_out(documents: Documents, config: DataConfig, seed: int) -> list[Encoded]:
    order = keyed_rng(seed, EVAL_ORDER).permutation(len(documents))[: config.eval_sequences]
    if config.format != "text":
        return [answer_span(documents[int(place)], config.seq_len) for place in order]
    spans = [held_out_spans(documents[int(n)], config.seq_len, seed, int(n)) for n in order]
    rounds = range(max(map(len, spans), default=0))
    in_turn = [of_one[n] for n in rounds for of_one in spans if n < len(of_one)]
    return in_turn[: config.eval_sequences]


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
        """Starts the stream behind its first `head` documents."""
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
        """Puts off tokenisation, so that a row that is never asked for costs nothing."""

        def sample() -> Encoded:
            document = item if isinstance(item, Encoded) else self._encoder([item])[0]
            return cut(document, self._config, self._seed, index)

        return lru_cache(maxsize=1)(sample)

    def _endless(self) -> Iterator[Record | Encoded]:
        while True:
            empty = True
            for item in self._one_pass():
                empty = False
                yield item
            if empty:
                raise nothing_left(self._source, self._encoder, self._config, self._head)

    def _one_pass(self) -> Iterator[Record] | Iterator[Encoded]:
        records = islice(filled_rows(self._source), self._head, None)
        if self._config.spans == "random" and self._config.short_texts == "pad":
            return records
        return stream_sequences(records, self._encoder, self._config)
