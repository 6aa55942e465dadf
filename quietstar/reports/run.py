"""The page of a run, ``report.html``, from the files of its folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from quietstar.config.yaml import Document, YamlProblem, parse
from quietstar.evaluation.controls import (
    BLANK,
    CONTROL_NAMES,
    CONTROL_NOTES,
    FEW_ITEMS,
    GAINS,
    GENERIC,
    SHUFFLED,
    SWAPPED,
)
from quietstar.reports.figures import (
    Chart,
    Draw,
    Line,
    Row,
    draw_curves,
    draw_forest,
    in_both_sizes,
)
from quietstar.reports.pages import percent, plain, signed, wilson, write_html
from quietstar.reports.run_files import (
    MOST_CONFIG_BYTES,
    Followed,
    Record,
    Results,
    RunFiles,
    series,
)
from quietstar.training.costs import duration
from quietstar.training.evaluation import ACCURACIES
from quietstar.training.guards import GUARDS, GuardState, measures_answers

MOST_FOLLOWED = 12
"""Evaluations at which a thought is shown."""
OTHERS = {SHUFFLED: "X", GENERIC: "P", BLANK: "p"}
"""Controls that share a color, with their symbols."""
OBJECTIVE_REWARD = "objective-reward"
"""Chart of what an objective is given, where that is not the reward in nats."""
# fmt: off
CHARTS = (
    Chart("accuracy", "Accuracy",
          "Held-out problems that are answered correctly. Swapped: each problem gets the thought "
          "of another one. Pause: one constant token in place of every thought token.",
          "correct answers",
          (Line("accuracy_with_thoughts", "with thoughts", "mixed"),
           Line("accuracy_without_thoughts", "without thoughts", "base", "s"),
           Line("accuracy_swapped", "swapped thoughts", "swapped", "D"),
           Line("accuracy_pause", "pause tokens", "pause", "v"),
           *(Line(f"accuracy_{name}", CONTROL_NAMES[name], "other", symbol)
             for name, symbol in OTHERS.items())), percent, True),
    Chart("probability", "P(gold answer)",
          "Mean probability of the whole correct answer of held-out problems.", "probability",
          (Line("gold_probability_with_thoughts", "with thoughts", "mixed"),
           Line("gold_probability_without_thoughts", "without thoughts", "base", "s"),
           Line("gold_probability_swapped", "swapped thoughts", "swapped", "D"),
           Line("gold_probability_pause", "pause tokens", "pause", "v"),
           *(Line(f"gold_probability_{name}", CONTROL_NAMES[name], "other", symbol)
             for name, symbol in OTHERS.items())), partial(plain, digits=3)),
    Chart("right-thoughts", "Correct thoughts",
          "Share of the sampled thoughts that are correct.", "correct thoughts",
          (Line("right_thoughts", "correct thoughts", "thought", "^"),), percent, True),
    Chart("nll", "Negative log-likelihood of the next token",
          "Base: without a thought. Mixed: base and thought together. Thought: its prediction "
          "alone. Lower is better. Early values may lie beyond the axis.", "nats/token",
          (Line("base_nll", "base NLL", "base", "s"),
           Line("mixed_nll", "mixed NLL", "mixed"),
           Line("swapped_mixed_nll", "mixed NLL, swapped thoughts", "swapped", "D"),
           Line("thought_nll", "thought NLL", "thought", "^")), from_zero=False),
    Chart("gain", "Gain of thinking, and cost of swapping the thoughts",
          "Gain: base minus mixed NLL. Gain of content: what is lost with swapped thoughts, more "
          "than the gain where those do harm.", "nats/token",
          (Line("gain", "gain", "mixed"),
           Line("gain_of_content", "gain of content", "content", "^"),
           Line("gain_over_pause", "gain over pause tokens", "pause", "D"),
           *(Line(GAINS[name], f"gain over {CONTROL_NAMES[name]}", "other", symbol)
             for name, symbol in OTHERS.items())), signed),
    Chart("mixing-weight", "Mixing weight",
          "Mean weight of the thought in the prediction. Near zero, thoughts are ignored.",
          "weight of the thought",
          (Line("mixing_weight", "mixing weight", "mixed"),)),
    Chart("reward", "Reward",
          "What a thought adds to the log-probability of its targets, and its standard deviation "
          "among the thoughts of one position: if that is zero, REINFORCE has no signal.",
          "nats/thought",
          (Line("reward", "reward", "thought", "^"),
           Line("reward_std", "standard deviation", "other", "D"))),
    Chart(OBJECTIVE_REWARD, "Reward of the objective",
          "What loss.reward gives a thought, in its own units: the mean, and its standard "
          "deviation among the thoughts of one position.", "reward",
          (Line("policy_reward", "reward", "thought", "^"),
           Line("policy_reward_std", "standard deviation", "other", "D"))),
    Chart("entropy", "Entropy of thoughts",
          "Mean entropy of the next-token distribution inside thoughts. Held-out thoughts are "
          "greedy.", "nats/token",
          (Line("entropy", "entropy", "thought", "^"),)),
    Chart("variety", "Variety of thoughts",
          "Distinct: distinct tokens of a thought over its length. Identical: positions where all "
          "K thoughts coincide.", "share",
          (Line("distinct_token_ratio", "distinct", "thought", "^"),
           Line("identical_fraction", "identical", "other", "s")), percent, True),
    Chart("length", "Length of thoughts",
          "Tokens of a thought where it may end early: the mean, and the length that nine in ten "
          "thoughts do not exceed.", "tokens",
          (Line("thought_length", "mean", "thought", "^"),
           Line("thought_length_p90", "90th percentile", "other", "s")),
          partial(plain, digits=1)),
    Chart("ends", "Ends of thoughts",
          "Stopped: a stop text or end-of-text ended the thought. Cut: it had all its tokens and "
          "none of them.", "share",
          (Line("stop_fraction", "stopped", "thought", "^"),
           Line("truncated_fraction", "cut", "other", "s")), percent, True),
)
# fmt: on
IN_TABLE = ("accuracy", "right-thoughts", "nll", "gain", "mixing-weight")
IN_TABLE_OF_ANSWERS = ("accuracy", "probability", "right-thoughts", "mixing-weight")
"""Charts whose figures are columns of the table of held-out evaluations: in general, and where the
probability of answers says more (`measures_answers`)."""
HEADING_BEGINS = {"accuracy": "right, ", "probability": "P(gold), "}
"""What sets columns apart whose lines go by the same names."""


def write_report(folder: Path, status: str = "") -> Path:
    """Write ``report.html``, which opens without a network, into a run folder; returns its path.

    Args:
        folder: Run folder with ``metrics.jsonl`` or ``controls.json`` or both, and any of
            ``config.yaml``, ``results.json`` and ``samples.json``. What is missing is left out.
        status: How far the run is, as the run itself knows it; by default what the files say.

    Raises:
        UserError: The folder holds no figures, a file of it is damaged.
    """
    run = RunFiles(folder)
    measured = {key for record in run.records for key in record.figures}
    repeats = all(  # with loss.reward thought or mixed both are the same
        r.figures["policy_reward"] == r.figures.get("reward")
        for r in run.records
        if "policy_reward" in r.figures
    )
    charts = [
        chart
        for chart in CHARTS
        if any(line.key in measured for line in chart.lines)
        and not (chart.name == OBJECTIVE_REWARD and repeats)
    ]
    figures: dict[str, Draw] = {
        chart.name: partial(draw_curves, chart, run.records) for chart in charts
    }
    for name, means, axis, digits in (
        ("variants", run.controls.variants, "accuracy, %", plain),
        ("differences", run.controls.differences, "difference, percentage points", signed),
    ):
        rows = [
            Row(m.label, 100 * m.mean, [100 * bound for bound in m.ci95 or ()],
                seeds=[100 * x for x in m.accuracy if x is not None])
            for m in means
            if m.mean is not None
        ]  # fmt: skip
        if rows:
            figures[name] = partial(draw_forest, rows, axis, partial(digits, digits=1))
    evaluations = [record for record in run.records if record.kind == "eval"]
    scored = [record for record in evaluations if "base_nll" in record.figures]
    configs = {stage.name: stage.config for stage in run.plan}
    of_answers = any(
        record.stage in configs and measures_answers(configs[record.stage], record.figures)
        for record in scored[-1:]
    )
    in_table = IN_TABLE_OF_ANSWERS if of_answers else IN_TABLE
    answers = _answers(evaluations, run.results)
    (probability,) = (chart for chart in CHARTS if chart.name == "probability")
    return write_html(
        folder / "report.html",
        "run.html.j2",
        figures=in_both_sizes(figures),
        run=run,
        status=status or _status(run),
        facts=_facts(run),
        answers=answers,
        control_notes={f"accuracy_{control}": note for control, note in CONTROL_NOTES.items()},
        scored=[record for record in scored if "mixed_nll" in record.figures] or scored,
        probabilities=[
            (line, scored[-1].figures[line.key])
            for line in probability.lines
            if line.key in scored[-1].figures
        ]
        if of_answers
        else [],
        guards=_guards(run),
        verdict=_verdict(evaluations, run.results),
        followed=_followed(run.followed),
        cards=[_card(c, run.records, measured, of_answers, answers["n"]) for c in charts],
        evaluations=evaluations,
        columns=[
            (line.key, f"{HEADING_BEGINS.get(chart.name, '')}{line.name}", chart.show)
            for chart in CHARTS
            for line in chart.lines
            if chart.name in in_table and any(line.key in e.figures for e in evaluations)
        ],
    )


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


def _verdict(evaluations: Sequence[Record], results: Results) -> str:
    """Say in a sentence or two what thinking does, as far as the run has measured it."""
    if not evaluations:
        return ""
    figures = evaluations[-1].figures
    accuracy = {key: figures.get(key) for key in ACCURACIES.values()}
    accuracy |= {key: results.accuracy[name] for name, key in ACCURACIES.items()
                 if results.accuracy.get(name) is not None}  # fmt: skip
    own, without, swapped = (
        accuracy[f"accuracy_{name}"] for name in ("with_thoughts", "without_thoughts", SWAPPED)
    )
    if own is not None and without is not None:
        n = results.accuracy.get("n") or figures.get("num_answers")
        if n is not None and n < FEW_ITEMS:
            return f"{n:.0f} held-out problems are too few to say whether thoughts help."
        text = f"{percent(own)} of the held-out answers are right with thoughts, {percent(without)}"
        text += " without"
        if own > without and swapped is not None:
            if own <= swapped:
                return f"{text}, but swapped thoughts help as much: it is not what they say."
            text += f"; with swapped thoughts {percent(swapped)}, "
            if swapped < without:  # which do harm, so that content is more than the gain
                text += "fewer than without: what the thoughts say matters"
            else:
                part = (own - swapped) / (own - without)
                text += f"so {part:.0%} of the gain is what the thoughts say"
        known = [pair for pair in (wilson(own, n), wilson(without, n)) if pair is not None]
        if own > without and len(known) == 2 and known[0][0] <= known[1][1]:
            text += f" (a difference that {n:.0f} problems cannot tell from chance)"
        return text + "."
    gain, content = figures.get("gain"), figures.get("gain_of_content")
    if gain is None:
        return ""
    if gain <= 0:
        return f"Thoughts do not help: the gain is {signed(gain, 3)} nats/token."
    if content is None:
        return f"Thoughts gain {signed(gain, 3)} nats/token; the gain of content was not measured."
    if content < 0.1 * gain:
        return (
            f"Thoughts gain {signed(gain, 3)} nats/token, but swapped ones gain as much (content "
            f"{signed(content, 3)}): it is not what they say."
        )
    text = f"Thoughts gain {signed(gain, 3)} nats/token"
    if content > gain:  # swapped ones do harm, which is no part of the gain
        return f"{text}, and swapped ones lose {plain(content - gain, 3)}: what they say matters."
    return f"{text}, of which swapping them costs {plain(content, 3)}: what they say matters."


def _followed(evaluations: Sequence[Followed]) -> list[dict[str, Any]]:
    """Return each text whose thought was followed, with what it was at the evaluations.

    At most `MOST_FOLLOWED` evaluations, evenly spaced with the first and the last one, are shown.
    """
    places = range(len(evaluations))
    if len(places) > MOST_FOLLOWED:
        last = len(places) - 1
        places = sorted({round(i * last / (MOST_FOLLOWED - 1)) for i in range(MOST_FOLLOWED)})
    texts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for place in places:
        evaluation = evaluations[place]
        for sample in evaluation.samples:
            row = {"step": evaluation.step, "stage": evaluation.stage, "sample": sample}
            texts.setdefault((sample.before, sample.truth), []).append(row)
    return [{"before": before, "truth": truth, "rows": rows}
            for (before, truth), rows in texts.items() if len(rows) > 1]  # fmt: skip


def _guards(run: RunFiles) -> list[dict[str, Any]]:
    """Describe the guards whose figures were measured: now, threshold, and where they fired."""
    states = {name: GuardState() for name in run.stages}
    for stage in run.plan:
        if stage.name in states:
            states[stage.name] = GuardState(stage.config, stage.first_step)
    for record in run.records:
        states[record.stage].see("train" if record.kind == "train" else "eval", record.step,
                                 record.figures)  # fmt: skip
    rows = []
    for guard in GUARDS:
        measured = [
            state for state in states.values()
            if state.value(guard) is not None and state.watches(guard)
        ]  # fmt: skip
        # What fired under an earlier version's rules is not lost.
        measured = measured or [
            state for state in states.values() if state.value(guard) is not None
            and any(fired.name == guard.name for fired in run.fired)
        ]  # fmt: skip
        if measured:
            rows.append({
                "name": guard.name, "title": guard.title, "threshold": guard.threshold,
                "now": format(measured[-1].value(guard), guard.form).replace("-", "−"),
                "is_bad": measured[-1].is_beyond(guard),
                "fired": [fired for fired in run.fired if fired.name == guard.name],
            })  # fmt: skip
    return rows


def _answers(evaluations: Sequence[Record], results: Results) -> dict[str, Any]:
    """Return accuracies and correct thoughts: of ``results.json``, or else as last evaluated."""
    figures = {key: results.accuracy.get(name) for name, key in ACCURACIES.items()}
    n, step = results.accuracy.get("n"), None
    if all(share is None for share in figures.values()):
        n = None
        for record in evaluations:
            if record.figures.keys() & figures:
                step, n = record.step, record.figures.get("num_answers")
                figures = {key: record.figures.get(key) for key in figures}
    own, without = figures["accuracy_with_thoughts"], figures["accuracy_without_thoughts"]
    before, after = map(results.right_thoughts.get, ("before", "after"))
    if before is None and after is None:
        _, values = series(evaluations, "eval", "right_thoughts")
        before, after = values[0] if values[1:] else None, values[-1] if values else None
    shares = [(line, figures.get(line.key)) for line in CHARTS[0].lines]
    return {
        "lines": [(line, share) for line, share in shares if share is not None],
        "gained": None if own is None or without is None else own - without,
        "n": n, "step": step, "before": before, "after": after,
    }  # fmt: skip


def _card(
    chart: Chart, records: Sequence[Record], measured: set[str], of_answers: bool, n: float | None
) -> dict[str, str]:
    """Heading, caption and description of a chart; the newest values are for screen readers."""
    caption = chart.caption
    if of_answers and chart.name in ("nll", "gain"):
        caption += " Here of the first token of each answer alone, which may be just a space."
    if chart.name == "gain" and "gain_of_content" not in measured:
        caption += " The gain of content was not measured here."
    if chart.name in ("accuracy", "probability") and n is not None and n < FEW_ITEMS:
        caption += f" There are {n:.0f} of them, too few to tell."
    parts = [chart.title + " over the steps"]
    for line in chart.lines:
        kind = "eval" if series(records, "eval", line.key)[1] else "train"
        steps, values = series(records, kind, line.key)
        if values:
            where = "held out" if kind == "eval" else "in training"
            parts.append(f"{line.name} {chart.show(values[-1])} {where} at step {steps[-1]}")
    return {"name": chart.name, "title": chart.title, "caption": caption,
            "description": "; ".join(parts) + "."}  # fmt: skip
