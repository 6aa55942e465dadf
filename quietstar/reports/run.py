"""The page of a run, ``report.html``, from the files of its folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from quietstar.config.yaml import YamlProblem, parse
from quietstar.reports import formats
from quietstar.reports.figures import Chart, Line, control_rows, draw_curves, draw_forest
from quietstar.reports.formats import MISSING, percent, percent_range, plain, points, signed
from quietstar.reports.pages import chart_scripts, render, write
from quietstar.reports.run_files import (
    Accuracy,
    BeforeAfter,
    Controls,
    Record,
    Results,
    RunFiles,
    Sample,
    read_run,
    series,
)

REPORT_FILE = "report.html"

# fmt: off
CHARTS = (
    Chart("accuracy", "Accuracy",
          "Held-out problems that are answered correctly. Swapped: each problem gets the thought "
          "of another one. Pause: one constant token in place of every thought token.",
          "correct answers",
          (Line("accuracy_with_thoughts", "with thoughts", "mixed"),
           Line("accuracy_without_thoughts", "without", "base", "square"),
           Line("accuracy_swapped", "swapped thoughts", "swapped", "diamond"),
           Line("accuracy_pause", "pause tokens", "pause", "triangle-down")),
          is_share=True, show_zero=True),
    Chart("right-thoughts", "Correct thoughts",
          "Share of the sampled thoughts that are correct.",
          "correct thoughts",
          (Line("right_thoughts", "correct thoughts", "thought", "triangle-up"),),
          is_share=True, show_zero=True),
    Chart("nll", "Negative log-likelihood of the next token",
          "Base: without a thought. Mixed: base and thought together. Thought: its prediction "
          "alone. Lower is better.",
          "nats/token",
          (Line("base_nll", "base", "base", "square"),
           Line("mixed_nll", "mixed", "mixed"),
           Line("thought_nll", "thought", "thought", "triangle-up")),
          cut_spikes=True),
    Chart("gain", "Gain from thinking, and cost of swapping the thoughts",
          "Gain: base minus mixed NLL. Gain of content: what is lost with swapped thoughts; only "
          "this part is thinking.",
          "nats/token",
          (Line("gain", "gain", "mixed"),
           Line("gain_of_content", "gain of content", "content", "triangle-up"),
           Line("gain_over_pause", "gain over pause tokens", "pause", "diamond")),
          show_zero=True),
    Chart("mixing-weight", "Mixing weight",
          "Mean weight of the thought in the prediction. Near zero, thoughts are ignored.",
          "weight of the thought",
          (Line("mixing_weight", "mixing weight", "mixed"),),
          show_zero=True),
    Chart("reward", "Reward",
          "What a thought adds to the log-probability of its targets, and its standard deviation "
          "among the thoughts of one position: if that is zero, REINFORCE has no signal.",
          "nats/thought",
          (Line("reward", "reward", "thought", "triangle-up"),
           Line("reward_std", "standard deviation", "other", "diamond")),
          show_zero=True),
    Chart("entropy", "Entropy of thoughts",
          "Mean entropy of the next-token distribution inside thoughts. Held-out thoughts are "
          "greedy.",
          "nats/token",
          (Line("entropy", "entropy", "thought", "triangle-up"),),
          show_zero=True),
    Chart("variety", "Variety of thoughts",
          "Distinct: distinct tokens of a thought over its length. Identical: positions where all "
          "K thoughts coincide.",
          "share",
          (Line("distinct_token_ratio", "distinct", "thought", "triangle-up"),
           Line("identical_fraction", "identical", "other", "square")),
          is_share=True, show_zero=True),
)
# fmt: on

COLUMNS = {
    "accuracy_with_thoughts": ("accuracy with thoughts", percent),
    "accuracy_without_thoughts": ("without thoughts", percent),
    "accuracy_swapped": ("swapped thoughts", percent),
    "accuracy_pause": ("pause tokens", percent),
    "right_thoughts": ("correct thoughts", percent),
    "base_nll": ("base NLL", plain),
    "mixed_nll": ("mixed NLL", plain),
    "thought_nll": ("thought NLL", plain),
    "gain": ("gain", signed),
    "gain_of_content": ("gain of content", signed),
    "gain_over_pause": ("gain over pause", signed),
    "mixing_weight": ("mixing weight", plain),
}
"""Figures in the table of held-out evaluations: headings and formats."""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder: one file that opens without a network.

    Args:
        folder: Run folder with ``metrics.jsonl`` or ``controls.json`` or both, and any of
            ``config.yaml``, ``results.json`` and ``samples.json``. What is missing is left out.

    Returns:
        Path of the page.

    Raises:
        UserError: The folder holds no figures, a file of it is damaged, or plotly is missing.
    """
    run = read_run(folder)
    measured = {key for record in run.records for key in record.figures}
    charts = [chart for chart in CHARTS if any(line.key in measured for line in chart.lines)]
    figures = {chart.name: draw_curves(chart, run.records, run.stages) for chart in charts}
    variants, differences = control_rows(run.controls)
    if variants:
        figures["variants"] = draw_forest(variants, "accuracy", ".0%", ".1%")
    if differences:
        title = "difference in accuracy, percentage points"
        figures["differences"] = draw_forest(differences, title, "", "+.1f")
    headings, rows = evaluation_table(run.records, run.stages)
    page = render(
        "run.html.j2",
        chart_scripts(figures),
        run=run,
        facts=facts(run),
        groups=headline(run.records, run.results, run.controls),
        cards=[_card(chart, run.records, measured) for chart in charts],
        figures=figures,
        headings=headings,
        rows=rows,
        samples=run.samples.samples,
        tally=tally(run.samples.samples),
    )
    return write(folder / REPORT_FILE, page)


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """Describe the run in a few words."""
    try:
        config: Any = parse(run.config).data
    except YamlProblem:
        config = None

    def setting(section: str, key: str) -> str:
        tree = config
        for part in (section, key):
            tree = tree.get(part) if isinstance(tree, dict) else None
        return tree if isinstance(tree, str) else ""

    last_stage = run.stages[-1] if run.stages else ""
    last = [record for record in run.records if record.stage == last_stage]
    seconds = series(last, "train", "seconds")[1]
    found = {
        "Model": setting("model", "name_or_path"),
        "Data": setting("data", "train"),
        "Stages": " → ".join(filter(None, run.stages)),
        "Steps": str(run.records[-1].step) if run.records else "",
        "Time": "" if run.results.seconds is None else formats.duration(run.results.seconds),
        f"Step time, {last_stage}" if len(run.stages) > 1 else "Step time": (
            f"{median(seconds):.2g} s" if seconds else ""
        ),
        "Seeds": "" if run.records else ", ".join(map(str, run.controls.seeds)),
    }
    return [(label, value) for label, value in found.items() if value]


def _card(chart: Chart, records: Sequence[Record], measured: set[str]) -> dict[str, str]:
    """Heading, caption and description of a chart; the newest values are for screen readers."""
    caption = chart.caption
    if chart.name == "gain" and "gain_of_content" not in measured:
        caption += " The gain of content was not measured here."
    parts = [chart.title + " over the steps"]
    for line in chart.lines:
        kind = "eval" if series(records, "eval", line.key)[1] else "train"
        steps, values = series(records, kind, line.key)
        if values:
            value = percent(values[-1]) if chart.is_share else plain(values[-1])
            where = "held out" if kind == "eval" else "in training"
            parts.append(f"{line.name} {value} {where} at step {steps[-1]}")
    return {"name": chart.name, "title": chart.title, "caption": caption,
            "description": "; ".join(parts) + "."}  # fmt: skip


def evaluation_table(
    records: Sequence[Record], stages: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of every held-out evaluation, with the columns that any has."""
    evaluations = [record for record in records if record.kind == "eval"]
    keys = [key for key in COLUMNS if any(key in record.figures for record in evaluations)]
    lead = ["step", "stage"] if any(stages) else ["step"]
    rows = []
    for record in evaluations:
        cells = [str(record.step), record.stage][: len(lead)]
        rows.append(cells + [COLUMNS[key][1](record.figures.get(key)) for key in keys])
    return lead + [COLUMNS[key][0] for key in keys], rows


def tally(samples: Sequence[Sample]) -> str:
    """Count the samples that come out correct."""
    text = (
        f"{sum(s.correct_with for s in samples)} of {len(samples)} correct with thoughts, "
        f"{sum(s.correct_without for s in samples)} without"
    )
    judged = [s.right_thought for s in samples if s.right_thought is not None]
    return f"{text}, {sum(judged)} of {len(judged)} thoughts correct." if judged else f"{text}."


# --- Key figures ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A key figure.

    Attributes:
        label: Text above the value.
        value: Text in large type.
        notes: Lines below the value that put it into relation.
        color: Class that gives the mark the figure's color in the charts.
    """

    label: str
    value: str
    notes: tuple[str, ...] = ()
    color: str = "base"


@dataclass(frozen=True)
class Group:
    """Key figures measured together, and where."""

    title: str
    tiles: list[Tile]


def headline(records: Sequence[Record], results: Results, controls: Controls) -> list[Group]:
    """Return what was measured of answers and next tokens, and only without them of controls."""
    groups = [answer_figures(records, results), next_token_figures(records)]
    groups = [group for group in groups if group.tiles]
    if groups:
        return groups
    tiles = [
        Tile(v.title, percent(v.mean), _ci(percent_range(v.ci95)), "mixed")
        for v in controls.variants[:1]
    ]
    tiles += [
        Tile(d.label, f"{points(d.mean)} points", _ci(formats.points_range(d.ci95)))
        for d in controls.differences[:3]
        if d.mean is not None
    ]
    tiles = [tile for tile in tiles if tile.value != MISSING]
    return [Group("Over all seeds", tiles)] if tiles else []


def _ci(shown: str) -> tuple[str, ...]:
    return () if shown == MISSING else (f"95% CI {shown}",)


def answer_figures(records: Sequence[Record], results: Results) -> Group:
    """Return accuracies and correct thoughts: of ``results.json``, or else as last evaluated."""
    accuracy, keys = results.accuracy, list(Accuracy.model_fields)[:4]
    if any(getattr(accuracy, key) is not None for key in keys):
        problems = f"{accuracy.n:.0f} held-out problems" if accuracy.n else "held-out problems"
        title = f"Answers to {problems}"
    else:
        columns = {key: f"accuracy_{key}" for key in keys[:2]}
        columns |= {"swapped_thoughts": "accuracy_swapped", "pause_thoughts": "accuracy_pause"}
        step, last = 0, {}
        for r in records:
            present = {k: r.figures[c] for k, c in columns.items() if c in r.figures}
            if r.kind == "eval" and present:
                step, last = r.step, present
        accuracy, title = Accuracy(**last), f"Answers to held-out problems, step {step}"
    return Group(title, [*accuracy_tiles(accuracy), *thought_tiles(records, results)])


def accuracy_tiles(accuracy: Accuracy) -> Iterator[Tile]:
    """Yield a tile for each accuracy there is."""
    n, own, without = accuracy.n, accuracy.with_thoughts, accuracy.without_thoughts
    gained = ()
    if own is not None and without is not None:
        gained = (f"{points(own - without)} points vs. no thoughts",)
    for label, share, notes, color in (
        ("With thoughts", own, gained, "mixed"),
        ("Without thoughts", without, (), "base"),
        ("Swapped thoughts", accuracy.swapped_thoughts,
         ("each problem with the thought of another",), "swapped"),
        ("Pause tokens", accuracy.pause_thoughts,
         ("one constant token in place of every thought token",), "pause"),
    ):  # fmt: skip
        if share is not None:
            interval = ()
            if n is not None and n >= 1 and 0 <= share <= 1:
                interval = _ci(percent_range(formats.wilson(share, n)))
            yield Tile(label, percent(share), interval + notes, color)


def thought_tiles(records: Sequence[Record], results: Results) -> Iterator[Tile]:
    """Yield the share of correct thoughts before and after training."""
    measured = results.right_thoughts
    if measured.before is None and measured.after is None:
        _, values = series(records, "eval", "right_thoughts")
        if not values:
            return
        measured = BeforeAfter(before=values[0] if len(values) > 1 else None, after=values[-1])
    value, notes = percent(measured.after), ("share of the sampled thoughts",)
    if measured.before is not None:
        value = f"{percent(measured.before)} → {value}"
        notes += ("before → after training",)
    yield Tile("Correct thoughts", value, notes, "thought")


def next_token_figures(records: Sequence[Record]) -> Group:
    """Return NLL and gain of the last held-out evaluation, always with the gain of content."""
    evaluations = [r for r in records if r.kind == "eval" and "base_nll" in r.figures]
    if not evaluations:
        return Group("", [])
    evaluations = [r for r in evaluations if "mixed_nll" in r.figures] or evaluations
    first, last = evaluations[0], evaluations[-1]
    tiles = []
    for key, label, color in (
        ("base_nll", "Base NLL", "base"),
        ("mixed_nll", "Mixed NLL", "mixed"),
    ):
        if key in last.figures:
            before = first.figures.get(key) if first is not last else None
            notes = () if before is None else (f"{plain(before, 3)} at step {first.step}",)
            tiles.append(Tile(label, plain(last.figures[key], 3), notes, color))
    if "gain" in last.figures:
        gain, content = last.figures["gain"], last.figures.get("gain_of_content")
        note = "not measured" if content is None else "lost with swapped thoughts"
        tiles.append(Tile("Gain from thinking", signed(gain, 3), ("base minus mixed",), "mixed"))
        tiles.append(Tile("Gain of content", signed(content, 3), (note,), "content"))
        if (weight := last.figures.get("mixing_weight")) is not None:
            note = "weight of the thought in the prediction"
            tiles.append(Tile("Mixing weight", plain(weight, 3), (note,), "mixed"))
    return Group(f"Next tokens of held-out data, nats/token, step {last.step}", tiles)
