"""Answers and the thoughts before them, on hand-made cases."""

import pytest
import torch

from quietstar.attention.layout import IGNORE_INDEX
from quietstar.training.evaluation import (
    gold_probabilities,
    place_before_answer,
    right_answers,
    right_thoughts,
)

IDS = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 0]])
ANSWERS = torch.tensor([[False, False, True, True], [False, False, True, False]])


def shares(pair):
    return [int(x) for x in pair]


def test_an_answer_is_right_only_if_all_of_its_tokens_are():
    # Position i predicts token i + 1. Text 0: answer tokens 3, 4 from positions 1, 2.
    right = torch.tensor([[9, 3, 4, 9], [9, 5, 9, 9]])[..., None]  # (batch, seq, one thought)
    half = torch.tensor([[9, 3, 9, 9], [9, 5, 9, 9]])[..., None]
    assert shares(right_answers(right, IDS, ANSWERS)) == [2, 2]
    assert shares(right_answers(half, IDS, ANSWERS)) == [1, 2]


def test_a_text_without_answer_does_not_count():
    none = torch.zeros_like(ANSWERS)
    none[1] = ANSWERS[1]
    predicted = torch.tensor([[9, 9, 9, 9], [9, 5, 9, 9]])[..., None]
    assert shares(right_answers(predicted, IDS, none)) == [1, 1]


def test_every_thought_of_a_position_counts():
    first = torch.tensor([[9, 3, 4, 9], [9, 5, 9, 9]])
    second = torch.tensor([[9, 3, 3, 9], [9, 9, 9, 9]])
    assert shares(right_answers(torch.stack([first, second], -1), IDS, ANSWERS)) == [2, 4]


def test_the_probability_of_an_answer_is_that_of_all_its_tokens():
    logprobs = torch.tensor([[0.9, 0.5, 0.5, 0.9], [0.9, 0.1, 0.9, 0.9]]).log()[..., None]
    total, count = gold_probabilities(logprobs, IDS, ANSWERS)
    assert (float(total), int(count)) == (pytest.approx(0.25 + 0.1), 2)
    both = torch.cat([logprobs, torch.zeros_like(logprobs)], dim=-1)  # of two thoughts
    total, count = gold_probabilities(both, IDS, ANSWERS)
    assert (float(total), int(count)) == (pytest.approx(0.25 + 0.1 + 2), 4)


def test_an_answer_that_is_no_target_or_not_there_has_no_probability():
    labels, none = IDS.clone(), ANSWERS.clone()
    labels[0, 2], none[1] = IGNORE_INDEX, False
    total, count = gold_probabilities(torch.zeros(2, 4, 1), labels, none)
    assert (float(total), int(count)) == (0, 0)


def test_the_thought_before_the_answer():
    assert place_before_answer(ANSWERS).tolist() == [1, 1]
    # Positions 0, 1, 3: text 0 thinks there at place 1; without position 1, at the next one.
    assert place_before_answer(ANSWERS, torch.tensor([[0, 1, 3]] * 2)).tolist() == [1, 1]
    assert place_before_answer(ANSWERS, torch.tensor([[0, 2, 3]] * 2)).tolist() == [1, 1]


def test_a_thought_is_right_if_it_begins_with_the_steps():
    tokens = torch.zeros(2, 4, 2, 3, dtype=torch.long)
    steps = torch.tensor([[7, 8], [6, -100]])
    tokens[0, 1, 0] = torch.tensor([7, 8, 1])  # right, and goes on
    tokens[0, 1, 1] = torch.tensor([7, 7, 8])
    tokens[1, 1, 0] = torch.tensor([6, 0, 0])  # one step
    tokens[1, 2, 1] = torch.tensor([6, 0, 0])  # at another position
    assert shares(right_thoughts(tokens, ANSWERS, steps)) == [2, 4]


def test_steps_longer_than_a_thought_are_never_in_it():
    tokens = torch.full((2, 4, 1, 1), 7)
    steps = torch.tensor([[7, 8], [7, -100]])
    assert shares(right_thoughts(tokens, ANSWERS, steps)) == [1, 2]
