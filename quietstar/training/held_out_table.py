"""The terminal's table of held-out figures; the gain of content stands beside the gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

_COLUMNS = {
    "base_nll": "base\nNLL",
    "mixed_nll": "mixed\nNLL",
    "thought_nll": "thought\nNLL",
    "gain": "gain of\nthinking",
    "gain_of_content": "gain of\ncontent",
    "gain_over_pause": "over\npause",
    "mixing_weight": "mixing\nweight",
    "accuracy_without_thoughts": "right\nwithout",
    "accuracy_with_thoughts": "right\nwith",
    "accuracy_swapped": "swapped\nthoughts",
    "right_thoughts": "thoughts\nright",
}
_WITHOUT_ANSWERS = (
    "base_nll",
    "mixed_nll",
    "thought_nll",
    "gain_over_pause",
    "mixing_weight",
)  # left out where answers need the room


def evaluation_table(evaluations: Sequence[tuple[int, Mapping[str, float]]]) -> Table:
    """Held-out figures by step."""
    keys = [key for key in _COLUMNS if any(key in figures for _, figures in evaluations)]
    if "accuracy_with_thoughts" in keys:
        keys = [key for key in keys if key not in _WITHOUT_ANSWERS]
    title = "held out: NLL in nats a token, share of answers that are right"
    table = Table(
        title=title if "accuracy_without_thoughts" in keys else title.split(",")[0],
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        title_justify="left",
    )
    for name in ("step", *(_COLUMNS[key] for key in keys)):
        table.add_column(name, justify="right", no_wrap=True)
    for step, figures in evaluations:
        table.add_row(str(step), *(_cell(key, figures.get(key)) for key in keys))
    return table


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if key.startswith(("accuracy", "right")):
        return f"{value:.3f}"
    return f"{value:+.4f}" if key.startswith("gain") else f"{value:.4f}"
