"""Figures over all tokens of an inspected text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import log
from statistics import fmean, median
from typing import Any

MOST_FREQUENT = 10
BINS = (-2.0, -1.0, -0.5, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Edges of the histogram of gains, nats; what lies beyond has bins of its own."""


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the predicted tokens, over hard and easy ones, and what is thought most often.

    Hard are tokens whose NLL without thoughts is above the median.
    """
    told = [record for record in records if "gain" in record]
    middle = median(-record["base_logprob"] for record in told)
    hard = [record for record in told if -record["base_logprob"] > middle]
    easy = [record for record in told if -record["base_logprob"] <= middle]
    thoughts = [thought for record in told for thought in record["thoughts"]]
    frequent = Counter(tuple(thought["ids"]) for thought in thoughts).most_common(MOST_FREQUENT)
    texts = {tuple(thought["ids"]): thought for thought in thoughts}
    return {
        "tokens": len(told),
        "base_nll": -fmean(record["base_logprob"] for record in told),
        "all": _means(told),
        "hard": _means(hard) if hard else None,
        "easy": _means(easy) if easy else None,
        "mixing_weight": fmean(thought["mixing_weight"] for thought in thoughts),
        "entropy": -fmean(
            _log(p) for thought in thoughts for p in thought["probabilities"]
        ),
        "distinct": fmean(len(set(t["ids"])) / len(t["ids"]) for t in thoughts),
        "histogram": histogram([record["gain"] for record in told]),
        "frequent": [
            {"ids": list(ids), "count": count,
             "gain": fmean(t["gain"] for t in thoughts if tuple(t["ids"]) == ids)}
            for ids, count in frequent if ids in texts
        ],
    }  # fmt: skip


def _means(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tokens": len(records),
        "gain": fmean(record["gain"] for record in records),
        "content": fmean(record["content"] for record in records),
    }


def _log(probability: float) -> float:
    return log(max(probability, 1e-30))


def histogram(gains: Sequence[float]) -> list[dict[str, Any]]:
    """Counts of gains between `BINS`; None stands for no bound."""
    edges = [None, *BINS, None]
    found = []
    for low, high in pairwise(edges):
        inside = sum(
            (low is None or gain >= low) and (high is None or gain < high) for gain in gains
        )
        found.append({"low": low, "high": high, "count": inside})
    return found
