"""What a model thinks before every token of a text, and what that does to the prediction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from statistics import fmean, median
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.attention.layout import at_positions
from quietstar.backbone.output_head import OutputHead
from quietstar.evaluation.controls import gain_over, swap_positions
from quietstar.losses.cross_entropy import chunk_rows
from quietstar.model.quiet_star import QuietStarForCausalLM

FORMAT, VERSION = "quietstar-thoughts", 2
TOP = 5
"""Most likely tokens that are listed."""
CHUNK = 128
"""Positions that think at once."""
MOST_FREQUENT = 10
BINS = (-2.0, -1.0, -0.5, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Edges of the histogram of gains, nats; what lies beyond has bins of its own."""


@dataclass(frozen=True)
class Reading:
    """How a text is read.

    Attributes:
        num_thoughts: Thoughts at every position.
        temperature: Sampling temperature of thoughts; None takes the most likely tokens.
        seed: Seed of the thoughts' noise.
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
        stop: End of the positions that think; the token there is read as the last one's target.
    """

    start: int
    first: int
    stop: int

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Give the tokens that are read, and the positions that think in them."""
        positions = torch.arange(self.first - self.start, self.stop - self.start)
        return ids[:, self.start : self.stop + 1], positions[None].to(ids.device)


def windows(length: int, context: int | None) -> Iterator[Window]:
    """Cut a text into windows that cover all its positions but the last, a chunk at a time.

    Where the text is longer than ``context``, a position still sees at least ``context`` minus
    `CHUNK` (at most half of ``context``) tokens before it.
    """
    size = CHUNK if context is None else max(1, min(CHUNK, context // 2))
    for first in range(0, length - 1, size):
        stop = min(first + size, length - 1)
        start = 0 if context is None else max(0, stop + 1 - context)
        yield Window(start, first, stop)


def num_windows(length: int, context: int | None) -> int:
    """Count how often `inspect_text` advances."""
    return 3 * len(list(windows(length, context)))


@torch.no_grad()
def inspect_text(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    name: str,
    reading: Reading,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Collect everything that the page shows, as JSON can hold it (docs/inspect.md: the schema).

    Args:
        model: Model with a lookahead of one.
        tokenizer: Tokenizer of the model.
        text: Text of at least two tokens.
        name: Name of the model.
        reading: How the text is read.
        advance: Called once a window and pass; there are three passes.
    """
    ids = torch.tensor([tokenizer(text)["input_ids"]], device=model.device)  # pyright: ignore
    parts, sampled = list(windows(ids.shape[1], reading.context)), []
    for window in parts:
        part, positions = window.read(ids)
        sampled.append(model.sample(
            part, num_thoughts=reading.num_thoughts, temperature=reading.temperature,
            positions=positions, seed=reading.seed,
        ))  # fmt: skip
        advance()
    own = torch.cat(sampled, dim=2)  # (1, K, S - 1, T)
    swapped = None  # a single position has no other to swap with
    if own.shape[2] > 1:
        swapped = swap_positions(own, torch.ones_like(own[:, 0, :, 0], dtype=torch.bool), [0])
    records: list[dict[str, Any]] = [{"position": 0, "id": int(ids[0, 0])}]
    for window in parts:
        columns = _scored(model, ids, own, window)
        advance()
        if swapped is not None:
            part, positions = window.read(ids)
            thoughts = swapped[:, :, window.first : window.stop]
            scores = model.score_mixed(part, None, part, thoughts, positions)
            columns["swapped"] = scores.logprobs[0].T  # (P, K)
        advance()
        records += token_records(columns, own, ids, range(window.first, window.stop))
    _add_texts(records, tokenizer, text)
    summary = summarise_thoughts(records)
    for thought in summary["frequent"]:
        thought["texts"] = tokenizer.batch_decode([[i] for i in thought["ids"]])
        thought["text"] = tokenizer.decode(thought["ids"])
    settings = {"thought_length": model.thoughts.length, "num_thoughts": reading.num_thoughts,
                "temperature": reading.temperature, "seed": reading.seed,
                "context": reading.context}  # fmt: skip
    document = {"format": FORMAT, "version": VERSION, "model": name, "settings": settings}
    return document | {"summary": summary, "tokens": records}


# --- Figures of a window --------------------------------------------------------------------------


def _scored(
    model: QuietStarForCausalLM, ids: Tensor, own: Tensor, window: Window
) -> dict[str, Tensor]:
    """Compute figures by position (and thought), without the batch axis."""
    part, positions = window.read(ids)
    thoughts = own[:, :, window.first : window.stop]  # (1, K, P, T)
    states, weight = model.states_with(part, thoughts.permute(3, 1, 0, 2), positions)
    targets = at_positions(part.roll(-1, 1), positions)[0]  # (P,)
    head, count = model.output_head, thoughts.shape[1]
    columns: dict[str, Tensor] = {"weight": weight[0, :, 0].T}  # (P, K)
    columns |= _predictions(
        head, states.text[0, positions[0]], states.ahead[0, :, 0], weight[0, :, 0], targets
    )
    policy = states.policy[:, :, 0].flatten(0, 2)  # (T * K * P, D)
    tokens = thoughts[0].permute(2, 0, 1).flatten()  # (T * K * P)
    sampling_head = head.sampled_only() if head.is_linear else head
    probabilities = []
    for start in range(0, len(policy), chunk_rows(head.num_logits)):
        rows = slice(start, start + chunk_rows(head.num_logits))
        # Rows of the vocabulary beyond the tokenizer's are never sampled.
        logits = sampling_head.logits(policy[rows])[:, : head.vocab_size]
        probabilities.append(logits.softmax(-1).gather(-1, tokens[rows, None]).squeeze(-1))
    columns["thought_probability"] = (
        torch.cat(probabilities).view(-1, count, len(targets)).permute(2, 1, 0)
    )
    return columns


def _predictions(
    head: OutputHead,
    base: Float[Tensor, "positions width"],
    thought: Float[Tensor, "thoughts positions width"],
    weight: Float[Tensor, "thoughts positions"],
    targets: Int[Tensor, " positions"],
) -> dict[str, Tensor]:
    """Describe the base, thought and mixed predictions; positions come first."""
    columns: dict[str, list[Tensor]] = {}
    size = max(1, chunk_rows(head.num_logits) // len(thought))
    for start in range(0, len(base), size):
        rows = slice(start, start + size)
        base_logits = head.logits(base[rows])  # (p, V)
        thought_logits = head.logits(thought[:, rows])  # (K, p, V)
        mixed_logits = torch.lerp(
            base_logits.expand_as(thought_logits), thought_logits, weight[:, rows, None]
        )
        kinds = {"base": base_logits, "thought": thought_logits, "mixed": mixed_logits}
        for kind, logits in kinds.items():
            logprobs = logits.log_softmax(-1)
            index = targets[rows].expand(logprobs.shape[:-1]).unsqueeze(-1)
            top = logprobs.topk(min(TOP, logprobs.shape[-1]), dim=-1)
            figures = {
                "logprob": logprobs.gather(-1, index).squeeze(-1),
                "entropy": -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(-1),
                "top_id": top.indices,
                "top_p": top.values.exp(),
            }
            for name, column in figures.items():
                column = column if kind == "base" else column.transpose(0, 1)
                columns.setdefault(f"{kind}_{name}", []).append(column)
    return {name: torch.cat(parts) for name, parts in columns.items()}


# --- Records of tokens ----------------------------------------------------------------------------


def token_records(
    columns: dict[str, Tensor], own: Tensor, ids: Tensor, positions: range
) -> Iterator[dict[str, Any]]:
    """Make a record of every token that one of the positions predicts."""
    lists = {name: column.tolist() for name, column in columns.items()}
    for row, position in enumerate(positions):
        at = {name: column[row] for name, column in lists.items()}
        tokens, base_nll = own[0, :, position].tolist(), -at["base_logprob"]
        mixed_nll = -fmean(at["mixed_logprob"])
        content = None if "swapped" not in at else gain_over(mixed_nll, -fmean(at["swapped"]))
        yield {
            "position": position + 1,
            "id": int(ids[0, position + 1]),
            "base_logprob": at["base_logprob"],
            "base_entropy": at["base_entropy"],
            "gain": base_nll - mixed_nll,
            "gain_of_content": content,
            "base_top": _top(at["base_top_id"], at["base_top_p"]),
            "thoughts": [
                {
                    "ids": tokens[k],
                    "probabilities": at["thought_probability"][k],
                    "mixing_weight": at["weight"][k],
                    "thought_logprob": at["thought_logprob"][k],
                    "mixed_logprob": at["mixed_logprob"][k],
                    "gain": at["mixed_logprob"][k] - at["base_logprob"],
                    "thought_top": _top(at["thought_top_id"][k], at["thought_top_p"][k]),
                    "mixed_top": _top(at["mixed_top_id"][k], at["mixed_top_p"][k]),
                }
                for k in range(len(tokens))
            ],
        }


def _top(ids: Sequence[int], probabilities: Sequence[float]) -> list[dict[str, Any]]:
    return [{"id": i, "probability": p} for i, p in zip(ids, probabilities, strict=True)]


def _add_texts(
    records: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    """Put texts beside ids, and cut figures to five significant digits."""
    table: dict[int, str] = {}

    def name(token: int) -> str:
        if token not in table:
            table[token] = str(tokenizer.decode([token]))
        return table[token]

    def short(holder: dict[str, Any]) -> None:
        for key, value in holder.items():
            if isinstance(value, float):
                holder[key] = float(f"{value:.5g}")

    slices = token_slices(tokenizer, text, [record["id"] for record in records])
    for record, own_text in zip(records, slices, strict=True):
        record["text"] = own_text
        thoughts = record.get("thoughts", [])
        tops = [record.get("base_top", [])]
        for thought in thoughts:
            thought["texts"] = [name(i) for i in thought["ids"]]
            thought["text"] = tokenizer.decode(thought["ids"])
            thought["probabilities"] = [float(f"{p:.5g}") for p in thought["probabilities"]]
            tops += [thought["thought_top"], thought["mixed_top"]]
        for top in (entry for entries in tops for entry in entries):
            top["text"] = name(top["id"])
            short(top)
        for holder in (record, *thoughts):
            short(holder)


def token_slices(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> list[str]:
    """Cut the text into its tokens, white space with the token behind it; joined they are the text.

    A token of some of a character's bytes has the whole character, and those behind it nothing. A
    tokenizer that does not say where its tokens lie gives their own texts.
    """
    if not tokenizer.is_fast:
        return [tokenizer.decode([i]) for i in ids]  # pyright: ignore[reportReturnType]
    offsets: Any = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    slices, done = [], 0
    for _, end in offsets:
        slices.append(text[done:end])
        done = max(done, end)
    slices[-1] += text[done:]
    return slices


# --- Summary --------------------------------------------------------------------------------------


def summarise_thoughts(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average over the predicted tokens, over hard and easy ones; list the most frequent thoughts.

    Hard tokens are those whose NLL without thoughts is above the median.
    """
    predicted = [record for record in records if "gain" in record]
    middle = median(-record["base_logprob"] for record in predicted)
    hard = [record for record in predicted if -record["base_logprob"] > middle]
    easy = [record for record in predicted if -record["base_logprob"] <= middle]
    thoughts = [thought for record in predicted for thought in record["thoughts"]]
    frequent = Counter(tuple(thought["ids"]) for thought in thoughts).most_common(MOST_FREQUENT)
    edges = [None, *BINS, None]
    surprises = [-log(max(p, 1e-30)) for thought in thoughts for p in thought["probabilities"]]
    return {
        "tokens": len(predicted),
        "base_nll": -fmean(record["base_logprob"] for record in predicted),
        "all": _means(predicted),
        "hard": _means(hard) if hard else None,
        "easy": _means(easy) if easy else None,
        "mixing_weight": fmean(thought["mixing_weight"] for thought in thoughts),
        "entropy": fmean(surprises),
        "distinct_token_ratio": fmean(len(set(t["ids"])) / len(t["ids"]) for t in thoughts),
        "histogram": [
            {"low": low, "high": high, "count": sum(
                (low is None or record["gain"] >= low) and (high is None or record["gain"] < high)
                for record in predicted
            )}
            for low, high in pairwise(edges)
        ],
        "frequent": [
            {"ids": list(ids), "count": count,
             "gain": fmean(t["gain"] for t in thoughts if tuple(t["ids"]) == ids)}
            for ids, count in frequent
        ],
    }  # fmt: skip


def _means(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    contents = [r["gain_of_content"] for r in records if r["gain_of_content"] is not None]
    return {
        "tokens": len(records),
        "gain": fmean(record["gain"] for record in records),
        "gain_of_content": fmean(contents) if contents else None,
    }
