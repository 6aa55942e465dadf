"""The metrics of ``quietstar eval``, in the terminal and as a page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from quietstar.evaluation.controls import (
    CONTROL_NAMES,
    CONTROL_NOTES,
    CONTROLS,
    GAINS,
    MADE,
    PAUSE,
    SWAPPED,
    WITH,
    WITHOUT,
    gain_over,
)
from quietstar.evaluation.metrics import label_of
from quietstar.evaluation.runner import FREE_SETTINGS
from quietstar.evaluation.statistics import LENGTHS, SHARES
from quietstar.reports import pages
from quietstar.reports.charts import Card, Row, draw_bars
from quietstar.reports.formats import share_of, show, shown_text
from quietstar.reports.pages import Cards, Cell, Line, Section, Table
from quietstar.reports.terminal import view

LOGS = ("nll", "gold_logprob")
COMPARED = (SWAPPED, *MADE)
COLORS = {SWAPPED: "swapped", PAUSE: "pause"}
"""Of controls; others share one."""
COMPARISON = ("difference", "95% CI", "p")
OF_ANSWERS = ("gold_probability", "gold_logprob", "accuracy")
"""Metrics of whole answers, which the controls are shown for."""
BREAKDOWNS = {
    "difficulty": ("By difficulty", "Quintiles of NLL without thoughts (nats)"),
    "kind": ("By kind of token", "What the token's text is made of"),
    "position": ("By position", "Quintiles of the token's index in the text"),
}


EXAMPLES = (
    ("Thoughts of items drawn at random",
     "Up to ten that are answered right with the thought, and ten that are not; nobody chose them.",
     ("right", "wrong")),
    ("Items that thoughts help and hurt most", "Those with the largest rise and the largest fall.",
     ("helped", "hurt")),
)  # fmt: skip
"""Lists of items: heading, what it shows, and which of the examples."""


def metrics_of(task: Mapping[str, Any]) -> dict[str, str]:
    """Return the metrics of a task, those with a standard error, and what they are called."""
    first = task[WITHOUT] if WITHOUT in task else task[WITH]
    return {str(m): label_of(str(m)) for m in first if f"{m}_stderr" in first}


def task_view(name: str, task: dict[str, Any]) -> RenderableType:
    """Show a task in the terminal: metrics with and without thoughts, controls, notes, verdict."""
    metrics, main = metrics_of(task), task["main_metric"]
    parts = [Line(f"{name}, {task['n']} item{'s' if task['n'] != 1 else ''}", "title")]
    parts += _numbers(task, [m for m in metrics if m in (main, *OF_ANSWERS)])
    parts += [Line(f"note: {text}", "note") for text in task["warnings"]]
    if task["verdict"]:
        parts.append(Line(f"{name}, by {metrics[main]}: {task['verdict']}", "verdict"))
    return view(parts)


def _numbers(task: Mapping[str, Any], controlled: Sequence[str]) -> list[Table | Line]:
    """Return what terminal and page show of all metrics, and of some with each control."""
    metrics, main, difference = metrics_of(task), task["main_metric"], task.get("difference")
    variants = {h: task[key] for h, key in (("without", WITHOUT), ("with", WITH)) if key in task}
    rows = []
    for metric, label in metrics.items():
        cells = [Cell(label, kind="strong" if metric == main else "")]
        cells += [value_cell(variant, metric) for variant in variants.values()]
        if difference:
            rows.append([*cells, *comparison_cells(difference, metric, main)])
        else:
            errors = [show(variant[f"{metric}_stderr"]) for variant in variants.values()]
            rows.append([*cells, *errors])
    headings = COMPARISON if difference else ("std. error",) * len(variants)
    parts: list[Table | Line] = [Table("Metrics", ("metric", *variants, *headings), rows, 1)]
    for metric in controlled if "controls" in task else ():
        rows = []
        for control in (c for c in CONTROLS if c in task["controls"]):
            name, kind = CONTROL_NAMES[control], "strong" if control == SWAPPED else ""
            cells = [Cell(name, [CONTROL_NOTES[control]], kind)]
            cells.append(value_cell(task["controls"][control], metric))
            rows.append([*cells, *comparison_cells(task[GAINS[control]], metric, main)])
        headings = (f"{metrics[metric]} with", "", "gain over it", *COMPARISON[1:])
        parts.append(Table(f"{metrics[metric]} with controls", headings, rows, 1))
    if "thought_length" in task.get(WITH, {}):
        length, cut = (task[WITH][name] for name in LENGTHS)
        parts.append(Line(f"thoughts: {length:.1f} tokens on average, {cut:.1%} cut at the limit"))
    if gates := task.get("gates"):
        headings = ("think where the entropy is above", "tokens", "NLL", "passes/token")
        rows = [[f"{row['entropy']:.3f} nats", f"{row['share']:.1%}", show(row["nll"]),
                 f"{row['passes']:.2f}"] for row in gates]  # fmt: skip
        parts.append(Table("Thinking where the prediction is unsure", headings, rows, 1))
        threshold = f"{gates[3]['entropy']:.2f}"
        parts.append(Line(f"such as quietstar generate --gate entropy:{threshold}", "dim"))
    for name, vote in task.get(WITH, {}).get("votes", {}).items():
        bounds = vote["ci95"]
        interval = "" if bounds is None else f" ({bounds[0]:.3f} to {bounds[1]:.3f})"
        parts.append(Line(f"{name} of the sampled thoughts: {vote['mean']:.3f}{interval}"))
    if task.get("num_tests", 1) > 1:
        text = f"p of {metrics[main]}: corrected for {task['num_tests']} tests (Holm); others not"
        parts.append(Line(text, "dim"))
    return parts


def value_cell(scores: Mapping[str, Any], metric: str) -> Cell:
    """Return the mean of a metric, with its interval below."""
    bounds = scores.get(f"{metric}_ci95")
    return Cell(show(scores[metric]), [show(bounds)] if bounds else [])


def comparison_cells(comparison: Mapping[str, Any], metric: str, main: str) -> list[str]:
    """Format a difference, its interval and its p-value; that of the main metric is corrected."""
    bounds, p_value = comparison[f"{metric}_ci95"], comparison[f"{metric}_p_value"]
    if metric == main:
        p_value = comparison.get("p_holm", p_value)
    return [show(comparison[metric], "+.4f"), show(bounds, "+.4f"), show(p_value, "p")]


def write_page(path: Path, model: str, result: dict[str, Any]) -> Path:
    """Write the page; returns its path.

    Args:
        path: Path of the page.
        model: Name of the model.
        result: Content of the file that ``--out`` names.
    """
    facts = [("Model", model)]
    facts += [(key, str(result["environment"][key])) for key in ("dtype", "device", "torch")]
    config = {key: value for key, value in result["config"].items() if value is not None}
    sections = [
        Section(f"section{number}", name, _task_parts(f"task{number}", task))
        for number, (name, task) in enumerate(result["tasks"].items(), start=1)
    ]
    return pages.write_html(
        path, [*sections, pages.settings_section(config)], title=f"{model} · quietstar evaluation",
        eyebrow="Quiet-STaR evaluation", heading="Do the thoughts help?", facts=facts,
        mark=page_mark(result["config"]),
    )  # fmt: skip


def _task_parts(key: str, task: Mapping[str, Any]) -> list[Any]:
    """Return what the page shows of a task: answer, charts, then tables."""
    metrics, main, n = metrics_of(task), task["main_metric"], task["n"]
    lead = f"{n} item{'s' if n != 1 else ''}; below each number is its 95% interval."
    lead += "".join(f" Note: {warning}." for warning in task["warnings"])
    verdict = [Line(task["verdict"], "verdict", f"(by {metrics[main]})")] if task["verdict"] else []
    parts = [*verdict, Line(_answer(task, metrics), "answer-line"), Line(lead)]
    cards = [_compared(key, task, metrics[main])] if "difference" in task else []
    for kind, groups in task.get("breakdown", {}).items():
        if len(groups) > 1:  # one group is the whole
            title, caption = BREAKDOWNS[kind]
            bars = draw_bars(_group_bars(groups), "gain over no thoughts, nats/token", "+.4f")
            cards.append(Card(f"{key}-{kind}", title, caption, bars))
    for number, (of_what, groups) in enumerate(task.get("groups", {}).items()):
        for metric in dict.fromkeys(("accuracy", main)) if len(groups) > 1 else ():
            if metric in metrics:
                rows = _group_bars([_in_groups(group, metric) for group in groups])
                bars = draw_bars(rows, f"gain in {metrics[metric]}", "+.4f")
                title, name = f"By {of_what}", f"{key}-groups{number}-{metric}"
                cards.append(Card(name, title, f"{metrics[metric]} within groups of items", bars))
    parts += [Cards(cards)] if cards else []
    parts += _numbers(task, sorted(metrics, key=lambda metric: metric != main))
    for heading, text, kinds in EXAMPLES:
        drawn = task.get("examples", {})
        if found := [_examples(kind, drawn[kind]) for kind in kinds if drawn.get(kind)]:
            text += f" The numbers are {metrics[main]} without the thought and with it."
            parts += [Line(heading, "between"), Line(text), *found]
    return parts


def _compared(key: str, task: Mapping[str, Any], label: str) -> Card:
    """Draw no, own and other thoughts from one start: the metric's zero, or no thoughts.

    Logarithms, of which zero says nothing, are drawn as gains over no thoughts.
    """
    main, controls = task["main_metric"], [c for c in COMPARED if c in task.get("controls", {})]
    known = [("Without thoughts", "base", task[WITHOUT]), ("With thoughts", "mixed", task[WITH])]
    known += [(f"With {CONTROL_NAMES[c]}", COLORS.get(c, "other"), task["controls"][c])
              for c in controls]  # fmt: skip
    title = "No thoughts, own and others'" if controls else "What thoughts change"
    if main in LOGS:
        values = [(name, color, scores[main]) for name, color, scores in known]
        rows = [Row(name, gain_over(value, values[0][2], main), None, color, note=show(value))
                for name, color, value in values]  # fmt: skip
        ends = [gain_over(bound, 0.0, main) for bound in task["difference"]["ci95"] or ()]
        rows[1] = rows[1]._replace(bounds=sorted(ends))
        caption = f"Gain over no thoughts in {label}; lines are 95% intervals."
        return Card(key, title, caption, draw_bars(rows, "gain over no thoughts, nats", "+.4f"))
    rows = [Row(name, scores[main], scores[f"{main}_ci95"], color) for name, color, scores in known]
    caption = f"{label}: mean and 95% CI"
    return Card(key, title, caption, draw_bars(rows, label))


def _group_bars(groups: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the gains of each group over no thoughts, with own and with swapped ones."""
    rows, content = [], GAINS[SWAPPED]
    for group in groups:
        label = f"{group['label']}: with thoughts"
        rows.append(Row(label, group["gain"], group["gain_ci95"], note=f"n {group['n']}"))
        if content in group:
            bounds = group[f"{content}_ci95"]
            note = f"content {show(group[content], '+.4f')}"
            note += f", 95% CI {show(bounds, '+.4f')}" if bounds else ""
            swapped = group["gain"] - group[content]
            rows.append(Row("with swapped thoughts", swapped, None, "swapped", note=note))
    return rows


def _in_groups(group: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Return a metric of a group of items in the form of a group of tokens."""
    note = f", {show(group[WITHOUT][metric])} without, {show(group[WITH][metric])} with"
    found = {"label": group["label"], "n": f"{group['n']}{note}"}
    for gain in ("gain", GAINS[SWAPPED]):
        if gain in group:
            found |= {gain: group[gain][metric], f"{gain}_ci95": group[gain][f"{metric}_ci95"]}
    return found


def _examples(kind: str, examples: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for one in examples:
        is_right = one.get("is_right", kind == "right")
        truth = "" if is_right else f"ground truth: {shown_text(one['answer'])}"
        mark = pages.right_or_wrong(is_right)
        predicted = Cell(shown_text(one["predicted"]), [truth], "text", mark)
        rows.append([Cell.folded(one["prompt"]), Cell(shown_text(one["thought"]), (), "text"),
                     predicted, show(one["without"]), show(one["with"])])  # fmt: skip
    headings = ("Prompt", "Thought", "Answer", "Without", "With")
    return Table(f"Items, {kind}", headings, rows, 3, widths=(30, 34, 16, 10, 10))


def _answer(task: Mapping[str, Any], metrics: Mapping[str, str]) -> str:
    """Say in numbers what thoughts change: the share of right items, or else the main metric."""
    metric = next((name for name in SHARES if name in metrics), task["main_metric"])
    form = partial(share_of, n=float(task["n"])) if metric in SHARES else show
    known = [
        ("with thoughts", task.get(WITH)),
        ("without", task.get(WITHOUT)),
        ("with swapped thoughts", task.get("controls", {}).get(SWAPPED)),
    ]
    parts = [f"{form(scores[metric])} {name}" for name, scores in known if scores]
    return f"{metrics[metric]}: {', '.join(parts)}."


def page_mark(config: Mapping[str, Any]) -> str:
    """Return the text by which a page of the same evaluation, with the same settings, is known."""
    decisive = {key: value for key, value in config.items() if key not in FREE_SETTINGS}
    content = json.dumps(decisive, sort_keys=True)
    return f"quietstar-evaluation-{hashlib.sha256(content.encode()).hexdigest()}"
