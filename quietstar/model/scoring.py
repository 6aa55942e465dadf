"""Thoughts and scores outside of training's forward: to look at, of a reference, of a teacher."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from quietstar import algorithm
from quietstar.attention.layout import NO_POSITION, early_ends, has_content, text_lookahead
from quietstar.backbone.run import TextRun, plain_pass
from quietstar.backbone.run import run_text as texts_run
from quietstar.backbone.teacher_forced import ThoughtStates, embed_blocks, teacher_forced
from quietstar.checks import (
    check_given,
    check_ids,
    check_positions,
    check_room,
    check_same_texts,
    check_texts,
    checked_labels,
    raise_failed,
)
from quietstar.losses.distillation import TeacherTargets, teacher_targets
from quietstar.losses.next_token import next_token_loss
from quietstar.losses.policy import thought_logprobs
from quietstar.losses.scores import Scores
from quietstar.model.outputs import PlainScores, plain_metrics, thought_metrics
from quietstar.sampling.positions import SCORED_RULES
from quietstar.sampling.thoughts import Sampling, Texts, ThoughtBatch


def checked_texts(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    sample_ids: Tensor | None = None,
    answers: Tensor | None = None,
    marked: Tensor | None = None,
    text: TextRun | None = None,
    places: np.ndarray | None = None,
) -> Texts:
    """Put what a caller gives about texts together; texts number from 0 by default.

    Raises:
        UserError: Something does not fit the texts, or these the model.
    """
    labels = checked_labels(input_ids, attention_mask, labels, model.num_embeddings)
    check_room(input_ids, model.max_text_length, model.thoughts, sum(model.num_markers))
    if sample_ids is None:
        sample_ids = torch.arange(input_ids.shape[0], device=input_ids.device)
    texts = Texts(input_ids, labels, answers, sample_ids, text, marked, places)
    check_texts(texts)
    return texts


def check_thoughts_given(
    model: Any, tokens: Tensor, input_ids: Tensor, positions: Tensor | None
) -> None:
    """Refuse given thoughts that do not fit the texts or the model."""
    room = model.max_text_length
    if room is not None:
        room += model.thoughts.length - input_ids.shape[1]
    check_given(tokens, input_ids, positions, model.num_embeddings, room)


def positions_of(thoughts: ThoughtBatch) -> Int[Tensor, "batch positions"] | None:
    """Positions of given thoughts, None for all."""
    ids, positions = thoughts.input_ids, thoughts.positions
    is_everywhere = thoughts.everywhere
    if is_everywhere is None and positions.shape == ids.shape and has_content(ids):
        seq = torch.arange(ids.shape[1], device=ids.device)  # a user's own making: waits to see
        is_everywhere = bool((positions == seq).all())
    return None if is_everywhere else positions.where(positions >= 0, NO_POSITION)


# --- Methods of `QuietStarForCausalLM` ------------------------------------------------------------
@torch.no_grad()
def run_text(model: Any, input_ids: Int[Tensor, "batch seq"]) -> TextRun:
    """Run texts once, for calls of `draw` and `score` that look at the same ones."""
    check_ids(input_ids, "input_ids", model.num_embeddings)
    return texts_run(model.causal_lm, input_ids)


@torch.no_grad()
def choose_positions(
    model: Any,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Tensor | None = None,
    labels: Int[Tensor, "batch seq"] | None = None,
    *,
    answers: Bool[Tensor, "batch seq"] | None = None,
    marked: Bool[Tensor, "batch seq"] | None = None,
    sample_ids: Int[Tensor, " batch"] | None = None,
    seed: int = 0,
) -> Int[Tensor, "batch positions"] | None:
    """Where to think in these texts by ``thoughts.positions``; None for all.

    Ascending, -1 after the last of a text with fewer; arguments as in `forward`. Training
    thinks there too, but leaves a quarter of the positions of ``weight`` and
    ``weighted_entropy`` to chance.
    """
    if model.thoughts.positions == "all":
        return None
    texts = checked_texts(model, input_ids, attention_mask, labels, sample_ids, answers, marked)
    if model.thoughts.positions in SCORED_RULES:
        texts = replace(texts, run=texts_run(model.causal_lm, input_ids))
    return algorithm.choose(model, texts, seed, explore=False)


@torch.no_grad()
def draw(
    model: Any,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Tensor | None = None,
    labels: Int[Tensor, "batch seq"] | None = None,
    *,
    positions: Int[Tensor, "batch positions"] | Literal["trained"] | None = "trained",
    num_thoughts: int = 1,
    length: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    answers: Bool[Tensor, "batch seq"] | None = None,
    marked: Bool[Tensor, "batch seq"] | None = None,
    sample_ids: Int[Tensor, " batch"] | None = None,
    seed: int = 0,
    text: TextRun | None = None,
    places: Int[np.ndarray, "batch positions"] | None = None,
) -> ThoughtBatch:
    """Draw thoughts, all positions in parallel, for `score` or for `forward` to learn from.

    Args:
        model: `QuietStarForCausalLM`, of which this is a method.
        input_ids: Texts, padded on the right if at all.
        attention_mask: (batch, seq), true (or 1) for real tokens.
        labels: Targets, as in `forward`.
        positions: Where to think: ascending, -1 after the last of a text with fewer; None for
            all; by default where ``thoughts.positions`` says.
        num_thoughts: Thoughts a position.
        length: Most tokens of a thought; by default ``thoughts.length``.
        temperature: Sampling temperature; None takes the most likely tokens.
        top_p: Sample among the most likely tokens that together reach this probability.
        top_k: Sample among so many of the most likely tokens.
        answers: As in `forward`; so are ``marked``, ``sample_ids``, ``seed``, ``places``.
        marked: Mask of the tokens before which to think.
        sample_ids: Index of each text; by default 0, 1, ...
        seed: Seed of the noise.
        text: What `run_text` made of the texts; without it they run here.
        places: Positions that the host knows.

    Raises:
        UserError: A text too long for the model, padded on the left, or with ids outside the
            vocabulary; or settings that cannot be.
    """
    texts = checked_texts(
        model, input_ids, attention_mask, labels, sample_ids, answers, marked, text, places
    )
    sampling = Sampling.by(
        model.thoughts, model.stop,
        num_thoughts=num_thoughts, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
        thought_length=model.thoughts.length if length is None else length,
    )  # fmt: skip
    if isinstance(positions, Tensor):
        check_positions(positions, input_ids)
    elif positions == "trained":
        if text is None and model.thoughts.positions in SCORED_RULES:
            texts = replace(texts, run=texts_run(model.causal_lm, input_ids))
        positions = algorithm.choose(model, texts, seed, explore=True)
    batch = algorithm.draw(model, texts, positions, sampling)
    raise_failed()
    return batch


@torch.no_grad()
def score(
    model: Any,
    input_ids: Int[Tensor, "batch seq"],
    thoughts: ThoughtBatch | Int[Tensor, "batch positions thoughts length"],
    attention_mask: Tensor | None = None,
    labels: Int[Tensor, "batch seq"] | None = None,
    *,
    positions: Int[Tensor, "batch positions"] | None = None,
    text: TextRun | None = None,
    only_mixed: bool = False,
    lookahead: int | None = None,
    candidates: Int[Tensor, " candidates"] | None = None,
) -> Scores:
    """Say what thoughts do to the prediction of the ground-truth tokens.

    Args:
        model: `QuietStarForCausalLM`, of which this is a method.
        input_ids: Texts, padded on the right if at all.
        thoughts: Those of `draw`; or tokens, -1 after the last of one that ends early.
        attention_mask: (batch, seq), true (or 1) for real tokens.
        labels: Targets, as in `forward`.
        positions: Where the thoughts are, if these are tokens: ascending, -1 after the last of
            a text with fewer; None for all.
        text: What `run_text` made of the texts; without it they run here.
        only_mixed: Whether the mixed prediction is all that is wanted, for less.
        lookahead: Tokens to predict after each thought; by default ``thoughts.lookahead``.
        candidates: Tokens whose mixed logits are wanted.

    Raises:
        UserError: Thoughts that do not fit the texts or the model, or texts as in `draw`.
    """
    texts = checked_texts(model, input_ids, attention_mask, labels, text=text)
    if isinstance(thoughts, ThoughtBatch):
        check_same_texts(thoughts, input_ids)
        positions, thoughts = positions_of(thoughts), thoughts.tokens
    check_thoughts_given(model, thoughts, input_ids, positions)
    batch = ThoughtBatch.of_texts(texts, positions, thoughts.long())
    run = text or texts_run(model.causal_lm, input_ids)
    _, scores = algorithm.learn(model, run, batch, positions, algorithm.Step(
        learns=False, only_mixed=only_mixed, lookahead=lookahead, candidates=candidates
    ))  # fmt: skip
    raise_failed()
    if only_mixed:
        return scores
    metrics = thought_metrics(scores, model.may_end_early, model.stop)
    return replace(scores, metrics=metrics)


@torch.no_grad()
def score_plain(
    model: Any,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Tensor | None = None,
    labels: Int[Tensor, "batch seq"] | None = None,
    candidates: Int[Tensor, " candidates"] | None = None,
) -> PlainScores:
    """Predict the next tokens without thoughts, as the plain model does.

    ``candidates`` are tokens whose logits are wanted; other arguments are as in `forward`.
    """
    labels = checked_labels(input_ids, attention_mask, labels, model.num_embeddings)
    states = plain_pass(model.causal_lm, input_ids)
    _, result, valid = next_token_loss(states, labels, model.output_head, needs_predicted=True)
    assert result.predicted is not None, "scoring was asked for"
    shape = input_ids.shape
    metrics = plain_metrics(result.nll, valid)
    few = None if candidates is None else model.output_head.candidate_logits(states, candidates)
    logprobs, predicted = -result.nll.view(shape), result.predicted.view(shape)
    raise_failed()
    return PlainScores(logprobs, predicted, valid, metrics, few)


# --- Functions ------------------------------------------------------------------------------------
def read_thoughts(
    model: Any,
    input_ids: Int[Tensor, "batch seq"],
    tokens: Int[Tensor, "batch positions thoughts length"],
    positions: Int[Tensor, "batch positions"] | None,
    fixed_mixing_weight: float | None = None,
    lookahead: int | None = None,
    text: TextRun | None = None,
) -> tuple[ThoughtStates, Float[Tensor, "lookahead thoughts batch positions"]]:
    """Read thoughts after the text up to their positions; their states and mixing weight."""
    text = texts_run(model.causal_lm, input_ids) if text is None else text
    blocks = rearrange(tokens, "b p k t -> t k b p").contiguous()
    inputs = embed_blocks(
        model.causal_lm, model.start_vectors, model.end_vectors, input_ids, blocks,
        lookahead or model.thoughts.lookahead, positions, early_ends(blocks),
    )  # fmt: skip
    states = teacher_forced(model.causal_lm, text, inputs)
    ahead = text_lookahead(states.text, states.ahead.shape[0], positions)
    return states, model.mixing_head(ahead, states.ahead, fixed_mixing_weight)


@torch.no_grad()
def next_logits(
    model: Any,
    input_ids: Int[Tensor, "batch seq"],
    tokens: Int[Tensor, "batch positions thoughts length"],
    positions: Int[Tensor, "batch positions"] | None = None,
    fixed_mixing_weight: float | None = None,
) -> Float[Tensor, "batch seq vocab"]:
    """Return the logits of the next token after every text position, in float32.

    They mix the prediction after the thought with the one without; several thoughts are averaged as
    probabilities, which makes logits log-probabilities. At a position without a thought, the latest
    one before it counts as far as ``thoughts.lookahead`` reaches, and the plain prediction beyond.
    """
    reach = 1 if positions is None else model.thoughts.lookahead
    states, weight = read_thoughts(
        model, input_ids, tokens, positions, fixed_mixing_weight, lookahead=reach
    )
    head, seq = model.output_head, input_ids.shape[1]
    if positions is None:
        positions = torch.arange(seq, device=input_ids.device).expand(input_ids.shape)
    logits = head.logits(states.text)
    for ahead in reversed(range(reach)):  # nearer thoughts overwrite
        places = positions + ahead
        rows, columns = ((positions >= 0) & (places < seq)).nonzero(as_tuple=True)
        places = places[rows, columns]
        # Anew: a thought further back may have been mixed into these logits already.
        base = head.logits(states.text[rows, places])
        after = head.logits(states.ahead[ahead, :, rows, columns])
        share = weight[ahead, :, rows, columns, None].to(base.dtype)
        mixed = torch.lerp(base.expand_as(after), after, share)
        if len(mixed) > 1:
            mixed = mixed.log_softmax(-1).logsumexp(0, keepdim=True) - math.log(len(mixed))
        logits[rows, places] = mixed[0]
    return logits


@torch.no_grad()
def score_reference(
    model: Any,
    input_ids: Int[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"],
    thoughts: ThoughtBatch | None = None,
) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch positions thoughts length"] | None]:
    """Score texts, and given thoughts, as the reference of another model's training step.

    Called while the weights are those of the reference. Returns what `ThoughtBatch` calls
    ``reference_text``, and with thoughts ``reference_logprobs``, at the temperature of the policy
    term.
    """
    by_token = None
    if thoughts is None:
        states = plain_pass(model.causal_lm, input_ids)
    else:
        check_same_texts(thoughts, input_ids)
        read, _ = read_thoughts(model, input_ids, thoughts.tokens, positions_of(thoughts))
        states, head = read.text, model.output_head
        by_token = thought_logprobs(
            read.policy, thoughts.token_major(), head, model.policy_temperature
        )
        by_token = rearrange(by_token, "t k b p -> b p k t")
    _, result, _ = next_token_loss(states, labels, model.output_head)
    return -result.nll.view(input_ids.shape), by_token


@torch.no_grad()
def teach(
    model: Any,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Tensor | None = None,
    labels: Int[Tensor, "batch seq"] | None = None,
    *,
    answers: Bool[Tensor, "batch seq"] | None = None,
    marked: Bool[Tensor, "batch seq"] | None = None,
    sample_ids: Int[Tensor, " batch"] | None = None,
    seed: int = 0,
    length: int | None = None,
    top: int | None = None,
    places: Int[np.ndarray, "batch positions"] | None = None,
) -> TeacherTargets:
    """Predict the ground-truth tokens after thoughts, drawn as in training, for a student.

    Arguments as in the model's ``forward``, and by default as in its objective: ``length`` are the
    tokens of a thought, ``top`` the most likely tokens that are kept of each prediction. Where all
    positions think, no more than the next token is predicted, unless the student thinks too.
    """
    spec, objective = model.thoughts, model.objective
    if length is None:
        length = getattr(objective.settings, "teacher_length", None) or spec.length
    text = model.run_text(input_ids)
    batch = model.draw(
        input_ids, attention_mask, labels, answers=answers, marked=marked, length=length,
        num_thoughts=spec.num_thoughts, temperature=spec.temperature, top_p=spec.top_p,
        top_k=spec.top_k, sample_ids=sample_ids, seed=seed, text=text, places=places,
    )  # fmt: skip
    positions = None if spec.positions == "all" else batch.positions
    is_next_enough = positions is None and objective.student != "thinking"
    states, weight = read_thoughts(
        model, input_ids, batch.tokens, positions, text=text,
        lookahead=1 if is_next_enough else spec.lookahead,
    )  # fmt: skip
    drawn = (batch.lengths * (batch.positions >= 0).unsqueeze(-1)).sum()
    most = objective.top_tokens if top is None else top
    return teacher_targets(states, weight, batch.labels, model.output_head, positions, most, drawn)
