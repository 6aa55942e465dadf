"""Encoded documents with random access, and what is known about them.

A table of up to `EXACT_BYTES` is tokenised once at the start and counted exactly; a larger one is
tokenised document by document as training asks for it, unless an option needs every length.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, List
from datasets.features import Value
from datasets.fingerprint import generate_random_fingerprint
from jaxtyping import Int

from quietstar.config import DataConfig
from quietstar.data.encoding import Encoded, Encoder
from quietstar.data.sources import Source
from quietstar.data.spans import chunks
from quietstar.errors import UserError

EXACT_BYTES = 64 * 2**20  # half a minute of tokenisation on one slow core
ENCODED = Features(
    {
        "ids": List(Value("int32")),
        "targets": List(Value("bool")),
        "answers": List(Value("bool")),
        "answer_start": Value("int64"),
        "rationale": List(Value("int32")),
    }
)


class LazyDocuments:
    """Documents that are tokenised when they are asked for; an empty one gives no tokens."""

    def __init__(self, records: Dataset, encoder: Encoder) -> None:
        """Keeps the canonical records and what encodes them."""
        self._records, self._encoder = records, encoder

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self._records)

    def __getitem__(self, index: int) -> Encoded:
        """Tokenises one document."""
        return self._encoder([self._records[int(index)]])[0]

    def select(self, indices: Int[np.ndarray, " chosen"]) -> "LazyDocuments":
        """Returns the documents at these indices."""
        return LazyDocuments(self._records.select(indices), self._encoder)


class EncodedTable:
    """Documents that were tokenised once, in memory or in a cached arrow file."""

    def __init__(
        self, table: Dataset, lengths: Int[np.ndarray, " documents"] | None = None
    ) -> None:
        """Keeps a table with the columns of `ENCODED`; lengths are counted unless given."""
        self._table = table.with_format("numpy")
        if lengths is None:
            lengths = np.asarray([len(ids) for ids in _column(table, "ids")], np.int64)
        self.lengths = lengths

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> Encoded:
        """Returns one document."""
        row: Any = self._table[int(index)]
        targets, answers = _bools(row["targets"]), _bools(row["answers"])
        start, rationale = int(row["answer_start"]), _ids(row["rationale"])
        return Encoded(_ids(row["ids"]), targets, answers, start, rationale)

    def select(self, indices: Int[np.ndarray, " chosen"]) -> "EncodedTable":
        """Returns the documents at these indices."""
        return EncodedTable(self._table.select(indices), self.lengths[indices])

    def concatenate(self, seq_len: int) -> "EncodedTable":
        """Joins the documents, a thousand at a time, and cuts them into chunks."""

        def join(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
            parts = zip(batch["ids"], batch["targets"], batch["answers"], strict=True)
            documents = (Encoded(_ids(ids), _bools(t), _bools(a)) for ids, t, a in parts)
            return _columns(list(chunks(documents, seq_len)))

        return EncodedTable(_map(self._table, join))


Documents = EncodedTable | LazyDocuments


def encode_table(records: Dataset, encoder: Encoder) -> EncodedTable:
    """Tokenises every record of a table."""

    def encode(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        rows = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        return _columns(encoder(rows))

    return EncodedTable(_map(records, encode))


def prepare(source: Source, config: DataConfig, encoder: Encoder) -> tuple[Documents, int, int]:
    """Turns a source's table into documents to train on or to hold out.

    Returns:
        The documents, how many empty ones were dropped and how many short ones were skipped
        (0 and 0 where documents are tokenised on demand, which drops and skips nothing).

    Raises:
        UserError: If no document is left.
    """
    records = source.table
    assert records is not None, "a stream has no table"
    joined, skip = config.spans == "concatenate", config.short_texts == "skip"
    if not (joined or skip) and records.data.nbytes > EXACT_BYTES:
        return LazyDocuments(records, encoder), 0, 0
    table = encode_table(records, encoder)
    filled = table.lengths > 0
    long_enough = table.lengths >= (config.seq_len if skip and not joined else 1)
    if not filled.any():
        raise UserError(f"{source.label}: every record is empty: give text to learn from")
    if not long_enough.any():
        raise no_text_long_enough(source.label, config.seq_len, int(table.lengths.max()))
    kept = table.select(np.flatnonzero(filled & long_enough))
    return kept, int((~filled).sum()), int((filled & ~long_enough).sum())


def join_documents(table: EncodedTable, config: DataConfig, label: str) -> tuple[EncodedTable, int]:
    """Joins documents into chunks; the short last chunks are kept or skipped.

    Returns:
        The chunks, and how many were skipped.

    Raises:
        UserError: If no chunk is left.
    """
    joined = table.concatenate(config.seq_len)
    if config.short_texts == "pad":
        return joined, 0
    whole = np.flatnonzero(joined.lengths == config.seq_len)
    if len(whole) == 0:
        raise no_text_long_enough(label, config.seq_len, int(joined.lengths.max()))
    return joined.select(whole), len(joined) - len(whole)


def no_text_long_enough(label: str, seq_len: int, longest: int) -> UserError:
    """Builds the error for data of which `short_texts: skip` leaves nothing."""
    return UserError(
        f"{label}: no text has data.seq_len ({seq_len}) tokens (the longest has {longest}) and"
        " data.short_texts is 'skip': lower data.seq_len, or set data.short_texts: pad"
    )


def _columns(encoded: Sequence[Encoded]) -> dict[str, list[Any]]:
    return {
        "ids": [document.ids for document in encoded],
        "targets": [document.targets for document in encoded],
        "answers": [document.answers for document in encoded],
        "answer_start": [document.answer_start for document in encoded],
        "rationale": [document.rationale for document in encoded],
    }


def _map(table: Dataset, function: Any) -> Dataset:
    # The fingerprint of function and tokenizer names a cache file; in memory there is none.
    fingerprint = None if table.cache_files else generate_random_fingerprint()
    with _quiet(table.data.nbytes <= EXACT_BYTES):
        return table.map(
            function,
            batched=True,
            remove_columns=table.column_names,
            features=ENCODED,
            new_fingerprint=fingerprint,
        )


def _column(table: Dataset, name: str) -> Iterator[Any]:
    for batch in table.with_format("numpy").select_columns([name]).iter(batch_size=1000):
        yield from batch[name]  # pyright: ignore[reportArgumentType, reportCallIssue]


def _ids(values: Any) -> np.ndarray:
    return np.asarray(values, np.int32)


def _bools(values: Any) -> np.ndarray:
    return np.asarray(values, np.bool_)


@contextlib.contextmanager
def _quiet(small: bool) -> Iterator[None]:
    """Shows progress bars for long work only."""
    if not small or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
