"""The page of ``quietstar calibrate``: speed against quality of the gates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quietstar.reports.figures import Figure, make_figure
from quietstar.reports.pages import write_charts

GATES = {  # color, symbol, size and dash: color is not all that tells gates apart
    "entropy": ("var(--gate-entropy)", "circle", 8, "solid"),
    "weight": ("var(--gate-weight)", "diamond", 8, "dash"),
    "gain": ("var(--gate-gain)", "square", 8, "dot"),
    "always": ("var(--mixed)", "star", 12, None),
    "never": ("var(--base)", "x", 12, None),
    "chosen": ("var(--ink)", "circle-open", 18, None),
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
    return write_charts(path, "calibration.html.j2", figures, rows=rows, chosen=chosen, cards=cards)


def _draw(rows: Sequence[dict[str, Any]], measure: str, chosen: dict[str, Any] | None) -> Figure:
    """Draw a measure over the passes, which are exact, unlike a few timed tokens."""
    traces: list[Figure] = []
    digits = ".1%" if measure == "accuracy" else ".4f"
    for kind, (color, symbol, size, dash) in GATES.items():
        points, name = [row for row in rows if row["gate"] == kind], kind
        if kind == "chosen" and chosen is not None:
            points, name = [chosen], f"chosen ({chosen['gate']})"
        points.sort(key=lambda point: point["passes_a_token"])
        if points:
            traces.append({
                "name": name, "mode": "lines+markers" if dash else "markers",
                "x": [point["passes_a_token"] for point in points],
                "y": [point[measure] for point in points],
                "text": [f"{point['share']:.1%} of tokens think" for point in points],
                "hovertemplate": f"{name}: %{{y:{digits}}}, %{{x:.2f}} passes/token, %{{text}}"
                                 "<extra></extra>",
                "line": {"color": color, "dash": dash},
                "marker": {"size": size, "symbol": symbol, "color": color,
                           "line": {"width": 2.5 if kind == "chosen" else 0}},
            })  # fmt: skip
    tickformat = ".0%" if measure == "accuracy" else ""
    return make_figure(
        traces, 400,
        showlegend=True,
        hovermode="closest",
        xaxis={"title": {"text": "forward passes/token"}, "rangemode": "tozero", "tickangle": 0},
        yaxis={"title": {"text": MEASURES[measure][1]}, "tickformat": tickformat},
    )  # fmt: skip
