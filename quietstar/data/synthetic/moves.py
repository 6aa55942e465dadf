"""Task ``moves``, that of the built-in demo: answers that need several serial steps.

A dancer stands on one of ten places, does some moves, and stands on another. Every
move is a fixed permutation of the places, the same in every text, so the answer is a composition
of permutations: one look-up after the other, more of them than a shallow model has layers.

    Mia stands on 4 . She does spin hop bow turn . Now Mia stands on 7

In text to pre-train on, some dancers do a single move, and many sentences stop for an aside between
dashes. Where an aside comes just before the last place, a few people work it out (the
place after every move); most chatter, as everybody does elsewhere:

    ... Now Mia stands on — 9 2 5 7 — 7
    ... Now Mia stands on — as ever we hoped — 7

So a model that learned this text can go on after an aside, but opens it with chatter far more often
than with work: what it has to teach itself is which thoughts help, and where. Names, full stops and
the like are predictable without any thought; moves, first places and answers are not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Annotated

import numpy as np
from pydantic import Field

from quietstar.config import Section
from quietstar.config.rules import DEFAULT_STEPS
from quietstar.data.records import Record

Share = Annotated[float, Field(ge=0, le=1)]

DASH = "—"
NAMES = ("Mia", "Leo", "Ana", "Tom", "Eva", "Max", "Ida", "Sam")
PRONOUNS = dict(zip(NAMES, ("She", "He") * 4, strict=True))
MOVES = (
    *("spin", "hop", "bow", "turn", "slide", "leap", "kick", "sway", "dip", "twirl", "glide"),
    *("step", "jump", "roll", "skip", "swing"),
)
PLACES = tuple("0123456789")
CHATTER = (
    ("as", "just", "much", "here"),
    ("ever", "like", "so", "where"),
    ("we", "you", "they", "all"),
    ("hoped", "said", "saw", "knew"),
)
FILLER = ("stands", "on", ".", "does", "Now", DASH)
VOCABULARY = (
    *PLACES,
    *MOVES,
    *NAMES,
    *("She", "He"),
    *FILLER,
    *(word for words in CHATTER for word in words),
)


class MovesOptions(Section):
    """``data.task_options`` of ``synthetic:moves``."""

    num_steps: int = Field(DEFAULT_STEPS, ge=1, le=12, description="Moves of a problem.")
    num_moves: int = Field(12, ge=2, le=len(MOVES), description="Different moves.")
    simple_share: Share = Field(
        0.0, description="Of the training texts with a single move, from which moves are learned."
    )
    aside_share: Share = Field(
        0.0, description="Of the training texts with an aside before the answer."
    )
    worked_share: Share = Field(0.2, description="Of those asides that work it out.")
    chatter_share: Share = Field(0.0, description="Of the training texts with an aside elsewhere.")
    held_out_share: Share = Field(0.1, description="Of all problems that only evaluations see.")
    meaning_seed: int = Field(
        0, ge=0, lt=2**32, description="Of the permutations; the same in training and evaluation."
    )


def moves_records(options: MovesOptions, size: int, seed: int, held_out: bool) -> Iterator[Record]:
    """Problems as records with ``question``, ``answer`` and ``rationale``.

    Args:
        options: Of the task.
        size: Number of problems.
        seed: Of the problems; the moves mean the same under every seed.
        held_out: Problems of the held-out part, without asides, or of the training part.
    """
    meaning = np.random.default_rng(options.meaning_seed)
    tables = [meaning.permutation(len(PLACES)) for _ in range(options.num_moves)]
    rng = np.random.default_rng([seed, held_out])
    made = 0
    while made < size:
        start = int(rng.integers(len(PLACES)))
        is_simple = not held_out and rng.random() < options.simple_share
        moves = rng.integers(options.num_moves, size=1 if is_simple else options.num_steps).tolist()
        if not is_simple and _is_held_out(start, moves, options.held_out_share) != held_out:
            continue
        made += 1
        places = [start]
        for move in moves:
            places.append(int(tables[move][places[-1]]))
        yield _record(places, moves, options, rng, with_aside=not held_out)


def _is_held_out(start: int, moves: list[int], share: float) -> bool:
    """By a hash of the problem, so that every seed and size agrees."""
    digest = hashlib.blake2b(bytes([start, *moves]), digest_size=4).digest()
    return int.from_bytes(digest, "big") < share * 2**32


def _record(
    places: list[int],
    moves: list[int],
    options: MovesOptions,
    rng: np.random.Generator,
    with_aside: bool,
) -> Record:
    name = NAMES[rng.integers(len(NAMES))]
    steps = [PLACES[place] for place in places[1:]]
    words = [name, "stands", "on", PLACES[places[0]], ".", PRONOUNS[name], "does"]
    words += [*(MOVES[move] for move in moves), ".", "Now", name, "stands", "on"]
    elsewhere = int(rng.integers(1, len(words)))
    before, worked, chatter = rng.random(3) < (
        options.aside_share, options.worked_share, options.chatter_share
    )  # fmt: skip
    if with_aside and before:
        words += _aside(steps if worked else _chatter(options.num_steps, rng))
    if with_aside and chatter:
        words[elsewhere:elsewhere] = _aside(_chatter(options.num_steps, rng))
    return {"question": " ".join(words), "answer": steps[-1], "rationale": " ".join(steps)}


def _aside(words: list[str]) -> list[str]:
    return [DASH, *words, DASH]


def _chatter(length: int, rng: np.random.Generator) -> list[str]:
    slots = (CHATTER[index % len(CHATTER)] for index in range(length))
    return [words[rng.integers(len(words))] for words in slots]
