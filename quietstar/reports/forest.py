"""Variants of the method as dots with intervals, one row each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from quietstar.reports.artifacts import Controls
from quietstar.reports.charts import BLUE, INK
from quietstar.reports.plots import Figure, axis, base_layout, literal, padded

_ROW = 54  # pixels: a name above its dots
_LINE = 17  # pixels: a second line of the name
_WIDTH = 44  # characters of a line, on a phone
_FRAME = 64  # pixels: the horizontal axis and its title


@dataclass(frozen=True)
class Row:
    """One row: a mean, its interval and the figures of the seeds."""

    label: str
    mean: float
    bounds: tuple[float, float] | None
    seeds: tuple[float, ...] = ()


def variant_rows(controls: Controls) -> list[Row]:
    """The accuracies of the variants that have a mean."""
    return [
        Row(v.title, v.mean, v.ci95, tuple(x for x in v.accuracy if x is not None))
        for v in controls.variants
        if v.mean is not None
    ]


def difference_rows(controls: Controls) -> list[Row]:
    """The differences that have a mean, in points."""
    return [
        Row(d.label, 100 * d.mean, (100 * d.ci95[0], 100 * d.ci95[1]) if d.ci95 else None)
        for d in controls.differences
        if d.mean is not None
    ]


def draw_forest(rows: Sequence[Row], title: str, tickformat: str, hoverformat: str) -> Figure:
    """Rows from top to bottom; interval as a bar, mean as a dot, seeds as small rings."""
    ends = [x for row in rows for x in (row.mean, *(row.bounds or ()), *row.seeds)]
    span = padded(min(0.0, *ends), max(0.0, *ends))
    height = _ROW + (_LINE if any("<br>" in wrapped(row.label) for row in rows) else 0)
    layout = base_layout(_FRAME + height * len(rows))
    layout |= {
        "showlegend": False,
        "hovermode": "closest",
        "xaxis": axis(title, range=span, tickformat=tickformat, zeroline=True),
        "yaxis": {"range": [len(rows) - 0.55, -0.75], "visible": False, "fixedrange": True},
        "annotations": [name(row, place) for place, row in enumerate(rows)],
    }
    return {"data": [seeds(rows, hoverformat), means(rows, hoverformat)], "layout": layout}


def means(rows: Sequence[Row], hoverformat: str) -> Figure:
    """The dots, with their intervals."""
    bounds = [row.bounds or (row.mean, row.mean) for row in rows]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [row.mean for row in rows],
        "y": list(range(len(rows))),
        "text": [literal(row.label, 60) for row in rows],
        "hovertemplate": f"%{{text}}: %{{x:{hoverformat}}}<extra></extra>",
        "marker": {"size": 11, "color": BLUE},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [high - row.mean for row, (_, high) in zip(rows, bounds, strict=True)],
            "arrayminus": [row.mean - low for row, (low, _) in zip(rows, bounds, strict=True)],
            "color": BLUE,
            "thickness": 2.5,
            "width": 5,
        },
    }


def seeds(rows: Sequence[Row], hoverformat: str) -> Figure:
    """The figures of the single seeds, a little below the mean."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [x for row in rows for x in row.seeds],
        "y": [place + 0.22 for place, row in enumerate(rows) for _ in row.seeds],
        "hovertemplate": f"one seed: %{{x:{hoverformat}}}<extra></extra>",
        "marker": {"size": 7, "symbol": "circle-open", "color": INK, "line": {"width": 1.5}},
    }


def name(row: Row, place: int) -> Figure:
    """The label, above its dots."""
    return {
        "text": wrapped(row.label),
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "y": place,
        "yanchor": "bottom",
        "yshift": 9,
        "align": "left",
        "showarrow": False,
        "font": {"color": "var(--ink)", "size": 13},
    }


def wrapped(label: str) -> str:
    """The label in at most two lines that fit a phone."""
    width = _WIDTH if len(label) <= _WIDTH else min(_WIDTH, len(label) // 2 + 8)
    lines = textwrap.wrap(label, width, max_lines=2, placeholder=" …")
    return "<br>".join(literal(line, _WIDTH) for line in lines)
