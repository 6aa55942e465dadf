"""Controls: what the model's own thoughts are compared with, and what the comparison is called.

Any second read-out of a text gives some gain, whatever the thoughts say. Each control keeps the
read-out and takes the content away: swapped thoughts (those of another text, or of another position
of the same text), shuffled thoughts (a thought's tokens in another order), pause tokens (one
constant token), a generic text that fits every question, and blank thoughts (their start and end
alone). Every function is pure; training, ``quietstar eval``, ``inspect`` and ``generate``
all use these, and call them by the same names.

Shapes: B texts, K thoughts, P positions, T tokens of a thought (`NO_TOKEN` after the end of one
that ends early). Shuffled thoughts and pause tokens keep lengths, swapped thoughts bring their own,
a generic text is as long as it is, and a blank thought has no token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.attention.layout import NO_TOKEN
from quietstar.errors import UserError

WITHOUT, WITH = "without_thoughts", "with_thoughts"
SWAPPED, SHUFFLED, PAUSE = "swapped", "shuffled", "pause"
GENERIC, BLANK = "generic", "blank"
MADE = (SHUFFLED, PAUSE, GENERIC, BLANK)
"""Controls that take no other text's thoughts (`make_thoughts`)."""
CONTROLS = (*MADE, SWAPPED)
GAINS = {SWAPPED: "gain_of_content", **{control: f"gain_over_{control}" for control in MADE}}
"""The name of what the model's own thoughts gain over each control."""
CONTROL_NAMES = {
    SWAPPED: "swapped thoughts", SHUFFLED: "shuffled thoughts", PAUSE: "pause tokens",
    GENERIC: "a generic text", BLANK: "blank thoughts",
}  # fmt: skip
CONTROL_NOTES = {
    SWAPPED: "each item with the thought of another",
    SHUFFLED: "the thought's tokens in another order",
    PAUSE: "one constant token in place of every thought token",
    GENERIC: "the same text in place of every thought",
    BLANK: "start and end of a thought, and nothing between",
}  # fmt: skip
"""What each control is, in a few words."""
GENERIC_TEXT = " I will work through this carefully and then give the answer."
LOWER_IS_BETTER = ("nll",)
LEAST_PROBABILITY = 1e-3
"""Mean P(gold answer) that must be reached to decide: of that of a long answer nothing is left."""
FEW_ITEMS = 20
"""Minimum number of items for a verdict."""

Value = TypeVar("Value", float, Tensor)


def gain_over(own: Value, control: Value, metric: str = "nll") -> Value:
    """Compute what own thoughts gain over a control; positive where they are better.

    Over swapped thoughts this is the gain of content, the one metric of that name: control minus
    own NLL (nats a token), or own minus control of a metric that is better when higher.
    """
    return control - own if metric in LOWER_IS_BETTER else own - control


# --- Swapped thoughts -----------------------------------------------------------------------------
def derangement(count: int, seed: int) -> Int[Tensor, " count"]:
    """Draw whose thoughts each of ``count`` owners gets: one cycle through all, in random order.

    Every owner gives once and takes once, and with two or more none keeps its own.

    Raises:
        ValueError: Fewer than two owners, which could only keep what is theirs.
    """
    if count < 2:
        raise ValueError(f"thoughts of {count} owners cannot be swapped; it takes two")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    donors = torch.empty_like(order)
    donors[order] = order.roll(1)
    return donors


def swap_positions(
    thoughts: Int[Tensor, "thoughts positions length"], seed: int
) -> Int[Tensor, "thoughts positions length"]:
    """Give every position of a text (at least two) the thoughts of another one.

    Within the text what is swapped still fits the subject (the harder control), and the metrics do
    not depend on how texts are batched.
    """
    return thoughts[:, derangement(thoughts.shape[1], seed).to(thoughts.device)]


def fit_thoughts(
    thoughts: Int[Tensor, "thoughts donor_positions length"], num_positions: int, shift: int = 0
) -> Int[Tensor, "thoughts positions length"]:
    """Lay a donor's thoughts out over a text with another number of positions.

    Index ``shift`` of the donor goes to index 0; the first and the last thought stand in for those
    that the donor lacks.
    """
    places = (torch.arange(num_positions) + shift).clamp(0, thoughts.shape[1] - 1)
    return thoughts[:, places.to(thoughts.device)]


@dataclass(frozen=True)
class TextThoughts:
    """Thoughts of one evaluated text, as ranks give them to each other."""

    sample_id: int  # index of the text in the evaluation set
    tokens: Int[Tensor, "thoughts positions length"]  # at its real positions, on the CPU
    anchor: int  # index of the thought before the first answer token; 0 without an answer
    has_answer: bool


def plan_swap(
    texts: Sequence[TextThoughts], seed: int = 0
) -> Callable[[TextThoughts, int], Tensor] | None:
    """Decide how the thoughts of a whole evaluation set are swapped.

    Among texts where all of them have answers: the thoughts before two answers take each other's
    place. Otherwise within each text, and among texts only for one that thinks at a single
    position. ``texts`` are those of all ranks; their order and duplicates, and so the number of
    ranks and the way texts are batched, do not matter.

    Returns:
        A function from a text and a number of positions to the swapped thoughts, (thoughts,
        positions, length); None if a single text would have to swap with another one.
    """
    by_id = {text.sample_id: text for text in texts}
    ids = sorted(by_id)
    all_answers = all(text.has_answer for text in by_id.values())
    if len(ids) < 2 and (all_answers or any(t.tokens.shape[1] < 2 for t in by_id.values())):
        return None
    order = derangement(len(ids), seed).tolist() if len(ids) > 1 else []
    donors = {ids[i]: by_id[ids[j]] for i, j in enumerate(order)}

    def swap(text: TextThoughts, num_positions: int) -> Tensor:
        if all_answers or text.tokens.shape[1] < 2:
            donor = donors[text.sample_id]
            return fit_thoughts(donor.tokens, num_positions, donor.anchor - text.anchor)
        return fit_thoughts(swap_positions(text.tokens, text.sample_id), num_positions)

    return swap


# --- Thoughts that are made, not sampled ----------------------------------------------------------
def make_thoughts(
    control: str,
    thoughts: Int[Tensor, "batch thoughts positions length"],
    numbers: Sequence[int],
    pause_token_id: int,
    generic: Sequence[int],
    seed: int = 0,
) -> Int[Tensor, "batch new_thoughts positions new_length"]:
    """Replace the model's own thoughts by those of a control.

    Args:
        control: One of `MADE`.
        thoughts: The model's own thoughts; of generic and blank ones only the positions count.
        numbers: Numbers of the items, which key the orders of shuffled tokens with ``seed``.
        pause_token_id: The token of pauses.
        generic: Tokens of the generic text (`generic_tokens`), for the control of that name.
        seed: Seed of the orders.
    """
    if control == SHUFFLED:
        return shuffle_tokens(thoughts, numbers, seed)
    if control == PAUSE:
        return pause_tokens(thoughts, pause_token_id)
    assert control in MADE, f"{control} takes the thoughts of others"
    return same_thought(thoughts, generic if control == GENERIC else [])


def replacement(
    control: str,
    pause_token_id: int,
    generic: Sequence[int],
    group: int = 1,
    remedy: str = "give another --batch-size",
) -> Callable[[Tensor], Tensor]:
    """Return what `QuietStarForCausalLM.generate` reads in place of the model's own thoughts.

    It makes the thoughts of a control of those of a batch, (texts, thoughts, length). Swapped ones
    are those of another text at the same new token.

    Args:
        control: One of `CONTROLS`.
        pause_token_id: The token of pauses.
        generic: Tokens of the generic text.
        group: Consecutive texts of the batch that belong to one item; thoughts are swapped between
            items.
        remedy: What to do about a batch of a single item, which has no other.
    """

    def replace(own: Tensor) -> Tensor:
        if control != SWAPPED:
            numbers = range(len(own))
            new = make_thoughts(control, own.unsqueeze(2), numbers, pause_token_id, generic)
            return new.squeeze(2)
        if len(own) < 2 * group:
            raise UserError(
                "--control (swapped): the last batch is a single text, which has no other to swap "
                f"thoughts with; {remedy}"
            )
        donors = derangement(len(own) // group, seed=0)
        rows = donors[:, None] * group + torch.arange(group)
        return own[rows.flatten().to(own.device)]

    return replace


def generic_tokens(
    tokenizer: PreTrainedTokenizerBase, length: int, text: str, option: str
) -> list[int]:
    """Give the tokens of a generic text, as many as a thought of so many tokens can hold.

    Raises:
        UserError: The tokenizer has none for the text, which is the value of the ``option``.
    """
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"{option} ({text!r}): has no token. Give a text, or leave it out.")
    return ids[:length]


def shuffle_tokens(
    thoughts: Int[Tensor, "batch thoughts positions length"], numbers: Sequence[int], seed: int
) -> Int[Tensor, "batch thoughts positions length"]:
    """Reorder the tokens of every thought so that none keeps its place (a single one must).

    The number of each item keys the orders, with the seed of the run.
    """
    assert thoughts.shape[-1] > 1, "one token cannot be shuffled"
    shuffled = thoughts.clone()
    place = torch.arange(thoughts.shape[-1])
    for row, number in enumerate(numbers):
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        noise = torch.rand(thoughts.shape[1:], generator=generator)
        tokens = thoughts[row]
        is_token = (tokens != NO_TOKEN).cpu()
        # One cycle through all places of a thought; those after its end come last, and stay.
        order = noise.where(is_token, 2.0 + place).argsort(-1)
        last = (is_token.sum(-1, keepdim=True) - 1).clamp(min=0)
        before = order.roll(1, -1).where(place > 0, order.gather(-1, last))
        before = before.where(is_token.sort(-1, descending=True).values, order)
        order, before = order.to(tokens.device), before.to(tokens.device)
        shuffled[row] = tokens.scatter(-1, order, tokens.gather(-1, before))
    return shuffled


def pause_tokens(
    thoughts: Int[Tensor, "batch thoughts positions length"], token_id: int
) -> Int[Tensor, "batch thoughts positions length"]:
    """Replace every token of every thought by one constant token; lengths stay."""
    return thoughts.where(thoughts == NO_TOKEN, token_id)


def same_thought(
    thoughts: Int[Tensor, "batch thoughts positions length"], tokens: Sequence[int]
) -> Int[Tensor, "batch 1 positions new_length"]:
    """Put these tokens in the place of every thought; without any, thoughts are blank.

    One thought stands for all of a position, which would be equal.
    """
    row = thoughts.new_tensor(list(tokens) or [NO_TOKEN])
    return row.expand(*thoughts[:, :1].shape[:-1], -1)
