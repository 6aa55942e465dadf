"""Charts as plain data for plotly.js.

Colors are variables of the style sheet, so that one figure serves light and dark, and have one
meaning on all pages: base, mixed, thought, content, swapped, pause, and other for what is neither.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quietstar.reports.run_files import Controls, Record, series

Figure = dict[str, Any]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
HEIGHT = 320  # pixels; the page reserves the same
MAX_POINTS = 150  # of a training line: more hides its course in its noise
FEW = 5  # held-out points under which the training line tells better what lies between them
_NARROWEST = 0.8  # of the widest panel, so that a short stage can be read beside a long one
_GAP = 0.06  # of the width, between panels: half a number on either side
_CHARACTERS = 48  # of the stages' names side by side, on a phone

# --- The look of all figures ----------------------------------------------------------------------


def base_layout(height: int = HEIGHT, **settings: Any) -> Figure:
    """Return what every figure has: the page's font and colors, no background of its own."""
    box: Figure = {"bgcolor": "var(--card)", "bordercolor": "var(--line)", "namelength": -1}
    return {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "font": {"family": FONT, "size": 12, "color": "var(--muted)"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": box | {"font": {"color": "var(--ink)"}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        **settings,
    }


def axis(title: str, **settings: Any) -> Figure:
    """Return an axis in the look of the page."""
    return {
        "title": {"text": title, "standoff": 8, "font": {"size": 12}},
        "gridcolor": "var(--grid)",
        "zerolinecolor": "var(--edge)",
        "linecolor": "var(--edge)",
        "automargin": True,
        "showspikes": False,
        **settings,
    }


def error_bars(values: Sequence[float], bounds: Sequence[Any], color: str) -> Figure:
    """Return the bars from a value to the ends of its interval; none where the interval is None."""
    ends = [
        (value, value) if pair is None else pair for value, pair in zip(values, bounds, strict=True)
    ]
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for value, (_, high) in zip(values, ends, strict=True)],
        "arrayminus": [value - low for value, (low, _) in zip(values, ends, strict=True)],
        "color": f"var(--{color})",
        "thickness": 2.5,
        "width": 5,
    }


def padded(low: float, high: float) -> tuple[float, float]:
    """Return a range with some air, around a single value too."""
    air = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return low - air, high + air


def literal(text: str, width: int) -> str:
    """Return a text that plotly, which reads some HTML in texts, shows as it is, in one line."""
    line = " ".join(text.split())
    return html.escape(line if len(line) <= width else line[: width - 1] + "…", quote=False)


# --- Curves over the steps ------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A figure in a chart: held out as marked points, training as a thin line.

    Attributes:
        key: Key of the figure in ``metrics.jsonl``.
        name: Name in the legend.
        color: Name of the color in the style sheet.
        symbol: Symbol of the held-out points, so that color is not all that tells lines apart.
    """

    key: str
    name: str
    color: str
    symbol: str = "circle"


@dataclass(frozen=True)
class Chart:
    """Lines on one pair of axes.

    Attributes:
        name: Id of the element in the page.
        title: Heading.
        caption: What is to be seen, in one or two sentences.
        unit: Title of the vertical axis.
        lines: What is drawn, if it was measured.
        is_share: True if the unit is a share of one, shown in percent.
        cut_spikes: True if the highest training values may leave the axes.
        show_zero: True if the axis takes in zero.
    """

    name: str
    title: str
    caption: str
    unit: str
    lines: tuple[Line, ...]
    is_share: bool = False
    cut_spikes: bool = False
    show_zero: bool = False


def draw_curves(chart: Chart, records: Sequence[Record], stages: Sequence[str]) -> Figure:
    """Draw a chart with a panel for every stage; training thin, held-out figures marked."""
    panels: dict[str, list[Figure]] = {}
    for stage in stages:
        staged = [record for record in records if record.stage == stage]
        if own := [trace for line in chart.lines for trace in line_traces(line, staged)]:
            panels[stage] = own
    traces = [trace for own in panels.values() for trace in own]
    listed: set[str] = set()
    for trace in reversed(traces):  # the legend lists a figure once, as its last panel shows it
        trace["showlegend"] = trace["showlegend"] and trace["legendgroup"] not in listed
        listed |= {trace["legendgroup"]} if trace["showlegend"] else set()
    values = axis(
        chart.unit,
        tickformat=".0%" if chart.is_share else "",
        hoverformat=".1%" if chart.is_share else ".4~f",
    )
    if chart.show_zero:
        values["rangemode"] = "tozero"
    if chart.cut_spikes:
        values["range"] = without_spikes(traces)
    layout = base_layout(showlegend=len(listed) > 1, hovermode="x unified", yaxis=values)
    place_panels(panels, layout, has_names=len(stages) > 1)
    return {"data": traces, "layout": layout}


def place_panels(panels: Mapping[str, list[Figure]], layout: Figure, has_names: bool) -> None:
    """Set axes, shades and names of panels side by side; long stages get more of the width."""
    steps = [[float(step) for trace in own for step in trace["x"]] for own in panels.values()]
    spans = [padded(min(of_panel), max(of_panel)) for of_panel in steps]
    lengths = [high - low for low, high in spans]
    widths = [max(length, _NARROWEST * max(lengths)) for length in lengths]
    layout |= {"shapes": [], "annotations": []}
    left = 0.0
    for number, (stage, span, width) in enumerate(zip(panels, spans, widths, strict=True), 1):
        share = width / sum(widths) * (1 - _GAP * (len(panels) - 1))
        right = min(left + share, 1.0)
        suffix = str(number) if number > 1 else ""
        # Numbers at the ends of a panel would meet those of the next one.
        inner = inner_steps(*span, most=max(1, int(5 * share)))
        layout[f"xaxis{suffix}"] = axis(
            "step", range=span, domain=(left, right), showgrid=False, zeroline=False, tickangle=0,
            unifiedhovertitle={"text": "step %{x}"}, nticks=6,
            tickvals=inner if len(panels) > 1 else None,
        )  # fmt: skip
        for trace in panels[stage]:
            trace["xaxis"] = f"x{suffix}"
        if has_names:
            layout["shapes"].append({
                "type": "rect", "xref": "paper", "yref": "paper", "layer": "below",
                "x0": left, "x1": right, "y0": 0, "y1": 1,
                "fillcolor": "var(--band)", "line": {"width": 0},
            })  # fmt: skip
            layout["annotations"].append({
                "text": literal(stage, max(3, int(_CHARACTERS * (right - left)))),
                "x": left, "xref": "paper", "xanchor": "left",
                "y": 1, "yref": "paper", "yanchor": "bottom",
                "showarrow": False, "font": {"size": 12, "color": "var(--muted)"},
            })  # fmt: skip
        left += share + _GAP
    if has_names:  # room for the names of the stages, under the legend if there is one
        layout["legend"]["y"] = 1.12
        layout["margin"]["t"] = 8 if layout["showlegend"] else 24


def inner_steps(low: float, high: float, most: int) -> list[int]:
    """Return at most so many round steps away from the ends of a range, at least one."""
    first, last = low + 0.12 * (high - low), high - 0.12 * (high - low)
    for size in (unit * 10**power for power in range(12) for unit in (1, 2, 5)):
        steps = range(size * math.ceil(first / size), math.floor(last) + 1, size)
        if len(steps) <= most:
            return list(steps) or [round((low + high) / 2)]
    return []


def line_traces(line: Line, records: Sequence[Record]) -> list[Figure]:
    """Return the traces of a figure, training under held out; they are toggled together."""
    train, held_out = (series(records, kind, line.key) for kind in ("train", "eval"))
    common = {"type": "scatter", "legendgroup": line.key}
    traces = []
    if train[0]:
        steps, values = thinned(*train)
        traces.append(common | {
            "x": steps, "y": values,
            "name": f"{line.name}, training" if held_out[0] else line.name,
            "showlegend": not held_out[0],
            "mode": "lines" if len(steps) > 1 else "markers",
            "line": {"width": 1.25, "color": f"var(--{line.color})"},
            "marker": {"color": f"var(--{line.color})"},
            "opacity": 0.6 if held_out[0] else 1.0,
        })  # fmt: skip
    if held_out[0]:
        traces.append(common | {
            "x": held_out[0], "y": held_out[1], "name": line.name, "showlegend": True,
            "mode": "markers" if train[0] and len(held_out[0]) < FEW else "lines+markers",
            "line": {"width": 2.25, "color": f"var(--{line.color})"},
            "marker": {"symbol": line.symbol, "size": 8, "color": f"var(--{line.color})"},
        })  # fmt: skip
    return traces


def thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Average over neighbors, to at most `MAX_POINTS`; each mean stands at its middle step."""
    size = -(-len(steps) // MAX_POINTS)
    starts = range(0, len(steps), size)
    groups = [values[start : start + size] for start in starts]
    middles = [
        steps[start + (len(group) - 1) // 2] for start, group in zip(starts, groups, strict=True)
    ]
    return middles, [sum(group) / len(group) for group in groups]


def without_spikes(traces: Sequence[Figure]) -> tuple[float, float]:
    """Return a range with all held-out values and all but the top 2% of the training values."""
    tops = []
    for trace in traces:
        values = sorted(trace["y"])
        is_held_out = "markers" in trace["mode"]
        tops.append(values[-1] if is_held_out else values[int(0.98 * (len(values) - 1))])
    return padded(min(min(trace["y"]) for trace in traces), max(tops))


# --- Means with intervals -------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of a forest plot: a mean, its interval and the figures of the seeds."""

    label: str
    mean: float
    bounds: Sequence[float] | None
    color: str = "mixed"
    seeds: tuple[float, ...] = ()


def control_rows(controls: Controls) -> tuple[list[Row], list[Row]]:
    """Return the variants (shares) and the differences (points) that have a mean."""
    variants = [
        Row(v.title, v.mean, v.ci95, seeds=tuple(x for x in v.accuracy if x is not None))
        for v in controls.variants
        if v.mean is not None
    ]
    differences = [
        Row(d.label, 100 * d.mean, (100 * d.ci95[0], 100 * d.ci95[1]) if d.ci95 else None)
        for d in controls.differences
        if d.mean is not None
    ]
    return variants, differences


def draw_forest(rows: Sequence[Row], title: str, tickformat: str, hoverformat: str) -> Figure:
    """Draw rows from top to bottom: intervals as bars, means as dots, seeds as small rings."""
    ends = [x for row in rows for x in (row.mean, *(row.bounds or ()), *row.seeds)]
    labels = []
    for row in rows:  # at most two lines, which fit a phone
        width = 44 if len(row.label) <= 44 else min(44, len(row.label) // 2 + 8)
        lines = textwrap.wrap(row.label, width, max_lines=2, placeholder=" …")
        labels.append("<br>".join(literal(line, 44) for line in lines))
    row_height = 71 if any("<br>" in label for label in labels) else 54
    layout = base_layout(
        64 + row_height * len(rows),
        showlegend=False,
        hovermode="closest",
        xaxis=axis(title, range=padded(min(0.0, *ends), max(0.0, *ends)), tickformat=tickformat,
                   zeroline=True, tickangle=0, nticks=6),
        yaxis={"range": [len(rows) - 0.55, -0.75], "visible": False, "fixedrange": True},
        annotations=[
            {"text": label, "x": 0, "xref": "paper", "xanchor": "left", "y": place,
             "yanchor": "bottom", "yshift": 9, "align": "left", "showarrow": False,
             "bgcolor": "var(--card)", "font": {"color": "var(--ink)", "size": 13}}
            for place, label in enumerate(labels)
        ],
    )  # fmt: skip
    rings = {
        "type": "scatter",
        "mode": "markers",
        "x": [x for row in rows for x in row.seeds],
        "y": [place + 0.22 for place, row in enumerate(rows) for _ in row.seeds],
        "hovertemplate": f"one seed: %{{x:{hoverformat}}}<extra></extra>",
        "marker": {
            "size": 7,
            "symbol": "circle-open",
            "color": "var(--base)",
            "line": {"width": 1.5},
        },
    }
    dots = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [row.mean],
            "y": [place],
            "hovertemplate": f"{literal(row.label, 60)}: %{{x:{hoverformat}}}<extra></extra>",
            "marker": {"size": 11, "color": f"var(--{row.color})"},
            "error_x": error_bars([row.mean], [row.bounds], row.color),
        }
        for place, row in enumerate(rows)
    ]
    return {"data": [rings, *dots], "layout": layout}


def draw_groups(groups: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw gain and gain of content of groups of tokens, side by side."""
    looks = {
        "gain": ("gain", "mixed", "circle"),
        "gain_of_content": ("gain of content", "content", "diamond"),
    }
    labels = [f"{literal(group['label'], 30)}<br>n {group['n']}" for group in groups]
    traces = []
    for key, (name, color, symbol) in looks.items():
        if key in groups[0]:
            values = [group[key] for group in groups]
            bounds = [group[f"{key}_ci95"] for group in groups]
            traces.append({
                "type": "scatter", "mode": "markers", "name": name, "x": labels, "y": values,
                "hovertemplate": "%{x}: %{y:+.4f}<extra></extra>",
                "marker": {"size": 9, "color": f"var(--{color})", "symbol": symbol},
                "error_y": error_bars(values, bounds, color),
            })  # fmt: skip
    layout = base_layout(
        showlegend=True,
        hovermode="closest",
        xaxis=axis("", showgrid=False, type="category", tickangle=0),
        yaxis=axis("nats/token", zeroline=True),
        scattermode="group",
    )
    return {"data": traces, "layout": layout}
