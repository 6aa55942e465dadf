"""An inspected text in the terminal, with the figures of the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import exp
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

LEVELS = (0.02, 0.1, 0.5, 1.5)
GAINS = ("", "color(153)", "color(75)", "color(33)", "color(27)")
LOSSES = ("", "color(223)", "color(215)", "color(208)", "color(202)")
SHOWN = 8
"""Tokens in each table."""
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """A text whose control characters cannot move the cursor or turn the line around."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def document_view(document: dict[str, Any]) -> RenderableType:
    """Summary, the coloured text, and the tokens with the largest gains and losses."""
    told = [record for record in document["tokens"] if "gain" in record]
    ordered = sorted(told, key=lambda record: record["gain"])
    return Group(
        Text(visible(document["model"]), style="bold"),
        summary_table(document["summary"]),
        coloured_text(document["tokens"]),
        Text(),
        token_table("largest gains", ordered[: -SHOWN - 1 : -1]),
        token_table("largest losses", ordered[:SHOWN]),
    )


def summary_table(summary: dict[str, Any]) -> Table:
    """Gain and gain of content over all, hard and easy tokens."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("tokens", "how many", "gain", "gain of content"):
        table.add_column(heading, justify="left" if heading == "tokens" else "right")
    for name in ("all", "hard", "easy"):
        if summary[name] is not None:
            row = summary[name]
            table.add_row(name, str(row["tokens"]), f"{row['gain']:+.4f}", f"{row['content']:+.4f}")
    table.caption = (
        f"mixing weight {summary['mixing_weight']:.3f}, surprise of thought tokens "
        f"{summary['entropy']:.2f} nats, distinct tokens {summary['distinct']:.0%}"
    )
    return table


def coloured_text(tokens: Sequence[dict[str, Any]]) -> Text:
    """The text: blue where thoughts gain, orange where they lose."""
    text = Text()
    for token in tokens:
        gain = token.get("gain", 0.0)
        level = sum(abs(gain) >= edge for edge in LEVELS)
        style = (GAINS if gain > 0 else LOSSES)[level]
        text.append(visible(token["text"]), style=f"black on {style}" if style else "")
    return text


def token_table(title: str, records: Sequence[dict[str, Any]]) -> Table:
    """Tokens with their first thought."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("place", "token", "gain", "p base", "p mixed", "weight"):
        table.add_column(heading, justify="left" if heading == "token" else "right", no_wrap=True)
    table.add_column("thought")
    for record in records:
        thought = record["thoughts"][0]
        base, mixed = exp(record["base_logprob"]), exp(thought["mixed_logprob"])
        table.add_row(
            str(record["position"]), Text(_quoted(record["text"])), f"{record['gain']:+.3f}",
            f"{base:.3f}", f"{mixed:.3f}", f"{thought['mixing_weight']:.2f}",
            Text(_quoted(thought["text"]), style="dim"),
        )  # fmt: skip
    return table


def _quoted(text: str) -> str:
    return visible(text).replace("\n", "⏎")
