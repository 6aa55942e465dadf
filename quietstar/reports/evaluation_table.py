"""The figures of an evaluation in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quietstar.evaluation.controls import CONTROLS, GAINS, SWAPPED, WITH, WITHOUT
from quietstar.evaluation.statistics import CONTROL_NAMES
from quietstar.reports.formats import MISSING, plain, signed

TITLES = {
    "accuracy": "accuracy (argmax)",
    "gold_probability": "P(gold answer)",
    "published_accuracy": "P, as published",
    "nll": "NLL a token",
    "token_accuracy": "accuracy of tokens",
}


def task_view(name: str, found: dict[str, Any]) -> RenderableType:
    """A task: metrics with and without thoughts, what their content is worth, the verdict."""
    parts: list[RenderableType] = [metrics_table(name, found)]
    if "controls" in found:
        parts.append(controls_table(found))
    parts += [Text(f"  note: {line}", style="yellow") for line in found["warnings"]]
    if found["verdict"]:
        parts.append(Text(f"  {name}: {found['verdict']}", style="bold"))
    return Group(*parts)


def metrics_table(name: str, found: dict[str, Any]) -> Table:
    """Every metric without and with thoughts, and the difference."""
    table = _table(f"{name}, {found['n']} item{'s' if found['n'] != 1 else ''}", "metric")
    variants = {"without": WITHOUT, "with": WITH}
    variants = {heading: v for heading, v in variants.items() if v in found}
    told = found.get("difference")
    headings = [*variants, *(("difference", "95 % interval", "p") if told else ("std. error",))]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for metric in metrics_of(found[next(iter(variants.values()))]):
        row = [TITLES.get(metric, metric), *(plain(found[v][metric]) for v in variants.values())]
        if told:
            row += told_cells(told, metric)
        else:
            row += [plain(found[v][f"{metric}_stderr"]) for v in variants.values()]
        table.add_row(*row, style="bold" if metric == found["main_metric"] else "")
    return table


def controls_table(found: dict[str, Any]) -> Table:
    """The main metric with each control, and what the model's own thoughts gain over it."""
    metric = found["main_metric"]
    table = _table("", f"{TITLES.get(metric, metric)} with")
    for heading in ("", "gain over it", "95 % interval", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for control in CONTROLS:
        if control in found["controls"]:
            value = plain(found["controls"][control][metric])
            cells = told_cells(found[GAINS[control]], metric)
            style = "bold" if control == SWAPPED else ""
            table.add_row(CONTROL_NAMES[control], value, *cells, style=style)
    return table


def _table(title: str, first: str) -> Table:
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(first)
    return table


def metrics_of(variant: dict[str, Any]) -> Sequence[str]:
    """The metrics of a variant: those with a standard error beside them."""
    return [name for name in variant if f"{name}_stderr" in variant]


def told_cells(told: dict[str, Any], metric: str) -> list[str]:
    """A difference, its interval and its p-value."""
    bounds, p_value = told[f"{metric}_ci95"], told[f"{metric}_p_value"]
    shown = MISSING if bounds is None else " to ".join(signed(bound) for bound in bounds)
    return [signed(told[metric]), shown, shown_p(p_value)]


def shown_p(value: float | None) -> str:
    """A p-value; ones below a thousandth are not told apart."""
    return MISSING if value is None else ("< 0.001" if value < 0.001 else f"{value:.3f}")
