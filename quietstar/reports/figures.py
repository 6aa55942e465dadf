"""Charts as plain data for plotly.js.

Colors are variables of the style sheet, so that one figure serves light and dark, and have one
meaning on all pages: base, mixed, thought, content, swapped, pause, and other for what is neither.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from quietstar.errors import visible
from quietstar.reports.pages import percent, plain
from quietstar.reports.run_files import Record, find_stages, series

Figure = dict[str, Any]

HEIGHT = 320  # pixels; the page reserves the same
MAX_POINTS = 150  # of a training line: more hides its course in its noise
FEW = 5  # held-out points under which the training line tells better what lies between them
_NARROWEST = 0.8  # of the widest panel, so that a short stage can be read beside a long one
_GAP = 0.06  # of the width, between panels: half a number on either side
_CHARACTERS = 48  # of the stages' names side by side, on a phone

# --- The look of all figures ----------------------------------------------------------------------
_AXIS: Figure = {
    "title": {"standoff": 8, "font": {"size": 12}}, "automargin": True, "showline": True,
    "showspikes": False, "gridcolor": "var(--grid)", "zerolinecolor": "var(--edge)",
    "linecolor": "var(--edge)",
}  # fmt: skip
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
_LAYOUT: Figure = {
    "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
    "font": {"family": _FONT, "size": 12, "color": "var(--muted)"},
    "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
    "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": "var(--line)", "namelength": -1,
                   "font": {"color": "var(--ink)"}},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    "annotationdefaults": {"xref": "paper", "xanchor": "left", "yanchor": "bottom",
                           "showarrow": False},
    "xaxis": _AXIS, "yaxis": _AXIS,
}  # fmt: skip


def make_figure(traces: Sequence[Figure], height: int = HEIGHT, **layout: Any) -> Figure:
    """Make a figure in the look of the page; the rest of its layout is given as in plotly."""
    look = {"template": {"layout": _LAYOUT}, "height": height}
    return {"data": traces, "layout": look | layout}


def error_bars(values: Sequence[float], bounds: Sequence[Any], color: str) -> Figure:
    """Return the bars from a value to the ends of its interval; none where the interval is None."""
    ends = [pair or (value, value) for value, pair in zip(values, bounds, strict=True)]
    above = [high - value for value, (_, high) in zip(values, ends, strict=True)]
    below = [value - low for value, (low, _) in zip(values, ends, strict=True)]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below,
            "color": f"var(--{color})", "thickness": 2.5, "width": 5}  # fmt: skip


def padded(low: float, high: float) -> tuple[float, float]:
    """Return a range with some air, around a single value too."""
    air = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return low - air, high + air


def literal(text: str, width: int) -> str:
    """Return a text that plotly, which reads some HTML in texts, shows as it is, in one line."""
    line = " ".join(visible(text).split())
    return html.escape(line if len(line) <= width else line[: width - 1] + "…", quote=False)


# --- Curves over the steps ------------------------------------------------------------------------
class Line(NamedTuple):
    """A figure in a chart."""

    key: str  # in metrics.jsonl
    name: str  # in the legend
    color: str
    symbol: str = "circle"  # of held-out points, so that color is not all that tells lines apart


class Chart(NamedTuple):
    """Lines on one pair of axes; those are drawn that were measured."""

    name: str  # id of the element in the page
    title: str
    caption: str  # what is to be seen, in one or two sentences
    unit: str
    lines: tuple[Line, ...]
    show: Callable[[float | None], str] = plain
    from_zero: bool = True  # the axis takes in zero; else the highest training values may leave it


def draw_curves(chart: Chart, records: Sequence[Record]) -> Figure:
    """Draw a chart with a panel for every stage; training thin, held-out figures marked."""
    stages = find_stages(records)
    panels: dict[str, list[Figure]] = {}
    for stage in stages:
        staged = [record for record in records if record.stage == stage]
        if own := [trace for line in chart.lines for trace in _line_traces(line, staged)]:
            panels[stage] = own
    traces = [trace for own in panels.values() for trace in own]
    # The legend lists a figure once, as its last panel shows it.
    listed = {trace["legendgroup"]: trace for trace in traces if trace["showlegend"]}
    for trace in traces:
        trace["showlegend"] = trace is listed.get(trace["legendgroup"])
    values: Figure = {"title": {"text": chart.unit}, "hoverformat": ".4~f"}
    if chart.show is percent:
        values |= {"tickformat": ".0%", "hoverformat": ".1%"}
    if chart.from_zero:
        values["rangemode"] = "tozero"
    else:  # all held-out values, but not the top 2% of the training values
        tops = [
            max(t["y"]) if "markers" in t["mode"] else sorted(t["y"])[int(0.98 * (len(t["y"]) - 1))]
            for t in traces
        ]
        values["range"] = padded(min(min(trace["y"]) for trace in traces), max(tops))
    layout = _place_panels(panels, has_names=len(stages) > 1, has_legend=len(listed) > 1)
    return make_figure(traces, hovermode="x unified", yaxis=values, **layout)


def _line_traces(line: Line, records: Sequence[Record]) -> list[Figure]:
    """Return the traces of a figure, training under held out; they are toggled together."""
    (train, values), held_out = (series(records, kind, line.key) for kind in ("train", "eval"))
    color, has_both = f"var(--{line.color})", bool(train and held_out[0])
    traces: list[Figure] = []
    if train:
        train, values = thinned(train, values)
        traces.append({
            "x": train, "y": values, "legendgroup": line.key, "showlegend": not has_both,
            "name": f"{line.name}, training" if has_both else line.name,
            "mode": "lines" if len(train) > 1 else "markers",
            "line": {"width": 1.25, "color": color}, "marker": {"color": color},
            "opacity": 0.6 if has_both else 1.0,
        })  # fmt: skip
    if held_out[0]:
        traces.append({
            "x": held_out[0], "y": held_out[1], "legendgroup": line.key, "showlegend": True,
            "name": line.name,
            "mode": "markers" if has_both and len(held_out[0]) < FEW else "lines+markers",
            "line": {"width": 2.25, "color": color},
            "marker": {"symbol": line.symbol, "size": 8, "color": color},
        })  # fmt: skip
    return traces


def thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Average over neighbors, to at most `MAX_POINTS`; each mean stands at its middle step."""
    size = -(-len(steps) // MAX_POINTS)
    starts = range(0, len(steps), size)
    middles = [steps[(start + min(start + size, len(steps)) - 1) // 2] for start in starts]
    return middles, [fmean(values[start : start + size]) for start in starts]


def _place_panels(panels: Mapping[str, list[Figure]], has_names: bool, has_legend: bool) -> Figure:
    """Lay panels out side by side, with shades and names; long stages get more of the width."""
    steps = [[float(step) for trace in own for step in trace["x"]] for own in panels.values()]
    spans = [padded(min(of_panel), max(of_panel)) for of_panel in steps]
    lengths = [high - low for low, high in spans]
    widths = [max(length, _NARROWEST * max(lengths)) for length in lengths]
    layout: Figure = {"showlegend": has_legend, "annotations": []}
    if has_names:  # room for the names of the stages, under the legend if there is one
        layout |= {"legend": {"y": 1.12}, "margin": {"t": 8 if has_legend else 24},
                   "plot_bgcolor": "var(--band)"}  # fmt: skip
    left = 0.0
    for number, (stage, span, width) in enumerate(zip(panels, spans, widths, strict=True), 1):
        share = width / sum(widths) * (1 - _GAP * (len(panels) - 1))
        right = min(left + share, 1.0)
        suffix = str(number) if number > 1 else ""
        layout[f"xaxis{suffix}"] = axis = {
            "title": {"text": "step"}, "range": span, "domain": (left, right), "showgrid": False,
            "zeroline": False, "tickangle": 0, "nticks": 6,
            "unifiedhovertitle": {"text": "step %{x}"},
        }  # fmt: skip
        if len(panels) > 1:  # numbers at the ends of a panel would meet those of the next one
            axis["tickvals"] = inner_steps(*span, most=max(1, int(5 * share)))
        for trace in panels[stage]:
            trace["xaxis"] = f"x{suffix}"
        if has_names:
            name = literal(stage, max(3, int(_CHARACTERS * (right - left))))
            layout["annotations"].append({"text": name, "x": left, "y": 1, "yref": "paper"})
        left += share + _GAP
    return layout


def inner_steps(low: float, high: float, most: int) -> list[int]:
    """Return at most so many round steps away from the ends of a range, at least one."""
    first, last = low + 0.12 * (high - low), high - 0.12 * (high - low)
    for size in (unit * 10**power for power in range(12) for unit in (1, 2, 5)):
        steps = range(size * math.ceil(first / size), math.floor(last) + 1, size)
        if len(steps) <= most:
            return list(steps) or [round((low + high) / 2)]
    return []


# --- Means with intervals -------------------------------------------------------------------------
class Row(NamedTuple):
    """One row of a forest plot: a mean, its interval and the figures of the seeds."""

    label: str
    mean: float
    bounds: Sequence[float] | None
    color: str = "mixed"
    seeds: Sequence[float] = ()


def draw_forest(rows: Sequence[Row], title: str, tickformat: str, hoverformat: str) -> Figure:
    """Draw rows from top to bottom: intervals as bars, means as dots, seeds as small rings."""
    ends = [x for row in rows for x in (row.mean, *(row.bounds or ()), *row.seeds)]
    traces: list[Figure] = [{
        "mode": "markers",
        "x": [x for row in rows for x in row.seeds],
        "y": [place + 0.22 for place, row in enumerate(rows) for _ in row.seeds],
        "hovertemplate": f"one seed: %{{x:{hoverformat}}}<extra></extra>",
        "marker": {"size": 7, "symbol": "circle-open", "color": "var(--base)",
                   "line": {"width": 1.5}},
    }]  # fmt: skip
    labels: list[Figure] = []
    for place, row in enumerate(rows):
        traces.append({
            "mode": "markers", "x": [row.mean], "y": [place],
            "hovertemplate": f"{literal(row.label, 60)}: %{{x:{hoverformat}}}<extra></extra>",
            "marker": {"size": 11, "color": f"var(--{row.color})"},
            "error_x": error_bars([row.mean], [row.bounds], row.color),
        })  # fmt: skip
        # At most two lines, which fit a phone.
        width = 44 if len(row.label) <= 44 else min(44, len(row.label) // 2 + 8)
        lines = textwrap.wrap(row.label, width, max_lines=2, placeholder=" …")
        labels.append({
            "text": "<br>".join(literal(line, 44) for line in lines), "align": "left",
            "x": 0, "y": place, "yshift": 9,
            "bgcolor": "var(--card)", "font": {"color": "var(--ink)", "size": 13},
        })  # fmt: skip
    row_height = 71 if any("<br>" in label["text"] for label in labels) else 54
    return make_figure(
        traces, 64 + row_height * len(rows),
        showlegend=False,
        xaxis={"title": {"text": title}, "range": padded(min(0.0, *ends), max(0.0, *ends)),
               "tickformat": tickformat, "zeroline": True, "tickangle": 0, "nticks": 6},
        yaxis={"range": [len(rows) - 0.55, -0.75], "visible": False, "fixedrange": True},
        annotations=labels,
    )  # fmt: skip


def draw_groups(groups: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw gain and gain of content of groups of tokens, side by side."""
    traces: list[Figure] = []
    for key, color, symbol in (("gain", "mixed", "circle"),
                               ("gain_of_content", "content", "diamond")):  # fmt: skip
        if key in groups[0]:
            values = [group[key] for group in groups]
            bounds = [group[f"{key}_ci95"] for group in groups]
            traces.append({
                "mode": "markers", "name": key.replace("_", " "),
                "x": [f"{literal(group['label'], 30)}<br>n {group['n']}" for group in groups],
                "y": values,
                "hovertemplate": "%{x}: %{y:+.4f}<extra></extra>",
                "marker": {"size": 9, "color": f"var(--{color})", "symbol": symbol},
                "error_y": error_bars(values, bounds, color),
            })  # fmt: skip
    return make_figure(
        traces,
        showlegend=True,
        xaxis={"showgrid": False, "type": "category", "tickangle": 0},
        yaxis={"title": {"text": "nats/token"}, "zeroline": True},
        scattermode="group",
    )
