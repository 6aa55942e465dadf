"""Scores of items, token by token, without thoughts and with given ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from quietstar.evaluation.tasks import AnswerBatch, Candidates
from quietstar.model.outputs import MixedScores
from quietstar.model.quiet_star import QuietStarForCausalLM

POSITIONS = ("trained", "every")
"""Where answers are thought about: as the model was trained, or before every scored token."""


@dataclass(frozen=True)
class Protocol:
    """How items are scored.

    Attributes:
        variants: Variants to score, such as ``with_thoughts`` and some `controls.CONTROLS`.
        batch_size: Items (chains, where there are votes) at once.
        samples: Thoughts of each item, over which scores are averaged.
        thought_temperature: Sampling temperature of thoughts; None takes the most likely tokens.
        seed: Seed of thoughts, votes, controls and resampling.
        votes: Chains of thought of an item.
        temperature: Sampling temperature of the chains.
        max_new_tokens: Tokens of a chain.
        text_tokens: Tokens that are read of a text without a prompt.
        positions: Where answers are thought about (`POSITIONS`).
        separator: Text between prompt and answer of the user's own records.
    """

    variants: tuple[str, ...]
    batch_size: int = 16
    samples: int = 1
    thought_temperature: float | None = None
    seed: int = 0
    votes: int = 8
    temperature: float = 0.9
    max_new_tokens: int = 384
    text_tokens: int = 256
    positions: str = "trained"
    separator: str = ""


def thinks_once(model: QuietStarForCausalLM, positions: str) -> bool:
    """Say whether answers are thought about once, before their first token.

    Args:
        model: Model that thinks.
        positions: One of `POSITIONS`.
    """
    return positions == "trained" and model.thoughts.positions == "answer_start"


def predict_plain(
    model: QuietStarForCausalLM, batch: AnswerBatch, candidates: Candidates | None
) -> MixedScores:
    """Predict the scored tokens without thoughts, as with one thought that changes nothing."""
    ids = None if candidates is None else candidates.ids.to(batch.ids.device)
    scores = model.score_plain(batch.ids, batch.mask, batch.labels, candidates=ids)
    places = batch.positions.clamp(min=0)  # (B, P)
    logits = None
    if scores.candidates is not None:
        index = places.unsqueeze(-1).expand(*places.shape, scores.candidates.shape[-1])
        logits = scores.candidates.gather(1, index).unsqueeze(1)
    logprobs, predicted = (
        x.gather(1, places).unsqueeze(1) for x in (scores.logprobs, scores.predicted)
    )
    return MixedScores(logprobs, predicted, logits)


def predict_thinking(
    model: QuietStarForCausalLM,
    batch: AnswerBatch,
    candidates: Candidates | None,
    thoughts: Int[Tensor, "batch thoughts thinking length"],
) -> MixedScores:
    """Predict the scored tokens with these thoughts, and plainly where the batch does not think."""
    ids = None if candidates is None else candidates.ids.to(batch.ids.device)
    mixed = model.score_mixed(
        batch.ids, batch.mask, batch.labels, thoughts, batch.thinking, candidates=ids
    )
    if torch.equal(batch.thinking, batch.positions):
        return mixed
    plain = predict_plain(model, batch, candidates)
    width = batch.thinking.shape[1]
    thinks = (batch.thinking >= 0).unsqueeze(1)  # (B, 1, thinking)

    def merge(plain: Tensor, mixed: Tensor) -> Tensor:
        merged = plain.repeat_interleave(mixed.shape[1], dim=1)
        here = thinks if mixed.ndim == 3 else thinks.unsqueeze(-1)
        merged[:, :, :width] = mixed.where(here, merged[:, :, :width])
        return merged

    logits = None
    if plain.candidates is not None and mixed.candidates is not None:
        logits = merge(plain.candidates, mixed.candidates)
    logprobs, predicted = merge(plain.logprobs, mixed.logprobs), plain.predicted
    return MixedScores(logprobs, merge(predicted, mixed.predicted), logits)


def item_metrics(
    predictions: MixedScores, batch: AnswerBatch, candidates: Candidates | None
) -> dict[str, Float[Tensor, "batch thoughts"]]:
    """Compute the metrics of every item and every one of its thoughts.

    Returns:
        ``nll``: of the scored tokens over the whole vocabulary, nats a token, and

        - with candidates: ``gold_probability``: the product over the answer's tokens of their
          probabilities, renormalized over the digits (or labels); ``accuracy``: 1 where each is
          the most likely of those; ``published_accuracy``: as ``gold_probability``, with the end
          of the line among candidates and tokens, as the published code does;
        - without: ``accuracy``: 1 where every token is the most likely of the vocabulary, and
          ``token_accuracy``, the fraction of tokens that are.
    """
    batch = batch.to(torch.device("cpu"))  # float64 is not on every device
    valid = batch.valid.unsqueeze(1)  # (B, 1, P)
    counts = valid.sum(-1)
    metrics = {"nll": -predictions.logprobs.cpu().double().where(valid, 0).sum(-1) / counts}
    if candidates is None or predictions.candidates is None:
        right = (predictions.predicted.cpu() == batch.targets.unsqueeze(1)) & valid
        fraction = right.sum(-1).double() / counts
        return metrics | {"accuracy": (right | ~valid).all(-1).double(), "token_accuracy": fraction}
    logits = predictions.candidates.cpu().double()
    gold = gold_index(batch, candidates)  # (B, P)
    answers = logits[..., : candidates.num_answers]
    is_answer = ((gold >= 0) & (gold < candidates.num_answers)).unsqueeze(1)
    right = (answers.argmax(-1) == gold.unsqueeze(1)) | ~is_answer
    metrics["gold_probability"] = _probability(answers, gold, is_answer)
    metrics["accuracy"] = right.all(-1).double()
    if candidates.has_end:
        metrics["published_accuracy"] = _probability(logits, gold, (gold >= 0).unsqueeze(1))
    return metrics


def gold_index(batch: AnswerBatch, candidates: Candidates) -> Int[Tensor, "batch positions"]:
    """Find each true token among the candidates; -1 for another token or none."""
    same = batch.targets.unsqueeze(-1) == candidates.ids  # (B, P, C)
    index = same.int().argmax(-1)
    return index.where(same.any(-1) & batch.valid, -1)


def _probability(
    logits: Float[Tensor, "batch thoughts positions candidates"],
    gold: Int[Tensor, "batch positions"],
    counted: Bool[Tensor, "batch 1 positions"],
) -> Float[Tensor, "batch thoughts"]:
    inside = gold.clamp(0, logits.shape[-1] - 1)
    index = inside[:, None, :, None].expand(*logits.shape[:3], 1)
    logprobs = logits.log_softmax(-1).gather(-1, index).squeeze(-1)
    return logprobs.where(counted, 0).sum(-1).exp()
