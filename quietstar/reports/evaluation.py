"""The figures of an evaluation as one page that opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from quietstar.evaluation.runner import CONTROLS, WITH, WITHOUT
from quietstar.evaluation.summary import CONTENT
from quietstar.evaluation.tables import TITLES, metrics_of, told_cells
from quietstar.reports.charts import BLUE, VERMILLION
from quietstar.reports.forest import Row, draw_forest
from quietstar.reports.formats import plain
from quietstar.reports.page import environment, hash_source, load_plotly, normal, packaged
from quietstar.reports.plots import Figure, axis, base_layout, literal

_TEMPLATE = "evaluation.html.j2"
BREAKDOWNS = {
    "difficulty": (
        "By difficulty",
        "tokens by the NLL they have without thoughts, nats, a fifth each",
    ),
    "kind": ("By kind of token", "what the token's text is made of"),
    "position": ("By place", "tokens by their index in the text, a fifth each"),
}
ROWS = {
    "difference": "with thoughts − without",
    "gain_of_content": "their own − those of another item (gain of content)",
    "gain_over_shuffled": "their own − their tokens shuffled",
    "gain_over_pause": "their own − pause tokens",
}


@dataclass(frozen=True)
class Card:
    """A chart, under the name of its figure."""

    name: str
    title: str
    caption: str


@dataclass(frozen=True)
class Section:
    """What the page says of a task."""

    name: str
    count: int
    verdict: str
    warnings: Sequence[str]
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    cards: Sequence[Card]


def write_page(path: Path, model: str, result: dict[str, Any]) -> Path:
    """Write the page; returns its path.

    Args:
        path: Of the page.
        model: Its name.
        result: What ``--out`` holds.

    Raises:
        UserError: plotly is not installed.
    """
    figures: dict[str, Figure] = {}
    sections = [
        _section(f"task{number}", name, found, figures)
        for number, (name, found) in enumerate(result["tasks"].items())
    ]
    scripts = [normal(load_plotly()), normal(packaged("script.js"))] if figures else []
    facts = [("Model", model)]
    facts += [(key, str(result["environment"][key])) for key in ("dtype", "device", "torch")]
    page = environment().get_template(_TEMPLATE).render(
        facts=facts,
        sections=sections,
        figures=figures,
        config=result["config"],
        style=Markup(packaged("style.css")),
        scripts=[Markup(source) for source in scripts],
        script_hashes=[hash_source(source) for source in scripts],
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(page.encode("utf-8", "replace"))
    return path


def _section(key: str, name: str, found: dict[str, Any], figures: dict[str, Figure]) -> Section:
    cards = []
    if "difference" in found:
        figures[key] = _differences(found)
        metric = TITLES.get(found["main_metric"], found["main_metric"])
        cards.append(Card(key, "What thoughts change", f"{metric}, mean and 95 % interval"))
    for kind, groups in found.get("breakdown", {}).items():
        title, caption = BREAKDOWNS[kind]
        figures[f"{key}-{kind}"] = _groups(groups)
        cards.append(Card(f"{key}-{kind}", title, caption))
    headings, rows = _table(found)
    return Section(name, found["n"], found["verdict"], found["warnings"], headings, rows, cards)


def _differences(found: dict[str, Any]) -> Figure:
    metric = found["main_metric"]
    rows = [
        Row(label, found[key][metric], found[key]["ci95"])
        for key, label in ROWS.items()
        if key in found
    ]
    return draw_forest(rows, str(TITLES.get(metric, metric)), "", "+.4f")


def _groups(groups: Sequence[dict[str, Any]]) -> Figure:
    """Gain and gain of content of groups of tokens, side by side."""
    layout = base_layout(320) | {
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        "xaxis": {**axis("", showgrid=False), "type": "category"},
        "yaxis": axis("nats a token", zeroline=True),
        "scattermode": "group",
    }
    looks = {
        "gain": ("gain of thinking", BLUE, "circle"),
        "content": ("gain of content", VERMILLION, "diamond"),
    }
    traces = [_trace(groups, kind, *look) for kind, look in looks.items() if kind in groups[0]]
    return {"data": traces, "layout": layout}


def _trace(
    groups: Sequence[dict[str, Any]], kind: str, name: str, color: str, symbol: str
) -> Figure:
    values = [group[kind] for group in groups]
    bounds = [group[f"{kind}_ci95"] or (group[kind], group[kind]) for group in groups]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [f"{literal(group['label'], 30)}<br>n {group['n']}" for group in groups],
        "y": values,
        "hovertemplate": "%{x}: %{y:+.4f}<extra></extra>",
        "marker": {"size": 9, "color": color, "symbol": symbol},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [high - y for y, (_, high) in zip(values, bounds, strict=True)],
            "arrayminus": [y - low for y, (low, _) in zip(values, bounds, strict=True)],
            "color": color,
            "thickness": 2,
            "width": 4,
        },
    }


def _table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Every metric in every variant, with its standard error, and the differences."""
    variants = {v: found[v] for v in (WITHOUT, WITH) if v in found}
    variants |= {c: found["controls"][c] for c in CONTROLS if c in found.get("controls", {})}
    names = {WITHOUT: "Without thoughts", WITH: "With", "shuffled": "Shuffled", "pause": "Pause",
             "other": "Of another item"}  # fmt: skip
    told = {"difference": "With − without", CONTENT["other"]: "Content"}
    told = {key: heading for key, heading in told.items() if key in found}
    rows = []
    for metric in metrics_of(next(iter(variants.values()))):
        row = [TITLES.get(metric, metric)]
        row += [plain(variant[metric]) for variant in variants.values()]
        for key in told:
            row += told_cells(found[key], metric)
        rows.append(row)
    headings = ["Metric", *(names[v] for v in variants)]
    for heading in told.values():
        headings += [heading, "95 % interval", "p"]
    return headings, rows
