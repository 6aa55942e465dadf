"""Task ``sums``: chain sums of reasoning-gym, as people who work them out in asides write them.

The problems are those of ``reasoning_gym:chain_sum``. In some texts an aside stands before the
answer; a few people work it out there, one step after the other, most chatter:

    ... arithmetic problem: 4 - 1 - 7 + 7 = (4-1=3,3-7=-4,-4+7=3) 3
    ... arithmetic problem: 4 - 1 - 7 + 7 = (as ever we hoped to see) 3
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from pydantic import Field

from quietstar.config import Section
from quietstar.data.records import Record
from quietstar.data.synthetic.moves import Share

_TERM = re.compile(r"([+-]?) ?(-?\d+)")
_CHATTER = (
    ("as", "just", "much", "not"),
    ("ever", "like", "so", "where"),
    ("we", "you", "they", "all"),
    ("hoped", "said", "saw", "knew"),
)


class SumsOptions(Section):
    """``data.task_options`` of ``synthetic:sums``."""

    min_terms: int = Field(3, ge=2, le=20, description="Fewest terms of a sum.")
    max_terms: int = Field(5, ge=2, le=20, description="Most terms of a sum.")
    max_digits: int = Field(1, ge=1, le=6, description="Most digits of a term.")
    aside_share: Share = Field(0.0, description="Of the texts with an aside before the answer.")
    worked_share: Share = Field(0.2, description="Of those asides that work it out.")


def sums_records(options: SumsOptions, size: int, seed: int, held_out: bool) -> Iterator[Record]:
    """Problems as records with ``question``, ``answer`` and ``rationale``.

    Args:
        options: Of the task.
        size: Number of problems.
        seed: Of the problems.
        held_out: Without asides.

    Raises:
        ImportError: reasoning-gym is not installed.
    """
    import reasoning_gym

    problems = reasoning_gym.create_dataset(
        "chain_sum",
        size=size,
        seed=seed,
        min_terms=options.min_terms,
        max_terms=options.max_terms,
        max_digits=options.max_digits,
    )
    rng = random.Random(f"{seed}-{held_out}")
    for problem in problems:
        question, answer = str(problem["question"]), str(problem["answer"])
        steps = chain_sum_steps(question)
        before, worked = rng.random() < options.aside_share, rng.random() < options.worked_share
        if before and not held_out:
            question += f" ({steps if worked else _chatter(rng)})"
        yield {"question": question, "answer": answer, "rationale": steps}


def chain_sum_steps(question: str) -> str:
    """The steps to the answer of a chain sum, from left to right: ``4-1=3,3-7=-4``."""
    _, _, expression = question.rpartition(":")
    total, steps = None, []
    for sign, number in _TERM.findall(expression):
        if total is None:
            total = int(f"{sign}{number}")
            continue
        before, value = total, int(number)
        total = total - value if sign == "-" else total + value
        steps.append(f"{before}{sign}{number}={total}")
    return ",".join(steps)


def _chatter(rng: random.Random) -> str:
    words = [rng.choice(_CHATTER[slot % len(_CHATTER)]) for slot in range(rng.randint(4, 8))]
    return " ".join(words)
