"""The page of a run, ``report.html``, from the files of its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from quietstar.config.yaml import Document, YamlProblem, parse
from quietstar.evaluation.controls import (
    BLANK,
    CONTROL_NAMES,
    CONTROL_NOTES,
    CONTROLS,
    FEW_ITEMS,
    GAINS,
    GENERIC,
    PAUSE,
    SHUFFLED,
    SWAPPED,
)
from quietstar.evaluation.metrics import METRICS
from quietstar.reports import pages
from quietstar.reports.charts import Card, Chart, Line, Row, draw_bars, draw_curves
from quietstar.reports.formats import MISSING, share_of, show, shown_text, wilson
from quietstar.reports.run_files import (
    MOST_CONFIG_BYTES,
    Answer,
    Record,
    Results,
    RunFiles,
    Sample,
    Samples,
    Swapped,
    series,
)
from quietstar.training.costs import duration
from quietstar.training.evaluation import ACCURACIES
from quietstar.training.guards import GUARDS, GuardState, measures_answers

MOST_FOLLOWED = 12
"""Evaluations at which a thought is shown."""
LOOKS = {SWAPPED: ("swapped", "D"), PAUSE: ("pause", "v"), SHUFFLED: ("other", "X"),
         GENERIC: ("other", "P"), BLANK: ("other", "p")}  # fmt: skip
"""Colors and symbols of controls."""


def _of_controls(prefix: str) -> list[Line]:
    return [Line(f"{prefix}_{name}", CONTROL_NAMES[name], *look) for name, look in LOOKS.items()]


def _kinds(prefix: str) -> tuple[Line, ...]:
    """Return the lines of a metric of answers: with thoughts, without, and with each control."""
    return (
        Line(f"{prefix}_with_thoughts", "with thoughts", "mixed"),
        Line(f"{prefix}_without_thoughts", "without thoughts", "base", "s"),
        *_of_controls(prefix),
    )


OBJECTIVE_REWARD = "objective-reward"
"""Chart of what an objective is given, where that is not the reward in nats."""
# fmt: off
CHARTS = (
    Chart("accuracy", "Accuracy",
          "Held-out problems that are answered correctly. Swapped: each problem gets the thought "
          "of another one. Pause: one constant token in place of every thought token.",
          "accuracy", _kinds("accuracy"), ".1%"),
    Chart("probability", "P(gold answer)",
          "Mean probability of the whole ground-truth answer of held-out problems.", "probability",
          _kinds("gold_probability"), ".3f"),
    Chart("right-thoughts", "Correct thoughts",
          "Share of the sampled thoughts that are correct.", "correct thoughts",
          (Line("right_thoughts", "correct thoughts", "thought", "t"),), ".1%"),
    Chart("nll", "NLL of the next token",
          "Negative log-likelihood; lower is better. With thoughts: base and thought mixed. "
          "Thought alone: its own prediction. Early values may lie beyond the axis.", "nats/token",
          (Line("mixed_nll", "with thoughts", "mixed"),
           Line("base_nll", "without thoughts", "base", "s"),
           Line("swapped_mixed_nll", "swapped thoughts", "swapped", "D"),
           Line("thought_nll", "thought alone", "thought", "t")), is_from_zero=False),
    Chart("gain", "Gain over no thoughts",
          "NLL without thoughts minus NLL with own, swapped or other ones. The gain of content is "
          "the distance from swapped to own thoughts.", "nats/token",
          (Line("gain", "with thoughts", "mixed"),
           Line("gain_without", "without thoughts", "base", "s"),
           *_of_controls("gain_with")), "+.4f"),
    Chart("mixing-weight", "Mixing weight",
          "Mean weight of the thought in the prediction. Near zero, thoughts are ignored.",
          "weight of the thought",
          (Line("mixing_weight", "mixing weight", "mixed"),)),
    Chart("reward", "Reward",
          "What a thought adds to the log-probability of its targets, and its standard deviation "
          "among the thoughts of one position: if that is zero, REINFORCE has no signal.",
          "nats/thought",
          (Line("reward", "reward", "thought", "t"),
           Line("reward_std", "standard deviation", "other", "D"))),
    Chart(OBJECTIVE_REWARD, "Reward of the objective",
          "What loss.reward gives a thought, in its own units: the mean, and its standard "
          "deviation among the thoughts of one position.", "reward",
          (Line("policy_reward", "reward", "thought", "t"),
           Line("policy_reward_std", "standard deviation", "other", "D"))),
    Chart("entropy", "Entropy of thoughts",
          "Mean entropy of the next-token distribution inside thoughts. Held-out thoughts are "
          "greedy.", "nats/token",
          (Line("entropy", "entropy", "thought", "t"),)),
    Chart("variety", "Variety of thoughts",
          "Distinct: distinct tokens of a thought over its length. Identical: positions where all "
          "K thoughts coincide.", "share",
          (Line("distinct_token_ratio", "distinct", "thought", "t"),
           Line("identical_fraction", "identical", "other", "s")), ".1%"),
    Chart("length", "Length of thoughts",
          "Tokens of a thought where it may end early: the mean, and the length that nine in ten "
          "thoughts do not exceed.", "tokens",
          (Line("thought_length", "mean", "thought", "t"),
           Line("thought_length_p90", "90th percentile", "other", "s")),
          ".1f"),
    Chart("ends", "Ends of thoughts",
          "Stopped: a stop text or end-of-text ended the thought. Cut: it had all its tokens and "
          "none of them.", "share",
          (Line("stop_fraction", "stopped", "thought", "t"),
           Line("truncated_fraction", "cut", "other", "s")), ".1%"),
)
# fmt: on


def _with_gains(record: Record) -> Record:
    """Add what each control gains over no thoughts, from where all lines of the chart start."""
    metrics = record.metrics
    if record.kind != "eval" or "gain" not in metrics:
        return record
    gains = {f"gain_with_{name}": metrics["gain"] - metrics[GAINS[name]]
             for name in CONTROLS if GAINS[name] in metrics}  # fmt: skip
    return replace(record, metrics={**metrics, "gain_without": 0.0, **gains})


def write_report(folder: Path, status: str = "") -> Path:
    """Write ``report.html``, which opens without a network, into a run folder; returns its path.

    Args:
        folder: Run folder with ``metrics.jsonl`` or ``controls.json`` or both, and any of
            ``config.yaml``, ``results.json`` and ``samples.json``. What is missing is left out.
        status: How far the run is, as the run itself knows it; by default what the files say.

    Raises:
        UserError: The folder holds no metrics, a file of it is damaged.
    """
    run = RunFiles(folder)
    records = [_with_gains(record) for record in run.records]
    evaluations = [record for record in records if record.kind == "eval"]
    scored = [record for record in evaluations if "base_nll" in record.metrics]
    configs = {stage.name: stage.config for stage in run.plan}
    of_answers = any(
        record.stage in configs and measures_answers(configs[record.stage], record.metrics)
        for record in scored[-1:]
    )
    accuracies, n, step = _accuracies(evaluations, run.results)
    newest = evaluations[-1].metrics if evaluations else {}
    status, verdict = status or _status(run), _verdict(accuracies, n, newest)
    tiles = _answers(accuracies, n, step, evaluations, run.results)
    top = [pages.Line(f"{status[0].upper()}{status[1:]}.", "status")] if status else []
    top += [pages.Line(verdict, "verdict")] if verdict else []
    followed = _thoughts(run.followed)
    sections = [
        pages.Section("glance", "", [*tiles, *_next_tokens(scored, of_answers)]),
        pages.Section("thoughts", "Thoughts over training", followed[:3]),
        pages.Section("others", "Thoughts in other texts", followed[3:], ""),
        _guards(run),
        pages.Section("curves", "Curves", _curves(records, of_answers, n)),
        pages.Section("controls", "Controls", _controls(run)),
        pages.Section("samples", "Samples", _samples(run.samples)),
        pages.Section("evaluations", "Evaluations", _table(evaluations, of_answers), ""),
        pages.Section("config", "Config", [pages.Code(run.config)] if run.config else [], ""),
    ]  # fmt: skip
    return pages.write_html(
        folder / "report.html", sections, title=f"{run.name} · quietstar report",
        eyebrow="Quiet-STaR report", heading=run.name, top=top, facts=_facts(run),
    )  # fmt: skip


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    """Describe the run in a few words."""
    config = Document(None, {})
    if len(run.config) <= MOST_CONFIG_BYTES:
        with suppress(YamlProblem):  # a page without these facts says more than none
            config = parse(run.config)
    last_stage = run.stages[-1] if run.stages else ""
    last = [record for record in run.records if record.stage == last_stage]
    seconds = series(last, "train", "seconds")[1]
    facts = {
        "Model": config.text("model.name_or_path"),
        "Data": config.text("data.train"),
        "Stages": " → ".join(filter(None, run.stages)),
        "Time": "" if run.results.seconds is None else duration(run.results.seconds),
        f"Step time, {last_stage}" if len(run.stages) > 1 else "Step time": (
            f"{median(seconds):.2g} s" if seconds else ""
        ),
        "Seeds": "" if run.records else ", ".join(map(str, run.controls.seeds)),
    }
    return [(label, value) for label, value in facts.items() if value]


def _status(run: RunFiles) -> str:
    """Say how far a run is."""
    if not run.records:
        return ""
    step, total = run.records[-1].step, run.plan[-1].last_step if run.plan else 0
    if step < total:
        return f"not finished, step {step} of {total}"
    return f"{step} steps" if run.results.seconds is None else f"finished, step {step} of {step}"


def _accuracies(
    evaluations: Sequence[Record], results: Results
) -> tuple[dict[str, float | None], float | None, str]:
    """Return accuracies of ``results.json`` or as last evaluated, of how many answers, and when."""
    metrics = {key: results.accuracy.get(name) for name, key in ACCURACIES.items()}
    n, step = results.accuracy.get("n"), ""
    if all(share is None for share in metrics.values()):
        n = None
        for record in evaluations:
            if record.metrics.keys() & metrics:
                step, n = f", step {record.step}", record.metrics.get("num_answers")
                metrics = {key: record.metrics.get(key) for key in metrics}
    return metrics, n, step


def _verdict(
    accuracy: Mapping[str, float | None], n: float | None, metrics: Mapping[str, float]
) -> str:
    """Say in a sentence or two what thinking does, as far as the run has measured it."""
    own, without, swapped = (
        accuracy[f"accuracy_{name}"] for name in ("with_thoughts", "without_thoughts", SWAPPED)
    )
    if own is not None and without is not None:
        if n is not None and n < FEW_ITEMS:
            return f"{n:.0f} held-out problems are too few to say whether thoughts help."
        text = f"Accuracy {show(own, '.1%')} with thoughts, {show(without, '.1%')} without"
        if own > without and swapped is not None:
            if own <= swapped:
                return f"{text}, but swapped thoughts help as much: it is not what they say."
            text += f"; with swapped thoughts {show(swapped, '.1%')}, "
            if swapped < without:  # which do harm, so that content is more than the gain
                text += "less than without: what the thoughts say matters"
            else:
                part = (own - swapped) / (own - without)
                text += f"so {part:.0%} of the gain is what the thoughts say"
        ends = wilson(own, n), wilson(without, n)
        if own > without and ends[0] and ends[1] and ends[0][0] <= ends[1][1]:
            text += f" (a difference that {n:.0f} problems cannot tell from chance)"
        return text + "."
    gain, content = metrics.get("gain"), metrics.get("gain_of_content")
    if gain is None:
        return ""
    if gain <= 0:
        return f"Thoughts do not help: the gain is {show(gain, '+.3f')} nats/token."
    text, matters = f"Thoughts gain {show(gain, '+.3f')} nats/token", "what they say matters"
    if content is None:
        return f"{text}; the gain of content was not measured."
    if content < 0.1 * gain:
        return f"{text}, but swapped ones gain as much: it is not what they say."
    if content > gain:  # swapped ones do harm, which is no part of the gain
        return f"{text}, and swapped ones lose {show(content - gain, '.3f')}: {matters}."
    return f"{text}, swapped ones {show(gain - content, '+.3f')}: {matters}."


# --- At a glance ----------------------------------------------------------------------------------
def _answers(
    metrics: Mapping[str, float | None], n: float | None, step: str,
    evaluations: Sequence[Record], results: Results,
) -> list[pages.Tiles]:  # fmt: skip
    """Show accuracies and correct thoughts."""
    own, without = metrics["accuracy_with_thoughts"], metrics["accuracy_without_thoughts"]
    notes = {f"accuracy_{control}": note for control, note in CONTROL_NOTES.items()}
    if own is not None and without is not None:
        notes["accuracy_with_thoughts"] = f"{show(own - without, 'points')} points vs. no thoughts"
    tiles = []
    for line in CHARTS[0].lines:
        if (share := metrics.get(line.key)) is not None:
            label, shown = line.name.capitalize(), share_of(share, n)
            bounds, note = wilson(share, n), notes.get(line.key, "")
            tiles.append(pages.Tile.measured(label, shown, line.color, bounds, note))
    before, after = map(results.right_thoughts.get, ("before", "after"))
    if before is None and after is None:
        _, values = series(evaluations, "eval", "right_thoughts")
        before, after = values[0] if values[1:] else None, values[-1] if values else None
    if after is not None:
        earlier = "" if before is None else f"{show(before, '.1%')} before training"
        said = ("share of the sampled thoughts", earlier)
        tiles.append(pages.Tile("Correct thoughts", show(after, ".1%"), "thought", said))
    title = f"Accuracy on {'' if n is None else f'{n:.0f} '}held-out problems{step}"
    return [pages.Tiles(title, tiles)] if tiles else []


def _next_tokens(scored: Sequence[Record], of_answers: bool) -> list[pages.Line | pages.Cards]:
    """Show no, own and swapped thoughts from one start: P(gold answer), or the gain over none."""
    scored = [record for record in scored if "mixed_nll" in record.metrics] or scored
    if not scored:
        return []
    first, last = scored[0], scored[-1]
    now, keys = last.metrics, {"gain": "mixed_nll", "gain_without": "base_nll"}

    def nll(key: str) -> str:
        """NLLs of the last evaluation and the first."""
        key = keys.get(key, f"{key.removeprefix('gain_with_')}_mixed_nll")
        if key not in now:
            return ""
        is_older = first is not last and key in first.metrics
        before = f", {show(first.metrics[key], '.3f')} at step {first.step}" if is_older else ""
        return f"NLL {show(now[key], '.3f')}{before}"

    if "gain" not in now:
        return [pages.Line(f"{nll('gain_without')} without thoughts, nats/token", "answer-line")]
    title, unit, form = "Next tokens of held-out data", "gain, nats/token", "+.3f"
    caption = "Gain over no thoughts."
    if GAINS[SWAPPED] not in now:
        caption += " Swapped thoughts, and so the gain of content, were not measured."
    if "mixing_weight" in now:
        caption += f" Mixing weight of the thought: {show(now['mixing_weight'], '.3f')}."
    if of_answers:
        title, unit, form = "P(gold answer)", "probability", ".3f"
        caption = "Mean over held-out problems."
    lines = next(c for c in CHARTS if c.name == ("probability" if of_answers else "gain")).lines
    rows = [Row(line.name.capitalize(), now[line.key], color=line.color, note=nll(line.key))
            for line in lines if line.key in now]  # fmt: skip
    card = Card("now", f"{title}, step {last.step}", caption, draw_bars(rows, unit, form))
    return [pages.Cards([card])]


# --- Thoughts -------------------------------------------------------------------------------------
def _thoughts(evaluations: Sequence[Samples]) -> list[pages.Line | pages.Table]:
    """Return a lead, then each text whose thought was followed and what it was at the steps.

    At most `MOST_FOLLOWED` evaluations, evenly spaced with the first and the last one, are shown.
    """
    last = len(evaluations) - 1
    count = min(MOST_FOLLOWED, len(evaluations))
    chosen = [evaluations[round(i * last / max(1, count - 1))] for i in range(count)]
    has_stages = len({evaluation.stage for evaluation in chosen}) > 1
    texts: dict[tuple[str, str], list[tuple[list[str], Sample]]] = {}
    for evaluation in chosen:
        step = f"{evaluation.step}{f', {evaluation.stage}' if has_stages else ''}"
        for sample in evaluation.samples:
            texts.setdefault((sample.before, sample.truth), []).append(([step], sample))
    lead = (
        "What the model thinks in the same held-out text as it learns. P(gold) is the probability"
    )
    lead += " of the ground truth; a swapped thought is that of another text or position."
    parts: list[pages.Line | pages.Table] = [pages.Line(lead)]
    for (before, truth), rows in texts.items():
        if len(rows) > 1:
            text = pages.Line(f"{pages.Cell.folded(before).text} ", "of-text", shown_text(truth))
            label = f"Thought before {shown_text(truth)}"
            parts += [text, _table_of_samples(label, {"Step": 8}, rows, True)]
    return parts if len(parts) > 1 else []


def _table_of_samples(
    label: str, first: Mapping[str, int], rows: Sequence[tuple[Sequence[Any], Sample]],
    has_slider: bool = False,
) -> pages.Table:  # fmt: skip
    """Show thoughts and answers; ``first`` are the headings and widths of a row's first cells."""
    is_swapped = any(sample.swapped for _, sample in rows)
    widths = {**first, "Thought": 20, "Swapped thought": 16, "Without thoughts": 14,
              "With thoughts": 14, "With swapped thoughts": 14, "Weight": 7}  # fmt: skip

    def answer(one: Answer, is_right: bool) -> pages.Cell:
        mark = pages.right_or_wrong(is_right)
        return pages.Cell(shown_text(one.prediction), (), "text", mark, one.probability)

    shown = []
    for cells, one in rows:
        mark = None if one.right_thought is None else pages.right_or_wrong(one.right_thought)
        other = one.swapped or Swapped()
        shown.append([
            *cells, pages.Cell(shown_text(one.thought), (), "text mono", mark),
            *([pages.Cell(shown_text(other.thought), (), "text mono")] if is_swapped else []),
            answer(one.without_thoughts, one.is_right(one.without_thoughts)),
            answer(one.with_thoughts, one.correct_with),
            *([answer(other, one.is_right(other))] if one.swapped else [MISSING] * is_swapped),
            show(one.mixing_weight, ".2f"),
        ])  # fmt: skip
    names = [name for name in widths if is_swapped or "wapped" not in name]
    return pages.Table(label, names, shown, widths=[widths[name] for name in names],
                       has_slider=has_slider)  # fmt: skip


def _samples(samples: Sequence[Sample]) -> list[pages.Line | pages.Table]:
    if not samples:
        return []
    judged = [one.right_thought for one in samples if one.right_thought is not None]
    lead = f"{sum(one.correct_with for one in samples)} of {len(samples)} correct with thoughts, "
    lead += f"{sum(one.is_right(one.without_thoughts) for one in samples)} without"
    lead += f", {sum(judged)} of {len(judged)} thoughts correct" if judged else ""
    rows = [([pages.Cell.folded(one.before), pages.Cell(shown_text(one.truth), kind="text")], one)
            for one in samples]  # fmt: skip
    table = _table_of_samples("Samples", {"Prompt": 22, "Ground truth": 11}, rows)
    return [pages.Line(f"{lead}. P(gold) is the probability of the ground truth."), table]


# --- Guards, curves, controls, evaluations --------------------------------------------------------
def _guards(run: RunFiles) -> pages.Section:
    """Describe the guards whose metrics were measured: now, threshold, and where they fired."""
    states = {name: GuardState() for name in run.stages}
    for stage in run.plan:
        if stage.name in states:
            states[stage.name] = GuardState(stage.config, stage.first_step)
    for record in run.records:
        states[record.stage].see("train" if record.kind == "train" else "eval", record.step,
                                 record.metrics)  # fmt: skip
    rows, num_fired, num_beyond = [], 0, 0
    for guard in GUARDS:
        fired = [one for one in run.fired if one.name == guard.name]
        known = [state for state in states.values() if state.value(guard) is not None]
        # What fired under an earlier version's rules is not lost.
        measured = [state for state in known if state.watches(guard)] or (known if fired else [])
        if not measured:
            continue
        is_beyond = measured[-1].is_beyond(guard) and not fired
        num_fired, num_beyond = num_fired + bool(fired), num_beyond + is_beyond
        state = pages.Cell("", mark=(True, "✓ fine"))
        if is_beyond:
            state = pages.Cell(
                "", mark=(False, "beyond the threshold, not for long enough to warn")
            )
        of_stage = "" if len(run.stages) == 1 else ", {}"
        marks = [pages.Cell("", [one.message],
                      mark=(False, f"! fired at step {one.step}{of_stage.format(one.stage)}"))
                 for one in fired]  # fmt: skip
        now = format(measured[-1].value(guard), guard.form).replace("-", "−")
        name = pages.Cell(guard.name, [guard.title], "strong mono")
        rows.append((not fired, [name, now, guard.threshold, marks or state]))
    rows = [cells for _, cells in sorted(rows, key=lambda row: row[0])]
    summary = f"{num_fired or 'None'} of {len(rows)} fired"
    summary += f", {num_beyond} beyond the threshold" if num_beyond else ""
    lead = "They watch metrics that show when thoughts collapse or training goes wrong; those of "
    lead += "training steps are means over the last five records."
    table = pages.Table(
        "Guards", ("Guard", "Now", "Warns if", "State"), rows, widths=(31, 10, 17, 42)
    )
    parts = [pages.Line(lead), table] if rows else []
    return pages.Section("guards", "Guards", parts, summary, bool(num_fired or num_beyond))


def _curves(
    records: Sequence[Record], of_answers: bool, n: float | None
) -> list[pages.Line | pages.Cards]:
    """Draw the charts whose metrics were measured."""
    measured = {key for record in records for key in record.metrics}
    repeats = all(  # with loss.reward thought or mixed both are the same
        r.metrics["policy_reward"] == r.metrics.get("reward")
        for r in records
        if "policy_reward" in r.metrics
    )
    cards = []
    for chart in CHARTS:
        if not any(line.key in measured for line in chart.lines):
            continue
        if chart.name == OBJECTIVE_REWARD and repeats:
            continue
        caption = chart.caption
        if of_answers and chart.name in ("nll", "gain"):
            caption += " Here of the first token of each answer alone, which may be just a space."
        if chart.name == "gain" and GAINS[SWAPPED] not in measured:
            caption += " Swapped thoughts were not measured here."
        if chart.name in ("accuracy", "probability") and n is not None and n < FEW_ITEMS:
            caption += f" There are {n:.0f} of them, too few to tell."
        newest = [f"{chart.title} over the steps"]  # for screen readers
        for line in chart.lines:
            kind = "eval" if series(records, "eval", line.key)[1] else "train"
            steps, values = series(records, kind, line.key)
            if values:
                where = "held out" if kind == "eval" else "in training"
                newest.append(
                    f"{line.name} {show(values[-1], chart.form)} {where} at step {steps[-1]}"
                )
        drawn = draw_curves(chart, records)
        cards.append(Card(chart.name, chart.title, caption, drawn, f"{'; '.join(newest)}."))
    lead = "Markers: held out (greedy thoughts). Thin lines: training (sampled, smoothed). Their "
    lead += "values are not directly comparable."
    if len({record.stage for record in records}) > 1:
        lead += " Every stage has its own part of the axis."
    return [pages.Line(lead), pages.Cards(cards)] if cards else []


def _controls(run: RunFiles) -> list[pages.Line | pages.Cards]:
    """Draw the variants and their differences, with what each seed and interval is."""
    cards = []
    for name, title, means, axis, form in (
        ("variants", "Accuracy of the variants", run.controls.variants, "accuracy, %",
         ".1%"),
        ("differences", "Differences in accuracy", run.controls.differences, "percentage points",
         "points"),
    ):  # fmt: skip
        rows = []
        for one in means:
            if one.mean is None:
                continue
            notes = [f"95% CI {show(one.ci95, form)}"] if one.ci95 else []
            if one.ci95 and form == "points":
                notes.append(f"zero {'inside' if one.ci95[0] <= 0 <= one.ci95[1] else 'outside'}")
            seeds = [share for share in one.accuracy if share is not None]
            notes += [f"seeds {' · '.join(show(x, form) for x in seeds)}"] if seeds else []
            if right := [share for share in one.right_thoughts if share is not None]:
                notes.append(f"correct thoughts {show(fmean(right), '.1%')}")
            rows.append(Row(one.label, one.mean, one.ci95, seeds=seeds, note=", ".join(notes)))
        caption = "Bars are means, lines 95% confidence intervals, rings single seeds."
        if rows:
            cards.append(Card(name, title, caption, draw_bars(rows, axis, form)))
    lead = "The same training with one part changed or taken away"
    lead += f", {len(run.controls.seeds)} seeds each." if run.controls.seeds else "."
    return [pages.Line(lead), pages.Cards(cards)] if cards else []


def _table(evaluations: Sequence[Record], of_answers: bool) -> list[pages.Line | pages.Table]:
    """List all held-out evaluations; the probability of answers says more where there is one."""
    left_out = ("base_nll", "mixed_nll", "thought_nll", "gain") if of_answers else ("gold_prob",)
    columns = [(key, metric) for key, metric in METRICS.items()
               if metric.heading and not key.startswith(left_out)
               and any(key in record.metrics for record in evaluations)]  # fmt: skip
    has_stages = any(record.stage for record in evaluations)
    headings = [
        "step",
        *(["stage"] if has_stages else []),
        *(metric.label for _, metric in columns),
    ]
    rows = [[str(record.step), *([record.stage] if has_stages else []),
             *(show(record.metrics.get(key), metric.form) for key, metric in columns)]
            for record in evaluations]  # fmt: skip
    lead = "Accuracies and correct thoughts in percent, "
    lead += "P(gold answer) as a probability." if of_answers else "NLL and gains in nats/token."
    table = pages.Table("All held-out evaluations", headings, rows, 1 + has_stages)
    return [pages.Line(lead), table] if rows else []
