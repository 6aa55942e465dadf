"""The page of ``quietstar calibrate``: speed against quality of the gates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quietstar.reports.figures import Figure, axis, base_layout
from quietstar.reports.pages import chart_scripts, render, write

GATES = {  # color, symbol and dash: color is not all that tells gates apart
    "entropy": ("var(--gate-entropy)", "circle", "solid"),
    "weight": ("var(--gate-weight)", "diamond", "dash"),
    "gain": ("var(--gate-gain)", "square", "dot"),
}
MEASURES = {
    "nll": ("Negative log-likelihood", "nats/token", "Lower is better."),
    "accuracy": ("Accuracy of answers", "correct answers", "Higher is better."),
}


def write_plot(
    path: Path, rows: Sequence[dict[str, Any]], chosen: dict[str, Any] | None = None
) -> Path:
    """Write the page; returns its path.

    Args:
        path: Path of the page.
        rows: Figures of every gate and threshold, as ``--json`` writes them.
        chosen: Figures of the saved gate, as ``--json`` writes them; marked if given.

    Raises:
        UserError: plotly is not installed.
    """
    measured = [key for key in MEASURES if rows[0][key] is not None]
    cards = [
        {"name": key, "title": MEASURES[key][0],
         "caption": f"Against forward passes per token, where fewer is faster. {MEASURES[key][2]}"}
        for key in measured
    ]  # fmt: skip
    figures = {key: _draw(rows, key, chosen) for key in measured}
    scripts = chart_scripts(figures)
    page = render("calibration.html.j2", scripts, rows=rows, chosen=chosen, cards=cards,
                  figures=figures)  # fmt: skip
    return write(path, page)


def _draw(rows: Sequence[dict[str, Any]], measure: str, chosen: dict[str, Any] | None) -> Figure:
    """Draw a measure over the passes, which are exact, unlike a few timed tokens."""
    share = ".1%" if measure == "accuracy" else ".4f"
    traces: list[Figure] = []

    def add(name: str, points: Sequence[dict[str, Any]], **look: Any) -> None:
        traces.append({
            "type": "scatter", "name": name, "mode": "markers",
            "x": [point["passes_a_token"] for point in points],
            "y": [point[measure] for point in points],
            "text": [f"{point['share']:.1%} of tokens think" for point in points],
            "hovertemplate": f"{name}: %{{y:{share}}}, %{{x:.2f}} passes/token, %{{text}}"
                             "<extra></extra>",
            **look,
        })  # fmt: skip

    for kind, (color, symbol, dash) in GATES.items():
        if points := [row for row in rows if row["gate"] == kind]:
            points.sort(key=lambda point: point["passes_a_token"])
            add(kind, points, mode="lines+markers", line={"color": color, "dash": dash},
                marker={"size": 8, "symbol": symbol, "color": color})  # fmt: skip
    for kind, symbol, color in (("always", "star", "var(--mixed)"), ("never", "x", "var(--base)")):
        points = [row for row in rows if row["gate"] == kind]
        add(kind, points, marker={"size": 12, "symbol": symbol, "color": color})
    if chosen is not None:
        add(f"chosen ({chosen['gate']})", [chosen],
            marker={"size": 18, "symbol": "circle-open", "color": "var(--ink)",
                    "line": {"width": 2.5}})  # fmt: skip
    layout = base_layout(
        400,
        showlegend=True,
        hovermode="closest",
        xaxis=axis("forward passes/token", rangemode="tozero", tickangle=0),
        yaxis=axis(MEASURES[measure][1], tickformat=".0%" if measure == "accuracy" else ""),
    )
    return {"data": traces, "layout": layout}
