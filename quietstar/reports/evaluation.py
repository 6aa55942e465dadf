"""The figures of ``quietstar eval``, in the terminal and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quietstar.evaluation.controls import CONTROLS, GAINS, SWAPPED, WITH, WITHOUT, gain_over
from quietstar.evaluation.statistics import CONTROL_NAMES
from quietstar.reports.figures import Figure, Row, draw_forest, draw_groups
from quietstar.reports.formats import MISSING, plain, signed
from quietstar.reports.pages import chart_scripts, render, write

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


# --- In the terminal ------------------------------------------------------------------------------


def task_view(name: str, task: dict[str, Any]) -> RenderableType:
    """Show a task: metrics with and without thoughts, controls, notes and the verdict."""
    metrics, difference = metrics_of(task), task.get("difference")
    variants = {"without": WITHOUT, "with": WITH}
    variants = {heading: task[v] for heading, v in variants.items() if v in task}
    headings = ("difference", "95% CI", "p") if difference else ("std. error",)
    table = _table(f"{name}, {task['n']} item{'s' if task['n'] != 1 else ''}", "metric",
                   *variants, *headings)  # fmt: skip
    for metric, label in metrics.items():
        row = [label, *(plain(variant[metric]) for variant in variants.values())]
        if difference:
            row += _comparison(difference, metric)
        else:
            row += [plain(variant[f"{metric}_stderr"]) for variant in variants.values()]
        table.add_row(*row, style="bold" if metric == task["main_metric"] else "")
    parts: list[RenderableType] = [table]
    if "controls" in task:
        main = task["main_metric"]
        table = _table("", f"{metrics[main]} with", "", "gain over it", "95% CI", "p")
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


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(first, title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _comparison(comparison: dict[str, Any], metric: str) -> list[str]:
    """Format a difference, its interval and its p-value."""
    bounds, p_value = comparison[f"{metric}_ci95"], comparison[f"{metric}_p_value"]
    interval = MISSING if bounds is None else " to ".join(signed(bound) for bound in bounds)
    return [signed(comparison[metric]), interval, show_p(p_value)]


def show_p(value: float | None) -> str:
    """Format a p-value; those below a thousandth are not told apart."""
    return MISSING if value is None else ("< 0.001" if value < 0.001 else f"{value:.3f}")


# --- As a page ------------------------------------------------------------------------------------


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
    scripts = chart_scripts(figures)
    page = render("evaluation.html.j2", scripts, facts=facts, tasks=tasks, figures=figures,
                  config=config)  # fmt: skip
    return write(path, page)


def _section(
    key: str, name: str, task: dict[str, Any], figures: dict[str, Figure]
) -> dict[str, Any]:
    """Return what the page says of a task; its charts go into ``figures``."""
    metrics, main = metrics_of(task), task["main_metric"]
    scored = {"Without thoughts": task.get(WITHOUT), "With thoughts": task.get(WITH)}
    controls = {CONTROL_NAMES[c].capitalize(): task.get("controls", {}).get(c) for c in CONTROLS}
    compared = {
        "With − without": task.get("difference"),
        "Gain of content": task.get(GAINS[SWAPPED]),
    }
    cards = []
    if "difference" in task:
        rows = [Row("over no thoughts", *_gain(task), "mixed")]
        for control in (c for c in CONTROLS if GAINS[c] in task):
            label = f"over {CONTROL_NAMES[control]}"
            label += " (gain of content)" if control == SWAPPED else ""
            color = {SWAPPED: "content", "pause": "pause"}.get(control, "other")
            gain = task[GAINS[control]]
            rows.append(Row(label, gain[main], gain["ci95"], color))
        figures[key] = draw_forest(rows, f"gain in {metrics[main]}", "", "+.4f")
        caption = f"Gain in {metrics[main]}: mean and 95% CI"
        cards.append({"name": key, "title": "What thoughts change", "caption": caption})
    for kind, groups in task.get("breakdown", {}).items():
        if len(groups) > 1:  # one group is the whole
            heading, caption = BREAKDOWNS[kind]
            figures[f"{key}-{kind}"] = draw_groups(groups)
            cards.append({"name": f"{key}-{kind}", "title": heading, "caption": caption})
    present = [{k: v for k, v in part.items() if v} for part in (scored, compared, controls)]
    return {"name": name, "task": task, "metrics": metrics, "cards": cards,
            "scored": present[0], "compared": present[1], "controls": present[2]}  # fmt: skip


def _gain(task: dict[str, Any]) -> tuple[float, tuple[float, ...] | None]:
    """Return the gain over no thoughts, positive where thoughts are better, and its interval."""
    main, ci95 = task["main_metric"], task["difference"]["ci95"]
    bounds = ci95 and tuple(sorted(gain_over(bound, 0.0, main) for bound in ci95))
    return gain_over(task["difference"][main], 0.0, main), bounds
