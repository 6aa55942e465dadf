"""The figures of ``quietstar eval``, in the terminal and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from quietstar.evaluation.controls import CONTROLS, GAINS, PAUSE, SWAPPED, WITH, WITHOUT, gain_over
from quietstar.evaluation.statistics import CONTROL_NAMES
from quietstar.reports.figures import Figure, Row, draw_forest, draw_groups
from quietstar.reports.formats import plain, probability, signed, signed_range
from quietstar.reports.pages import write_charts

METRICS = {
    "accuracy": "accuracy (argmax)",
    "gold_probability": "P(gold answer)",
    "published_accuracy": "P, as published",
    "nll": "NLL, nats/token",
    "token_accuracy": "accuracy of tokens",
}
BREAKDOWNS = {
    "difficulty": ("By difficulty", "Quintiles of NLL without thoughts (nats)"),
    "kind": ("By kind of token", "What the token's text is made of"),
    "position": ("By position", "Quintiles of the token's index in the text"),
}


def metrics_of(task: dict[str, Any]) -> dict[str, str]:
    """Return the metrics of a task, those with a standard error, and what they are called."""
    first = task[WITHOUT] if WITHOUT in task else task[WITH]
    return {str(m): METRICS.get(m) or str(m) for m in first if f"{m}_stderr" in first}


def task_view(name: str, task: dict[str, Any]) -> RenderableType:
    """Show a task in the terminal: metrics with and without thoughts, controls, notes, verdict."""
    metrics, main, difference = metrics_of(task), task["main_metric"], task.get("difference")
    variants = {"without": task.get(WITHOUT), "with": task.get(WITH)}
    variants = {heading: variant for heading, variant in variants.items() if variant is not None}
    headings = ("difference", "95% CI", "p") if difference else ("std. error",)
    table = _table("metric", *variants, *headings)
    table.title = f"{name}, {task['n']} item{'s' if task['n'] != 1 else ''}"
    for metric, label in metrics.items():
        cells = [plain(variant[metric]) for variant in variants.values()]
        if difference:
            cells += _comparison(difference, metric)
        else:
            cells += [plain(variant[f"{metric}_stderr"]) for variant in variants.values()]
        table.add_row(label, *cells, style="bold" if metric == main else "")
    parts: list[RenderableType] = [table]
    if "controls" in task:
        table = _table(f"{metrics[main]} with", "", "gain over it", "95% CI", "p")
        for control in (c for c in CONTROLS if c in task["controls"]):
            cells = [plain(task["controls"][control][main])]
            cells += _comparison(task[GAINS[control]], main)
            style = "bold" if control == SWAPPED else ""
            table.add_row(CONTROL_NAMES[control], *cells, style=style)
        parts.append(table)
    parts += [Text(f"  note: {line}", style="yellow") for line in task["warnings"]]
    if task["verdict"]:
        parts.append(Text(f"  {name}: {task['verdict']}", style="bold"))
    return Group(*parts)


def _table(first: str, *numbers: str) -> Table:
    columns = [Column(heading, justify="right", no_wrap=True) for heading in numbers]
    return Table(first, *columns, title_justify="left", box=box.SIMPLE_HEAD)


def _comparison(comparison: dict[str, Any], metric: str) -> list[str]:
    """Format a difference, its interval and its p-value."""
    bounds, p_value = comparison[f"{metric}_ci95"], comparison[f"{metric}_p_value"]
    return [signed(comparison[metric]), signed_range(bounds), probability(p_value)]


def write_page(path: Path, model: str, result: dict[str, Any]) -> Path:
    """Write the page; returns its path.

    Args:
        path: Path of the page.
        model: Name of the model.
        result: Content of the file that ``--out`` names.

    Raises:
        UserError: plotly is not installed.
    """
    figures: dict[str, Figure] = {}
    tasks = [
        _section(f"task{number}", name, task, figures)
        for number, (name, task) in enumerate(result["tasks"].items(), start=1)
    ]
    facts = [("Model", model)]
    facts += [(key, str(result["environment"][key])) for key in ("dtype", "device", "torch")]
    config = {key: value for key, value in result["config"].items() if value is not None}
    return write_charts(path, "evaluation.html.j2", figures, facts=facts, tasks=tasks,
                        config=config)  # fmt: skip


def _section(
    key: str, name: str, task: dict[str, Any], figures: dict[str, Figure]
) -> dict[str, Any]:
    """Return what the page says of a task; its charts go into ``figures``."""
    metrics, main = metrics_of(task), task["main_metric"]
    cards = []

    def add(suffix: str, title: str, caption: str, figure: Figure) -> None:
        figures[key + suffix] = figure
        cards.append({"name": key + suffix, "title": title, "caption": caption})

    if "difference" in task:
        # The gain over no thoughts is positive where thoughts are better.
        difference, ci95 = task["difference"][main], task["difference"]["ci95"]
        bounds = ci95 and sorted(gain_over(bound, 0.0, main) for bound in ci95)
        rows = [Row("over no thoughts", gain_over(difference, 0.0, main), bounds)]
        for control in (c for c in CONTROLS if GAINS[c] in task):
            label, gain = f"over {CONTROL_NAMES[control]}", task[GAINS[control]]
            label += " (gain of content)" if control == SWAPPED else ""
            color = {SWAPPED: "content", PAUSE: "pause"}.get(control, "other")
            rows.append(Row(label, gain[main], gain["ci95"], color))
        caption = f"Gain in {metrics[main]}: mean and 95% CI"
        add("", "What thoughts change", caption,
            draw_forest(rows, f"gain in {metrics[main]}", "", "+.4f"))  # fmt: skip
    for kind, groups in task.get("breakdown", {}).items():
        if len(groups) > 1:  # one group is the whole
            add(f"-{kind}", *BREAKDOWNS[kind], draw_groups(groups))
    controls = task.get("controls", {})
    columns = [
        ("Without thoughts", task.get(WITHOUT)),
        ("With thoughts", task.get(WITH)),
        ("With − without", task.get("difference")),
        ("Gain of content", task.get(GAINS[SWAPPED])),
        *((CONTROL_NAMES[control].capitalize(), controls.get(control)) for control in CONTROLS),
    ]
    columns = [(heading, scores) for heading, scores in columns if scores]
    return {"name": name, "task": task, "metrics": metrics, "cards": cards, "columns": columns}
