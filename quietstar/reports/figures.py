"""Charts as SVG, drawn by matplotlib: they need no script, and take their colors from the page.

Every chart is drawn twice, for screens and for phones, and the style sheet shows the one that fits.
Colors have one meaning on all pages: base, mixed, thought, content, swapped, pause, and other for
what is neither.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from quietstar.errors import visible
from quietstar.reports.pages import plain
from quietstar.reports.run_files import Record, find_stages, series

WIDE, NARROW = 540, 330
"""Widths in pixels, for screens and for phones."""
HEIGHT = 270.0
MAX_POINTS = 150  # of a training line: more hides its course in its noise
FEW = 5  # held-out points under which the training line tells better what lies between them

COLORS = (
    *("base", "mixed", "thought", "content", "swapped", "pause", "other"),
    *("group-1", "group-2", "group-3", "group-4", "group-5", "group-6"),
    *("ink", "muted", "grid", "edge", "band", "card"),
)
"""Variables of the style sheet."""
_PAINTS = {name: f"#abc0{number:02x}" for number, name in enumerate(COLORS)}
_LOOK: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "quietstar", "figure.dpi": 72, "savefig.dpi": 72,
    "figure.facecolor": "none", "axes.facecolor": "none",
    "font.size": 12, "axes.titlesize": 12, "axes.labelsize": 12, "legend.fontsize": 12,
    "xtick.labelsize": 11.5, "ytick.labelsize": 11.5,
    "text.color": _PAINTS["muted"], "axes.labelcolor": _PAINTS["muted"],
    "axes.titlecolor": _PAINTS["muted"], "axes.edgecolor": _PAINTS["edge"],
    "xtick.color": _PAINTS["edge"], "xtick.labelcolor": _PAINTS["muted"],
    "ytick.color": _PAINTS["edge"], "ytick.labelcolor": _PAINTS["muted"],
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": _PAINTS["grid"], "grid.linewidth": 1,
    "axes.titlelocation": "left", "legend.frameon": False, "legend.borderaxespad": 0,
    "legend.handlelength": 1.6, "legend.columnspacing": 1.4,
    "figure.constrained_layout.use": True, "figure.constrained_layout.w_pad": 0.03,
}  # fmt: skip

_NO_XML = re.compile("[\ufffe\uffff]")


def paint(name: str) -> str:
    """Return what stands for a color of the style sheet until the figure is SVG."""
    return _PAINTS[name]


@dataclass(frozen=True)
class Plot:
    """A drawn chart.

    Attributes:
        figure: Figure of matplotlib, a pixel for every point.
        hints: By the group id of a line's markers, a text for each, shown where one points.
    """

    figure: Figure
    hints: dict[str, list[str]] = field(default_factory=dict)

    def explain(self, texts: Sequence[str]) -> str:
        """Take up the texts of a line's markers; returns the group id to give to the line."""
        group = f"hints-{len(self.hints)}"
        self.hints[group] = list(texts)
        return group


Draw = Callable[[int], Plot]
"""Draws a chart for a width."""


def padded(low: float, high: float) -> tuple[float, float]:
    """Return a range with some air, around a single value too."""
    air = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return low - air, high + air


def literal(text: str, width: int) -> str:
    """Return a text as one line of at most so many visible characters."""
    line = " ".join(_NO_XML.sub("\ufffd", visible(text)).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def in_both_sizes(figures: Mapping[str, Draw]) -> dict[str, dict[str, str]]:
    """Draw charts by name, each for screens and for phones, as elements of a page."""
    sizes = {"wide": WIDE, "narrow": NARROW}
    return {
        name: {size: as_svg(draw(width), f"{name}-{size}") for size, width in sizes.items()}
        for name, draw in figures.items()
    }


# --- SVG ------------------------------------------------------------------------------------------
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_FAMILY = re.compile(r"font-family: [^;]+; ")
_FONT = re.compile(r"font: (?:(\d+|bold) )?([\d.]+px) [^;]+")  # as matplotlib before 3.11 writes


def as_svg(plot: Plot, name: str) -> str:
    """Return a chart as an element of an HTML page; ids in it begin with ``name``."""
    buffer = io.StringIO()
    with rc_context(_LOOK), warnings.catch_warnings():
        # Browsers have fonts for the scripts that the measuring one lacks.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        plot.figure.savefig(buffer, format="svg")
    root = ElementTree.fromstring(buffer.getvalue())
    for group in root.iter(f"{_SVG}g"):
        texts = plot.hints.get(group.get("id", ""), [])
        markers = list(group.iter(f"{_SVG}use"))
        if len(texts) == len(markers):  # outside of the axes none is drawn
            for marker, text in zip(markers, texts, strict=True):
                ElementTree.SubElement(marker, f"{_SVG}title").text = visible(text)
    referred = set(re.findall(r"#([\w-]+)[\")]", buffer.getvalue()))
    for parent in list(root.iter()):
        for child in list(parent):
            is_sheet = child.tag == f"{_SVG}defs" and child.find(f"{_SVG}style") is not None
            if is_sheet or child.tag == f"{_SVG}metadata":
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if (target := element.attrib.pop(_LINK, None)) is not None:
            element.set("href", f"#{name}-{target[1:]}")
        if (own := element.attrib.pop("id", None)) in referred:
            element.set("id", f"{name}-{own}")
        if (area := element.get("clip-path")) is not None:
            element.set("clip-path", area.replace("#", f"#{name}-"))
        if (style := element.get("style")) is not None:
            for color, stand_in in _PAINTS.items():
                style = style.replace(stand_in, f"var(--{color})")
            style = _FONT.sub(_font, style)
            element.set("style", _FAMILY.sub("", style))
    kept = {"viewBox": root.attrib["viewBox"], "aria-hidden": "true", "focusable": "false"}
    root.attrib.clear()
    root.attrib.update(kept)
    return ElementTree.tostring(root, encoding="unicode")


def _font(match: re.Match[str]) -> str:
    return f"font-size: {match[2]}" + (f"; font-weight: {match[1]}" if match[1] else "")


# --- Shared parts ---------------------------------------------------------------------------------
_ROUND = [1, 2, 2.5, 5, 10]
"""Steps of an axis, times powers of ten."""


def _number(value: float, _: int) -> str:
    return f"{value:.6g}".replace("-", "−")


def _percent(value: float, _: int) -> str:
    return f"{100 * value:.4g}%".replace("-", "−")


def _new(width: int, height: float) -> Plot:
    return Plot(Figure(figsize=(width / 72, height / 72)))


def _add_legend(plot: Plot, handles: Sequence[Any], width: int) -> None:
    """Put a legend above the axes, in columns that fit; the figure grows by its rows."""
    widest = max(32 + 7 * len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), width // widest))
    rows = -(-len(handles) // columns)
    columns = -(-len(handles) // rows)
    plot.figure.legend(handles=handles, loc="outside upper left", ncols=columns)
    plot.figure.set_figheight(plot.figure.get_figheight() + rows * 18 / 72)


# --- Curves over the steps ------------------------------------------------------------------------
class Line(NamedTuple):
    """A figure in a chart."""

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
    show: Callable[[float | None], str] = plain
    is_share: bool = False
    from_zero: bool = True  # the axis takes in zero; else early values may leave it


def draw_curves(chart: Chart, records: Sequence[Record], width: int = WIDE) -> Plot:
    """Draw a chart with a panel for every stage; training thin, held-out figures marked.

    A stage with a single line, mostly one before the thinking, has less of the width.
    """
    panels, stages = {}, find_stages(records)
    for stage in stages:
        staged = [record for record in records if record.stage == stage]
        measured = [(line, series(staged, "train", line.key), series(staged, "eval", line.key))
                    for line in chart.lines]  # fmt: skip
        if own := [(line, *both) for line, *both in measured if both[0][0] or both[1][0]]:
            panels[stage] = own
    with rc_context(_LOOK):
        plot = _new(width, HEIGHT if width == WIDE else 0.85 * HEIGHT)
        most = max(map(len, panels.values()))
        ratios = [1.0 if len(own) == most else 0.5 for own in panels.values()]
        (row,) = plot.figure.subplots(
            1, len(panels), sharey=True, squeeze=False, width_ratios=ratios
        )
        handles: dict[str, Any] = {}
        for axes, (stage, own), ratio in zip(row, panels.items(), ratios, strict=True):
            for measured in own:
                handles[measured[0].key] = _draw_line(plot, axes, chart, *measured)
            steps = [step for _, train, held_out in own for step in (*train[0], *held_out[0])]
            axes.set_xlim(*padded(float(min(steps)), float(max(steps))))
            share = ratio / sum(ratios)
            axes.xaxis.set_major_locator(MaxNLocator(
                max(1, int(7 * share * width / WIDE)), integer=True, min_n_ticks=1,
                steps=[1, 2, 5, 10],
                prune="both" if len(panels) > 1 else None,  # they would meet the neighbor's
            ))  # fmt: skip
            axes.xaxis.set_major_formatter(FuncFormatter(_number))
            axes.set_xlabel("step")
            if len(stages) > 1:
                room = max(3, int(share * width / 8))
                axes.set_title(literal(stage, room), parse_math=False)
                axes.set_facecolor(paint("band"))
        row[0].set_ylim(*_value_range(chart, list(panels.values())))
        row[0].set_ylabel(chart.unit)
        row[0].yaxis.set_major_locator(MaxNLocator(6, steps=_ROUND))
        row[0].yaxis.set_major_formatter(FuncFormatter(_percent if chart.is_share else _number))
        if len(handles) > 1:
            ordered = [handles[line.key] for line in chart.lines if line.key in handles]
            _add_legend(plot, ordered, width)
    return plot


def _draw_line(plot: Plot, axes: Any, chart: Chart, line: Line, train: Any, held_out: Any) -> Any:
    """Draw a figure of a stage, training under held out; returns what its legend shows."""
    color, has_both = paint(line.color), bool(train[0] and held_out[0])
    handle = None
    if train[0]:
        steps, values = thinned(*train)
        (handle,) = axes.plot(
            steps, values, color=color, label=line.name, linewidth=1.25,
            alpha=0.6 if has_both else 1.0, marker="" if len(steps) > 1 else ".",
        )  # fmt: skip
    if held_out[0]:
        texts = [f"step {step}: {line.name} {chart.show(value)}"
                 for step, value in zip(*held_out, strict=True)]  # fmt: skip
        is_joined = not has_both or len(held_out[0]) >= FEW
        (handle,) = axes.plot(
            *held_out, color=color, label=line.name, linewidth=2.25, marker=line.symbol,
            linestyle="-" if is_joined else "", markersize=6, markeredgewidth=0,
            gid=plot.explain(texts),
        )  # fmt: skip
    return handle


def _value_range(chart: Chart, panels: Sequence[Sequence[Any]]) -> tuple[float, float]:
    """Return the ends of the axis of values.

    Where zero is no part of it, the first third of a stage does not set it either: a loss that
    falls from far above would press everything else into a few pixels.
    """
    values, late = [], []
    for own in panels:
        steps = [step for _, *both in own for measured in both for step in measured[0]]
        settled = min(steps) + (max(steps) - min(steps)) / 3
        for _, *both in own:
            for measured in (thinned(*both[0]) if both[0][0] else both[0], both[1]):
                values += measured[1]
                late += [v for s, v in zip(*measured, strict=True) if s >= settled]
    if not chart.from_zero:
        return padded(min(late), max(late))
    low, high = min(0.0, *values), max(0.0, *values)
    below, above = padded(low, high)
    return (below if low < 0 else 0.0), (above if high > 0 or low == 0 else 0.0)


def thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Average over neighbors, to at most `MAX_POINTS`; each mean stands at its middle step."""
    size = -(-len(steps) // MAX_POINTS)
    starts = range(0, len(steps), size)
    middles = [steps[(start + min(start + size, len(steps)) - 1) // 2] for start in starts]
    return middles, [fmean(values[start : start + size]) for start in starts]


# --- Means with intervals -------------------------------------------------------------------------
class Row(NamedTuple):
    """One row of a forest plot: a mean, its interval and the figures of the seeds."""

    label: str
    mean: float
    bounds: Sequence[float] | None
    color: str = "mixed"
    seeds: Sequence[float] = ()


def draw_forest(
    rows: Sequence[Row], title: str, show: Callable[[float], str], width: int = WIDE
) -> Plot:
    """Draw rows from top to bottom: intervals as bars, means as dots, seeds as small rings.

    Args:
        rows: What is drawn.
        title: Title of the axis.
        show: Formats a mean, which stands at the right of its row.
        width: Width in pixels.
    """
    ends = [x for row in rows for x in (row.mean, *(row.bounds or ()), *row.seeds)]
    columns = width // 8 - 8
    labels = [textwrap.wrap(literal(row.label, 2 * columns), columns) or [""] for row in rows]
    height = 40.0 + sum(24 + 16 * len(lines) for lines in labels)
    with rc_context({**_LOOK, "axes.grid.axis": "x", "axes.spines.left": False}):
        plot = _new(width, height)
        axes = plot.figure.subplots()
        beside = axes.get_yaxis_transform()  # x in parts of the axes, y as the rows count
        axes.axvline(0, color=paint("edge"), linewidth=1.5)
        bottom = 0.0
        for row, lines in zip(rows, labels, strict=True):
            top, bottom = bottom, bottom + 24 + 16 * len(lines)
            place = bottom - 10
            text = {"transform": beside, "va": "top", "color": paint("ink"), "fontsize": 12.5,
                    "parse_math": False}  # fmt: skip
            axes.text(0, top + 2, "\n".join(lines), ha="left", **text)
            axes.text(1, top + 2, show(row.mean), ha="right", weight="bold", **text)
            if row.seeds:
                axes.plot(
                    row.seeds, [place + 6] * len(row.seeds), "o", color=paint("base"),
                    fillstyle="none", markersize=5, gid=plot.explain(
                        [f"one seed: {show(value)}" for value in row.seeds]
                    ),
                )  # fmt: skip
            if row.bounds:
                axes.plot(row.bounds, [place] * 2, color=paint(row.color), linewidth=2.5)
            axes.plot(
                [row.mean], [place], "o", color=paint(row.color), markersize=8,
                gid=plot.explain([f"{literal(row.label, 60)}: {show(row.mean)}"]),
            )  # fmt: skip
        axes.set_xlim(*padded(min(0.0, *ends), max(0.0, *ends)))
        axes.set_ylim(bottom, 0)
        axes.set_yticks([])
        axes.set_xlabel(title)
        axes.xaxis.set_major_locator(MaxNLocator(6 if width == WIDE else 4, steps=_ROUND))
        axes.xaxis.set_major_formatter(FuncFormatter(_number))
    return plot


def draw_groups(groups: Sequence[Mapping[str, Any]], width: int = WIDE) -> Plot:
    """Draw gain and gain of content of groups of tokens, side by side."""
    with rc_context(_LOOK):
        plot = _new(width, HEIGHT)
        axes = plot.figure.subplots()
        axes.axhline(0, color=paint("edge"), linewidth=1.5)
        kinds = [kind for kind in (("gain", "mixed", "o"), ("gain_of_content", "content", "D"))
                 if kind[0] in groups[0]]  # fmt: skip
        handles = []
        for number, (key, color, symbol) in enumerate(kinds):
            places = [place + 0.2 * (number - (len(kinds) - 1) / 2) for place in range(len(groups))]
            for place, group in zip(places, groups, strict=True):
                if group[f"{key}_ci95"]:
                    axes.plot([place] * 2, group[f"{key}_ci95"], color=paint(color), linewidth=2.5)
            texts = [f"{literal(group['label'], 30)}: {_signed(group[key])}" for group in groups]
            handles += axes.plot(
                places, [group[key] for group in groups], symbol, color=paint(color), markersize=7,
                label=key.replace("_", " "), gid=plot.explain(texts),
            )  # fmt: skip
        room = max(6, int(width / 8.5 / len(groups)))
        names = ["\n".join([*textwrap.wrap(literal(group["label"], 30), room), f"n {group['n']}"])
                 for group in groups]  # fmt: skip
        axes.set_xticks(range(len(groups)), names, parse_math=False)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_ylabel("nats/token")
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=_ROUND))
        axes.yaxis.set_major_formatter(FuncFormatter(_number))
        _add_legend(plot, handles, width)
    return plot


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


class Points(NamedTuple):
    """Points of one kind over another measure, in the order in which a line joins them."""

    label: str  # in the legend, which leaves an empty one out
    x: Sequence[float]
    y: Sequence[float]
    texts: Sequence[str]
    color: str
    symbol: str = "o"
    line: str = ""  # in matplotlib's signs; empty joins nothing


_MARKER_SIZES = {"*": 13, "X": 9}
"""Of symbols that look smaller than others of their size."""


def draw_points(
    kinds: Sequence[Points],
    titles: tuple[str, str],
    is_share: bool = False,
    width: int = WIDE,
) -> Plot:
    """Draw points of several kinds; ``titles`` are those of the axes, and x begins at zero."""
    with rc_context(_LOOK):
        plot = _new(width, 1.2 * HEIGHT)
        axes = plot.figure.subplots()
        handles = []
        for kind in kinds:
            (line,) = axes.plot(
                kind.x, kind.y, color=paint(kind.color), marker=kind.symbol, linestyle=kind.line,
                markersize=_MARKER_SIZES.get(kind.symbol, 7), label=kind.label,
                markeredgewidth=0, clip_on=False, gid=plot.explain(kind.texts),
            )  # fmt: skip
            handles += [line] if kind.label else []
        axes.set_xlim(left=0)
        if is_share:  # no axis goes on where no share can be
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -0.004), min(max(high, 0.02), 1.004))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=_ROUND))
        axes.set_xlabel(titles[0])
        axes.set_ylabel(titles[1])
        axes.xaxis.set_major_formatter(FuncFormatter(_number))
        axes.yaxis.set_major_formatter(FuncFormatter(_percent if is_share else _number))
        _add_legend(plot, handles, width)
    return plot
