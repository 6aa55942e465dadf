"""Synthetic problems whose answers need several serial steps: the task of the built-in demo.

Task ``moves``: a dancer stands on one of ten places, does some moves, and stands on another. Every
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
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from quietstar.config.rules import DEFAULT_STEPS
from quietstar.data.records import Record
from quietstar.errors import UserError

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
TASKS = ("moves",)


@dataclass(frozen=True)
class MovesOptions:
    """``data.task_options`` of ``synthetic:moves``.

    Attributes:
        num_steps: Moves of a problem, its difficulty.
        num_moves: Different moves.
        simple_share: Share of the training texts with a single move, from which moves are learned.
        aside_share: Share of the training texts with an aside before the answer.
        worked_share: Share of those asides that work it out.
        chatter_share: Share of the training texts with an aside elsewhere.
        held_out_share: Share of all problems that only evaluations see.
        meaning_seed: Draws the permutations; the same for training and evaluation.
    """

    num_steps: int = DEFAULT_STEPS
    num_moves: int = 12
    simple_share: float = 0.0
    aside_share: float = 0.0
    worked_share: float = 0.2
    chatter_share: float = 0.0
    held_out_share: float = 0.1
    meaning_seed: int = 0

    @classmethod
    def from_mapping(cls, options: dict[str, Any]) -> MovesOptions:
        """From the config.

        Raises:
            UserError: Unknown option, or a value that is out of range.
        """
        known = {field.name: field for field in fields(cls)}
        for name, value in options.items():
            if name not in known:
                raise _wrong_option(name, value, f"unknown; known are {', '.join(known)}")
            _check_option(name, value)
        return cls(**options)


_RANGES = {"num_steps": (1, 12), "num_moves": (2, len(MOVES)), "meaning_seed": (0, 2**32 - 1)}


def _check_option(name: str, value: Any) -> None:
    whole = name in _RANGES
    low, high = _RANGES.get(name, (0, 1))
    kind = "an integer" if whole else "a number"
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not fits or not low <= value <= high:
        raise _wrong_option(name, value, f"must be {kind} from {low} to {high}")


def _wrong_option(name: str, value: Any, rule: str) -> UserError:
    return UserError(f"data.task_options: {name}: {value!r} {rule}; correct it or leave it out")


def check_task(label: str, task: str) -> None:
    """Refuse an unknown task.

    Raises:
        UserError: It is no synthetic task.
    """
    if task not in TASKS:
        raise UserError(f"{label}: there is no synthetic task {task!r}; known: {', '.join(TASKS)}")


def moves_records(options: MovesOptions, size: int, seed: int, held_out: bool) -> Iterator[Record]:
    """Problems as records with ``question``, ``answer`` and ``steps``.

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
    return {"question": " ".join(words), "answer": steps[-1], "steps": " ".join(steps)}


def _aside(words: list[str]) -> list[str]:
    return [DASH, *words, DASH]


def _chatter(length: int, rng: np.random.Generator) -> list[str]:
    slots = (CHATTER[index % len(CHATTER)] for index in range(length))
    return [words[rng.integers(len(words))] for words in slots]
