"""Tokens before which the model thinks, by a regular expression on what the tokens decode to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import regex
from jaxtyping import Bool
from transformers import PreTrainedTokenizerBase

from quietstar.data.tokenizer import decode_behind
from quietstar.errors import UserError, reason_of

PATTERN_SECONDS = 10.0
"""Time that a pattern gets for a text, which takes it milliseconds unless it backtracks."""
_BROKEN = "\ufffd"
"""What some of the bytes of a character decode to."""
_MOST_TOKENS = 8
"""Of one character, whose bytes are four at most: those of more are no text."""


class PatternMarker:
    r"""Marks the tokens that hold the first character of what a pattern finds in a text.

    A text is what its tokens decode to, so that any tokenizer serves and a match may begin inside a
    token. Special tokens are part of it, but no match that begins in them counts. Where the pattern
    has a group that took part in the match, the first character of group 1 counts:
    ``=\s*(\d+)`` marks the numbers after equals signs.

    Args:
        pattern: Regular expression of Python; ``^`` and ``$`` match at every line.
        tokenizer: Tokenizer of the texts.

    Raises:
        UserError: The pattern cannot be compiled.
    """

    def __init__(self, pattern: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._key = f"thoughts.pattern ({pattern!r})"
        try:
            # Python's own module has no time limit, and stops every thread while it backtracks.
            self._pattern = regex.compile(pattern, regex.MULTILINE | regex.VERSION0)
        except Exception as problem:  # what `re` takes and `regex` does not
            raise UserError(
                f"{self._key}: cannot be compiled ({reason_of(problem)}). Write it in another way."
            ) from problem
        self._special = tokenizer.all_special_ids
        self._decode = lru_cache(2**18)(lambda run: decode_behind(tokenizer, [list(run)])[0])

    def __call__(self, ids: Sequence[int]) -> Bool[np.ndarray, " tokens"]:
        """Returns the mask of the marked tokens of a text.

        Raises:
            UserError: The pattern takes more than `PATTERN_SECONDS`.
        """
        parts, begins, length = [], [], 0
        for text, starts in self._spell(ids):
            if not text:  # such a token begins with the one before it
                starts = [begins[-1] - length if begins else -1] * len(starts)
            begins += [length + start for start in starts]
            parts.append(text)
            length += len(text)
        marked, first = np.zeros(len(ids), np.bool_), np.asarray(begins, np.int64)
        matches = self._pattern.finditer(
            "".join(parts), timeout=PATTERN_SECONDS, concurrent=True
        )  # fmt: skip
        try:
            for match in matches:
                group = match.start(1) if self._pattern.groups else -1
                start = match.start() if group < 0 else group
                if start < length:
                    # Of the tokens that share a character the first one.
                    holds = first[np.searchsorted(first, start, side="right") - 1]
                    marked[np.searchsorted(first, holds)] = True
        except TimeoutError:
            raise UserError(
                f"{self._key}: takes more than {PATTERN_SECONDS:g} seconds for a text of "
                f"{len(ids):,} tokens. Write it without repetitions inside of repetitions."
            ) from None
        return marked & ~np.isin(ids, self._special)

    def _spell(self, ids: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
        """Yields the text of each token, or of several that share characters, and their starts."""
        run: tuple[int, ...] = ()
        starts: list[int] = []
        text, complete = "", 0
        for token in ids:
            run, starts = (*run, token), [*starts, complete]
            text = self._decode(run)
            if text.endswith(_BROKEN) and len(run) < _MOST_TOKENS:
                complete = len(text.rstrip(_BROKEN))
            else:
                yield text, starts
                run, starts, complete = (), [], 0
        if run:
            yield text, starts
