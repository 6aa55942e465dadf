"""Charts as plotly figures: plain data, which the page draws with the inlined plotly.js."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quietstar.reports.charts import Chart, Line
from quietstar.reports.records import Record, series

Figure = dict[str, Any]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
HEIGHT = 320  # pixels; the page reserves the same
MAX_POINTS = 150  # of a training line: more hides its course in its noise
FEW = 5  # held-out points under which a training line tells the way between them better
_NARROWEST = 0.8  # of the widest panel, so that a short stage can be read beside a long one
_GAP = 0.06  # of the width, between panels: half a number on either side
_CHARACTERS = 48  # of the stages' names side by side, on a phone


@dataclass(frozen=True)
class Panel:
    """The part of a chart that shows one stage, with steps of its own.

    Attributes:
        stage: Its name.
        traces: What is drawn.
        span: The steps from left to right, with some air.
    """

    stage: str
    traces: list[Figure]
    span: tuple[float, float]


def plotly_script() -> str:
    """The source of plotly.js.

    Raises:
        ImportError: plotly is not installed.
    """
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def draw(chart: Chart, records: Sequence[Record], stages: Sequence[str]) -> Figure:
    """A chart over the steps, a panel for every stage; training thin, held-out figures marked."""
    panels = [panel for stage in stages if (panel := draw_panel(chart, records, stage))]
    traces = [trace for panel in panels for trace in panel.traces]
    list_once(traces)
    has_names = len(stages) > 1
    layout = base_layout(HEIGHT) | place(panels, has_names)
    layout |= {
        "showlegend": True,
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.12 if has_names else 1.02,
            "yanchor": "bottom",
        },
        "hovermode": "x unified",
        "yaxis": axis(chart.unit, **value_axis(chart, traces)),
    }
    return {"data": traces, "layout": layout}


def draw_panel(chart: Chart, records: Sequence[Record], stage: str) -> Panel | None:
    """What the chart shows of a stage, or None if that is nothing."""
    ours = [record for record in records if record.stage == stage]
    traces = [trace for line in chart.lines for trace in draw_line(line, ours)]
    steps = [float(step) for trace in traces for step in trace["x"]]
    return Panel(stage, traces, padded(min(steps), max(steps))) if steps else None


def list_once(traces: Sequence[Figure]) -> None:
    """Leave one trace of every figure in the legend: that of the last panel."""
    listed = set()
    for trace in reversed(traces):
        trace["showlegend"] = trace["showlegend"] and trace["legendgroup"] not in listed
        if trace["showlegend"]:
            listed.add(trace["legendgroup"])


def place(panels: Sequence[Panel], has_names: bool) -> Figure:
    """Axes, shades and names of the panels side by side; long stages get more of the width."""
    spans = [panel.span[1] - panel.span[0] for panel in panels]
    widths = [max(span, _NARROWEST * max(spans)) for span in spans]
    layout: Figure = {"shapes": [], "annotations": []}
    left = 0.0
    for number, (panel, width) in enumerate(zip(panels, widths, strict=True), start=1):
        share = width / sum(widths) * (1 - _GAP * (len(panels) - 1))
        suffix = str(number) if number > 1 else ""
        domain = (left, min(left + share, 1.0))
        settings: Figure = {"range": panel.span, "showgrid": False, "zeroline": False}
        layout[f"xaxis{suffix}"] = axis(
            "step", **settings, domain=domain, nticks=2 + int(6 * share)
        )
        for trace in panel.traces:
            trace["xaxis"] = f"x{suffix}"
        if has_names:
            layout["shapes"].append(shade(domain))
            layout["annotations"].append(stage_name(panel.stage, domain))
        left += share + _GAP
    return layout


def shade(domain: tuple[float, float]) -> Figure:
    """The ground of a panel."""
    return {
        "type": "rect",
        "xref": "paper",
        "yref": "paper",
        "layer": "below",
        "x0": domain[0],
        "x1": domain[1],
        "y0": 0,
        "y1": 1,
        "fillcolor": "var(--plot-band)",
        "line": {"width": 0},
    }


def stage_name(name: str, domain: tuple[float, float]) -> Figure:
    """The name of a stage above its panel."""
    return {
        "text": literal(name, max(3, int(_CHARACTERS * (domain[1] - domain[0])))),
        "x": domain[0],
        "xref": "paper",
        "xanchor": "left",
        "y": 1,
        "yref": "paper",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 12, "color": "var(--muted)"},
    }


def draw_line(line: Line, records: Sequence[Record]) -> list[Figure]:
    """The traces of a figure: training under held out; one of them stands in the legend."""
    train, held_out = (series(records, kind, line.key) for kind in ("train", "eval"))
    traces = []
    if train[0]:
        name = f"{line.name}, training"
        thin = thinned(*train)
        mode = "lines" if len(thin[0]) > 1 else "markers"
        look: Figure = {"mode": mode, "line": {"width": 1.25, "color": line.color}}
        look |= {"opacity": 0.6 if held_out[0] else 1.0, "marker": {"color": line.color}}
        traces.append(trace(thin, name if held_out[0] else line.name, line, not held_out[0]) | look)
    if held_out[0]:
        marker = {"symbol": line.symbol, "size": 8, "color": line.color}
        mode = "markers" if train[0] and len(held_out[0]) < FEW else "lines+markers"
        look = {"mode": mode, "line": {"width": 2.25, "color": line.color}}
        traces.append(trace(held_out, line.name, line, True) | look | {"marker": marker})
    return traces


def trace(points: tuple[list[int], list[float]], name: str, line: Line, in_legend: bool) -> Figure:
    """What every trace has; the held-out and training traces of a line are toggled together."""
    return {
        "type": "scatter",
        "x": points[0],
        "y": points[1],
        "name": name,
        "legendgroup": line.key,
        "showlegend": in_legend,
    }


def thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Means over neighbours, at most `MAX_POINTS` of them; each at the middle of its steps."""
    size = -(-len(steps) // MAX_POINTS)
    starts = range(0, len(steps), size)
    groups = [values[start : start + size] for start in starts]
    middles = [
        steps[start + (len(group) - 1) // 2] for start, group in zip(starts, groups, strict=True)
    ]
    return middles, [sum(group) / len(group) for group in groups]


def value_axis(chart: Chart, traces: Sequence[Figure]) -> Figure:
    """Settings of the vertical axis."""
    settings: Figure = {"tickformat": ".0%" if chart.is_share else "", "hoverformat": ".4~f"}
    if chart.is_share:
        settings["hoverformat"] = ".1%"
    if chart.show_zero:
        settings["rangemode"] = "tozero"
    if chart.cut_spikes:
        settings["range"] = without_spikes(traces)
    return settings


def without_spikes(traces: Sequence[Figure]) -> tuple[float, float]:
    """A range with all held-out values and all but the highest 2 % of the training values."""
    tops = []
    for item in traces:
        values = sorted(item["y"])
        is_held_out = "markers" in item["mode"]
        tops.append(values[-1] if is_held_out else values[int(0.98 * (len(values) - 1))])
    return padded(min(min(item["y"]) for item in traces), max(tops))


def padded(low: float, high: float) -> tuple[float, float]:
    """A range with some air; around a single value too."""
    air = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return low - air, high + air


def axis(title: str, **settings: Any) -> Figure:
    """An axis in the look of the page."""
    return {
        "title": {"text": title, "standoff": 8, "font": {"size": 12}},
        "gridcolor": "var(--plot-grid)",
        "zerolinecolor": "var(--plot-edge)",
        "linecolor": "var(--plot-edge)",
        "automargin": True,
        "showspikes": False,
        **settings,
    }


def base_layout(height: int) -> Figure:
    """What every figure has: the page's font and colours, no background of its own."""
    box: Figure = {"bgcolor": "var(--card)", "bordercolor": "var(--line)", "namelength": -1}
    return {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "font": {"family": FONT, "size": 12, "color": "var(--muted)"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": box | {"font": {"color": "var(--ink)"}},
    }


def literal(text: str, width: int) -> str:
    """A text that plotly, which reads some HTML in texts, shows as it is, in one line."""
    line = " ".join(text.split())
    return html.escape(line if len(line) <= width else line[: width - 1] + "…", quote=False)
