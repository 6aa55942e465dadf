"""What a model thinks before every token of a text, and what that does to the prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.attention.layout import at_positions
from quietstar.backbone.output_head import OutputHead
from quietstar.evaluation.controls import swap_positions
from quietstar.evaluation.thought_records import (
    name_tokens,
    token_records,
    token_slices,
    used_tokens,
)
from quietstar.evaluation.thought_summary import summarise
from quietstar.losses.cross_entropy import chunk_rows
from quietstar.model.quiet_star import QuietStarForCausalLM

FORMAT, VERSION = "quietstar-thoughts", 1
TOP = 5
"""Most likely tokens that are shown."""
CHUNK = 128
"""Positions that think at once."""


@dataclass(frozen=True)
class Reading:
    """How a text is read.

    Attributes:
        num_thoughts: At every position.
        temperature: Of thoughts; None takes the most likely tokens.
        seed: Of their noise.
        context: Most tokens that the model reads at once; None for all.
    """

    num_thoughts: int = 1
    temperature: float | None = None
    seed: int = 0
    context: int | None = None


@dataclass(frozen=True)
class Window:
    """Positions that think, in the part of the text that is read for them.

    Attributes:
        start: First token of the part.
        first: First position that thinks.
        stop: Behind the last one; the token there is still read, as the last one's target.
    """

    start: int
    first: int
    stop: int


def windows(length: int, context: int | None) -> Iterator[Window]:
    """All positions of a text but the last, a chunk at a time, with all the context there is.

    Where the text is longer than ``context``, a position still sees at least ``context`` minus
    `CHUNK` (at most half of ``context``) tokens before it.
    """
    size = CHUNK if context is None else max(1, min(CHUNK, context // 2))
    for first in range(0, length - 1, size):
        stop = min(first + size, length - 1)
        start = 0 if context is None else max(0, stop + 1 - context)
        yield Window(start, first, stop)


@torch.no_grad()
def inspect_text(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    name: str,
    reading: Reading,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Everything that the page shows, as JSON can hold it (docs/inspect.md has the schema).

    Args:
        model: With a lookahead of one.
        tokenizer: Its own.
        text: Of at least two tokens.
        name: Of the model.
        reading: How.
        advance: Called once a window and pass; there are three passes.
    """
    ids = torch.tensor([tokenizer(text)["input_ids"]], device=model.device)  # pyright: ignore
    parts = list(windows(ids.shape[1], reading.context))
    own = torch.cat([_sampled(model, ids, window, reading, advance) for window in parts], dim=2)
    real = torch.ones_like(own[:, 0, :, 0], dtype=torch.bool)
    others = swap_positions(own, real, [0])
    records: list[dict[str, Any]] = [{"position": 0, "id": int(ids[0, 0])}]
    for window in parts:
        columns = _scored(model, ids, own, window)
        advance()
        columns["exchanged"] = _exchanged(model, ids, others, window)
        advance()
        records += list(token_records(columns, own, ids, range(window.first, window.stop)))
    table = {i: str(tokenizer.decode([i])) for i in sorted(used_tokens(records))}
    slices = token_slices(tokenizer, text, ids[0].tolist())
    for record, own_text in zip(records, slices, strict=True):
        record["text"] = own_text
        name_tokens(record, table, tokenizer)
    summary = summarise(records)
    for thought in summary["frequent"]:
        thought["texts"] = [table[i] for i in thought["ids"]]
        thought["text"] = tokenizer.decode(thought["ids"])
    settings = {"thought_length": model.thoughts.length, "num_thoughts": reading.num_thoughts,
                "temperature": reading.temperature, "seed": reading.seed,
                "context": reading.context}  # fmt: skip
    found = {"format": FORMAT, "version": VERSION, "model": name, "settings": settings}
    return found | {"summary": summary, "tokens": records}


def num_windows(length: int, context: int | None) -> int:
    """How often `inspect_text` advances."""
    return 3 * len(list(windows(length, context)))


def _part(ids: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """The tokens that are read, and the positions in them."""
    positions = torch.arange(window.first - window.start, window.stop - window.start)
    return ids[:, window.start : window.stop + 1], positions[None].to(ids.device)


def _sampled(
    model: QuietStarForCausalLM,
    ids: Tensor,
    window: Window,
    reading: Reading,
    advance: Callable[[], object],
) -> Int[Tensor, "1 thoughts positions length"]:
    part, positions = _part(ids, window)
    tokens = model.sample(
        part, num_thoughts=reading.num_thoughts, temperature=reading.temperature,
        positions=positions, seed=reading.seed,
    )  # fmt: skip
    advance()
    return tokens


def _scored(
    model: QuietStarForCausalLM, ids: Tensor, own: Tensor, window: Window
) -> dict[str, Tensor]:
    """Figures by position (and thought), without the batch axis."""
    part, positions = _part(ids, window)
    thoughts = own[:, :, window.first : window.stop]
    states, weight = model.states_with(part, thoughts.permute(3, 1, 0, 2), positions)
    targets = at_positions(part.roll(-1, 1), positions)[0]  # (P,)
    base = states.text[0, positions[0]]  # (P, D)
    head, count = model.output_head, thoughts.shape[1]
    columns: dict[str, Tensor] = {"weight": weight[0, :, 0].T}  # (P, K)
    found = _predictions(head, base, states.ahead[0, :, 0], weight[0, :, 0], targets)
    columns |= found
    policy = states.policy[:, :, 0].flatten(0, 2)  # (T * K * P, D)
    tokens = thoughts[0].permute(2, 0, 1).flatten()  # (T * K * P)
    logprobs = _logprobs(head, policy, tokens)
    columns["thought_probability"] = logprobs.exp().view(-1, count, len(targets)).permute(2, 1, 0)
    return columns


def _predictions(
    head: OutputHead,
    base: Float[Tensor, "positions width"],
    ahead: Float[Tensor, "thoughts positions width"],
    weight: Float[Tensor, "thoughts positions"],
    targets: Int[Tensor, " positions"],
) -> dict[str, Tensor]:
    """Of base, thought and mixed: log-probability of the truth and the most likely tokens."""
    columns: dict[str, list[Tensor]] = {}
    size = max(1, chunk_rows(head.num_logits) // len(ahead))
    for start in range(0, len(base), size):
        rows = slice(start, start + size)
        base_logits = head.logits(base[rows])  # (p, V)
        thought_logits = head.logits(ahead[:, rows])  # (K, p, V)
        mixed_logits = torch.lerp(
            base_logits.expand_as(thought_logits), thought_logits, weight[:, rows, None]
        )
        kinds = {"base": base_logits, "thought": thought_logits, "mixed": mixed_logits}
        for kind, logits in kinds.items():
            for name, column in _told(logits, targets[rows]).items():
                columns.setdefault(f"{kind}_{name}", []).append(column)
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    return joined


def _told(logits: Float[Tensor, "*thoughts positions vocab"], targets: Tensor) -> dict[str, Tensor]:
    """Figures of a prediction, positions first."""
    logprobs = logits.log_softmax(-1)
    index = targets.expand(logprobs.shape[:-1]).unsqueeze(-1)
    truth = logprobs.gather(-1, index).squeeze(-1)
    top = logprobs.topk(min(TOP, logprobs.shape[-1]), dim=-1)
    entropy = -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(-1)
    found = {"logprob": truth, "entropy": entropy, "top_id": top.indices,
             "top_p": top.values.exp()}  # fmt: skip
    return {k: v if logits.ndim == 2 else v.transpose(0, 1) for k, v in found.items()}


def _logprobs(head: OutputHead, states: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of a token after every state; the head's rows beyond are never sampled."""
    head = head.sampled_only() if head.is_linear else head
    parts = []
    for start in range(0, len(states), chunk_rows(head.num_logits)):
        rows = slice(start, start + chunk_rows(head.num_logits))
        logits = head.logits(states[rows])[:, : head.vocab_size]
        parts.append(logits.log_softmax(-1).gather(-1, tokens[rows, None]).squeeze(-1))
    return torch.cat(parts)


def _exchanged(
    model: QuietStarForCausalLM, ids: Tensor, others: Tensor, window: Window
) -> Float[Tensor, "positions thoughts"]:
    """Log-probability of the truth with the thoughts of other positions."""
    part, positions = _part(ids, window)
    thoughts = others[:, :, window.first : window.stop]
    scored = model.score_mixed(part, None, part, thoughts, positions)
    return scored.logprobs[0].T
