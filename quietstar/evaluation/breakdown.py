"""Where thoughts help: gains by the difficulty of a token, by its kind, by its place."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quietstar.evaluation.statistics import Array, ratio_interval

QUANTILES = 5
FEWEST_TOKENS = 40
"""Of a task, for a breakdown to say anything."""
KINDS = ("digits", "words", "punctuation", "white space")


@dataclass(frozen=True)
class Tokens:
    """Scored tokens of all items of a task, in one row.

    Attributes:
        item: Index of the item of each.
        kind: Of its text (`kind_of`).
        position: Its index in the text.
        nll: By variant, nats.
    """

    item: Array
    kind: np.ndarray
    position: Array
    nll: dict[str, Array]


def gather_tokens(records: Mapping[str, Sequence[dict[str, Any]]]) -> Tokens:
    """From the records of every variant, in the order of the items."""
    first = records["without_thoughts"]
    lengths = [len(record["tokens"]) for record in first]
    places = [record["position"] + np.arange(n) for record, n in zip(first, lengths, strict=True)]
    return Tokens(
        item=np.repeat(np.arange(len(first), dtype=float), lengths),
        kind=np.array([kind_of(text) for record in first for text in record["tokens"]]),
        position=np.concatenate(places).astype(float),
        nll={
            variant: np.concatenate([np.asarray(record["nll"], dtype=float) for record in kept])
            for variant, kept in records.items()
        },
    )


def kind_of(text: str) -> str:
    """What a token's text is made of, by its first character that is no blank."""
    text = text.strip()
    if not text:
        return "white space"
    category = unicodedata.category(text[0])
    if category[0] == "N":
        return "digits"
    return "words" if category[0] in "LM" else "punctuation"


def break_down(tokens: Tokens, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Gains (base minus mixed NLL, nats a token) of groups of tokens, with intervals.

    Returns:
        ``difficulty``, by quantiles of the base NLL, ``kind`` and ``position``; each a list of
        groups with ``label``, ``n``, ``base_nll``, ``gain``, ``gain_ci95`` and, where the thoughts
        of other items were scored, ``content`` and ``content_ci95``.
    """
    base = tokens.nll["without_thoughts"]
    if len(base) < FEWEST_TOKENS:
        return {}
    groups = {
        "difficulty": _quantiles(base, "{:.2f} to {:.2f}"),
        "kind": [(kind, tokens.kind == kind) for kind in KINDS if (tokens.kind == kind).any()],
        "position": _quantiles(tokens.position, "{:.0f} to {:.0f}"),
    }
    return {
        name: [_group(tokens, label, chosen, seed) for label, chosen in found]
        for name, found in groups.items()
    }


def _quantiles(values: Array, label: str) -> list[tuple[str, np.ndarray]]:
    """Groups of about equal size; fewer where many values are the same."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, QUANTILES + 1)))
    if len(edges) < 2:
        return [(label.format(edges[0], edges[0]), np.ones_like(values, dtype=bool))]
    index = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    chosen = [index == i for i in range(len(edges) - 1)]
    return [
        (label.format(values[one].min(), values[one].max()), one) for one in chosen if one.any()
    ]


def _group(tokens: Tokens, label: str, chosen: np.ndarray, seed: int) -> dict[str, Any]:
    mixed = tokens.nll["with_thoughts"]
    base = tokens.nll["without_thoughts"]
    found = {"label": label, "n": int(chosen.sum()), "base_nll": float(base[chosen].mean())}
    gains = {"gain": base - mixed}
    if "other" in tokens.nll:
        gains["content"] = tokens.nll["other"] - mixed
    for name, gain in gains.items():
        found[name] = float(gain[chosen].mean())
        count = int(tokens.item.max()) + 1
        items = tokens.item[chosen].astype(int)
        sums = np.bincount(items, weights=gain[chosen], minlength=count).astype(float)
        counts = np.bincount(items, minlength=count).astype(float)
        has = counts > 0
        found[f"{name}_ci95"] = ratio_interval(sums[has], counts[has], seed)
    return found
