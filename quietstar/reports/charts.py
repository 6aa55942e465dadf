"""Charts as numbers in percent of their axes, which one template draws as SVG of any width.

Colors are variables of the style sheet and have one meaning on all pages: base, mixed, thought,
content, swapped, pause, and other for what is neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

from quietstar.errors import visible
from quietstar.reports.formats import show
from quietstar.reports.run_files import Record, find_stages, series

MAX_POINTS = 150  # of a training line: more hides its course in its noise
FEW = 5  # held-out points under which the training line tells better what lies between them
_NO_XML = re.compile("[\ufffe\uffff]")


class Card(NamedTuple):
    """A chart with its heading; the description is for screen readers."""

    name: str
    title: str
    caption: str
    chart: dict[str, Any]
    description: str = ""


def literal(text: str, width: int) -> str:
    """Return a text as one line of at most so many visible characters."""
    line = " ".join(_NO_XML.sub("\ufffd", visible(text)).split())
    return line if len(line) <= width else line[: width - 1] + "…"


# --- Axes -----------------------------------------------------------------------------------------
def padded(low: float, high: float) -> tuple[float, float]:
    """Return a range with some air, around a single value too."""
    air = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return low - air, high + air


def with_zero(values: Sequence[float]) -> tuple[float, float]:
    """Return a range that takes in zero, with air only where values are."""
    low, high = min(0.0, *values), max(0.0, *values)
    below, above = padded(low, high)
    return (below if low < 0 else 0.0), (above if high > 0 or low == 0 else 0.0)


def place(value: float, low: float, high: float) -> float:
    """Return where a value lies on an axis, in percent; never far outside of it."""
    return round(min(max(100 * (value - low) / (high - low), -200.0), 300.0), 2)


def ticks(
    low: float, high: float, most: int, is_whole: bool = False, is_share: bool = False
) -> list[tuple[float, str]]:
    """Return places and texts of at most so many round numbers on an axis."""
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(size * power for size in (1, 2, 2.5, 5, 10, 20) if size * power >= least)
    step = max(1.0, float(round(step))) if is_whole else step
    values = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    show = (lambda x: f"{100 * x:.4g}%") if is_share else "{:.6g}".format
    return [(place(x, low, high), show(x).replace("-", "−")) for x in values]


# --- Lines ----------------------------------------------------------------------------------------
class Trace(NamedTuple):
    """Points on a panel, with a text for each that is marked."""

    label: str  # in the legend, which leaves an empty one out
    color: str
    x: Sequence[float]
    y: Sequence[float]
    texts: Sequence[str] = ()
    symbol: str = "o"
    line: str = "thick"  # or thin, or empty, which joins nothing


class Panel(NamedTuple):
    """Part of a chart with an axis of its own for x."""

    traces: Sequence[Trace]
    title: str = ""
    share: float = 1.0  # of the width, relative to the others'


def draw_lines(
    panels: Sequence[Panel],
    titles: tuple[str, str],
    y_range: tuple[float, float],
    is_share: bool = False,
    is_from_zero: bool = False,
) -> dict[str, Any]:
    """Draw traces; ``titles`` are those of x and y, and x begins at zero or at its first point."""
    drawn, (low, high), most = [], y_range, max(panel.share for panel in panels)
    for panel in panels:
        x = [float(value) for trace in panel.traces for value in trace.x]
        left, right = padded(min(x), max(x))
        left = 0.0 if is_from_zero else left
        share = panel.share / sum(one.share for one in panels)
        marks = ticks(left, right, max(1, round(6 * share)), is_whole=True)
        traces = []
        for trace in panel.traces:
            points = [(place(float(u), left, right), 100 - place(v, low, high))
                      for u, v in zip(trace.x, trace.y, strict=True)]  # fmt: skip
            hints = zip(points, map(visible, trace.texts), strict=False)  # not all are marked
            marked = [(*point, hint) for point, hint in hints if -1 <= point[1] <= 101]
            traces.append(trace._asdict() | {"points": points, "marked": marked})
        if len(panels) > 1:  # they would meet the neighbor's
            marks = [mark for mark in marks if 8 < mark[0] < 92]
        share = panel.share / most
        drawn.append({"title": panel.title, "share": share, "traces": traces, "ticks": marks})
    known = {trace.label: trace for panel in panels for trace in panel.traces if trace.label}
    legend = list(known.values()) if len(known) > 1 else []
    marks = [(100 - at, text) for at, text in ticks(low, high, 6, is_share=is_share)]
    return {"panels": drawn, "titles": titles, "legend": legend, "ticks": marks}


class Line(NamedTuple):
    """A metric in a chart."""

    key: str  # in metrics.jsonl
    name: str  # in the legend
    color: str
    symbol: str = "o"  # of held-out points, so that color is not all that tells lines apart


class Chart(NamedTuple):
    """Lines on one pair of axes; those are drawn that were measured."""

    name: str  # id of the element in the page
    title: str
    caption: str  # what is to be seen, in one or two sentences
    unit: str
    lines: tuple[Line, ...]
    form: str = ".4f"  # of values
    is_from_zero: bool = True  # the axis takes in zero; else early values may leave it


def draw_curves(chart: Chart, records: Sequence[Record]) -> dict[str, Any]:
    """Draw a chart with a panel for every stage; training thin, held-out metrics marked.

    A stage with a single line, mostly one before the thinking, has less of the width. Where zero is
    no part of the axis, the first third of a stage does not set it either: a loss that falls from
    far above would press everything else into a few pixels.
    """
    stages, panels, values = find_stages(records), [], []
    for stage in stages:
        staged = [record for record in records if record.stage == stage]
        traces = [trace for line in chart.lines for trace in _traces(line, staged, chart.form)]
        if not traces:
            continue
        steps = [step for trace in traces for step in trace.x]
        settled = min(steps) if chart.is_from_zero else min(steps) + (max(steps) - min(steps)) / 3
        values += [y for t in traces for x, y in zip(t.x, t.y, strict=True) if x >= settled]
        title = literal(stage, 30) if len(stages) > 1 else ""
        panels.append(Panel(traces, title, 1.0 if len({t.label for t in traces}) > 1 else 0.5))
    y_range = with_zero(values) if chart.is_from_zero else padded(min(values), max(values))
    drawn = draw_lines(panels, ("step", chart.unit), y_range, chart.form.endswith("%"))
    names = [line.name for line in chart.lines]
    drawn["legend"].sort(key=lambda trace: names.index(trace.label))
    return drawn


def _traces(line: Line, records: Sequence[Record], form: str) -> list[Trace]:
    """Return a metric's line in training, thinned, and that of its held-out points."""
    train, held_out = series(records, "train", line.key), series(records, "eval", line.key)
    make, traces = partial(Trace, line.name, line.color, symbol=line.symbol), []
    if train[0]:
        x, y = thinned(*train)
        texts = [f"step {x[0]}: {line.name} {show(y[0], form)}"] if len(x) == 1 else []
        traces.append(make(x, y, texts, line="thin" if held_out[0] else "thick"))
    if held_out[0]:
        texts = [f"step {x}: {line.name} {show(y, form)}" for x, y in zip(*held_out, strict=True)]
        is_joined = not train[0] or len(held_out[0]) >= FEW
        traces.append(make(*held_out, texts, line="thick" if is_joined else ""))
    return traces


def thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Average over neighbors, to at most `MAX_POINTS`; each mean stands at its middle step."""
    size = -(-len(steps) // MAX_POINTS)
    starts = range(0, len(steps), size)
    middles = [steps[(start + min(start + size, len(steps)) - 1) // 2] for start in starts]
    return middles, [fmean(values[start : start + size]) for start in starts]


# --- Bars -----------------------------------------------------------------------------------------
class Row(NamedTuple):
    """A bar from zero to a mean, with its interval and the values of single seeds."""

    label: str
    mean: float
    bounds: Sequence[float] | None = None
    color: str = "mixed"
    seeds: Sequence[float] = ()
    note: str = ""  # next to the label, less strong


def draw_bars(rows: Sequence[Row], title: str, form: str = ".4f") -> dict[str, Any]:
    """Draw rows from top to bottom, all from one zero; ``form`` is that of all numbers."""
    low, high = with_zero([x for r in rows for x in (r.mean, *(r.bounds or ()), *r.seeds)])
    at = partial(place, low=low, high=high)
    drawn = []
    for row in rows:
        start, end = sorted((at(0.0), at(row.mean)))
        hint = f"{row.label}: {show(row.mean, form)}"
        hint += f" (95% CI {' to '.join(show(x, form) for x in row.bounds)})" if row.bounds else ""
        drawn.append(row._asdict() | {
            "label": literal(row.label, 100), "shown": show(row.mean, form), "hint": visible(hint),
            "start": start, "width": round(end - start, 2), "ends": [*map(at, row.bounds or ())],
            "rings": [(at(value), show(value, form)) for value in row.seeds],
        })  # fmt: skip
    marks = ticks(low, high, 4, is_share=form == "points" or form.endswith("%"))
    return {"rows": drawn, "title": title, "zero": at(0.0), "ticks": marks}
