"""The page of ``quietstar judge``: what was preferred, and where the judge contradicts itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quietstar.judging.contest import probability_of_first
from quietstar.judging.judge import LEAST_MASS
from quietstar.judging.labels import Label, Pair
from quietstar.reports.formats import show, shown_text
from quietstar.reports.pages import (
    Cell,
    Line,
    Section,
    Table,
    Tile,
    Tiles,
    settings_section,
    write_html,
)

OF_A_FILE, UNNAMED = ("chosen in the file", "rejected in the file"), ("first text", "second text")
"""Headings of the texts, where no models are compared."""
MOST = 20
"""Pairs that a list of the page shows."""
CLEAR = 0.55
"""Minimum probability of a preference that is shown as clear."""


def write_judge_page(
    path: Path,
    labels: Sequence[Label],
    pairs: Sequence[Pair],
    summary: Mapping[str, Any],
    settings: Mapping[str, Any],
    names: tuple[str, str] | None = None,
) -> Path:
    """Write the page; returns its path.

    Args:
        path: Path of the page.
        labels: Preferences of the judge.
        pairs: The pairs, in the order of the preferences.
        summary: Metrics of all pairs.
        settings: Settings of the judge.
        names: The two contestants, where models were compared.
    """
    rows = [_row(label, pair) for label, pair in zip(labels, pairs, strict=True)]
    judged = [row for row in rows if not row["is_equal"]]
    decided = [row for row in judged if max(row["first"], 1 - row["first"]) >= CLEAR]
    clearest = sorted(decided, key=lambda row: -abs(row["first"] - 0.5))
    undecided = sorted(
        (row for row in judged if row["is_contradiction"]),
        key=lambda row: -min(abs(p - 0.5) for p in row["orders"]),
    )
    is_labeled = any(row["is_labeled"] for row in judged)
    lists = []
    clear = f"Pairs with a probability of {CLEAR:.0%} or more, averaged over both orders."
    if names is not None:
        for name, is_first in zip(names, (True, False), strict=True):
            some = [row for row in clearest if (row["first"] > 0.5) == is_first]
            lists.append((f"Clearest for {name}", clear, some))
    elif is_labeled:
        some = [row for row in clearest if row["is_labeled"] and row["first"] < 0.5]
        caption = "Pairs in which it clearly prefers what the file says was rejected."
        lists.append(("The judge against the file", caption, some))
    else:
        lists.append(("Clearest preferences", clear, clearest))
    caption = "Pairs whose verdict turns with the order: it follows the place, not the text."
    lists.append(("The judge against itself", caption, undecided))
    tiles = []
    if names is not None:
        preferred = f"{summary['preferred']} pairs preferred, {summary['not_preferred']} not"
        tiles.append(_tile(f"{names[0]} wins", "win_rate", summary, "mixed", preferred))
    if summary["agreement"] is not None:
        tiles.append(_tile("Agrees with the file", "agreement", summary, "mixed"))
    second = summary["slot_2"]
    second = "" if second is None else f"of these, number 2: {show(second, '.1%')}"
    tiles += [
        _tile("Same number in both orders", "same_slot", summary, "swapped", second),
        Tile("Probability of 1 and 2 together", show(summary["mass"], ".1%"), "other",
             ["the rest is on other answers"]),
    ]  # fmt: skip
    headings = names or (OF_A_FILE if is_labeled else UNNAMED)
    verdict = Line(_verdict(summary, names), "verdict")
    sections = [Section("result", "", [verdict, Tiles("", tiles)])]
    for number, (title, text, some) in enumerate(lists, start=1):
        more = f" {MOST} of {len(some)} are shown." if len(some) > MOST else ""
        columns = ("Prompt", *headings, f"P({headings[0]})")
        cells = [row["cells"] for row in some[:MOST]]
        table = Table(title, columns, cells, 3, widths=(26, 29, 29, 16))
        parts = [Line(f"{text}{more}"), table] if some else []
        sections.append(Section(f"list{number}", title, parts))
    sections.append(settings_section(settings))
    return write_html(
        path, sections, title=f"{settings['model']} · quietstar judge",
        eyebrow="Quiet-STaR judge", heading="Which text is better?",
        facts=[("Judge", settings["model"]), ("Template", settings["template_name"]),
               ("Pairs", str(len(pairs)))],
    )  # fmt: skip


def _tile(label: str, key: str, summary: Mapping[str, Any], color: str, *notes: str) -> Tile:
    return Tile.measured(label, show(summary[key], ".1%"), color, summary[f"{key}_ci"], *notes)


def _row(label: Label, pair: Pair) -> dict[str, Any]:
    is_first = label.chosen == pair.first
    shown = label.probabilities if is_first else [1 - p for p in reversed(label.probabilities)]
    rationales = label.rationales if is_first else label.rationales[::-1]
    first = probability_of_first(label, pair)
    orders = [f"{show(shown[0], '.1%')} shown first", f"{show(shown[1], '.1%')} shown second"]
    probability = [Cell(show(first, ".1%"), orders, "strong")]
    if rationales:
        probability.append(Cell("rationales", whole="\n\n".join(map(shown_text, rationales))))
    texts = [Cell(shown_text(text), kind="text") for text in (pair.first, pair.second)]
    return {
        "cells": [Cell.folded(pair.prompt), *texts, probability],
        "first": first, "orders": shown, "is_labeled": pair.is_labeled,
        "is_equal": pair.first == pair.second,
        "is_contradiction": (shown[0] - 0.5) * (shown[1] - 0.5) < 0,
    }  # fmt: skip


def _verdict(summary: Mapping[str, Any], names: tuple[str, str] | None) -> str:
    """Say the result in a sentence or two."""
    same, mass = summary["same_slot"], summary["mass"]
    bias = ""
    if same is not None:
        bias = f" In {show(same, '.1%')} of the pairs it gives the same number in both orders"
        bias += ": it follows the place more than the text." if same > 0.5 else "."
    if mass is not None and mass < LEAST_MASS:
        bias += f" Its verdicts say little: {100 * mass:.3g} % of its probability is on 1 and 2."
    if names is not None:
        low, high = summary["win_rate_ci"] or (0.0, 1.0)
        rate = f"{show(summary['win_rate'], '.1%')} (95% CI {show((low, high), '.1%')})"
        if low > 0.5 or high < 0.5:
            winner, loser = names if low > 0.5 else names[::-1]
            return f"The judge prefers {winner} to {loser}: {names[0]} wins {rate}.{bias}"
        both = " from ".join(names)
        return f"The judge does not tell {both}: {names[0]} wins {rate}.{bias}"
    if summary["agreement"] is not None:
        bounds = show(summary["agreement_ci"], ".1%")
        agreement = f"{show(summary['agreement'], '.1%')} of the pairs (95% CI {bounds})"
        return f"The judge agrees with the file's own choice in {agreement}.{bias}"
    return f"The judge has compared {summary['pairs'] - summary['equal']} pairs.{bias}"
