"""Which tokens of a document make a sequence: random spans, kept answers, joined chunks."""

from collections.abc import Iterable, Iterator

import numpy as np

from quietstar.data.encoding import EMPTY, Encoded

# First key of every random stream, so that no two uses of one seed share their numbers.
ORDER, SPAN, HELD_OUT, EVAL_ORDER, EVAL_SPAN, ESTIMATE = range(6)


def keyed_rng(seed: int, *keys: int) -> np.random.Generator:
    """Returns a generator that depends on the seed and the keys only."""
    return np.random.default_rng([seed, *keys])


def random_span(document: Encoded, seq_len: int, seed: int, index: int) -> Encoded:
    """Takes the span of a document that the sample of this index in the run sees."""
    if len(document) <= seq_len:
        return document
    start = keyed_rng(seed, SPAN, index).integers(len(document) - seq_len + 1)
    return document.span(int(start), seq_len)


def answer_span(document: Encoded, seq_len: int) -> Encoded:
    """Shortens a record so that its last answer survives.

    The question loses its start; an answer of more than seq_len - 1 tokens keeps one token before
    it and loses its end. Without a known answer the end of the record is kept.
    """
    start = max(len(document) - seq_len, 0)
    if document.answer_start >= 0:
        start = min(start, max(document.answer_start - 1, 0))
    return document.span(start, seq_len)


def held_out_spans(document: Encoded, seq_len: int, seed: int, index: int) -> list[Encoded]:
    """Cuts a held-out document into disjoint spans, in random order, always the same ones."""
    count = len(document) // seq_len
    if count == 0:
        return [document]
    rng = keyed_rng(seed, EVAL_SPAN, index)
    shift = int(rng.integers(len(document) - count * seq_len + 1))
    return [
        document.span(shift + int(place) * seq_len, seq_len) for place in rng.permutation(count)
    ]


def chunks(documents: Iterable[Encoded], seq_len: int) -> Iterator[Encoded]:
    """Joins documents and cuts the whole into chunks of seq_len; the last one may be shorter."""
    rest = EMPTY
    for document in documents:
        joined = Encoded(
            np.concatenate([rest.ids, document.ids]),
            np.concatenate([rest.targets, document.targets]),
            np.concatenate([rest.answers, document.answers]),
        )
        whole = len(joined) - len(joined) % seq_len
        for start in range(0, whole, seq_len):
            yield joined.span(start, seq_len)
        rest = joined.span(whole, seq_len)
    if len(rest) > 1:  # a single token has nothing to predict
        yield rest
