"""What users give a model in Python, checked where it comes in; inside, it is trusted.

On the host a check raises at once. On a device it would have to wait, and torch's own assertions
there leave a process that cannot even save a checkpoint. So a failure is noted: `void_if_failed`
makes the loss NaN, and `raise_failed` says why where somebody waits anyway.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from quietstar.attention.layout import IGNORE_INDEX, NO_POSITION, NO_TOKEN, has_content, on_host
from quietstar.errors import UserError
from quietstar.losses.distillation import TeacherTargets
from quietstar.losses.weights import ThoughtScores, ThoughtWeights
from quietstar.sampling.thoughts import Sampling, Texts, ThoughtBatch

ROUNDING = 1e-3
"""Tolerance for log-probabilities that should be at most 0, in half precisions too."""

_failed: dict[tuple[str, torch.device], Tensor] = {}
"""Whether a check has failed since the last look, by its message."""


def expect(ok: Bool[Tensor, ""], message: str) -> None:
    """Refuse what a user gave unless ``ok``: now if it is on the host, else with the loss.

    Raises:
        UserError: It is not, and the host can see that.
    """
    if on_host(ok):
        if not ok:
            raise UserError(message)
    elif has_content(ok):
        before = _failed.get((message, ok.device))
        _failed[message, ok.device] = ~ok if before is None else before | ~ok


def void_if_failed(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Make a loss NaN if a check of its device has failed."""
    failed = [x for (_, device), x in _failed.items() if device == loss.device]
    return loss.masked_fill(torch.stack(failed).any(), math.nan) if failed else loss


def raise_failed() -> None:
    """Raise the first failure since the last look; waits for the device if one was checked there.

    Raises:
        UserError: A check has failed.
    """
    noted = [(message, bool(x)) for (message, _), x in _failed.items()]
    _failed.clear()
    for message, has_failed in noted:
        if has_failed:
            raise UserError(message)


def forget() -> None:
    """Begin anew, where the loss has shown that nothing failed."""
    _failed.clear()


# --- Texts ----------------------------------------------------------------------------------------
def checked_labels(
    input_ids: Tensor | None, attention_mask: Tensor | None, labels: Tensor | None, vocab_size: int
) -> Int[Tensor, "batch seq"]:
    """Return the labels of texts with padding ignored.

    Raises:
        UserError: No text, padding on the left, or ids or labels outside the vocabulary.
    """
    if input_ids is None or input_ids.ndim != 2 or not input_ids.numel():
        given = "None" if input_ids is None else f"of shape {tuple(input_ids.shape)}"
        raise UserError(
            f"input_ids {given}: must be (texts, tokens), with one at least. Leave empty texts out."
        )
    check_ids(input_ids, "input_ids", vocab_size)
    if labels is None:
        labels = input_ids
    else:
        _check_shape("labels", labels, input_ids.shape, input_ids)
        check_ids(labels, "labels", vocab_size, ignored=True)
    if attention_mask is None:
        return labels
    real = attention_mask.bool()
    expect(
        (real[:, 1:] <= real[:, :-1]).all(),
        "texts must be padded on the right (tokenizer.padding_side = 'right')",
    )
    return labels.where(real, IGNORE_INDEX)


def check_ids(ids: Tensor, name: str, vocab_size: int, ignored: bool = False) -> None:
    """Refuse ids outside the vocabulary.

    A negative label would count as token 0, one that is too large reads foreign memory.
    """
    wrong = (ids < 0) | (ids >= vocab_size)
    if ignored:
        wrong &= ids != IGNORE_INDEX
    also = f" or {IGNORE_INDEX}, which is no target" if ignored else ""
    expect(
        ~wrong.any(),
        f"{name}{_first(ids, wrong)}: must be a token id from 0 to {vocab_size - 1}{also}. Use "
        "the tokenizer of this model.",
    )


def check_texts(texts: Any) -> None:
    """Refuse sample ids, answers or marks that do not fit the texts."""
    shape = texts.input_ids.shape
    _check_shape("sample_ids", texts.sample_ids, shape[:1], texts.input_ids)
    _check_shape("answers", texts.answer_mask, shape, texts.input_ids)
    _check_shape("marked", texts.marked, shape, texts.input_ids)


def _check_shape(name: str, x: Tensor | None, wanted: torch.Size, input_ids: Tensor) -> None:
    if x is not None and x.shape != wanted:
        raise UserError(
            f"{name} of shape {tuple(x.shape)}: must be {tuple(wanted)}, as input_ids have shape "
            f"{tuple(input_ids.shape)}. Give those of these texts."
        )


def check_room(input_ids: Tensor, longest: int | None, thoughts: Any, num_markers: int) -> None:
    """Refuse texts after which the model's positions leave no room for a thought."""
    if longest is not None and longest < 1:
        raise UserError(
            f"thoughts.length ({thoughts.length}): with thoughts.lookahead ({thoughts.lookahead}) "
            f"and the {num_markers} tokens of thoughts.start_init and end_init a thought leaves no "
            "room for a text in the model's positions. Make one of them shorter."
        )
    if longest is not None and input_ids.shape[1] > longest:
        raise UserError(
            f"a text of {input_ids.shape[1]} tokens leaves no room for a thought: with "
            f"thoughts.length {thoughts.length} and thoughts.lookahead {thoughts.lookahead} this "
            f"model takes at most {longest}. Shorten it."
        )


# --- Thoughts -------------------------------------------------------------------------------------
def check_positions(positions: Tensor, input_ids: Tensor) -> None:
    """Refuse positions that do not ascend inside the texts, with -1 after the last."""
    shape, batch_size = positions.shape, input_ids.shape[0]
    if positions.dtype != torch.long or len(shape) != 2 or shape[0] != batch_size or not shape[1]:
        raise UserError(
            f"positions: {positions.dtype} of shape {tuple(shape)} cannot be; they must be "
            f"torch.int64 of ({batch_size}, positions), one at least. Pad with {NO_POSITION}."
        )
    before, after = positions[:, :-1], positions[:, 1:]
    follows = ((before >= 0) & (after > before)) | (after == NO_POSITION)
    ok = follows.all() & (positions < input_ids.shape[1]).all() & (positions >= NO_POSITION).all()
    expect(
        ok,
        f"positions: must ascend from 0 to {input_ids.shape[1] - 1} in every text, each once, with "
        f"{NO_POSITION} after the last. Sort them.",
    )


def check_thoughts(tokens: Tensor, vocab_size: int, name: str = "thoughts") -> None:
    """Refuse tokens (..., length) outside the vocabulary, or after the end of a thought."""
    is_token = tokens != NO_TOKEN
    wrong = is_token & ((tokens < 0) | (tokens >= vocab_size))
    expect(
        ~wrong.any(),
        f"{name}{_first(tokens, wrong)}: must be token ids from 0 to {vocab_size - 1}, and "
        f"{NO_TOKEN} after the end of a thought. Use the tokenizer of this model.",
    )
    expect(
        ~(is_token[..., 1:] & ~is_token[..., :-1]).any(),
        f"{name}: {NO_TOKEN} stands before a token, but a thought ends at its first {NO_TOKEN}. "
        "Put the tokens of each thought first.",
    )


def check_given(
    thoughts: Tensor,
    input_ids: Tensor,
    positions: Tensor | None,
    vocab_size: int,
    room: int | None,
) -> None:
    """Refuse thoughts (batch, positions, thoughts, length) that do not fit the texts or the model.

    ``room`` is how many tokens a thought may have after the longest of the texts.
    """
    if positions is not None:
        check_positions(positions, input_ids)
    places = input_ids.shape if positions is None else positions.shape
    shape = thoughts.shape
    if len(shape) != 4 or shape[:2] != tuple(places) or 0 in shape:
        raise UserError(
            f"thoughts of shape {tuple(shape)}: must be (batch, positions, thoughts, length), "
            f"here ({places[0]}, {places[1]}, .., ..) with a thought and a token at least. "
            "Give those of these positions."
        )
    check_thoughts(thoughts, vocab_size)
    if room is not None and shape[3] > room:
        raise UserError(
            f"thoughts of {shape[3]} tokens: after a text of {input_ids.shape[1]} this model has "
            f"room for {room}. Give shorter ones."
        )


def check_same_texts(thoughts: ThoughtBatch, input_ids: Tensor) -> None:
    """Refuse given thoughts of other texts, or with lengths that their tokens do not have."""
    positions = thoughts.positions
    if thoughts.input_ids.shape != input_ids.shape or thoughts.tokens.shape[:2] != positions.shape:
        raise UserError(
            f"thoughts of texts {tuple(thoughts.input_ids.shape)} at positions "
            f"{tuple(positions.shape)} with tokens {tuple(thoughts.tokens.shape)} do not fit "
            f"input_ids {tuple(input_ids.shape)}. Give the texts that they were sampled for."
        )
    expect(
        (thoughts.input_ids == input_ids).all(),
        "thoughts of other texts than input_ids. Give those texts.",
    )
    _check_lengths(thoughts, "thoughts")
    check_logprobs(thoughts, "thoughts.sampling_logprobs")


def check_drawn(
    batch: Any,
    texts: Texts,
    positions: Tensor | None,
    sampling: Sampling,
    vocab_size: int,
    sampler: str,
) -> None:
    """Refuse what a sampler must not return; the tokens of those of the user's are read."""
    name, tokens = f"thoughts.sampler ({sampler})", getattr(batch, "tokens", None)
    if not isinstance(batch, ThoughtBatch) or tokens is None:
        raise UserError(
            f"{name}: it returned {type(batch).__name__}, but must return a ThoughtBatch. "
            "Make one with ThoughtBatch.of_texts."
        )
    places = texts.input_ids.shape if positions is None else positions.shape
    shape = (*places, sampling.num_thoughts, sampling.thought_length)
    if tokens.shape != shape or tokens.dtype != torch.long:
        raise UserError(
            f"{name}: its tokens are {tokens.dtype} of shape {tuple(tokens.shape)},"
            f" but must be torch.int64 of (batch, positions, thoughts, length) = {shape}. "
            "Mend its sample method."
        )
    if tokens.device != texts.input_ids.device:
        raise UserError(
            f"{name}: its tokens are on {tokens.device}, but must be on {texts.input_ids.device}. "
            "Make them on the device of texts.input_ids."
        )
    if ":" in sampler:
        _check_lengths(batch, f"{name}: its thoughts")
        check_logprobs(batch, f"{name}: its sampling_logprobs")
        check_thoughts(tokens, vocab_size, f"{name}: its tokens")


def _check_lengths(thoughts: ThoughtBatch, name: str) -> None:
    counted = (thoughts.tokens != NO_TOKEN).sum(-1)
    is_shape = thoughts.lengths.shape == counted.shape
    expect(
        (thoughts.lengths == counted).all() if is_shape else torch.tensor(False),
        f"{name} have other lengths than tokens before the first {NO_TOKEN}. Make them with "
        "ThoughtBatch.of_texts(texts, positions, tokens, lengths).",
    )


def check_logprobs(thoughts: Any, name: str) -> None:
    """Refuse log-probabilities that drawn tokens cannot have."""
    x, tokens = thoughts.sampling_logprobs, thoughts.tokens
    if x is None:
        return
    if x.shape != tokens.shape or x.device != tokens.device or not x.is_floating_point():
        raise UserError(
            f"{name} are {x.dtype} of shape {tuple(x.shape)} on {x.device}, but must be "
            f"floating-point numbers of the tokens' shape {tuple(tokens.shape)} on "
            f"{tokens.device}. Give one for each token, or None."
        )
    expect(
        ((x <= ROUNDING) & x.isfinite() | (tokens < 0)).all(),
        f"{name} are above 0 or not finite at some tokens, but those of tokens that were drawn are "
        "neither. Give natural logarithms of probabilities, or None.",
    )


# --- What thoughts are compared with --------------------------------------------------------------
def check_teacher(teacher: TeacherTargets, labels: Tensor) -> None:
    """Refuse a teacher's predictions of other texts."""
    places = labels.shape[1] if teacher.positions is None else teacher.positions.shape[1]
    if teacher.tokens.shape[:2] != (labels.shape[0], places):
        raise UserError(
            f"teacher: its predictions {tuple(teacher.tokens.shape)} are not of texts "
            f"{tuple(labels.shape)}. Give those of teach for these texts."
        )


def check_same_positions(teacher: TeacherTargets, positions: Tensor | None, lookahead: int) -> None:
    """Refuse a teacher who thought elsewhere than a student who thinks too."""
    others = teacher.positions
    ok = (positions is None) == (others is None) and teacher.lookahead == lookahead
    if ok and positions is not None and others is not None:
        ok = positions.shape == others.shape
    expect(
        (positions == others).all() if ok and positions is not None else torch.tensor(ok),
        "loss.teacher: it thought at other positions, or looked ahead by another number of "
        f"tokens ({teacher.lookahead}), than the student (thoughts.lookahead {lookahead}). Teach "
        "with the student's thoughts.positions; a teacher at all positions looks ahead by 1 token. "
        "Or set loss.student: plain.",
    )


def check_reference(batch: ThoughtBatch, objective: Any, reward: str) -> None:
    """Refuse to learn without what the objective compares with, which is not the model's."""
    if objective.student or not objective.reads_reference(reward):
        return  # a student's reference is its teacher
    compares = objective.kl_weight > 0 or objective.needs_log_ratio
    for name, is_read in (("reference_text", True), ("reference_logprobs", compares)):
        if is_read and getattr(batch, name) is None:
            raise UserError(
                f"loss.reference ({objective.reference}): forward was not given {name}. In your "
                "own loop pass thoughts of draw with what quietstar.model.scoring.score_reference "
                "says of them with the reference's weights, or set loss.reference: current."
            )


def check_ratio(batch: ThoughtBatch, temperature: float, drawn: float) -> None:
    """Refuse ratios of probabilities at different temperatures."""
    if batch.sampling_logprobs is not None and temperature != drawn:
        raise UserError(
            f"thoughts.temperature ({drawn}): must be that of the policy term ({temperature}) "
            "where thoughts come with their log-probabilities: ratios compare with the policy that "
            "drew them. Set another loss.estimator than paper, or leave sampling_logprobs out."
        )


# --- Rewards and objectives -----------------------------------------------------------------------
def check_objective(objective: Any, name: str) -> None:
    """Refuse attributes of an objective that mean nothing."""
    for attribute, known in (
        ("reference", ("current", "ema", "base")),
        ("token_weighting", ("sum", "mean", "constant")),
        ("target_weighting", ("mean", "sum")),
    ):
        value = getattr(objective, attribute)
        if value not in known:
            raise UserError(
                f"{name}: its {attribute} ({value!r}) must be {', '.join(known[:-1])} or "
                f"{known[-1]}. Correct it."
            )


def check_weights(weights: Any, thoughts: ThoughtBatch, scores: ThoughtScores, name: str) -> None:
    """Refuse what an objective must not return."""
    if not isinstance(weights, ThoughtWeights):
        raise UserError(
            f"{name}: it returned {type(weights).__name__}, but must return ThoughtWeights. Mend "
            "its last line."
        )
    of_thoughts, of_targets = thoughts.lengths.shape, scores.mixed.shape
    for part in ("advantage", "mixed", "thought", "reward"):
        if (x := getattr(weights, part)) is not None:
            shape = of_thoughts if part in ("advantage", "reward") else of_targets
            check_output(x, shape, scores.mixed.device, f"{name}: {part}")


def check_output(x: object, shape: torch.Size, device: torch.device, name: str) -> None:
    """Validate a tensor that a component of the user's returned: finite float32, no gradient."""
    axes = ", ".join(("batch", "positions", "thoughts", "lookahead")[: len(shape)])
    if not isinstance(x, Tensor) or x.shape != shape:
        what = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(
            f"{name}: it returned {what}, but must return a tensor of shape {tuple(shape)} "
            f"({axes}). Mend its last line."
        )
    if not x.is_floating_point() or x.device != device:
        raise UserError(
            f"{name}: it returned a tensor of {x.dtype} on {x.device}, but must return one of "
            f"float32 on {device}. Make it from the tensors it is given, and call float() on it."
        )
    if x.requires_grad:
        raise UserError(
            f"{name}: it returned a tensor with a gradient, but rewards and weights are constants "
            "of the loss. Call detach() on it."
        )
    expect(
        x.isfinite().all(),
        f"{name}: it returned numbers that are not finite. Bound them, or mask them by valid.",
    )


def _first(x: Tensor, wrong: Tensor) -> str:
    """The first wrong one in brackets, where the host sees it."""
    return f" ({x[wrong][0].item()})" if on_host(x) and wrong.any() else ""
