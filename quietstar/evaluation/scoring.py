"""Scores of items, token by token, without thoughts and with given or own ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from quietstar.evaluation.encoding import AnswerBatch, Candidates, EncodedItem, answer_batch
from quietstar.model.quiet_star import QuietStarForCausalLM


@dataclass(frozen=True)
class Predictions:
    """What was predicted of the scored tokens of a batch; K is 1 without thoughts.

    Attributes:
        logprobs: Of the true tokens, over the whole vocabulary, natural logarithm.
        predicted: Most likely tokens.
        candidates: Logits of the candidates; None for texts.
        thoughts: Tokens of the thoughts; None without.
    """

    logprobs: Float[Tensor, "batch thoughts positions"]
    predicted: Int[Tensor, "batch thoughts positions"]
    candidates: Float[Tensor, "batch thoughts positions candidates"] | None
    thoughts: Int[Tensor, "batch thoughts positions length"] | None


def batch_of(encoded: Sequence[EncodedItem], pad: int, device: torch.device) -> AnswerBatch:
    """Items side by side."""
    batch = answer_batch([one.ids for one in encoded], [one.num_scored for one in encoded], pad)
    return batch.to(device)


def predict_plain(
    model: QuietStarForCausalLM, batch: AnswerBatch, candidates: Candidates | None
) -> Predictions:
    """Without thoughts: what the plain model says."""
    few = None if candidates is None else candidates.ids.to(batch.ids.device)
    scores = model.score_plain(batch.ids, batch.mask, batch.labels, candidates=few)
    places = batch.positions.clamp(min=0)
    if scores.candidates is not None:
        index = places.unsqueeze(-1).expand(*places.shape, scores.candidates.shape[-1])
        few = scores.candidates.gather(1, index).unsqueeze(1)
    return Predictions(
        scores.logprobs.gather(1, places).unsqueeze(1),
        scores.predicted.gather(1, places).unsqueeze(1),
        few,
        None,
    )


def predict_thinking(
    model: QuietStarForCausalLM,
    batch: AnswerBatch,
    candidates: Candidates | None,
    thoughts: Int[Tensor, "batch thoughts positions length"],
) -> Predictions:
    """With these thoughts before the scored tokens."""
    few = None if candidates is None else candidates.ids.to(batch.ids.device)
    scored = model.score_mixed(batch.ids, batch.mask, batch.labels, thoughts, batch.positions, few)
    return Predictions(scored.logprobs, scored.predicted, scored.candidates, thoughts)


# --- Metrics of items -----------------------------------------------------------------------------


def item_metrics(
    predictions: Predictions, batch: AnswerBatch, candidates: Candidates | None
) -> dict[str, Float[Tensor, "batch thoughts"]]:
    """Metrics of every item and every one of its thoughts.

    Returns:
        ``nll``: of the scored tokens over the whole vocabulary, nats a token, and

        - with candidates: ``gold_probability``: the product over the answer's tokens of their
          probabilities, renormalised over the digits (or labels); ``accuracy``: 1 where each is
          the most likely of those; ``published_accuracy``: as ``gold_probability``, with the end
          of the line among candidates and tokens, as the published code does;
        - without: ``accuracy``: 1 where every token is the most likely of the vocabulary, and
          ``token_accuracy``, the share of those.
    """
    valid = batch.valid.unsqueeze(1)  # (B, 1, P)
    counts = valid.sum(-1)
    metrics = {"nll": -predictions.logprobs.double().where(valid, 0).sum(-1) / counts}
    if candidates is None or predictions.candidates is None:
        right = (predictions.predicted == batch.targets.unsqueeze(1)) & valid
        share = right.sum(-1).double() / counts
        return metrics | {"accuracy": (right | ~valid).all(-1).double(), "token_accuracy": share}
    logits = predictions.candidates.double()
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
    """Place of the true token among the candidates, -1 for another token or none."""
    same = batch.targets.unsqueeze(-1) == candidates.ids.to(batch.targets.device)  # (B, P, C)
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


# --- Controls -------------------------------------------------------------------------------------


def shuffle_within(
    thoughts: Int[Tensor, "batch thoughts positions length"], numbers: Sequence[int], seed: int
) -> Int[Tensor, "batch thoughts positions length"]:
    """Every thought's tokens in another order, in which none keeps its place.

    Args:
        thoughts: Of at least two tokens.
        numbers: Of the items; with the seed they key the orders.
        seed: Of the run.
    """
    assert thoughts.shape[-1] > 1, "one token cannot be shuffled"
    shuffled = thoughts.clone()
    for row, number in enumerate(numbers):
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        noise = torch.rand(thoughts.shape[1:], generator=generator)
        order = noise.argsort(-1).to(thoughts.device)  # a cycle through all places
        shuffled[row] = thoughts[row].scatter(
            -1, order, thoughts[row].gather(-1, order.roll(1, -1))
        )
    return shuffled


def donors(count: int, seed: int) -> list[int]:
    """Whose thoughts each item gets: one cycle through all of them in random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    given = torch.empty_like(order)
    given[order] = order.roll(1)
    return given.tolist()


def donated(
    thoughts: Sequence[Int[Tensor, "thoughts _ length"]], width: int
) -> Int[Tensor, "batch thoughts positions length"]:
    """Thoughts of other items at ``width`` places; their last one stands for those they lack."""
    places = torch.arange(width)
    return torch.stack([own[:, places.clamp(max=own.shape[1] - 1)] for own in thoughts])
