"""Answers in held-out texts: are they right, are the thoughts before them, and whose are they?

Pure functions of tensors. An answer is right if each of its tokens is the most likely one; a
thought is right if it begins with the steps that lead to the answer.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Count = tuple[Tensor, Tensor]  # a sum, and of how many


def right_answers(
    predicted: Int[Tensor, "batch thoughts seq"],
    input_ids: Int[Tensor, "batch seq"],
    answers: Bool[Tensor, "batch seq"],
) -> Count:
    """Right answers, and all.

    Args:
        predicted: At i the most likely token i + 1, with each thought (or one, without).
        input_ids: The texts.
        answers: Tokens of answers; a text without any does not count.
    """
    wrong = (predicted[..., :-1] != input_ids[:, None, 1:]) & answers[:, None, 1:]
    has_answer = answers[:, 1:].any(-1, keepdim=True)  # (B, 1)
    right = ~wrong.any(-1) & has_answer
    return right.sum(), has_answer.sum() * predicted.shape[1]


def place_before_answer(
    answers: Bool[Tensor, "batch seq"], positions: Int[Tensor, "batch positions"] | None = None
) -> Int[Tensor, " batch"]:
    """Place (among the positions) of the thought before the first answer token.

    0 in a text without an answer; with chosen positions that leave it out, that of the next one.
    """
    before = (answers.int().argmax(-1) - 1).clamp(min=0)
    if positions is None:
        return before
    return (positions >= before[:, None]).int().argmax(-1)


def right_thoughts(
    tokens: Int[Tensor, "batch thoughts places length"],
    answers: Bool[Tensor, "batch seq"],
    steps: Int[Tensor, "batch steps"],
    positions: Int[Tensor, "batch places"] | None = None,
) -> Count:
    """Thoughts before an answer that begin with the steps to it, and all.

    Args:
        tokens: Thoughts of every position.
        answers: Tokens of answers.
        steps: The steps, -100 behind them; a text without any does not count.
        positions: Of the thoughts, None for all; a text that does not think there does not count.
    """
    is_step = steps >= 0
    counted = is_step.any(-1) & answers.any(-1)  # (B,)
    rows = torch.arange(len(tokens), device=tokens.device)
    place = place_before_answer(answers, positions)
    if positions is not None:
        counted = counted & (positions[rows, place] == place_before_answer(answers))
    thoughts = tokens[rows, :, place]  # (B, K, T)
    width = min(thoughts.shape[-1], steps.shape[-1])
    agrees = (thoughts[..., :width] == steps[:, None, :width]) | ~is_step[:, None, :width]
    fits = ~is_step[:, width:].any(-1)  # steps longer than a thought cannot be in it
    right = agrees.all(-1) & (counted & fits)[:, None]
    return right.sum(), counted.sum() * tokens.shape[1]
