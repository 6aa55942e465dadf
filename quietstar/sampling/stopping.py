"""Where thoughts end: texts that end a thought as soon as the model has written one of them.

Texts are matched on what tokens decode to, so a text may begin and end inside a token. A step for
all thoughts is one lookup in a table, without a look at the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.errors import UserError

_ANCHOR = "a"
"""Stands before each token when it is decoded: some tokenizers drop a space at the beginning."""
_MOST_STATES = 1000
"""The table has a row for each: 1,000 for a vocabulary of 150,000 are 300 MB."""


class StopTexts:
    """An automaton over tokens that says when one of some texts has been written.

    A state is the longest end of what was written that begins one of the texts (Aho and Corasick,
    1975); from the last state, `ended`, no token leads away.

    Args:
        texts: Texts that end a thought, one at least.
        pieces: What each token of the vocabulary adds to a text.
        end_ids: Tokens that end a thought whatever the texts are: end-of-text.

    Raises:
        UserError: A text that no tokens can write, or too many long ones.
    """

    def __init__(self, texts: Sequence[str], pieces: Sequence[str], end_ids: Iterable[int]) -> None:
        if (count := sum(map(len, texts))) > _MOST_STATES:
            raise UserError(
                f"thoughts.stop: has {count:,} characters, but at most {_MOST_STATES:,} fit into "
                "the table of its states. Give fewer or shorter texts."
            )
        order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i]))
        for text in texts:
            table = _build_table([text], pieces, order)
            if not _can_end(table):
                raise UserError(
                    f"thoughts.stop: {text!r} cannot be written with the tokens of this model, of "
                    "which each must hold whole characters of it, so no thought would end with it. "
                    "Give another text."
                )
        self.table = _build_table(texts, pieces, order)
        self.ended = len(self.table) - 1
        self.table[:, list(end_ids)] = self.ended

    @classmethod
    def of_tokenizer(
        cls, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int
    ) -> StopTexts:
        """Build it for a model with ``vocab_size`` rows of embeddings."""
        pieces = token_pieces(tokenizer) + [""] * vocab_size
        end: Any = tokenizer.eos_token_id
        return cls(texts, pieces[:vocab_size], [] if end is None else [end])

    def step(
        self, state: Int[Tensor, " *thoughts"], tokens: Int[Tensor, " *thoughts"]
    ) -> Int[Tensor, " *thoughts"]:
        """Return the states behind the next tokens; a thought begins in state 0."""
        if self.table.device != tokens.device:
            self.table = self.table.to(tokens.device)
        return self.table[state, tokens.clamp(min=0)].long()

    def is_ended(
        self, thoughts: Int[Tensor, "length thoughts batch positions"]
    ) -> Bool[Tensor, "thoughts batch positions"]:
        """Say which of these thoughts have written a text; padding is skipped."""
        state = torch.zeros_like(thoughts[0])
        for tokens in thoughts:
            state = self.step(state, tokens).where(tokens >= 0, state)
        return state == self.ended


def token_pieces(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what each token adds to a text that goes on with it.

    A token of some bytes of a character has the replacement character.
    """
    anchor = tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"]
    begin = len(str(tokenizer.decode(anchor)))
    rows = [[*anchor, token] for token in range(len(tokenizer))]
    return [text[begin:] for text in tokenizer.batch_decode(rows)]


def _build_table(
    texts: Sequence[str], pieces: Sequence[str], order: Sequence[int]
) -> Int[Tensor, "states vocab"]:
    """Tabulate the next state for every state and token; the last state has ended.

    ``order`` has the tokens from the longest piece to the shortest.
    """
    letters = {letter: n for n, letter in enumerate(sorted(set("".join(texts))))}
    by_letter = torch.tensor(_by_letter(texts, list(letters)), dtype=torch.int16)
    ended, other = len(by_letter) - 1, len(letters)
    table = torch.arange(ended + 1, dtype=torch.int16)[:, None].repeat(1, len(pieces))
    texts_left, index, place = [pieces[token] for token in order], torch.tensor(order), 0
    while texts_left:  # all states and tokens at once, letter by letter
        while texts_left and len(texts_left[-1]) <= place:
            texts_left.pop()
        spelled = torch.tensor(
            [letters.get(text[place], other) for text in texts_left], dtype=torch.long
        )
        some = index[: len(texts_left)]
        table[:, some] = by_letter[table[:, some].long(), spelled]
        place += 1
    return table


def _by_letter(texts: Sequence[str], letters: Sequence[str]) -> list[list[int]]:
    """Tabulate the next state for every state and letter; the last column is any other letter."""
    begun = sorted({text[:n] for text in texts for n in range(len(text))}, key=len)
    states = {prefix: n for n, prefix in enumerate(begun)}
    ended = len(begun)

    def after(written: str) -> int:
        ends = [written[n:] for n in range(len(written) + 1)]
        if any(end in texts for end in ends):
            return ended
        return next(states[end] for end in ends if end in states)

    rows = [[*(after(prefix + letter) for letter in letters), 0] for prefix in begun]
    return [*rows, [ended] * (len(letters) + 1)]


def _can_end(table: Shaped[Tensor, "states vocab"]) -> bool:
    """Say whether tokens lead from the first state to the last one."""
    reached, new = {0}, {0}
    while new:
        new = set(table[sorted(new)].unique().tolist()) - reached
        reached |= new
    return len(table) - 1 in reached
