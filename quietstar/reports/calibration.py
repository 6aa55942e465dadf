"""Speed against quality of gates, as one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

COLORS = {"entropy": "#0072b2", "weight": "#d55e00", "gain": "#009e73"}
SYMBOLS = {"entropy": "circle", "weight": "diamond", "gain": "square"}


def write_plot(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write the page; returns its path.

    Args:
        path: Of the page.
        rows: Figures of every gate and threshold, as ``--json`` writes them.
    """
    measures = {"nll": "NLL, nats a token"}
    if rows[0]["accuracy"] is not None:
        measures["accuracy"] = "accuracy of answers"
    figure = make_subplots(rows=1, cols=len(measures), horizontal_spacing=0.12)
    for column, (measure, title) in enumerate(measures.items(), 1):
        for kind, color in COLORS.items():
            _add_line(figure, [r for r in rows if r["gate"] == kind], measure, column, color)
        for kind, symbol in (("always", "star"), ("never", "x")):
            (end,) = (row for row in rows if row["gate"] == kind)
            figure.add_scatter(
                x=[end["tokens_per_second"]], y=[end[measure]], name=kind, mode="markers",
                marker={"size": 12, "symbol": symbol, "color": "#4c535b"},
                legendgroup=kind, showlegend=column == 1, row=1, col=column,
            )  # fmt: skip
        figure.update_xaxes(title_text="tokens a second", row=1, col=column)
        figure.update_yaxes(title_text=title, row=1, col=column)
    figure.update_layout(title="Gates: speed against quality", template="plotly_white", height=460)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs=True)
    return path


def _add_line(
    figure: go.Figure, rows: Sequence[dict[str, Any]], measure: str, column: int, color: str
) -> None:
    kind = rows[0]["gate"]
    figure.add_scatter(
        x=[row["tokens_per_second"] for row in rows], y=[row[measure] for row in rows],
        text=[f"{row['share']:.1%} think, threshold {row['threshold']:.4f}" for row in rows],
        name=kind, mode="lines+markers", legendgroup=kind, showlegend=column == 1,
        line={"color": color}, marker={"size": 8, "symbol": SYMBOLS[kind]}, row=1, col=column,
    )  # fmt: skip
