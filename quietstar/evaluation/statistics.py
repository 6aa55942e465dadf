"""From finished items to figures: paired statistics, their breakdown, and what they say in words.

Intervals and tests are scipy's; everything is paired by item.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from quietstar.evaluation.controls import (
    CONTROLS,
    GAINS,
    LOWER_IS_BETTER,
    PAUSE,
    SHUFFLED,
    SWAPPED,
    WITH,
    WITHOUT,
    gain_over,
)
from quietstar.evaluation.harness_tasks import HarnessTask
from quietstar.evaluation.runner import ItemStore
from quietstar.evaluation.tasks import Task

Array = NDArray[np.float64]
RESAMPLES = 9_999
LEVEL = 0.95
POWER = 0.8
SIGNIFICANT = 0.05
CONTROL_NAMES = {
    SWAPPED: "swapped thoughts",
    SHUFFLED: "shuffled thoughts",
    PAUSE: "pause tokens",
}
QUANTILES = 5
MIN_TOKENS = 40
"""Fewest tokens of a task for which a breakdown is made."""
KINDS = ("digits", "words", "punctuation", "white space")


@dataclass(frozen=True)
class Mean:
    """Mean of a metric over items.

    Attributes:
        value: Mean over items and thought samples.
        stderr: Standard error, from the spread over items; None for one item.
        stdev_items: Standard deviation between items, without the part of thought samples.
        stdev_samples: Standard deviation between thoughts of an item; None for one sample.
    """

    value: float
    stderr: float | None
    stdev_items: float | None
    stdev_samples: float | None


@dataclass(frozen=True)
class Difference:
    """Mean difference of a metric between two variants, paired by item.

    Attributes:
        value: Difference of the means.
        ci95: Bootstrap interval (bias-corrected and accelerated); None for one item.
        p_value: Exact McNemar test of metrics that are 0 or 1, else a paired permutation test.
        test: Name of that test.
        items_needed: Number of items that would show a difference of this size (two-sided test at
            5 %, power 80 %); None if there is no difference.
    """

    value: float
    ci95: tuple[float, float] | None
    p_value: float | None
    test: str
    items_needed: int | None


def mean(values: Array) -> Mean:
    """Compute the mean of a metric, (items, samples), with its spread."""
    items, samples = values.shape
    of_items = values.mean(1)
    stderr = float(of_items.std(ddof=1) / math.sqrt(items)) if items > 1 else None
    if samples == 1:
        spread = None if items == 1 else float(of_items.std(ddof=1))
        return Mean(float(of_items.mean()), stderr, spread, None)
    within = float(values.var(1, ddof=1).mean())
    between = float(of_items.var(ddof=1)) - within / samples if items > 1 else 0.0
    return Mean(float(of_items.mean()), stderr, math.sqrt(max(between, 0.0)), math.sqrt(within))


def difference(after: Array, before: Array, seed: int) -> Difference:
    """Compare a metric of the same items in two variants, after minus before.

    Args:
        after: Metric of every item, (items, samples); samples are averaged.
        before: The same metric in the other variant.
        seed: Seed of resampling.
    """
    a, b = after.mean(1), before.mean(1)
    gaps = a - b
    value, ci95, needed = float(gaps.mean()), interval(gaps, seed), items_needed(gaps)
    if len(gaps) < 2:
        return Difference(value, ci95, None, "none", needed)
    if np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        gained, lost = int((a > b).sum()), int((a < b).sum())
        p_value = 1.0
        if gained + lost:
            p_value = float(stats.binomtest(gained, gained + lost, 0.5).pvalue)
        return Difference(value, ci95, p_value, "McNemar, exact", needed)
    p_value = 1.0
    if np.abs(gaps).max() >= 1e-12:

        def statistic(x: Array, y: Array, axis: int = -1) -> Any:
            return (x - y).mean(axis)

        result = stats.permutation_test(
            (a, b), statistic, permutation_type="samples", vectorized=True, n_resamples=RESAMPLES,
            batch=500, rng=np.random.default_rng(seed),
        )  # fmt: skip
        p_value = float(result.pvalue)
    return Difference(value, ci95, p_value, "permutation, paired", needed)


def interval(values: Array, seed: int) -> tuple[float, float] | None:
    """Compute the bootstrap interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    if np.ptp(values) < 1e-12:  # all equal: nothing to resample
        return float(values[0]), float(values[0])
    rng = np.random.default_rng(seed)
    for method in ("BCa", "percentile"):  # the first has no answer where the values hardly differ
        with np.errstate(invalid="ignore", divide="ignore"):
            result = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, batch=500,
                                     confidence_level=LEVEL, method=method, rng=rng)  # fmt: skip
        low, high = map(float, result.confidence_interval)
        if math.isfinite(low) and math.isfinite(high):
            return low, high
    return None


def ratio_interval(sums: Array, counts: Array, seed: int) -> tuple[float, float] | None:
    """Compute the bootstrap interval of sum(sums) / sum(counts), resampled by item."""
    if len(sums) < 2:
        return None

    def ratio(s: Array, c: Array, axis: int = -1) -> Any:
        return s.sum(axis) / c.sum(axis)

    result = stats.bootstrap(
        (sums, counts), ratio, paired=True, vectorized=True, n_resamples=1_999, batch=500,
        confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(seed),
    )  # fmt: skip
    low, high = map(float, result.confidence_interval)
    return low, high


def items_needed(gaps: Array) -> int | None:
    """Estimate how many items would show a mean difference of this size (normal approximation)."""
    size = abs(float(gaps.mean()))
    if len(gaps) < 2 or size < 1e-12:
        return None
    z = stats.norm.ppf(1 - (1 - LEVEL) / 2) + stats.norm.ppf(POWER)
    return math.ceil((z * float(gaps.std(ddof=1)) / size) ** 2)


# --- Summary of a task ----------------------------------------------------------------------------


def summarise(
    task: Task | HarnessTask,
    store: ItemStore,
    variants: Sequence[str],
    count: int,
    num_cut: int,
    seed: int,
) -> dict[str, Any]:
    """Compute the figures of a task.

    Args:
        task: Task of the items.
        store: Store that holds all its items.
        variants: Variants that were asked for.
        count: Number of items.
        num_cut: Number of items that were shortened.
        seed: Seed of resampling.

    Returns:
        ``n``, ``main_metric``, ``truncated``; a mapping of metrics for every variant; the
        ``difference`` and the gain over each control, with their intervals; ``breakdown``;
        ``verdict`` and ``warnings``.
    """
    records = {v: store.of(task.name, v, count) for v in variants if store.has(task.name, [0], [v])}
    values = {
        variant: {
            name: np.array([record["metrics"][name] for record in rows])
            for name in rows[0]["metrics"]
        }
        for variant, rows in records.items()
    }
    first = next(iter(values.values()))
    main = task.main_metric if task.main_metric in first else next(iter(first))
    summary: dict[str, Any] = {"n": count, "main_metric": main, "truncated": num_cut}
    for variant in (WITHOUT, WITH):
        if variant in values:
            summary[variant] = means(values[variant], main)
    if WITHOUT in values and WITH in values:
        summary["difference"] = differences(values[WITH], values[WITHOUT], main, seed)
    controls = [control for control in CONTROLS if control in values]
    if controls:
        summary["controls"] = {control: means(values[control], main) for control in controls}
    for control in controls:
        summary[GAINS[control]] = differences(
            values[WITH], values[control], main, seed, as_gain=True
        )
    if WITHOUT in records and WITH in records and task.kind in ("answer", "text"):
        summary["breakdown"] = break_down(gather_tokens(records), seed)
    summary["warnings"] = warnings(summary)
    if SWAPPED in variants and SWAPPED not in records and task.kind in ("answer", "text"):
        summary["warnings"].append(
            "gain of content: not available, because a single item has no other to swap thoughts "
            "with"
        )
    summary["verdict"] = verdict(summary)
    return summary


def means(values: dict[str, Array], main: str) -> dict[str, Any]:
    """Compute every metric with ``METRIC_stderr``, and ``stderr`` of the main one."""
    figures: dict[str, Any] = {}
    samples = {}
    for name, value in values.items():
        result = mean(value)
        figures[name], figures[f"{name}_stderr"] = result.value, result.stderr
        if result.stdev_samples is not None:
            samples[name] = {"stdev_between_items": result.stdev_items,
                             "stdev_between_thoughts": result.stdev_samples}  # fmt: skip
    count, num_samples = values[main].shape
    figures |= {"n": count, "stderr": figures[f"{main}_stderr"]}
    return figures | ({"samples": {"n": num_samples, **samples}} if samples else {})


def differences(
    after: dict[str, Array],
    before: dict[str, Array],
    main: str,
    seed: int,
    *,
    as_gain: bool = False,
) -> dict[str, Any]:
    """Compare every metric; ``ci95``, ``p_value`` and so on are those of the main one.

    Args:
        after: Values by metric, (items, samples) each.
        before: Values of the same items in the other variant.
        main: Name of the main metric.
        seed: Seed of resampling.
        as_gain: Give gains (`controls.gain_over`), which are positive where ``after`` is better;
            otherwise plain differences, after minus before.
    """
    figures: dict[str, Any] = {}
    for name in after:
        pair = (after[name], before[name])
        if as_gain and name in LOWER_IS_BETTER:
            pair = pair[::-1]
        result = asdict(difference(*pair, seed))
        figures[name] = result.pop("value")
        figures |= {f"{name}_{key}": value for key, value in result.items()}
    details = ("ci95", "p_value", "test", "items_needed")
    return figures | {key: figures[f"{main}_{key}"] for key in details}


def warnings(summary: dict[str, Any]) -> list[str]:
    """List what a reader must know before the figures."""
    lines = []
    if summary["truncated"]:
        lines.append(f"{summary['truncated']} items were longer than the model takes and were cut")
    change = summary.get("difference")
    if change is None:
        return lines
    count, needed = summary["n"], change["items_needed"]
    if needed is not None and needed > count and not is_significant(change):
        lines.append(
            f"{count} items are too few to tell a difference of "
            f"{change[summary['main_metric']]:+.4f} in {summary['main_metric']} from chance: it "
            f"would take about {needed:,}"
        )
    return lines


def is_significant(change: dict[str, Any]) -> bool:
    """Say whether a difference is told from chance: by its interval *and* by its test.

    A bootstrap interval of very few items excludes zero as soon as they agree.
    """
    ci95, p_value = change["ci95"], change["p_value"]
    return ci95 is not None and (ci95[0] > 0 or ci95[1] < 0) and p_value < SIGNIFICANT


def gain_of_thinking(summary: dict[str, Any]) -> float:
    """Turn the main metric's difference into a gain, positive where thoughts are better."""
    return gain_over(summary["difference"][summary["main_metric"]], 0.0, summary["main_metric"])


def verdict(summary: dict[str, Any]) -> str:
    """Answer in a sentence: do the thoughts help, and is it what they say?"""
    if "difference" not in summary:
        return ""
    if not is_significant(summary["difference"]):
        return f"no difference that {summary['n']} items can tell"
    if gain_of_thinking(summary) < 0:
        return "thoughts make it worse"
    controls = [control for control in CONTROLS if GAINS[control] in summary]
    if not controls:
        return "better with thoughts (run --controls to see whether it is what they say)"
    main, equal = summary["main_metric"], []
    for control in controls:
        gain = summary[GAINS[control]]
        if not (is_significant(gain) and gain[main] > 0):
            equal.append(CONTROL_NAMES[control])
    if equal:
        helping = " and ".join(equal)
        return f"better with thoughts, but {helping} help as much: it is not what the thoughts say"
    return "better with thoughts, and because of what they say"


# --- Breakdown by token ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """Scored tokens of all items of a task, in one row.

    Attributes:
        item: Index of each token's item.
        kind: Kind of each token's text (`kind_of`).
        position: Index of each token in its text.
        nll: NLL by variant, nats.
    """

    item: Array
    kind: np.ndarray
    position: Array
    nll: dict[str, Array]


def gather_tokens(records: Mapping[str, Sequence[dict[str, Any]]]) -> Tokens:
    """Gather the tokens from the records of every variant, in the order of the items."""
    first = records[WITHOUT]
    lengths = [len(record["tokens"]) for record in first]
    places = [record["position"] + np.arange(n) for record, n in zip(first, lengths, strict=True)]
    return Tokens(
        item=np.repeat(np.arange(len(first), dtype=float), lengths),
        kind=np.array([kind_of(text) for record in first for text in record["tokens"]]),
        position=np.concatenate(places).astype(float),
        nll={
            variant: np.concatenate([np.asarray(record["nll"], dtype=float) for record in rows])
            for variant, rows in records.items()
        },
    )


def kind_of(text: str) -> str:
    """Name what a token's text is made of, by its first character that is not white space."""
    text = text.strip()
    if not text:
        return "white space"
    category = unicodedata.category(text[0])
    if category[0] == "N":
        return "digits"
    return "words" if category[0] in "LM" else "punctuation"


def break_down(tokens: Tokens, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Compute the gains (nats a token) of groups of tokens, with intervals.

    Returns:
        ``difficulty``, by quantiles of the base NLL, ``kind`` and ``position``; each a list of
        groups with ``label``, ``n``, ``base_nll``, ``gain``, ``gain_ci95`` and, where swapped
        thoughts were scored, ``gain_of_content`` and ``gain_of_content_ci95``.
    """
    base = tokens.nll[WITHOUT]
    if len(base) < MIN_TOKENS:
        return {}
    groups = {
        "difficulty": _quantiles(base, "{:.2f} to {:.2f}"),
        "kind": [(kind, tokens.kind == kind) for kind in KINDS if (tokens.kind == kind).any()],
        "position": _quantiles(tokens.position, "{:.0f} to {:.0f}"),
    }
    return {
        name: [_group(tokens, label, selected, seed) for label, selected in parts]
        for name, parts in groups.items()
    }


def _quantiles(values: Array, label: str) -> list[tuple[str, np.ndarray]]:
    """Split into groups of about equal size; into fewer where many values are equal."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, QUANTILES + 1)))
    if len(edges) < 2:
        return [(label.format(edges[0], edges[0]), np.ones_like(values, dtype=bool))]
    index = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    groups = [index == i for i in range(len(edges) - 1)]
    return [(label.format(values[g].min(), values[g].max()), g) for g in groups if g.any()]


def _group(tokens: Tokens, label: str, selected: np.ndarray, seed: int) -> dict[str, Any]:
    own, base = tokens.nll[WITH], tokens.nll[WITHOUT]
    group = {"label": label, "n": int(selected.sum()), "base_nll": float(base[selected].mean())}
    gains = {"gain": base - own}
    if SWAPPED in tokens.nll:
        gains[GAINS[SWAPPED]] = tokens.nll[SWAPPED] - own
    items, count = tokens.item[selected].astype(int), int(tokens.item.max()) + 1
    counts = np.bincount(items, minlength=count).astype(float)
    for name, gain in gains.items():
        group[name] = float(gain[selected].mean())
        sums = np.bincount(items, weights=gain[selected], minlength=count).astype(float)
        present = counts > 0
        group[f"{name}_ci95"] = ratio_interval(sums[present], counts[present], seed)
    return group
