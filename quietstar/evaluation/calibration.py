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
from quietstar.generation.gates import PROBED, Gate, GateKind, Probe
from quietstar.generation.generate import next_logits
from quietstar.losses.thought_loss import next_token_entropy
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.sampling.decoding import Decoder
from quietstar.sampling.thoughts import Sampling

RIDGE = 1e-2
"""Regularization of the probes' fit, relative to the mean variance of the states."""


@dataclass(frozen=True)
class Measured:
    """Every predicted token of the texts, in one row.

    Attributes:
        text: Index of the token's text.
        states: States of the text behind the token before.
        entropy: Entropy of the plain prediction, nats.
        weight: Mixing weight.
        base_nll: NLL without a thought, nats.
        mixed_nll: NLL with a greedy thought, nats.
        base_right: True if the token is the most likely one without a thought.
        mixed_right: True if it is the most likely one with the thought.
        answer: True if the token belongs to an answer.
    """

    text: Int[Tensor, " tokens"]
    states: Float[Tensor, "tokens width"]
    entropy: Float[Tensor, " tokens"]
    weight: Float[Tensor, " tokens"]
    base_nll: Float[Tensor, " tokens"]
    mixed_nll: Float[Tensor, " tokens"]
    base_right: Bool[Tensor, " tokens"]
    mixed_right: Bool[Tensor, " tokens"]
    answer: Bool[Tensor, " tokens"]

    def where(self, selected: Bool[Tensor, " tokens"]) -> Measured:
        """Select some of the tokens."""
        return Measured(*[getattr(self, field.name)[selected] for field in fields(self)])

    @property
    def has_answers(self) -> bool:
        """Say whether the texts have answers."""
        return bool(self.answer.any())


@torch.no_grad()
def measure(
    model: QuietStarForCausalLM, batches: Sequence[Batch], advance: Callable[[], object]
) -> Measured:
    """Think greedily behind every token of the texts."""
    parts = []
    for batch in batches:
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
        parts.append([column[valid].cpu() for column in columns])
        advance()
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    joined[1:6] = [column.float() for column in joined[1:6]]
    return Measured(*joined)


def fit_probes(measured: Measured) -> dict[str, Probe]:
    """Fit linear probes of states that predict mixing weight and gain, by ridge regression."""
    gain = measured.base_nll - measured.mixed_nll
    states = measured.states.double()
    mean = states.mean(0)
    centred = states - mean
    gram = centred.T @ centred / len(states)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    probes = {}
    for name, target in zip(PROBED, (measured.weight, gain), strict=True):
        offset = target.double().mean()
        weight = torch.linalg.solve(gram, centred.T @ (target.double() - offset) / len(states))
        probes[name] = Probe(weight.float(), (offset - mean @ weight).float())
    return probes


@dataclass(frozen=True)
class GateResult:
    """A gate, and what it would have given on the texts.

    Attributes:
        gate: Gate with its threshold.
        think_fraction: Fraction of the tokens that think.
        nll: NLL of the tokens, mixed where they think, nats.
        accuracy: Fraction of answers all of whose tokens are right; None without answers.
        passes: Passes of the model per token.
    """

    gate: Gate
    think_fraction: float
    nll: float
    accuracy: float | None
    passes: float


def try_gate(gate: Gate, measured: Measured, scores: Tensor, thought_length: int) -> GateResult:
    """Compute what a gate would have given.

    Args:
        gate: Gate with its threshold.
        measured: Tokens of the texts.
        scores: Scores that the gate gives them (`score_tokens`).
        thought_length: Tokens of a thought.
    """
    thinks = scores > gate.threshold
    nll = torch.where(thinks, measured.mixed_nll, measured.base_nll).double().mean().item()
    fraction = thinks.double().mean().item()
    accuracy = None
    if measured.has_answers:
        right = torch.where(thinks, measured.mixed_right, measured.base_right) | ~measured.answer
        wrong = torch.zeros(int(measured.text.max()) + 1).index_add(
            0, measured.text, (~right).float()
        )
        texts = torch.zeros_like(wrong).index_add(0, measured.text, measured.answer.float()) > 0
        accuracy = (wrong[texts] == 0).double().mean().item()
    return GateResult(gate, fraction, nll, accuracy, 1 + thought_length * fraction)


def score_tokens(kind: GateKind, measured: Measured, probes: dict[str, Probe]) -> Tensor:
    """Give a gate's score of every token."""
    return measured.entropy if kind == "entropy" else probes[kind](measured.states)


def threshold_at(scores: Tensor, fraction: float) -> float:
    """Find the threshold above which this fraction of the scores lies."""
    count = round(fraction * len(scores))
    ordered = scores.sort(descending=True).values
    if count == 0:
        return float(ordered[0]) + 1e-6 * abs(float(ordered[0])) + 1e-12
    if count >= len(ordered):
        return float(ordered[-1]) - 1e-6 * abs(float(ordered[-1])) - 1e-12
    return float((ordered[count - 1] + ordered[count]) / 2)


@torch.no_grad()
def stream_seconds(
    model: QuietStarForCausalLM, texts: Int[Tensor, "batch seq"], gate: Gate, start: int = 1
) -> float:
    """Measure the seconds a token takes when these texts are decoded as `generate` does.

    Args:
        model: Model that thinks.
        texts: Texts of one length; their tokens are forced, so that every gate reads the same.
        gate: Gate that decides which tokens think.
        start: Number of tokens that are read at once at the beginning.
    """
    sampling = Sampling(1, model.thoughts.length, None, 0)
    rows = torch.arange(len(texts), device=texts.device)
    real = torch.ones_like(texts[:, : start - 1], dtype=torch.bool)
    decoder = Decoder(
        model.causal_lm, model.output_head, model.start_embedding, model.end_embedding,
        sampling, texts[:, : start - 1], real, rows,
    )  # fmt: skip
    begun = time.perf_counter()
    for place in range(start - 1, texts.shape[1] - 1):
        new = decoder.append(texts[:, place], opens=gate.kind != "never")
        thinks = gate.decide(new.states, new.logits).nonzero().squeeze(1)
        if len(thinks):
            some = None if len(thinks) == len(texts) else thinks
            thinking = decoder.think(new, some)
            next_logits(model, new.states[thinks], new.logits[thinks], thinking).argmax(-1)
    if texts.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / max(1, texts.shape[1] - start)
