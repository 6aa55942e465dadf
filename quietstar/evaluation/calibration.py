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

from quietstar.backbone.teacher_forced import plain_pass
from quietstar.data import Batch
from quietstar.generation.gates import PROBED, Gate, GateKind, Probe
from quietstar.generation.generate import next_logits
from quietstar.losses.thought_loss import next_token_entropy
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.sampling.decoding import Decoder
from quietstar.sampling.thoughts import Sampling

RIDGE = 1e-2
"""Of the probes' fit, times the mean variance of the states."""


@dataclass(frozen=True)
class Measured:
    """Every predicted token of the texts, in one row.

    Attributes:
        text: Index of its text.
        states: Of the text, behind the token before.
        entropy: Of the plain prediction, nats.
        weight: Mixing weight.
        base_nll: Without a thought.
        mixed_nll: With a greedy one.
        base_right: Whether the most likely token is the true one.
        mixed_right: The same with the thought.
        answer: Whether the token is one of an answer.
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

    def where(self, chosen: Bool[Tensor, " tokens"]) -> Measured:
        """Some of the tokens."""
        return Measured(*[getattr(self, field.name)[chosen] for field in fields(self)])

    @property
    def has_answers(self) -> bool:
        """Whether the texts have answers."""
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
    """Linear probes of states that foretell mixing weight and gain: ridge regression."""
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
class Setting:
    """A gate, and what it gives on the texts.

    Attributes:
        gate: It.
        share: Of the tokens that think.
        nll: Of the tokens, mixed where they think, nats.
        accuracy: Of answers (all their tokens right); None without answers.
        passes: Of the model, a token.
    """

    gate: Gate
    share: float
    nll: float
    accuracy: float | None
    passes: float


def try_gate(gate: Gate, measured: Measured, scores: Tensor, thought_length: int) -> Setting:
    """What a gate gives.

    Args:
        gate: With its threshold.
        measured: The texts' tokens.
        scores: Its scores of them (`score_tokens`).
        thought_length: T.
    """
    thinks = scores > gate.threshold
    nll = torch.where(thinks, measured.mixed_nll, measured.base_nll).double().mean().item()
    share = thinks.double().mean().item()
    accuracy = None
    if measured.has_answers:
        right = torch.where(thinks, measured.mixed_right, measured.base_right) | ~measured.answer
        wrong = torch.zeros(int(measured.text.max()) + 1).index_add(
            0, measured.text, (~right).float()
        )
        texts = torch.zeros_like(wrong).index_add(0, measured.text, measured.answer.float()) > 0
        accuracy = (wrong[texts] == 0).double().mean().item()
    return Setting(gate, share, nll, accuracy, 1 + thought_length * share)


def score_tokens(kind: GateKind, measured: Measured, probes: dict[str, Probe]) -> Tensor:
    """A gate's score of every token."""
    return measured.entropy if kind == "entropy" else probes[kind](measured.states)


def threshold_at(scores: Tensor, share: float) -> float:
    """The threshold above which this share of the scores lies."""
    count = round(share * len(scores))
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
    """Seconds a new token takes where these texts are decoded token by token, as `generate` does.

    Args:
        model: It.
        texts: Of one length; what they say is forced, so that every gate reads the same.
        gate: It.
        start: Tokens that are read at once before.
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
