"""What thinking gives behind every token of held-out text, and which tokens a gate would pick.

Teacher-forced, a thought changes one prediction and nothing else, so one parallel pass over the
texts says what every gate with every threshold would have given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from quietstar.backbone.run import plain_pass
from quietstar.data import Batch
from quietstar.evaluation.scoring import not_finite
from quietstar.generation.gates import PROBED, Gate, GateKind, Probe
from quietstar.generation.generate import new_decoder, predict_next
from quietstar.losses.thought_loss import next_token_entropy
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.sampling.thoughts import Sampling
from quietstar.system.processes import ALONE, Processes

RIDGE = 1e-2
"""Regularization of the probes' fit, relative to the mean variance of the states."""


@dataclass(frozen=True)
class Measured:
    """Every predicted token of the texts, in one row."""

    text: Int[Tensor, " tokens"]  # index of the token's text
    states: Float[Tensor, "tokens width"]  # of the text behind the token before
    entropy: Float[Tensor, " tokens"]  # of the plain prediction, nats
    weight: Float[Tensor, " tokens"]  # mixing weight
    base_nll: Float[Tensor, " tokens"]  # without a thought, nats
    mixed_nll: Float[Tensor, " tokens"]  # with a greedy thought, nats
    base_right: Bool[Tensor, " tokens"]  # the token is the most likely one without a thought
    mixed_right: Bool[Tensor, " tokens"]  # it is the most likely one with the thought
    answer: Bool[Tensor, " tokens"]  # the token belongs to an answer

    def where(self, selected: Bool[Tensor, " tokens"]) -> Measured:
        """Select some of the tokens."""
        return Measured(*[getattr(self, field.name)[selected] for field in fields(self)])


@torch.no_grad()
def measure_tokens(
    model: QuietStarForCausalLM,
    batches: Sequence[Batch],
    advance: Callable[[], object],
    processes: Processes = ALONE,
) -> Measured:
    """Think greedily behind every token of the texts, whose batches ``processes`` share.

    Raises:
        UserError: A figure is NaN or infinite.
    """

    def measure(batch: Batch) -> list[Tensor]:
        batch = batch.to(model.device)
        thoughts = model.think(batch.input_ids, batch.attention_mask)
        states = plain_pass(model.causal_lm, batch.input_ids)
        entropy = next_token_entropy(states, model.output_head)
        valid = thoughts.valid[..., 0]  # (B, S)
        following = batch.input_ids.roll(-1, 1)
        rows = batch.sample_ids[:, None].expand_as(valid)
        columns = (
            rows, states, entropy, thoughts.mixing_weight[:, 0, :, 0],
            -thoughts.base_logprobs[..., 0], -thoughts.mixed_logprobs[:, 0, :, 0],
            thoughts.base_predicted == following,
            thoughts.mixed_predicted[:, 0, :, 0] == following, batch.answers.roll(-1, 1),
        )  # fmt: skip
        return [column[valid].cpu() for column in columns]

    parts = []
    for part in processes.share(batches, measure):
        parts.append(part)
        advance()
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    joined[1:6] = [column.float() for column in joined[1:6]]
    for field, column in zip(fields(Measured), joined, strict=True):
        for row in (~column.isfinite()).nonzero()[:1, 0].tolist():
            value = column[row].flatten()[0].item()
            raise not_finite(f"token {row} of the held-out texts", field.name, value)
    return Measured(*joined)


def fit_probes(measured: Measured) -> dict[str, Probe]:
    """Fit linear probes of states that predict mixing weight and gain, by ridge regression."""
    gain = measured.base_nll - measured.mixed_nll
    states = measured.states.double()
    mean = states.mean(0)
    centred = states - mean
    gram = centred.T @ centred / len(states)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp(min=1e-12))  # all states may be equal
    probes = {}
    for name, target in zip(PROBED, (measured.weight, gain), strict=True):
        offset = target.double().mean()
        weight = torch.linalg.solve(gram, centred.T @ (target.double() - offset) / len(states))
        probes[name] = Probe(weight.float(), (offset - mean @ weight).float())
    return probes


@dataclass(frozen=True)
class GateResult:
    """A gate, and what it would have given on the texts."""

    gate: Gate
    think_fraction: float  # of the tokens
    nll: float  # of the tokens, mixed where they think, nats
    accuracy: float | None  # fraction of answers all of whose tokens are right
    passes: float  # of the model, per token


def try_gate(gate: Gate, measured: Measured, scores: Tensor, thought_length: int) -> GateResult:
    """Compute what a gate would have given, by its scores of the tokens (`score_tokens`)."""
    thinks = scores > gate.threshold
    nll = torch.where(thinks, measured.mixed_nll, measured.base_nll).double().mean().item()
    fraction = thinks.double().mean().item()
    accuracy = None
    if measured.answer.any():
        right = torch.where(thinks, measured.mixed_right, measured.base_right) | ~measured.answer
        wrong = measured.text.bincount((~right).float())
        texts = measured.text[measured.answer].unique()
        accuracy = (wrong[texts] == 0).double().mean().item()
    return GateResult(gate, fraction, nll, accuracy, 1 + thought_length * fraction)


def score_tokens(kind: GateKind, measured: Measured, probes: dict[str, Probe]) -> Tensor:
    """Give a gate's score of every token."""
    return measured.entropy if kind == "entropy" else probes[kind](measured.states)


def threshold_at(scores: Tensor, fraction: float) -> float:
    """Find the threshold above which this fraction of the scores lies."""
    count = round(fraction * len(scores))
    ordered = scores.sort(descending=True).values
    if 0 < count < len(ordered):
        return float((ordered[count - 1] + ordered[count]) / 2)
    edge = float(ordered[0 if count == 0 else -1])
    margin = 1e-6 * abs(edge) + 1e-12
    return edge + margin if count == 0 else edge - margin


@torch.no_grad()
def stream_seconds(
    model: QuietStarForCausalLM, texts: Int[Tensor, "batch seq"], gate: Gate
) -> float:
    """Measure the seconds a token takes when texts of one length are decoded as `generate` does.

    Their tokens are forced, so that every gate reads the same.
    """
    sampling = Sampling(1, model.thoughts.length, None, 0, model.stop)
    decoder = new_decoder(model, sampling, texts[:, :0])
    begun = time.perf_counter()
    for place in range(texts.shape[1] - 1):
        logits, _ = predict_next(model, decoder, gate, texts[:, place])
        logits.argmax(-1)
    if texts.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / max(1, texts.shape[1] - 1)
