"""Evaluations of several models compared item by item, each with the first of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel
from rich.console import RenderableType

from quietstar.errors import UserError, reading
from quietstar.evaluation.controls import FEW_ITEMS, WITH, WITHOUT, gain_over
from quietstar.evaluation.metrics import label_of
from quietstar.evaluation.runner import Records, read_items, settings_changes
from quietstar.evaluation.statistics import (
    LENGTHS,
    SHARES,
    Array,
    choose_main_metric,
    differences,
    holm,
    is_significant,
    item_groups,
    means,
    none_is_right,
)
from quietstar.reports.charts import Card, Row, draw_bars
from quietstar.reports.evaluation import comparison_cells, value_cell
from quietstar.reports.formats import show
from quietstar.reports.pages import Cards, Cell, Line, Section, Table, write_html
from quietstar.reports.terminal import view
from quietstar.system.inputs import open_input, parse_json

OF_TOKENS = ("nll", "token_accuracy")
"""Metrics that are means over tokens, of which two tokenizers make different ones."""
SEED = 0
"""Of resampling."""
_EXPECTED = ("model", "weights", "data_dir", "generic")
"""Settings that differ between evaluations of several models, or are of controls only."""
_OF_THOUGHTS = ("samples", "thought_temperature", "thought_top_p", "thought_top_k", "positions",
                "untrained")  # fmt: skip
"""Settings that count where both evaluations think."""
_REMEDY = "Give files that quietstar eval --out has written."
_VOTES = re.compile(r"(maj|pass)@(\d+)")


class _Task(BaseModel):
    main_metric: str


class _Result(BaseModel):
    """A file that ``quietstar eval --out`` writes, as far as it is read here."""

    tasks: dict[str, _Task]
    config: dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What ``quietstar eval --out FILE.json`` has written, and the items next to it."""

    path: Path
    name: str
    settings: Mapping[str, Any]
    main_metrics: Mapping[str, str]  # by task
    records: Records

    def of_task(self, task: str, variant: str) -> dict[int, dict[str, Any]]:
        """Return the records of a task's items, by their numbers."""
        return {number: record for (name, number, how), record in self.records.items()
                if (name, how) == (task, variant)}  # fmt: skip


def read_evaluation(path: Path, name: str) -> Evaluation:
    """Read an evaluation and its items.

    Raises:
        UserError: It is none, or its items are not next to it or are those of another one.
    """
    where = f"RUN ({path})"
    with reading(where, _REMEDY), open_input(path) as file:
        result = _Result.model_validate(parse_json(file.read().decode()))
    items = path.with_suffix(".items.jsonl")
    if not items.exists():
        raise UserError(
            f"{where}: has no {items.name} next to it, and evaluations are compared item by item. "
            "Put the file that --out-items named there, or evaluate again."
        )
    settings, records = read_items(items, f"{where}, {items.name}", _REMEDY)
    if changes := settings_changes(settings, result.config):
        raise UserError(
            f"{where}: the items next to it were made with another {changes}. Evaluate again with "
            "--force."
        )
    main_metrics = {task: known.main_metric for task, known in result.tasks.items()}
    return Evaluation(path, name, settings, main_metrics, records)


def compare_evaluations(paths: Sequence[Path]) -> dict[str, Any]:
    """Compare evaluations item by item, each with the first of them.

    A model that thinks is judged with its thoughts, others without. Items are those that all
    evaluations have; tasks of the same name are compared, or whatever the only task of each is
    called (such as files that put the same questions into different prompts). Metrics of tokens
    are left out where tokenizers split answers differently.

    Args:
        paths: Files that ``quietstar eval --out`` has written, at least two.

    Returns:
        ``tasks``: for each its number of items ``n``, ``main_metric``, a list of ``evaluations``
        (``name``, ``file``, ``model``, ``variant``, the ``settings`` that differ from the first's,
        ``scores`` as ``quietstar eval`` writes them, and but for the first the ``difference``: the
        evaluation minus the first, and the ``verdict``), and ``groups``, the means within groups of
        items; ``num_tests``.

    Raises:
        UserError: They have no task or no item in common, or their items have other answers.
    """
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    evaluations = [read_evaluation(*pair) for pair in zip(paths, names, strict=True)]
    only = [next(iter(one.main_metrics)) for one in evaluations if len(one.main_metrics) == 1]
    if len(only) == len(evaluations):
        shared = {only[0]: only}
    else:
        shared = {name: [name] * len(evaluations) for name in evaluations[0].main_metrics
                  if all(name in one.main_metrics for one in evaluations)}  # fmt: skip
    if not shared:
        raise UserError(
            f"RUN ({paths[0]}): shares no task with all others. Give evaluations of the same tasks."
        )
    tasks = {name: _compare_task(evaluations, of_each) for name, of_each in shared.items()}
    pairs = [(row, task) for task in tasks.values() for row in task["evaluations"][1:]]
    tests = [row["difference"] for row, _ in pairs if row["difference"]["p_value"] is not None]
    holm(tests)
    for row, task in pairs:
        row["verdict"] = _verdict(row, task["evaluations"][0], task["main_metric"], task["n"])
    return {"tasks": tasks, "num_tests": len(tests)}


def _compare_task(evaluations: Sequence[Evaluation], tasks: Sequence[str]) -> dict[str, Any]:
    """Compare evaluations on a task, which each may call by a name of its own."""
    variants, found = [], []
    for one, task in zip(evaluations, tasks, strict=True):
        records = one.of_task(task, WITH)
        variants.append(WITH if records else WITHOUT)
        found.append(records or one.of_task(task, WITHOUT))
    numbers, first = sorted(set.intersection(*map(set, found))), evaluations[0]
    if not numbers:
        raise UserError(
            f"RUN ({first.path}): shares no item of {tasks[0]} with all others. "
            "Evaluate them with the same --limit."
        )
    for one, records in zip(evaluations, found, strict=True):
        for number in numbers:
            before, now = (records[number].get("answer") for records in (found[0], records))
            if before != now:
                raise UserError(
                    f"RUN ({one.path}): item {number} has the answer {str(now)[:40]!r}, "
                    f"and in {first.path} {str(before)[:40]!r}. Give evaluations of the "
                    "same items in the same order."
                )
    rows = [[records[number] for number in numbers] for records in found]
    values = _values(rows)
    if not values[0]:
        raise UserError(
            f"RUN ({first.path}): shares no metric of {tasks[0]} with all others. "
            "Give evaluations of the same kind."
        )
    by_name = {one.name: of_one for one, of_one in zip(evaluations, values, strict=True)}
    main, summaries = choose_main_metric(first.main_metrics[tasks[0]], by_name), []
    for place, one in enumerate(evaluations):
        idle = _EXPECTED if variants[0] == variants[place] == WITH else _EXPECTED + _OF_THOUGHTS
        row: dict[str, Any] = {
            "name": one.name, "file": str(one.path), "model": str(one.settings.get("model")),
            "variant": variants[place],
            "settings": {
                name: str(one.settings.get(name)) for name in {**first.settings, **one.settings}
                if name not in idle and one.settings.get(name) != first.settings.get(name)
            },
            "scores": means(values[place], main, SEED),
        }  # fmt: skip
        for name in LENGTHS:
            if lengths := [record[name] for record in rows[place] if name in record]:
                row[name] = float(np.mean(lengths))
        if place:
            row["difference"] = differences(values[place], values[0], main, SEED)
        summaries.append(row)
    return {"n": len(numbers), "main_metric": main, "evaluations": summaries,
            "groups": _groups(evaluations, tasks, numbers, values, main)}  # fmt: skip


def _values(rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Array]]:
    """Return the metrics that all evaluations have, (items, samples), of each of them."""
    metrics = [name for name in rows[0][0]["metrics"]
               if all(name in records[0]["metrics"] for records in rows)]  # fmt: skip
    tokens = [[len(record.get("nll", ())) for record in records] for records in rows]
    if any(counts != tokens[0] for counts in tokens):
        metrics = [name for name in metrics if name not in OF_TOKENS]
    values = [{name: np.array([record["metrics"][name] for record in records])
               for name in metrics} for records in rows]  # fmt: skip
    votes = [set(records[0].get("votes", ())) for records in rows]
    largest: dict[str, int] = {}  # of the votes that all have, those of the most thoughts
    for match in filter(None, map(_VOTES.fullmatch, sorted(set.intersection(*votes)))):
        largest[match[1]] = max(largest.get(match[1], 0), int(match[2]))
    for kind, count in largest.items():
        name = f"{kind}@{count}"
        for of_one, records in zip(values, rows, strict=True):
            of_one.setdefault(name, np.array([[record["votes"][name]] for record in records]))
    return values


def _groups(
    evaluations: Sequence[Evaluation], tasks: Sequence[str], numbers: Sequence[int],
    values: Sequence[Mapping[str, Array]], main: str,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Return the means of every evaluation within groups of items.

    What group an item is in stands in the records without thoughts, which one of the evaluations
    must have.
    """
    without = (one.of_task(task, WITHOUT) for one, task in zip(evaluations, tasks, strict=True))
    known = next((records for records in without if records.keys() >= {*numbers}), None)
    if known is None:
        return {}
    of_items = [known[number].get("groups", {}) for number in numbers]
    metrics = [name for name in dict.fromkeys((*SHARES, main)) if name in values[0]]
    return {
        name: [
            {"label": label, "n": int(chosen.sum()),
             **{metric: [float(of_one[metric][chosen].mean()) for of_one in values]
                for metric in metrics}}
            for label, chosen in item_groups(of_items, name)
        ]
        for name in dict.fromkeys(name for groups in of_items for name in groups)
    }  # fmt: skip


def _verdict(row: Mapping[str, Any], first: Mapping[str, Any], main: str, count: int) -> str:
    """Say whether an evaluation is better than the first one, by the main metric."""
    difference = row["difference"]
    if count < FEW_ITEMS:
        return f"{count} items are too few to tell"
    if not is_significant(difference):
        return f"no difference that {count} items can tell"
    if none_is_right(row["scores"], first["scores"]):
        return "it changes, but no answer is right in either"
    return "better" if gain_over(difference[main], 0.0, main) > 0 else "worse"


# --- What is shown --------------------------------------------------------------------------------
def _metrics(task: Mapping[str, Any]) -> dict[str, str]:
    """Return the metrics of a task, the main one first, and what they are called."""
    scores, main = task["evaluations"][0]["scores"], task["main_metric"]
    names = sorted((m for m in scores if f"{m}_stderr" in scores), key=lambda m: m != main)
    return {name: label_of(name) for name in names}


def paired_view(result: Mapping[str, Any]) -> RenderableType:
    """Show the result of `compare_evaluations`: a row for each metric and evaluation, verdicts."""
    parts: list[Table | Line] = []
    for name, task in result["tasks"].items():
        main = label_of(task["main_metric"])
        parts += [Line(f"{name}, {task['n']} items", "title"), *_tables(task)]
        if result["num_tests"] > 1:
            note = f"p of {main}: corrected for {result['num_tests']} tests (Holm); others not"
            parts.append(Line(note, "dim"))
        parts += [Line(f"by {main}:"), *_verdicts(task)]
    return view(parts)


def _tables(task: Mapping[str, Any]) -> list[Table]:
    """Return a table for each metric, the main one first: a row for each evaluation."""
    main, tables = task["main_metric"], []
    for metric, label in _metrics(task).items():
        rows = []
        for row in task["evaluations"]:
            note = row["variant"].replace("_", " ")
            if LENGTHS[0] in row:
                note += f", {row[LENGTHS[0]]:.1f} tokens of thought"
            name = Cell(row["name"], [note], "strong" if metric == main else "")
            change = row.get("difference")
            cells = [""] * 3 if change is None else comparison_cells(change, metric, main)
            rows.append([name, value_cell(row["scores"], metric), *cells])
        tables.append(Table(label, (label, "", "minus the first", "95% CI", "p"), rows, 1))
    return tables


def _verdicts(task: Mapping[str, Any]) -> list[Line]:
    """Say who is better, how many items are right in one evaluation only, and what differs."""
    lines, main = [], task["main_metric"]
    before = task["evaluations"][0]
    first = before["name"]
    for row in task["evaluations"][1:]:
        text, difference = f"{row['name']} against {first}: {row['verdict']}", row["difference"]
        if metric := next((m for m in SHARES if f"{m}_gained" in difference), ""):
            gained, lost = (difference[f"{metric}_{key}"] for key in ("gained", "lost"))
            text += f" (right only in {row['name']}: {gained}, only in {first}: {lost})"
        now, then = (show(one["scores"][main]) for one in (row, before))
        lines.append(Line(f"{text}, {_metrics(task)[main]} {now} against {then}", "verdict as-is"))
        if row["settings"]:
            listed = ", ".join(f"{name} {value[:80]}" for name, value in row["settings"].items())
            lines.append(Line(f"note: {row['name']}: {listed}, unlike the first", "note"))
    return lines


def write_paired(path: Path, result: Mapping[str, Any]) -> Path:
    """Write the page of what `compare_evaluations` found; returns its path."""
    sections = []
    for number, (name, task) in enumerate(result["tasks"].items(), start=1):
        main, metrics = task["main_metric"], _metrics(task)
        first, *others = task["evaluations"]
        rows = [Row(row["name"], row["difference"][main], row["difference"]["ci95"])
                for row in others]  # fmt: skip
        title = f"{metrics[main]}, minus {first['name']}"
        bars = draw_bars(rows, title, "+.4f")
        lead = f"Judged by {metrics[main]}. {task['n']} item{'s' if task['n'] != 1 else ''} that "
        lead += "all evaluations have, compared one by one; below each number is its 95% interval."
        if result["num_tests"] > 1:
            lead += f" The p-values of {metrics[main]} are corrected for {result['num_tests']} "
            lead += "tests (Holm), others are not."
        card = Card(f"task{number}", "What changes", f"{title}: mean and 95% CI", bars)
        parts = [*_verdicts(task), Line(lead), Cards([card]), *_tables(task)]
        for of_what, groups in task["groups"].items():
            if len(groups) > 1:
                parts.append(Line(f"By {of_what}", "between"))
                names = [row["name"] for row in task["evaluations"]]
                parts += [
                    Table(f"{metrics[m]} by {of_what}",
                          (f"{of_what.capitalize()}: {metrics[m]}", "Items", *names),
                          [[g["label"], str(g["n"]), *map(show, g[m])] for g in groups], 1)
                    for m in dict.fromkeys((*SHARES, main)) if m in metrics
                ]  # fmt: skip
        sections.append(Section(f"section{number}", name, parts))
    rows = [(row["name"], row["file"], row["model"])
            for row in next(iter(result["tasks"].values()))["evaluations"]]  # fmt: skip
    files = Table("Files and models", ("Evaluation", "File", "Model"), rows, widths=(24, 38, 38))
    return write_html(
        path, [*sections, Section("files", "Files and models", [files], "")],
        title=f"{len(rows)} evaluations · quietstar report", eyebrow="Quiet-STaR report",
        heading="Evaluations compared",
    )  # fmt: skip
