"""What a model thinks before every token of a text, and what that does to the prediction."""

from __future__ import annotations

import json
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from math import log
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.evaluation.controls import (
    CONTROL_NAMES,
    GAINS,
    GENERIC,
    GENERIC_TEXT,
    MADE,
    SWAPPED,
    gain_over,
    generic_tokens,
    make_thoughts,
    swap_positions,
)
from quietstar.evaluation.scoring import not_finite
from quietstar.losses.cross_entropy import chunk_rows
from quietstar.losses.scores import without_padding
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.model.scoring import read_thoughts
from quietstar.system.processes import ALONE, Processes

FORMAT, VERSION = "quietstar-thoughts", 2
TOP = 5
"""Most likely tokens that are listed."""
CHUNK = 128
"""Positions that think at once."""
MOST_FREQUENT = 10
BINS = (-2.0, -1.0, -0.5, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Edges of the histogram of gains, nats; what lies beyond has bins of its own."""

OF_THOUGHT = (
    *("ids", "texts", "text", "probabilities", "mixing_weight", "thought_top", "mixed_top"),
)
"""What there is to say of a thought whose target is not known."""


@dataclass(frozen=True)
class Reading:
    """How a text is read."""

    num_thoughts: int = 1  # at every position
    temperature: float | None = None  # of thoughts; None takes the most likely tokens
    seed: int = 0  # of the thoughts' noise
    context: int | None = None  # most tokens that the model reads at once; None for all
    all_controls: bool = False  # score all controls, not swapped thoughts alone
    generic: str = GENERIC_TEXT  # what stands in every thought of the control of that name


@dataclass(frozen=True)
class Window:
    """Positions that think, in the part of the text that is read for them."""

    start: int  # first token of the part
    first: int  # first position that thinks
    stop: int  # end of those that think; the token there is read as the last one's target

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
    return 2 * len(list(windows(length, context)))


@torch.no_grad()
def inspect_text(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    name: str,
    reading: Reading,
    advance: Callable[[], object] = lambda: None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Collect everything that the page shows, as JSON can hold it (docs/inspect.md: the schema).

    The text has at least two tokens, the model a lookahead of one; ``name`` is the model's.
    ``advance`` is called once a window and pass: one in which the model thinks, and one in which
    what it thinks is scored. Then comes the thought after the last token, which predicts what the
    text does not have. The windows are shared among ``processes``, all of which get the result.

    Raises:
        UserError: A figure is NaN or infinite, or the tokenizer has no token for the generic text.
    """
    ids = torch.tensor([tokenizer.encode(text)], device=model.device)

    def think(ids: Tensor, window: Window) -> Tensor:
        part, positions = window.read(ids)
        return model.draw(
            part, num_thoughts=reading.num_thoughts, temperature=reading.temperature,
            positions=positions, seed=reading.seed,
        ).tokens.transpose(1, 2)  # fmt: skip

    parts, sampled = list(windows(ids.shape[1], reading.context)), []
    for thoughts in processes.share(parts, lambda window: think(ids, window).cpu()):
        sampled.append(thoughts)
        advance()
    own = torch.cat(sampled, dim=2).to(ids.device)  # (1, K, S - 1, T)
    others = {}
    if own.shape[2] > 1:  # a single position has no other to swap with
        others[SWAPPED] = swap_positions(own[0], seed=0)[None]
    for control in MADE if reading.all_controls else ():
        generic = []
        if control == GENERIC:
            generic = generic_tokens(tokenizer, own.shape[3], reading.generic, "--generic")
        others[control] = make_thoughts(control, own, [0], model.pause_token_id, generic)
    slices = token_slices(tokenizer, text, ids[0].tolist())
    records: list[dict[str, Any]] = [{"position": 0, "id": int(ids[0, 0]), "text": slices[0]}]

    def score(window: Window) -> list[dict[str, Any]]:
        columns = _figures(model, ids, own, window)
        part, positions = window.read(ids)
        for control, thoughts in others.items():
            there = thoughts[:, :, window.first : window.stop]
            scores = model.score(
                part, there.transpose(1, 2), positions=positions, only_mixed=True, lookahead=1
            )
            columns[control] = scores.mixed_logprobs[0, ..., 0]  # (P, K), (P, 1) if all are equal
        _check_finite(name, columns, window.first + 1)
        return [
            {"position": position, "text": slices[position], **record}
            for position, record in enumerate(_token_records(columns, tokenizer), window.first + 1)
        ]

    for made in processes.share(parts, score):
        records += made
        advance()
    # After the last token the passes need one more, which no figure of the thought depends on.
    length = ids.shape[1]
    start = 0 if reading.context is None else max(0, length + 1 - reading.context)
    window, longer = Window(start, length - 1, length), torch.cat([ids, ids[:, -1:]], dim=1)
    thoughts = torch.cat([own, think(longer, window)], dim=2)
    columns = _figures(model, longer, thoughts, window)
    _check_finite(name, columns, length)
    (following,) = _token_records(columns, tokenizer)
    upcoming = {
        "position": length,
        **{key: following[key] for key in ("base_entropy", "base_top")},
        "thoughts": [
            {key: thought[key] for key in OF_THOUGHT} for thought in following["thoughts"]
        ],
    }
    # Figures are cut to five significant digits.
    records, upcoming = json.loads(
        json.dumps([records, upcoming]), parse_float=lambda x: float(f"{float(x):.5g}")
    )
    settings = {"thought_length": model.thoughts.length, **asdict(reading)}
    names = {control: CONTROL_NAMES[control] for control in others}
    return {"format": FORMAT, "version": VERSION, "model": name, "settings": settings,
            "controls": names, "summary": summarise_thoughts(records), "tokens": records,
            "next": upcoming}  # fmt: skip


# --- Figures of a window --------------------------------------------------------------------------
def _figures(
    model: QuietStarForCausalLM, ids: Tensor, own: Tensor, window: Window
) -> dict[str, Tensor]:
    """Describe thoughts and predictions by position (and thought), without the batch axis."""
    part, positions = window.read(ids)
    thoughts = own[:, :, window.first : window.stop]  # (1, K, P, T)
    states, weight = read_thoughts(model, part, thoughts.transpose(1, 2), positions)
    weight = weight[0, :, 0]  # (K, P)
    targets = ids[0, window.first + 1 : window.stop + 1]
    head, count = model.output_head, len(weight)
    columns: dict[str, list[Tensor]] = defaultdict(list)
    size = max(1, chunk_rows(head.num_logits) // count)
    for start in range(0, len(targets), size):
        rows = slice(start, start + size)
        base_logits = head.logits(states.text[0, positions[0, rows]])[:, None]  # (p, 1, V)
        thought_logits = head.logits(states.ahead[0, :, 0, rows]).transpose(0, 1)  # (p, K, V)
        mixed_logits = torch.lerp(
            base_logits.expand_as(thought_logits), thought_logits, weight.T[rows, :, None]
        )
        kinds = {"base": base_logits, "thought": thought_logits, "mixed": mixed_logits}
        for kind, logits in kinds.items():
            logprobs = logits.log_softmax(-1)
            index = targets[rows, None, None].expand(-1, logprobs.shape[1], 1)
            top = logprobs.topk(min(TOP, logprobs.shape[-1]), dim=-1)
            columns[f"{kind}_logprob"].append(logprobs.gather(-1, index).squeeze(-1))
            entropy = -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(-1)
            columns[f"{kind}_entropy"].append(entropy)
            columns[f"{kind}_top_id"].append(top.indices)
            columns[f"{kind}_top_p"].append(top.values.exp())
    policy = states.policy[:, :, 0].flatten(0, 2)  # (T * K * P, D)
    tokens = thoughts[0].permute(2, 0, 1).flatten()  # (T * K * P)
    sampling_head = head.sampled_only() if head.is_linear else head
    probabilities, size = [], chunk_rows(head.num_logits)
    for some, chosen in zip(policy.split(size), tokens.split(size), strict=True):
        # Rows of the vocabulary beyond the tokenizer's are never sampled.
        logits = sampling_head.logits(some)[:, : head.vocab_size]
        index = chosen.clamp(min=0)[:, None]  # what lies after the end of a thought is not shown
        probabilities.append(logits.softmax(-1).gather(-1, index).squeeze(-1))
    probability = torch.cat(probabilities).view(-1, count, len(targets)).permute(2, 1, 0)
    figures = {"id": targets, "ids": thoughts[0].transpose(0, 1), "weight": weight.T}
    figures |= {name: torch.cat(chunks) for name, chunks in columns.items()}
    return figures | {"probabilities": probability}


def _check_finite(name: str, columns: dict[str, Tensor], first: int) -> None:
    """Refuse NaN, which a page could not show; the first token of a window is number ``first``."""
    for figure, column in columns.items():
        is_bad = ~column.isfinite().flatten(1).all(1) if column.ndim > 1 else ~column.isfinite()
        for row in is_bad.nonzero()[:1, 0].tolist():
            where = f"{name}, token {first + row}"
            raise not_finite(where, figure, column[row].flatten().tolist()[0])


# --- Records of tokens ----------------------------------------------------------------------------
def _token_records(
    columns: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """Make a record of every token that one of the positions predicts."""

    @cache
    def text_of(token: int) -> str:
        return str(tokenizer.decode([token]))

    def top(ids: list[int], probabilities: list[float]) -> list[dict[str, Any]]:
        pairs = zip(ids, probabilities, strict=True)
        return [{"id": i, "probability": p, "text": text_of(i)} for i, p in pairs]

    lists = {name: column.tolist() for name, column in columns.items()}
    for row in range(len(columns["id"])):
        at = {name: column[row] for name, column in lists.items()}
        (base,), mixed = at["base_logprob"], fmean(at["mixed_logprob"])
        gains = {
            GAINS[control]: gain_over(-mixed, -fmean(at[control]))
            for control in CONTROL_NAMES
            if control in at
        }
        yield {
            "id": at["id"],
            "base_logprob": base,
            "base_entropy": at["base_entropy"][0],
            "gain": mixed - base,
            **{GAINS[SWAPPED]: None, **gains},
            "base_top": top(at["base_top_id"][0], at["base_top_p"][0]),
            "thoughts": [
                {
                    "ids": ids,
                    "texts": [text_of(i) for i in ids],
                    "text": tokenizer.decode(ids),
                    "probabilities": at["probabilities"][k][: len(ids)],
                    "mixing_weight": at["weight"][k],
                    "thought_logprob": at["thought_logprob"][k],
                    "mixed_logprob": at["mixed_logprob"][k],
                    "gain": at["mixed_logprob"][k] - base,
                    "controls": {
                        control: at[control][min(k, len(at[control]) - 1)]
                        for control in CONTROL_NAMES
                        if control in at
                    },
                    "thought_top": top(at["thought_top_id"][k], at["thought_top_p"][k]),
                    "mixed_top": top(at["mixed_top_id"][k], at["mixed_top_p"][k]),
                }
                for k, ids in enumerate(map(without_padding, at["ids"]))
            ],
        }


def token_slices(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> list[str]:
    """Cut the text into its tokens, white space with the token after it; joined they are the text.

    A token of some of a character's bytes has the whole character, and those after it nothing. A
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
    middle = median(record["base_logprob"] for record in predicted)
    hard = [record for record in predicted if record["base_logprob"] < middle]
    easy = [record for record in predicted if record["base_logprob"] >= middle]
    thoughts = [thought for record in predicted for thought in record["thoughts"]]
    surprises = [-log(max(p, 1e-30)) for thought in thoughts for p in thought["probabilities"]]
    counts = Counter(bisect(BINS, record["gain"]) for record in predicted)
    frequent = []
    for ids, count in Counter(tuple(t["ids"]) for t in thoughts).most_common(MOST_FREQUENT):
        same = [thought for thought in thoughts if tuple(thought["ids"]) == ids]
        gain = fmean(thought["gain"] for thought in same)
        texts = {key: same[0][key] for key in ("ids", "texts", "text")}
        frequent.append({**texts, "count": count, "gain": gain})
    return {
        "tokens": len(predicted),
        "base_nll": -fmean(record["base_logprob"] for record in predicted),
        "all": _means(predicted),
        "hard": _means(hard) if hard else None,
        "easy": _means(easy) if easy else None,
        "mixing_weight": fmean(thought["mixing_weight"] for thought in thoughts),
        "entropy": fmean(surprises or [0.0]),  # thoughts may be empty
        "distinct_token_ratio": fmean(len(set(t["ids"])) / max(1, len(t["ids"])) for t in thoughts),
        "histogram": [
            {"low": low, "high": high, "count": counts[index]}
            for index, (low, high) in enumerate(pairwise([None, *BINS, None]))
        ],
        "frequent": frequent,
    }


def _means(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    gains = {name: [record[name] for record in records if record.get(name) is not None]
             for name in GAINS.values()}  # fmt: skip
    return {
        "tokens": len(records),
        "gain": fmean(record["gain"] for record in records),
        GAINS[SWAPPED]: None,
        **{name: fmean(values) for name, values in gains.items() if values},
    }
