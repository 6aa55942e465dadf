"""Synthetic tasks: generated text whose answers need several serial steps.

``moves`` is the task of the built-in demo. A dancer stands on one of ten places, does some moves,
and stands on another. Every move is a fixed permutation of the places, the same in every text, so
the answer is a composition of permutations: one look-up after the other, more of them than a
shallow model has layers.

    Mia stands on 4 . She does spin hop bow turn . Now Mia stands on 7

In text to pretrain on, some dancers do a single move, and many sentences stop for an aside between
dashes. Where an aside comes just before the last place, a few people work it out (the place after
every move); most chatter, as everybody does elsewhere:

    ... Now Mia stands on — 9 2 5 7 — 7
    ... Now Mia stands on — as ever we hoped — 7

So a model that learned this text can go on after an aside, but opens it with chatter far more often
than with work: what it has to teach itself is which thoughts help, and where. Names, periods and
the like are predictable without any thought; moves, first places and answers are not.

``sums`` has the same asides in the chain sums of ``reasoning_gym:chain_sum``:

    ... arithmetic problem: 4 - 1 - 7 + 7 = (4-1=3,3-7=-4,-4+7=3) 3
    ... arithmetic problem: 4 - 1 - 7 + 7 = (as ever we hoped to see) 3

A record has a ``question``, an ``answer`` and a ``rationale``: the places, or the sums, that lead
to the answer.
"""

import contextlib
import hashlib
import io
import itertools
import random
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError

from quietstar.config import Section
from quietstar.errors import UserError

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
VOCABULARY = (
    *(*PLACES, *MOVES, *NAMES, "She", "He"),
    *("stands", "on", ".", "does", "Now", DASH),
    *(word for words in CHATTER for word in words),
)
_SUM_CHATTER = (("as", "just", "much", "not"), *CHATTER[1:])
_TERM = re.compile(r"([+-]?) ?(-?\d+)")
_MOST_REJECTED = 100_000  # draws in a row that belong to the other part: then there is no problem


class MovesOptions(Section):
    """``data.task_options`` of ``synthetic:moves``."""

    num_steps: Annotated[int, Field(ge=1, le=12)] = 4
    """Moves of a problem."""
    num_moves: Annotated[int, Field(ge=2, le=len(MOVES))] = 12
    """Number of different moves."""
    simple_share: Share = 0.0
    """Share of the training texts with a single move, from which moves are learned."""
    aside_share: Share = 0.0
    """Share of the training texts with an aside before the answer."""
    worked_share: Share = 0.2
    """Share of those asides that work it out."""
    chatter_share: Share = 0.0
    """Share of the training texts with an aside elsewhere."""
    held_out_share: Annotated[float, Field(ge=0.001, le=0.999)] = 0.1
    """Share of all problems that only evaluations see."""
    meaning_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the permutations; the same in training and evaluation."""


class SumsOptions(Section):
    """``data.task_options`` of ``synthetic:sums``."""

    min_terms: Annotated[int, Field(ge=2, le=20)] = 3
    """Fewest terms of a sum."""
    max_terms: Annotated[int, Field(ge=2, le=20)] = 5
    """Most terms of a sum."""
    max_digits: Annotated[int, Field(ge=1, le=6)] = 1
    """Most digits of a term."""
    aside_share: Share = 0.0
    """Share of the texts with an aside before the answer."""
    worked_share: Share = 0.2
    """Share of those asides that work it out."""


def moves_records(
    options: MovesOptions, size: int, seed: int, held_out: bool
) -> Iterator[dict[str, str]]:
    """Yields problems of ``moves``, held-out ones without asides.

    The moves mean the same under every seed. Raises `UserError` if the part is empty, as the
    held-out one is with ``held_out_share: 0``.
    """
    meaning = np.random.default_rng(options.meaning_seed)
    tables = [meaning.permutation(len(PLACES)) for _ in range(options.num_moves)]
    rng = np.random.default_rng([seed, held_out])

    def chat() -> list[str]:
        slots = (CHATTER[index % len(CHATTER)] for index in range(options.num_steps))
        return [slot[rng.integers(len(slot))] for slot in slots]

    made = rejected = 0
    while made < size:
        start = int(rng.integers(len(PLACES)))
        is_simple = not held_out and rng.random() < options.simple_share
        moves = rng.integers(options.num_moves, size=1 if is_simple else options.num_steps).tolist()
        # A hash of the problem says which part it belongs to, so that every seed and size agrees.
        digest = hashlib.blake2b(bytes([start, *moves]), digest_size=4).digest()
        is_held_out = int.from_bytes(digest, "big") < options.held_out_share * 2**32
        if not is_simple and is_held_out != held_out:
            rejected += 1
            if rejected == _MOST_REJECTED:
                part = "held out" if held_out else "to train on"
                raise UserError(
                    f"data.task_options: held_out_share: {options.held_out_share:g} leaves no"
                    f" problem {part}; set it between 0 and 1, such as 0.1"
                )
            continue
        made, rejected = made + 1, 0
        places = [start]
        for move in moves:
            places.append(int(tables[move][places[-1]]))
        steps = [PLACES[place] for place in places[1:]]
        name = NAMES[rng.integers(len(NAMES))]
        words = [name, "stands", "on", PLACES[start], ".", PRONOUNS[name], "does"]
        words += [*(MOVES[move] for move in moves), ".", "Now", name, "stands", "on"]
        elsewhere = int(rng.integers(1, len(words)))
        shares = (options.aside_share, options.worked_share, options.chatter_share)
        before, worked, chatter = rng.random(3) < shares
        if not held_out and before:
            words += [DASH, *(steps if worked else chat()), DASH]
        if not held_out and chatter:
            words[elsewhere:elsewhere] = [DASH, *chat(), DASH]
        yield {"question": " ".join(words), "answer": steps[-1], "rationale": " ".join(steps)}


def sums_records(
    options: SumsOptions, size: int, seed: int, held_out: bool
) -> Iterator[dict[str, str]]:
    """Yields problems of ``sums``, held-out ones without asides."""
    gym = import_reasoning_gym("synthetic:sums")
    terms = options.model_dump(include={"min_terms", "max_terms", "max_digits"})
    rng = random.Random(f"{seed}-{held_out}")
    for problem in gym.create_dataset("chain_sum", size=size, seed=seed, **terms):
        question, answer = str(problem["question"]), str(problem["answer"])
        rationale = chain_sum_steps(question)
        before, worked = rng.random() < options.aside_share, rng.random() < options.worked_share
        if before and not held_out:
            slots = [] if worked else range(rng.randint(4, 8))
            chatter = (rng.choice(_SUM_CHATTER[slot % len(_SUM_CHATTER)]) for slot in slots)
            question += f" ({rationale if worked else ' '.join(chatter)})"
        yield {"question": question, "answer": answer, "rationale": rationale}


def import_reasoning_gym(label: str) -> Any:
    """Imports reasoning-gym silently; without it raises a `UserError` that begins with a label."""
    sink = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            warnings.simplefilter("ignore")
            import reasoning_gym
            import reasoning_gym.factory
    except ImportError as error:
        raise UserError(f"{label}: needs reasoning-gym: pip install 'quietstar[tasks]'") from error
    return reasoning_gym


def chain_sum_steps(question: str) -> str:
    """Works out a chain sum from left to right: ``4-1=3,3-7=-4``."""
    terms = _TERM.findall(question.rpartition(":")[2])
    values = (-int(number) if sign == "-" else int(number) for sign, number in terms)
    totals = list(itertools.accumulate(values))
    steps = zip(totals[:-1], terms[1:], totals[1:], strict=True)
    return ",".join(f"{before}{sign}{number}={total}" for before, (sign, number), total in steps)


TASKS: dict[str, tuple[type[Section], Callable[..., Iterator[dict[str, str]]]]] = {
    "moves": (MovesOptions, moves_records),
    "sums": (SumsOptions, sums_records),
}


def check_task(label: str, task: str) -> None:
    """Raises `UserError` if there is no such task."""
    if task not in TASKS:
        raise UserError(f"{label}: there is no synthetic task {task!r}; known: {', '.join(TASKS)}")


def synthetic_records(
    label: str, task: str, options: dict[str, Any], size: int, seed: int, held_out: bool
) -> Callable[[], Iterator[dict[str, str]]]:
    """Returns what starts a pass over the problems of a task, of its held-out or training part.

    Raises `UserError`, in which ``label`` names the data, if the task or one of the ``options`` is
    unknown, or an option is out of range.
    """
    check_task(label, task)
    kind, records = TASKS[task]
    try:
        return partial(records, kind.model_validate(options), size, seed, held_out)
    except ValidationError as problems:
        problem = problems.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            rule = f"is unknown; known are {', '.join(kind.model_fields)}"
        else:
            rule = problem["msg"].replace("Input should", "should")
        raise UserError(
            f"data.task_options: {name}: {problem['input']!r} {rule}; correct it or leave it out"
        ) from None
