"""Records of an inspected text: one for every token, as JSON can hold it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase


def token_records(
    columns: dict[str, Tensor], own: Tensor, ids: Tensor, positions: range
) -> Iterator[dict[str, Any]]:
    """One for every token that one of the positions predicts."""
    lists = {name: column.tolist() for name, column in columns.items()}
    for row, position in enumerate(positions):
        at = {name: column[row] for name, column in lists.items()}
        tokens = own[0, :, position].tolist()
        mixed = at["mixed_logprob"]
        gain = sum(mixed) / len(mixed) - at["base_logprob"]
        yield {
            "position": position + 1,
            "id": int(ids[0, position + 1]),
            "base_logprob": at["base_logprob"],
            "base_entropy": at["base_entropy"],
            "gain": gain,
            "content": sum(mixed) / len(mixed) - sum(at["exchanged"]) / len(mixed),
            "base_top": _top(at["base_top_id"], at["base_top_p"]),
            "thoughts": [
                {
                    "ids": tokens[k],
                    "probabilities": at["thought_probability"][k],
                    "mixing_weight": at["weight"][k],
                    "thought_logprob": at["thought_logprob"][k],
                    "mixed_logprob": mixed[k],
                    "gain": mixed[k] - at["base_logprob"],
                    "thought_top": _top(at["thought_top_id"][k], at["thought_top_p"][k]),
                    "mixed_top": _top(at["mixed_top_id"][k], at["mixed_top_p"][k]),
                }
                for k in range(len(tokens))
            ],
        }


def _top(ids: Sequence[int], probabilities: Sequence[float]) -> list[dict[str, Any]]:
    return [{"id": i, "probability": p} for i, p in zip(ids, probabilities, strict=True)]


def used_tokens(records: Sequence[dict[str, Any]]) -> set[int]:
    """Ids of all tokens that records name."""
    used = {record["id"] for record in records}
    for record in records[1:]:
        used |= {top["id"] for top in record["base_top"]}
        for thought in record["thoughts"]:
            used |= {*thought["ids"]}
            used |= {top["id"] for kind in ("thought_top", "mixed_top") for top in thought[kind]}
    return used


def token_slices(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> list[str]:
    """The text cut into its tokens, white space before a token with it; together they are the text.

    A token of some of a character's bytes has the whole character, and those behind it nothing. A
    tokenizer that does not tell where its tokens lie gives their own texts.
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


def name_tokens(
    record: dict[str, Any], table: dict[int, str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Texts beside ids, and figures cut to what can be read."""
    for top in _tops(record):
        top["text"] = table[top["id"]]
        top["probability"] = _short(top["probability"])
    for thought in record.get("thoughts", ()):
        thought["texts"] = [table[i] for i in thought["ids"]]
        thought["text"] = tokenizer.decode(thought["ids"])
        thought["probabilities"] = [_short(p) for p in thought["probabilities"]]
    for holder in (record, *record.get("thoughts", ())):
        for name, value in holder.items():
            if isinstance(value, float):
                holder[name] = _short(value)


def _tops(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from record.get("base_top", ())
    for thought in record.get("thoughts", ()):
        yield from thought["thought_top"]
        yield from thought["mixed_top"]


def _short(value: float) -> float:
    return float(f"{value:.5g}")
