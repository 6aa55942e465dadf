"""From finished items to metrics: paired statistics, their breakdown, and what they say in words.

Intervals and tests are scipy's; everything is paired by item.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from quietstar.evaluation.controls import (
    CONTROL_NAMES,
    CONTROLS,
    FEW_ITEMS,
    GAINS,
    LEAST_PROBABILITY,
    LOWER_IS_BETTER,
    SWAPPED,
    WITH,
    WITHOUT,
    gain_over,
)
from quietstar.evaluation.runner import HarnessTask, ItemStore
from quietstar.evaluation.tasks import Task

Array = NDArray[np.float64]
LEVEL = 0.95
EXAMPLES = 10
"""Items of each kind that a page shows, drawn at random."""
EXTREMES = 5
"""Items that a page shows of those that thoughts help or hurt most."""
MOST_GROUPS = 8
"""Numbers that are groups of their own."""
MIN_TOKENS = 40
"""Fewest tokens of a task for which a breakdown is made."""
SHARES = ("accuracy", "exact_match")
"""Metrics that are shares of items which are right, clearest first."""
LENGTHS = ("thought_length", "truncated_fraction")
"""Metrics of thoughts that may end early."""
GATE_SHARES = (0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Shares of the tokens that think, of a table of gates (`quietstar.generation.gates`)."""
KINDS = ("digits", "words", "punctuation", "white space")


def difference(after: Array, before: Array, seed: int) -> dict[str, Any]:
    """Compare a metric of the same items in two variants, (items, samples), averaged over samples.

    Returns:
        ``value``: mean of after minus before; ``ci95``: its bootstrap interval (bias-corrected and
        accelerated), None for one item; ``p_value``: by the exact McNemar test for metrics that are
        0 or 1, else by a paired permutation test; ``test``: the name of that; ``items_needed``.
        For the McNemar test also ``gained`` and ``lost``: items that are 1 after alone, and before
        alone.
    """
    a, b = after.mean(1), before.mean(1)
    gaps = a - b
    p_value, test, counts = 1.0, "permutation, paired", {}
    if len(gaps) < 2:
        p_value, test = None, "none"
    elif np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        test, counts = "McNemar, exact", {"gained": int((a > b).sum()), "lost": int((a < b).sum())}
        if changed := sum(counts.values()):
            p_value = float(stats.binomtest(counts["gained"], changed, 0.5).pvalue)
    elif np.abs(gaps).max() >= 1e-12:
        result = stats.permutation_test(
            (a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples",
            vectorized=True, n_resamples=9_999, batch=500, rng=np.random.default_rng(seed),
        )  # fmt: skip
        p_value = float(result.pvalue)
    return {"value": float(gaps.mean()), "ci95": bootstrap_interval(gaps, seed), "p_value": p_value,
            "test": test, "items_needed": items_needed(gaps), **counts}  # fmt: skip


def bootstrap_interval(values: Array, seed: int) -> tuple[float, float] | None:
    """Compute the bootstrap interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    if np.ptp(values) < 1e-12:  # all equal: nothing to resample
        return float(values.mean()), float(values.mean())
    rng = np.random.default_rng(seed)
    for method in ("BCa", "percentile"):  # the first has no answer where the values hardly differ
        with np.errstate(invalid="ignore", divide="ignore"):
            result = stats.bootstrap((values,), np.mean, n_resamples=9_999, batch=500,
                                     confidence_level=LEVEL, method=method, rng=rng)  # fmt: skip
        low, high = map(float, result.confidence_interval)
        if math.isfinite(low) and math.isfinite(high):
            return low, high
    return None


def interval(values: Array, seed: int) -> tuple[float, float] | None:
    """Compute the interval of a mean over items: exact of shares (Clopper and Pearson), else BCa.

    None for fewer than two values.
    """
    if len(values) < 2 or not np.isin(values, (0, 1)).all():
        return bootstrap_interval(values, seed)
    found = stats.binomtest(int(values.sum()), len(values)).proportion_ci(LEVEL, method="exact")
    return float(found.low), float(found.high)


def mean_over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Compute ``mean`` and ``ci95`` of a metric of runs that differ in their seed.

    The interval is Student's t; None of a single seed.
    """
    mean = sum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "ci95": None}
    margin = float(stats.sem(values)) * float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return {"mean": mean, "ci95": [mean - margin, mean + margin]}


def items_needed(gaps: Array) -> int | None:
    """Estimate how many items would show a mean difference of this size; None if there is none.

    Two-sided test at 5 %, power 80 %, by the normal approximation.
    """
    size = abs(float(gaps.mean()))
    if len(gaps) < 2 or size < 1e-12:
        return None
    z = stats.norm.ppf(1 - (1 - LEVEL) / 2) + stats.norm.ppf(0.8)
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
    """Compute the metrics of a task of ``count`` items, of which ``num_cut`` were shortened.

    Returns:
        ``n``, ``main_metric``, ``truncated``; a mapping of metrics for every variant; the
        ``difference`` and the gain over each control, with their intervals; ``breakdown`` of
        tokens, ``groups`` of items, and ``examples``; ``verdict`` and ``warnings``.
    """
    records = {
        variant: [store.records[task.name, number, variant] for number in range(count)]
        for variant in variants
        if store.has(task.name, [0], [variant])
    }
    values = {
        variant: {
            name: np.array([record["metrics"][name] for record in rows])
            for name in rows[0]["metrics"]
        }
        for variant, rows in records.items()
    }
    main = choose_main_metric(task.main_metric, values)
    summary: dict[str, Any] = {"n": count, "main_metric": main, "truncated": num_cut}
    summary |= {v: means(values[v], main, seed) for v in (WITHOUT, WITH) if v in values}
    for name in LENGTHS:
        lengths = [record[name] for record in records.get(WITH, ()) if name in record]
        if lengths:
            summary[WITH][name] = float(np.mean(lengths))
    votes = [record["votes"] for record in records.get(WITH, ()) if "votes" in record]
    if votes:
        by_name = {name: np.array([vote[name] for vote in votes]) for name in votes[0]}
        summary[WITH]["votes"] = {
            name: {"mean": float(value.mean()), "ci95": interval(value, seed)}
            for name, value in by_name.items()
        }
    if WITHOUT in values and WITH in values:
        summary["difference"] = differences(values[WITH], values[WITHOUT], main, seed)
    controls = [control for control in CONTROLS if control in values]
    if controls:
        summary["controls"] = {control: means(values[control], main, seed) for control in controls}
    for control in controls:
        pair = (values[WITH], values[control])
        summary[GAINS[control]] = differences(*pair, main, seed, as_gain=True)
    tokens_are_scored = task.kind in ("answer", "text")
    if WITHOUT in records and WITH in records and tokens_are_scored:
        summary["breakdown"] = break_down(records, seed)
        summary["groups"] = by_group(records, values, seed)
        summary["examples"] = draw_examples(records, main, seed)
        if all("entropy" in record for record in records[WITHOUT]):
            summary["gates"] = sweep_entropy(records)
    summary["warnings"] = warnings(summary)
    if SWAPPED in variants and SWAPPED not in records and tokens_are_scored:
        summary["warnings"].append(
            "gain of content: not available, because a single item has no other to swap thoughts "
            "with"
        )
    summary["verdict"] = verdict(summary)
    return summary


def choose_main_metric(of_task: str, values: Mapping[str, Mapping[str, Array]]) -> str:
    """Choose what verdicts and warnings are about, of the metrics of every variant.

    The accuracy of choices; of other answers the probability, though a task would have their NLL,
    which punishes a model that is sure of a wrong answer more than it rewards right ones. But of
    the probability of a long answer nothing is left.
    """
    first = next(iter(values.values()))
    main = of_task if of_task in first else next(iter(first))
    if "accuracy_norm" in first:  # of choices
        return "accuracy"
    if main == "nll" and "gold_probability" in first:
        shares = [metrics["gold_probability"].mean() for metrics in values.values()]
        main = "gold_probability" if max(shares) >= LEAST_PROBABILITY else main
    return main


def means(values: dict[str, Array], main: str, seed: int = 0) -> dict[str, Any]:
    """Compute the mean of every metric, (items, samples), and its error over items.

    Returns:
        Every metric, its ``METRIC_stderr`` and ``METRIC_ci95`` (None for one item; `interval`),
        ``stderr`` of the main one, and ``n``; of several thought samples also ``samples``: the
        standard deviation of each metric between items, without the part of thought samples, and
        between thoughts of an item.
    """
    metrics: dict[str, Any] = {}
    count, num_samples = values[main].shape
    spread = {}
    for name, value in values.items():
        of_items = value.mean(1)
        metrics[name], metrics[f"{name}_stderr"] = float(of_items.mean()), None
        if count > 1:
            metrics[f"{name}_stderr"] = float(of_items.std(ddof=1) / math.sqrt(count))
        metrics[f"{name}_ci95"] = interval(of_items, seed)
        if value.shape[1] > 1:  # votes have one value for all samples of an item
            within = float(value.var(1, ddof=1).mean())
            between = float(of_items.var(ddof=1)) - within / num_samples if count > 1 else 0.0
            spread[name] = {"stdev_between_items": math.sqrt(max(between, 0.0)),
                            "stdev_between_thoughts": math.sqrt(within)}  # fmt: skip
    metrics |= {"n": count, "stderr": metrics[f"{main}_stderr"]}
    return metrics | ({"samples": {"n": num_samples, **spread}} if spread else {})


def differences(
    after: dict[str, Array],
    before: dict[str, Array],
    main: str,
    seed: int,
    *,
    as_gain: bool = False,
) -> dict[str, Any]:
    """Compare every metric of the same items in two variants, (items, samples), after minus before.

    ``ci95``, ``p_value`` and so on are those of the main metric. With ``as_gain`` the metrics are
    gains (`controls.gain_over`), which are positive where ``after`` is better.
    """
    metrics: dict[str, Any] = {}
    for name in after:
        pair = (after[name], before[name])
        if as_gain and name in LOWER_IS_BETTER:
            pair = pair[::-1]
        result = difference(*pair, seed)
        metrics[name] = result.pop("value")
        metrics |= {f"{name}_{key}": value for key, value in result.items()}
    details = ("ci95", "p_value", "test", "items_needed")
    return metrics | {key: metrics[f"{main}_{key}"] for key in details}


def warnings(summary: dict[str, Any]) -> list[str]:
    """List what a reader must know before the metrics."""
    lines = []
    if summary["truncated"]:
        lines.append(f"{summary['truncated']} items were longer than the model takes and were cut")
    change = summary.get("difference")
    if change is None:
        return lines
    main, count, needed = summary["main_metric"], summary["n"], change["items_needed"]
    if count < FEW_ITEMS:  # of which a spread cannot be estimated either
        return lines
    if needed is not None and needed > count and not is_significant(change):
        lines.append(
            f"{count} items are too few to tell a difference of {change[main]:+.4f} in {main} from "
            f"chance: it would take about {needed:,}"
        )
    return lines


def correct_for_many(tasks: Mapping[str, dict[str, Any]]) -> None:
    """Correct the p-values of all tasks for their number, by Holm's method, and judge anew.

    The tests are those of the main metrics, with thoughts against without and against every
    control. Each gets ``p_holm``, and each task ``num_tests``, their number over all tasks.
    """
    tests = [
        summary[name]
        for summary in tasks.values()
        for name in ("difference", *GAINS.values())
        if name in summary and summary[name]["p_value"] is not None
    ]
    holm(tests)
    for summary in tasks.values():
        summary["num_tests"] = len(tests)
        summary["verdict"] = verdict(summary)


def holm(tests: Sequence[dict[str, Any]]) -> None:
    """Give every test the ``p_holm`` that its ``p_value`` is among so many (Holm 1979)."""
    highest = 0.0
    for rank, test in enumerate(sorted(tests, key=lambda test: test["p_value"])):
        highest = max(highest, min(1.0, (len(tests) - rank) * test["p_value"]))
        test["p_holm"] = highest


def is_significant(change: dict[str, Any]) -> bool:
    """Say whether a difference is told from chance: by its interval *and* by its test.

    A bootstrap interval of very few items excludes zero as soon as they agree. Where many tests
    were made, the p-value is that corrected for their number.
    """
    ci95, p_value = change["ci95"], change.get("p_holm", change["p_value"])
    if ci95 is None or p_value is None:
        return False
    return (ci95[0] > 0 or ci95[1] < 0) and p_value < 0.05


def none_is_right(*scores: Mapping[str, Any]) -> bool:
    """Say whether not one answer is right in any of several evaluations of the same items.

    Whole texts never are, so those without a gold answer do not count.
    """
    return all(
        "gold_probability" in s and not any(s.get(name, 0.0) for name in SHARES) for s in scores
    )


def verdict(summary: dict[str, Any]) -> str:
    """Answer in a sentence: do the thoughts help, and is it what they say?"""
    if "difference" not in summary:
        return ""
    change, main = summary["difference"], summary["main_metric"]
    if summary["n"] < FEW_ITEMS:
        return f"{summary['n']} items are too few to say whether thoughts help"
    if not is_significant(change):
        return f"no difference that {summary['n']} items can tell"
    if none_is_right(*(summary.get(variant, {}) for variant in (WITH, WITHOUT))):
        return "it changes, but no answer is right, with thoughts or without"
    if gain_over(change[main], 0.0, main) < 0:
        return "thoughts make it worse"
    gains = {control: summary[GAINS[control]] for control in CONTROLS if GAINS[control] in summary}
    if not gains:
        return "better with thoughts (run --controls to see whether it is what they say)"
    equal = [
        CONTROL_NAMES[control]
        for control, gain in gains.items()
        if not (is_significant(gain) and gain[main] > 0)
    ]
    if equal:
        helping = " and ".join(equal)
        return f"better with thoughts, but {helping} help as much: it is not what the thoughts say"
    return "better with thoughts, and because of what they say"


# --- Breakdown by token ---------------------------------------------------------------------------
def kind_of(text: str) -> str:
    """Name what a token's text is made of, by its first character that is not white space."""
    text = text.strip()
    if not text:
        return "white space"
    major = unicodedata.category(text[0])[0]
    return {"N": "digits", "L": "words", "M": "words"}.get(major, "punctuation")


def break_down(
    records: Mapping[str, Sequence[dict[str, Any]]], seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Compute the gains (nats a token) of groups of tokens, with intervals.

    Returns:
        ``difficulty``, by quantiles of the base NLL, ``kind`` and ``position``; each a list of
        groups with ``label``, ``n``, ``base_nll``, ``gain``, ``gain_ci95`` and, where swapped
        thoughts were scored, ``gain_of_content`` and ``gain_of_content_ci95``.
    """
    nll = {variant: np.concatenate([r["nll"] for r in rows]) for variant, rows in records.items()}
    first, base = records[WITHOUT], nll[WITHOUT]
    if len(base) < MIN_TOKENS:
        return {}
    gains = {"gain": base - nll[WITH]}
    if SWAPPED in nll:
        gains[GAINS[SWAPPED]] = nll[SWAPPED] - nll[WITH]
    item = np.repeat(np.arange(len(first)), [len(record["tokens"]) for record in first])
    kind = np.array([kind_of(text) for record in first for text in record["tokens"]])
    position = [record["position"] + np.arange(len(record["tokens"])) for record in first]
    groups = {
        "difficulty": _quantiles(base, "{:.2f} to {:.2f}"),
        "kind": [(name, kind == name) for name in KINDS if name in kind],
        "position": _quantiles(np.concatenate(position), "{:.0f} to {:.0f}"),
    }

    def group(label: str, chosen: np.ndarray) -> dict[str, Any]:
        metrics = {"label": label, "n": int(chosen.sum()), "base_nll": float(base[chosen].mean())}
        _, items, counts = np.unique(item[chosen], return_inverse=True, return_counts=True)
        for name, gain in gains.items():
            metrics |= {name: float(gain[chosen].mean()), f"{name}_ci95": None}
            if len(counts) > 1:  # items are resampled, with all their tokens
                result = stats.bootstrap(
                    (np.bincount(items, weights=gain[chosen]), counts),
                    lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis), paired=True,
                    vectorized=True, n_resamples=1_999, batch=500, confidence_level=LEVEL,
                    method="percentile", rng=np.random.default_rng(seed),
                )  # fmt: skip
                metrics[f"{name}_ci95"] = tuple(map(float, result.confidence_interval))
        return metrics

    return {name: [group(*part) for part in parts] for name, parts in groups.items()}


def sweep_entropy(records: Mapping[str, Sequence[dict[str, Any]]]) -> list[dict[str, float]]:
    """Compute what thinking gives where the entropy of the plain prediction is high alone.

    Teacher-forced, a thought changes one prediction and nothing else: no other pass is needed.

    Returns:
        For some shares of the tokens, from none to all of them: ``share`` that thinks, ``entropy``
        above which these are (nats), ``nll`` of all tokens (nats a token), and ``passes`` of the
        model a token.
    """
    base, mixed, entropy = (
        np.concatenate([record[name] for record in records[variant]])
        for variant, name in ((WITHOUT, "nll"), (WITH, "nll"), (WITHOUT, "entropy"))
    )
    length = len(records[WITH][0]["thoughts"][0][0])
    rows = []
    for share in GATE_SHARES:
        threshold = 0.0 if share == 1 else float(np.quantile(entropy, 1 - share))
        thinks = (entropy > threshold) | (share == 1)
        rows.append({
            "share": float(thinks.mean()), "entropy": threshold,
            "nll": float(np.where(thinks, mixed, base).mean()),
            "passes": 1 + length * float(thinks.mean()),
        })  # fmt: skip
    return rows


# --- Items: groups of them, and some drawn at random ----------------------------------------------
def by_group(
    records: Mapping[str, Sequence[dict[str, Any]]],
    values: Mapping[str, Mapping[str, Array]],
    seed: int,
) -> dict[str, list[dict[str, Any]]]:
    """Compare variants within groups of items, such as those whose solution has two steps.

    Returns:
        For every way to group them a list of groups with ``label``, ``n``, and every metric with
        and without thoughts, as ``gain`` and, where swapped thoughts were scored, as
        ``gain_of_content``, with intervals. Numbers are in order, more than eight of them in
        quintiles.
    """
    of_items = [record.get("groups", {}) for record in records[WITHOUT]]
    names = dict.fromkeys(name for groups in of_items for name in groups)
    pairs = {"gain": (values[WITH], values[WITHOUT])}
    if SWAPPED in values:
        pairs[GAINS[SWAPPED]] = (values[WITH], values[SWAPPED])

    def compare(label: str, chosen: np.ndarray) -> dict[str, Any]:
        metrics: dict[str, Any] = {"label": label, "n": int(chosen.sum())}
        for variant in (WITHOUT, WITH):
            means = {name: float(value[chosen].mean()) for name, value in values[variant].items()}
            metrics[variant] = means
        for gain, (after, before) in pairs.items():
            metrics[gain] = {}
            for name in after:
                sign = -1.0 if name in LOWER_IS_BETTER else 1.0
                gaps = sign * (after[name] - before[name])[chosen].mean(1)
                bounds = bootstrap_interval(gaps, seed)
                metrics[gain] |= {name: float(gaps.mean()), f"{name}_ci95": bounds}
        return metrics

    return {name: [compare(*part) for part in item_groups(of_items, name)] for name in names}


def item_groups(
    of_items: Sequence[Mapping[str, str]], name: str
) -> list[tuple[str, NDArray[np.bool_]]]:
    """Split items by what their ``groups`` say under a name; numbers in order, many in quintiles.

    Returns:
        Labels, each with a mask of the items that it holds for.
    """
    labels = np.array([groups.get(name, "none") for groups in of_items])
    distinct = sorted(set(labels.tolist()))
    try:
        numbers = {label: float(label) for label in distinct}
    except ValueError:
        return [(label, labels == label) for label in distinct]
    if len(distinct) > MOST_GROUPS:
        return _quantiles(np.array([numbers[label] for label in labels.tolist()]), "{:g} to {:g}")
    return [(label, labels == label) for label in sorted(distinct, key=numbers.__getitem__)]


def draw_examples(
    records: Mapping[str, Sequence[dict[str, Any]]], main: str, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Show items with prompts: some drawn at random, and those that thoughts change most.

    Returns:
        ``right`` and ``wrong``: up to `EXAMPLES` items drawn at random of those that thoughts
        answer right, and of the others; ``helped`` and ``hurt``: the `EXTREMES` whose main metric
        thoughts make better most, and worse. Of each item ``id``, ``prompt``, ``answer``, first
        ``thought``, ``predicted`` tokens (each after the true ones before it), ``is_right``, and
        its main metric ``with`` and ``without`` thoughts. Of several thoughts of an item the first
        is taken.
    """
    items = []
    for own, plain in zip(records[WITH], records[WITHOUT], strict=True):
        if own.get("prompt") and own.get("thought_texts"):
            items.append({
                "id": own["id"], "prompt": own["prompt"], "answer": own["answer"],
                "thought": own["thought_texts"][0][0],
                "predicted": (own.get("predicted") or [""])[0],
                "is_right": own["metrics"].get("accuracy", [0.0])[0] == 1,
                "with": own["metrics"][main][0], "without": float(np.mean(plain["metrics"][main])),
            })  # fmt: skip
    if not items:
        return {}
    order = [items[i] for i in np.random.default_rng(seed).permutation(len(items)).tolist()]
    gains = sorted(
        ((gain_over(item["with"], item["without"], main), i) for i, item in enumerate(items)),
        key=lambda pair: -pair[0],
    )
    return {
        "right": [item for item in order if item["is_right"]][:EXAMPLES],
        "wrong": [item for item in order if not item["is_right"]][:EXAMPLES],
        "helped": [items[i] for gain, i in gains[:EXTREMES] if gain > 0],
        "hurt": [items[i] for gain, i in gains[: -EXTREMES - 1 : -1] if gain < 0],
    }


def _quantiles(values: np.ndarray, label: str) -> list[tuple[str, np.ndarray]]:
    """Split into five groups of about equal size; into fewer where many values are equal."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, 6)))
    index = np.digitize(values, edges[1:-1])
    groups = [index == i for i in np.unique(index)]
    return [(label.format(values[g].min(), values[g].max()), g) for g in groups]
