"""From finished items to the figures of a task, and what they say in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from quietstar.evaluation.breakdown import break_down, gather_tokens
from quietstar.evaluation.harness_tasks import HarnessTask
from quietstar.evaluation.runner import CONTROLS, WITH, WITHOUT
from quietstar.evaluation.statistics import Array, difference, mean
from quietstar.evaluation.store import ItemStore
from quietstar.evaluation.tasks import Task

TOLD = ("ci95", "p_value", "test", "items_needed")
"""Of a difference, beside its value."""
SIGNIFICANT = 0.05
LOWER_IS_BETTER = ("nll",)
CONTENT = {"other": "gain_of_content", "shuffled": "gain_over_shuffled", "pause": "gain_over_pause"}
"""What the thoughts' own content is worth, by the control that takes it away."""


def summarise(
    task: Task | HarnessTask,
    store: ItemStore,
    variants: Sequence[str],
    count: int,
    num_cut: int,
    seed: int,
) -> dict[str, Any]:
    """Figures of a task.

    Args:
        task: It.
        store: Holds all its items.
        variants: That were scored.
        count: Items.
        num_cut: Items that were shortened.
        seed: Of resampling.

    Returns:
        ``n``, ``main_metric``, ``truncated``; a mapping of metrics for every variant, and for every
        difference, with their intervals; ``breakdown``; ``verdict`` and ``warnings``.
    """
    records = {v: store.of(task.name, v, count) for v in variants if (task.name, 0, v) in store}
    values = {variant: _values(kept) for variant, kept in records.items()}
    first = next(iter(values.values()))
    main = task.main_metric if task.main_metric in first else next(iter(first))
    found: dict[str, Any] = {"n": count, "main_metric": main, "truncated": num_cut}
    for variant in (WITHOUT, WITH):
        if variant in values:
            found[variant] = means(values[variant], main)
    if WITHOUT in values and WITH in values:
        found["difference"] = differences(values[WITH], values[WITHOUT], main, seed)
    controls = [control for control in CONTROLS if control in values]
    if controls:
        found["controls"] = {control: means(values[control], main) for control in controls}
    for control in controls:
        found[CONTENT[control]] = differences(values[WITH], values[control], main, seed)
    if WITHOUT in records and WITH in records and task.kind in ("answer", "text"):
        found["breakdown"] = break_down(gather_tokens(records), seed)
    found["warnings"] = warnings(found)
    found["verdict"] = verdict(found)
    return found


def _values(records: Sequence[dict[str, Any]]) -> dict[str, Array]:
    names = records[0]["metrics"]
    return {name: np.array([record["metrics"][name] for record in records]) for name in names}


def means(values: dict[str, Array], main: str) -> dict[str, Any]:
    """Every metric with ``METRIC_stderr``, and ``stderr`` of the main one."""
    found: dict[str, Any] = {}
    samples = {}
    for name, value in values.items():
        result = mean(value)
        found[name], found[f"{name}_stderr"] = result.value, result.stderr
        if result.stdev_samples is not None:
            samples[name] = {"stdev_between_items": result.stdev_items,
                             "stdev_between_thoughts": result.stdev_samples}  # fmt: skip
    count, num_samples = values[main].shape
    found |= {"n": count, "stderr": found[f"{main}_stderr"]}
    return found | ({"samples": {"n": num_samples, **samples}} if samples else {})


def differences(
    after: dict[str, Array], before: dict[str, Array], main: str, seed: int
) -> dict[str, Any]:
    """Every metric with interval and test; ``ci95`` and ``p_value`` are those of the main one."""
    found: dict[str, Any] = {}
    for name in after:
        result = asdict(difference(after[name], before[name], seed))
        found[name] = result.pop("value")
        found |= {f"{name}_{key}": value for key, value in result.items()}
    return found | {key: found[f"{main}_{key}"] for key in TOLD}


def warnings(found: dict[str, Any]) -> list[str]:
    """What a reader must know before the figures."""
    said = []
    if found["truncated"]:
        said.append(f"{found['truncated']} items were longer than the model takes and were cut")
    told = found.get("difference")
    if told is None:
        return said
    count, needed = found["n"], told["items_needed"]
    if needed is not None and needed > count and not is_told(told):
        said.append(
            f"{count} items are too few to tell a difference of {told[found['main_metric']]:+.4f} "
            f"in {found['main_metric']} from chance: it would take about {needed:,}"
        )
    return said


def is_told(told: dict[str, Any]) -> bool:
    """Whether a difference is told from chance: by its interval *and* by its test.

    A bootstrap interval of very few items excludes zero as soon as they agree.
    """
    ci95, p_value = told["ci95"], told["p_value"]
    return ci95 is not None and (ci95[0] > 0 or ci95[1] < 0) and p_value < SIGNIFICANT


def improvement(found: dict[str, Any], key: str) -> float:
    """A difference of the main metric, positive where thoughts are better."""
    main = found["main_metric"]
    return found[key][main] * (-1 if main in LOWER_IS_BETTER else 1)


def verdict(found: dict[str, Any]) -> str:
    """The answer in a sentence: do the thoughts help, and is it what they say?"""
    if "difference" not in found:
        return ""
    gain = improvement(found, "difference")
    if not is_told(found["difference"]):
        return f"no difference that {found['n']} items can tell"
    if gain < 0:
        return "thoughts make it worse"
    controls = [control for control in CONTROLS if CONTENT[control] in found]
    if not controls:
        return "better with thoughts (run --controls to see whether it is what they say)"
    equal = [c for c in controls if not _beats(found, CONTENT[c])]
    if equal:
        names = {"other": "thoughts of other items", "shuffled": "shuffled thoughts",
                 "pause": "pause tokens"}  # fmt: skip
        helped = " and ".join(names[control] for control in equal)
        return f"better with thoughts, but {helped} help as much: it is not what the thoughts say"
    return "better with thoughts, and because of what they say"


def _beats(found: dict[str, Any], key: str) -> bool:
    return is_told(found[key]) and improvement(found, key) > 0
