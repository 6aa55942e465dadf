"""The page of an evaluation: the figures of ``quietstar eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quietstar.evaluation.controls import gain_over
from quietstar.reports.evaluation_table import TITLES
from quietstar.reports.figures import (
    Figure,
    Row,
    draw_forest,
    draw_groups,
)
from quietstar.reports.pages import chart_scripts, render, write

VARIANTS = {
    "without_thoughts": "Without thoughts",
    "with_thoughts": "With thoughts",
    "shuffled": "Shuffled thoughts",
    "pause": "Pause tokens",
    "swapped": "Swapped thoughts",
}
DIFFERENCES = {
    "difference": ("over no thoughts", "mixed"),
    "gain_of_content": ("over swapped thoughts (gain of content)", "content"),
    "gain_over_shuffled": ("over shuffled thoughts", "other"),
    "gain_over_pause": ("over pause tokens", "pause"),
}
BREAKDOWNS = {
    "difficulty": ("By difficulty", "Quintiles of NLL without thoughts (nats)"),
    "kind": ("By kind of token", "What the token's text is made of"),
    "position": ("By position", "Quintiles of the token's index in the text"),
}


def write_page(path: Path, model: str, result: dict[str, Any]) -> Path:
    """Write the page; returns its path.

    Args:
        path: Path of the page.
        model: Name of the model.
        result: Content of the file that ``--out`` names.

    Raises:
        UserError: plotly is not installed.
    """
    figures: dict[str, Figure] = {}
    tasks = [
        _task(f"task{number}", name, task, figures)
        for number, (name, task) in enumerate(result["tasks"].items(), start=1)
    ]
    facts = [("Model", model)]
    facts += [(key, str(result["environment"][key])) for key in ("dtype", "device", "torch")]
    config = {key: value for key, value in result["config"].items() if value is not None}
    page = render(
        "evaluation.html.j2",
        chart_scripts(figures),
        facts=facts,
        tasks=tasks,
        figures=figures,
        config=config,
    )
    return write(path, page)


def _task(key: str, name: str, task: dict[str, Any], figures: dict[str, Figure]) -> dict[str, Any]:
    """Return what the page says of a task; its charts go into ``figures``."""
    scored = {**task, **task.get("controls", {})}
    variants = {label: scored[v] for v, label in VARIANTS.items() if v in scored}
    first = next(iter(variants.values()))
    metrics = {m: TITLES.get(m, m) for m in first if f"{m}_stderr" in first}
    compared = {"With − without": "difference", "Gain of content": "gain_of_content"}
    compared = {heading: task[d] for heading, d in compared.items() if d in task}
    main, cards = task["main_metric"], []
    if "difference" in task:
        title = TITLES.get(main, main)
        rows = [
            Row(label, *_gain(task, d), color=color)
            for d, (label, color) in DIFFERENCES.items()
            if d in task
        ]
        figures[key] = draw_forest(rows, f"gain in {title}", "", "+.4f")
        cards.append({"name": key, "title": "What thoughts change",
                      "caption": f"Gain in {title}: mean and 95% CI"})  # fmt: skip
    for kind, groups in task.get("breakdown", {}).items():
        if len(groups) > 1:  # one group is the whole
            heading, caption = BREAKDOWNS[kind]
            figures[f"{key}-{kind}"] = draw_groups(groups)
            cards.append({"name": f"{key}-{kind}", "title": heading, "caption": caption})
    return {"name": name, "task": task, "variants": variants, "metrics": metrics,
            "compared": compared, "cards": cards}  # fmt: skip


def _gain(task: dict[str, Any], key: str) -> tuple[float, tuple[float, float] | None]:
    """Return a comparison's gain and interval, positive where the model's own thoughts are better.

    Gains over controls have that sign already; the plain difference gets it here.
    """
    main, value, ci95 = task["main_metric"], task[key][task["main_metric"]], task[key]["ci95"]
    if key == "difference":
        value = gain_over(value, 0.0, main)
        low, high = (gain_over(bound, 0.0, main) for bound in ci95 or (0.0, 0.0))
        ci95 = ci95 and (min(low, high), max(low, high))
    return value, ci95
