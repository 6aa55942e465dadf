"""The figures of ``quietstar eval``, in the terminal and as a page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from quietstar.errors import visible
from quietstar.evaluation.controls import (
    CONTROL_NAMES,
    CONTROL_NOTES,
    CONTROLS,
    GAINS,
    PAUSE,
    SWAPPED,
    WITH,
    WITHOUT,
    gain_over,
)
from quietstar.evaluation.runner import FREE_SETTINGS
from quietstar.evaluation.statistics import LENGTHS, SHARES
from quietstar.reports.figures import (
    Draw,
    Row,
    draw_forest,
    draw_groups,
    in_both_sizes,
)
from quietstar.reports.pages import (
    plain,
    probability,
    share_of,
    signed,
    signed_range,
    write_html,
)

METRICS = {
    "accuracy": "accuracy (argmax)",
    "accuracy_norm": "accuracy by byte",
    "exact_match": "exact match",
    "gold_probability": "P(gold answer)",
    "gold_logprob": "log P(gold answer), nats",
    "published_accuracy": "P, as published",
    "nll": "NLL, nats/token",
    "token_accuracy": "accuracy of tokens",
}
OF_ANSWERS = ("gold_probability", "gold_logprob", "accuracy")
"""Metrics of whole answers, which the controls are shown for."""
BREAKDOWNS = {
    "difficulty": ("By difficulty", "Quintiles of NLL without thoughts (nats)"),
    "kind": ("By kind of token", "What the token's text is made of"),
    "position": ("By position", "Quintiles of the token's index in the text"),
}


EXAMPLES = (
    ("Thoughts of items drawn at random",
     "Up to ten that are answered right with the thought, and ten that are not; nobody chose them.",
     ("right", "wrong")),
    ("Items that thoughts help and hurt most", "Those with the largest rise and the largest fall.",
     ("helped", "hurt")),
)  # fmt: skip
"""Lists of items: heading, what it shows, and which of the examples."""


def metrics_of(task: dict[str, Any]) -> dict[str, str]:
    """Return the metrics of a task, those with a standard error, and what they are called."""
    first = task[WITHOUT] if WITHOUT in task else task[WITH]
    return {str(m): METRICS.get(m) or str(m) for m in first if f"{m}_stderr" in first}


def task_view(name: str, task: dict[str, Any]) -> RenderableType:
    """Show a task in the terminal: metrics with and without thoughts, controls, notes, verdict."""
    metrics, main, difference = metrics_of(task), task["main_metric"], task.get("difference")
    variants = {h: task[key] for h, key in (("without", WITHOUT), ("with", WITH)) if key in task}
    headings = ("difference", "95% CI", "p") if difference else ("std. error",)
    table = figures_table("metric", *variants, *headings)
    name = visible(name).replace("\n", "⏎")
    table.title = Text(f"{name}, {task['n']} item{'s' if task['n'] != 1 else ''}")
    for metric, label in metrics.items():
        cells = [plain(variant[metric]) for variant in variants.values()]
        if difference:
            cells += comparison_cells(difference, metric, main)
        else:
            cells += [plain(variant[f"{metric}_stderr"]) for variant in variants.values()]
        style = "bold" if metric == main else ""
        table.add_row(Text(visible(label)), *cells, style=style)
    parts: list[RenderableType] = [table]
    for metric in (m for m in metrics if "controls" in task and m in (main, *OF_ANSWERS)):
        table = figures_table(f"{visible(metrics[metric])} with", "", "gain over it", "95% CI", "p")
        for control in (c for c in CONTROLS if c in task["controls"]):
            cells = [plain(task["controls"][control][metric])]
            cells += comparison_cells(task[GAINS[control]], metric, main)
            style = "bold" if control == SWAPPED else ""
            table.add_row(CONTROL_NAMES[control], *cells, style=style)
        parts.append(table)
    if WITH in task and "thought_length" in task[WITH]:
        length, cut = (task[WITH][name] for name in LENGTHS)
        parts.append(
            Text(f"  thoughts: {length:.1f} tokens on average, {cut:.1%} cut at the limit")
        )
    if "gates" in task:
        table = figures_table("think where the entropy is above", "tokens", "NLL", "passes/token")
        for row in task["gates"]:
            cells = [f"{row['share']:.1%}", plain(row["nll"]), f"{row['passes']:.2f}"]
            table.add_row(f"{row['entropy']:.3f} nats", *cells)
        parts.append(table)
    for name, vote in task.get(WITH, {}).get("votes", {}).items():
        parts.append(Text(f"  {name} of the sampled thoughts: {_share(vote)}"))
    if task.get("num_tests", 1) > 1:
        text = f"  p of {metrics[main]}: corrected for {task['num_tests']} tests (Holm); others not"
        parts.append(Text(text, style="dim"))
    parts += [Text(f"  note: {line}", style="yellow") for line in task["warnings"]]
    if task["verdict"]:
        parts.append(Text(f"  {name}, by {metrics[main]}: {task['verdict']}", style="bold"))
    return Group(*parts)


def _share(vote: Mapping[str, Any]) -> str:
    """Format a share of items with its interval."""
    bounds = vote["ci95"]
    shown = "" if bounds is None else f" ({bounds[0]:.3f} to {bounds[1]:.3f})"
    return f"{vote['mean']:.3f}{shown}"


def figures_table(first: str, *numbers: str) -> Table:
    """Make a table of the terminal: a column of names, and columns of numbers."""
    columns = [Column(heading, justify="right", no_wrap=True) for heading in numbers]
    return Table(Column(Text(first)), *columns, title_justify="left", box=box.SIMPLE_HEAD)


def comparison_cells(comparison: Mapping[str, Any], metric: str, main: str) -> list[str]:
    """Format a difference, its interval and its p-value; that of the main metric is corrected."""
    bounds, p_value = comparison[f"{metric}_ci95"], comparison[f"{metric}_p_value"]
    if metric == main:
        p_value = comparison.get("p_holm", p_value)
    return [signed(comparison[metric]), signed_range(bounds), probability(p_value)]


def write_page(path: Path, model: str, result: dict[str, Any]) -> Path:
    """Write the page; returns its path.

    Args:
        path: Path of the page.
        model: Name of the model.
        result: Content of the file that ``--out`` names.
    """
    figures: dict[str, Draw] = {}
    sections = []
    for number, (name, task) in enumerate(result["tasks"].items(), start=1):
        key, metrics, main, cards = f"task{number}", metrics_of(task), task["main_metric"], []
        if "difference" in task:  # the gain is positive where thoughts are better
            mean, ci95 = task["difference"][main], task["difference"]["ci95"]
            bounds = ci95 and sorted(gain_over(bound, 0.0, main) for bound in ci95)
            rows = [Row("over no thoughts", gain_over(mean, 0.0, main), bounds)]
            for control in (c for c in CONTROLS if GAINS[c] in task):
                label, gain = f"over {CONTROL_NAMES[control]}", task[GAINS[control]]
                label += " (gain of content)" if control == SWAPPED else ""
                color = {SWAPPED: "content", PAUSE: "pause"}.get(control, "other")
                rows.append(Row(label, gain[main], gain["ci95"], color))
            figures[key] = partial(draw_forest, rows, f"gain in {metrics[main]}", signed)
            caption = f"Gain in {metrics[main]}: mean and 95% CI"
            cards.append({"name": key, "title": "What thoughts change", "caption": caption})
        for kind, groups in task.get("breakdown", {}).items():
            if len(groups) > 1:  # one group is the whole
                title, caption = BREAKDOWNS[kind]
                figures[f"{key}-{kind}"] = partial(draw_groups, groups)
                cards.append({"name": f"{key}-{kind}", "title": title, "caption": caption})
        controls = task.get("controls", {})
        variants = [
            ("With thoughts", "", task.get(WITH)),
            ("Without thoughts", "", task.get(WITHOUT)),
            *((CONTROL_NAMES[c].capitalize(), CONTROL_NOTES[c], controls.get(c)) for c in CONTROLS),
            ("With − without", "", task.get("difference")),
            ("Gain of content", "with − swapped thoughts", task.get(GAINS[SWAPPED])),
        ]
        variants = [entry for entry in variants if entry[-1]]
        lengths = [task[WITH][n] for n in LENGTHS if n in task.get(WITH, {})]
        drawn = task.get("examples", {})
        examples = [(heading, text, [(kind, drawn[kind]) for kind in kinds if drawn.get(kind)])
                    for heading, text, kinds in EXAMPLES]  # fmt: skip
        shown = {name: metrics[name] for name in ("accuracy", main) if name in metrics}
        sections.append({
            "name": name, "task": task, "answer": _answer(task, metrics), "metrics": metrics,
            "cards": cards, "shown": shown,
            "variants": variants, "lengths": lengths, "without": WITHOUT, "with": WITH,
            "examples": [entry for entry in examples if entry[2]],
            "content": GAINS[SWAPPED], "votes": task.get(WITH, {}).get("votes", {}),
        })  # fmt: skip
    facts = [("Model", model)]
    facts += [(key, str(result["environment"][key])) for key in ("dtype", "device", "torch")]
    config = {key: value for key, value in result["config"].items() if value is not None}
    return write_html(
        path, "evaluation.html.j2", figures=in_both_sizes(figures), facts=facts, tasks=sections,
        config=config, mark=page_mark(result["config"]),
    )  # fmt: skip


def _answer(task: Mapping[str, Any], metrics: Mapping[str, str]) -> str:
    """Say in numbers what thoughts change: the share of right items, or else the main metric."""
    metric = next((name for name in SHARES if name in metrics), task["main_metric"])
    show = partial(share_of, n=float(task["n"])) if metric in SHARES else plain
    known = [
        ("with thoughts", task.get(WITH)),
        ("without", task.get(WITHOUT)),
        ("with swapped thoughts", task.get("controls", {}).get(SWAPPED)),
    ]
    parts = [f"{show(scores[metric])} {name}" for name, scores in known if scores]
    return f"{metrics[metric]}: {', '.join(parts)}."


def page_mark(config: Mapping[str, Any]) -> str:
    """Return the text by which a page of the same evaluation, with the same settings, is known."""
    decisive = {key: value for key, value in config.items() if key not in FREE_SETTINGS}
    content = json.dumps(decisive, sort_keys=True)
    return f"quietstar-evaluation-{hashlib.sha256(content.encode()).hexdigest()}"
