"""Where thoughts end: texts that end a thought as soon as the model has written one of them.

Texts are matched on what tokens decode to, so a text may begin and end inside a token. A step for
all thoughts is one lookup in a table, without a look at the host.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.data.tokenizer import decode_behind
from quietstar.errors import UserError

_NO_LETTER = "\ufffd"
"""In no text that tokens can write: the replacement character of half a character."""
_MOST_STATES = 300
"""The table has a row for each: 300 for a vocabulary of 150,000 are 90 MB."""


class StopTexts:
    """An automaton over tokens that says when one of some texts has been written.

    A state is the longest end of what was written that begins one of the texts (Aho and Corasick,
    1975); from the last state, `ended`, no token leads away.

    Args:
        texts: Texts that end a thought, one at least.
        pieces: What each token of the vocabulary adds to a text.
        end_ids: Tokens that end a thought whatever the texts are: end-of-text.

    Attributes:
        fewest: The fewest tokens that write each text.

    Raises:
        UserError: A text that no tokens can write, or too many long ones.
    """

    def __init__(self, texts: Sequence[str], pieces: Sequence[str], end_ids: Iterable[int]) -> None:
        if (count := sum(map(len, texts))) > _MOST_STATES:
            raise UserError(
                f"thoughts.stop: has {count:,} characters, but at most {_MOST_STATES:,} fit into "
                "the table of its states. Give fewer or shorter texts."
            )
        spelled = _Spelled(pieces)
        self.fewest: dict[str, int] = {}
        for text in texts:
            fewest = _fewest_tokens(_build_table([text], spelled))
            if fewest is not None:
                self.fewest[text] = fewest
            else:
                raise UserError(
                    f"thoughts.stop: {text!r} cannot be written with the tokens of this model, of "
                    "which each must hold whole characters of it, so no thought would end with it. "
                    "Give another text."
                )
        self.table = _build_table(texts, spelled)
        self.ended = len(self.table) - 1
        self.table[:, list(end_ids)] = self.ended

    @classmethod
    def of_tokenizer(
        cls, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int
    ) -> StopTexts:
        """Build it for a model with ``vocab_size`` rows of embeddings.

        A special token writes its name as a whole, for texts that hold it, and nothing else.
        """
        pieces = token_pieces(tokenizer) + [""] * vocab_size
        for token in tokenizer.all_special_ids:
            if not any(pieces[token] in text for text in texts):
                pieces[token] = _NO_LETTER
        end: Any = tokenizer.eos_token_id
        return cls(texts, pieces[:vocab_size], [] if end is None else [end])

    def step(
        self, state: Int[Tensor, " *thoughts"], tokens: Int[Tensor, " *thoughts"]
    ) -> Int[Tensor, " *thoughts"]:
        """Return the states after the next tokens; a thought begins in state 0."""
        if self.table.device != tokens.device:
            self.table = self.table.to(tokens.device)
        return self.table[state, tokens.clamp(min=0)].long()

    def is_ended(self, thoughts: Int[Tensor, "*thoughts length"]) -> Bool[Tensor, "*thoughts"]:
        """Say which of these thoughts have written a text; padding is skipped."""
        state = torch.zeros_like(thoughts[..., 0])
        for tokens in thoughts.unbind(-1):
            state = self.step(state, tokens).where(tokens >= 0, state)
        return state == self.ended


def token_pieces(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what each token adds to a text that goes on with it.

    A token of some bytes of a character has the replacement character.
    """
    return decode_behind(tokenizer, [[token] for token in range(len(tokenizer))])


class _Spelled:
    """The letters of all tokens, place by place, for the tokens that are as long.

    Attributes:
        tokens: From the longest to the shortest.
        columns: Of each place, the code points of the letters there; of the first tokens.
    """

    def __init__(self, pieces: Sequence[str]) -> None:
        order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i]))
        self.tokens, left = torch.tensor(order, dtype=torch.long), [pieces[i] for i in order]
        self.columns: list[Tensor] = []
        for place in range(len(left[0]) if left else 0):
            while len(left[-1]) <= place:
                left.pop()
            self.columns.append(torch.tensor([ord(piece[place]) for piece in left]))


def _build_table(texts: Sequence[str], spelled: _Spelled) -> Int[Tensor, "states vocab"]:
    """Tabulate the next state for every state and token; the last state has ended."""
    letters = sorted(set("".join(texts)))
    by_letter = torch.tensor(_by_letter(texts, letters), dtype=torch.int16)
    index = torch.full((sys.maxunicode + 1,), len(letters))
    index[[ord(letter) for letter in letters]] = torch.arange(len(letters))
    states = torch.arange(len(by_letter), dtype=torch.int16)
    table = states[:, None].repeat(1, len(spelled.tokens))
    for column in spelled.columns:  # all states and tokens at once, letter by letter
        some = spelled.tokens[: len(column)]
        table[:, some] = by_letter[table[:, some].long(), index[column]]
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


def _fewest_tokens(table: Shaped[Tensor, "states vocab"]) -> int | None:
    """Count the fewest tokens from the first state to the last one; None if none lead there."""
    reached, new, count = {0}, {0}, 0
    while new:
        if len(table) - 1 in reached:
            return count
        new = set(table[sorted(new)].unique().tolist()) - reached
        reached |= new
        count += 1
    return None
