"""Several runs compared over their seeds: one table of the held-out metrics at their ends."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import RenderableType

from quietstar.config import Config
from quietstar.config.loading import load_config
from quietstar.errors import ConfigError, UserError
from quietstar.evaluation.metrics import METRICS, label_of
from quietstar.evaluation.statistics import mean_over_seeds
from quietstar.registry import trusting
from quietstar.reports.charts import Card, Panel, Trace, draw_lines, literal, padded, with_zero
from quietstar.reports.formats import MISSING, show
from quietstar.reports.pages import Cards, Cell, Line, Section, Table, write_html
from quietstar.reports.run_files import RunFiles, series
from quietstar.reports.terminal import view
from quietstar.training.run_dir import CONFIG_FILE, FREE_ON_RESUME, flat
from quietstar.training.stages import Stage, plan_stages

ACCURACY, REWARD = "accuracy_with_thoughts", "policy_reward"
CURVES = {
    ACCURACY: ("Accuracy", "accuracy"),
    "gold_probability_with_thoughts": ("P(gold answer)", "probability"),
    "gain_of_content": ("Gain of content", "nats/token"),
    "gain": ("Gain of thinking", "nats/token"),
    "mixed_nll": ("NLL of the next token", "nats/token"),
    REWARD: ("Reward of the objective", "reward"),
}
"""What the page draws over the steps of the last stage, and its unit: held out, and in training
what the objective was given."""
REWARD_POINTS = 10
"""Points of that curve: means over as many steps as it takes, because single steps vary."""
_OF_PLAIN_RUNS = {
    ACCURACY: "accuracy_without_thoughts",
    "gold_probability_with_thoughts": "gold_probability_without_thoughts",
    "mixed_nll": "base_nll",
}
"""What a run that does not think has in their place."""
LOOKS = (("group-1", "o"), ("group-2", "s"), ("group-3", "t"), ("group-4", "D"), ("group-5", "v"),
         ("group-6", "P"))  # fmt: skip
"""Colors and symbols of groups."""
# More steps or other held-out texts make another run, whatever a resume may change.
_SAME_RUN = {"training.seed", *FREE_ON_RESUME} - {"training.max_steps", "data.eval_sequences"}
_SEED_IN_NAME = re.compile(r"[-_. ]?seed[-_. =]?\d+", re.IGNORECASE)
MOST_THOUGHTS = 3
"""Thoughts of a group that the page shows."""
MOST_DIFFERENCES = 6
"""Settings that are named to tell a group from the first one."""


def read_run(folder: Path) -> dict[str, Any]:
    """Read a finished run: a group of `compare_runs` that has one run, with all its settings.

    ``training_seconds`` is the mean time of a recorded step times the number of steps, summed over
    stages: without evaluations and checkpoints, and the same for a run that was interrupted.

    Raises:
        UserError: It is no run, or is not finished, or one of its files is damaged.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"RUN ({folder}): has no {CONFIG_FILE}, so it is no run. Give the folder of a run "
            "(training.output_dir), such as runs/x, or those in FOLDER_controls/seed-0."
        )
    try:
        config = load_config(folder / CONFIG_FILE)
    except ConfigError as error:
        raise UserError(f"RUN ({folder}): {error.problems[0]}") from error
    files, stages = RunFiles(folder), plan_stages(config)
    last = stages[-1]
    of_stage = {s.name: [r for r in files.records if r.stage == s.name] for s in stages}
    evaluations = [record for record in of_stage[last.name] if record.kind == "eval"]
    done = evaluations[-1].step if evaluations else 0
    if done < last.last_step:
        raise UserError(
            f"RUN ({folder}): is evaluated up to step {done} of {last.last_step}, so its final "
            "metrics are missing. Finish it with --resume auto, or leave it out."
        )
    metrics = {key: value for key, value in evaluations[-1].metrics.items() if key in METRICS}
    seconds, ends = 0.0, []
    for stage in stages:
        records = of_stage[stage.name]
        times = series(records, "train", "seconds")[1] or [0.0]
        seconds += fmean(times) * stage.config.training.max_steps
        key, tokens = "accuracy_without_thoughts", 0.0
        if not _is_plain(stage):
            lengths = (series(records, "train", n)[1] for n in ("thought_length", "length_limit"))
            longest = float(stage.config.thoughts.length)
            key, tokens = ACCURACY, next((found[-1] for found in lengths if found), longest)
        if shares := series(records, "eval", key)[1]:
            ends.append({"stage": stage.name, "thought_tokens": tokens, "accuracy": shares[-1]})
    metrics["training_seconds"] = seconds
    if ends and ends[-1]["stage"] == last.name:
        metrics["accuracy"] = ends[-1]["accuracy"]
    curves = {key: series(evaluations, "eval", key) for key in (*CURVES, *_OF_PLAIN_RUNS.values())}
    curves[REWARD] = _smooth(*series(of_stage[last.name], "train", REWARD))
    followed = [one for one in files.followed if one.stage == last.name and not _is_plain(last)]
    samples = followed[-1].samples[:MOST_THOUGHTS] if followed else ()
    return {
        "folder": folder, "seed": config.training.seed, "settings": _settings(config),
        "is_plain": _is_plain(last), "metrics": metrics, "ends": ends,
        "curves": {key: [[step - last.first_step for step in steps], values]
                   for key, (steps, values) in curves.items()},
        "thoughts": [{"before": one.before, "thought": one.thought} for one in samples],
        "warnings": {guard.name for guard in files.fired},
    }  # fmt: skip


def _smooth(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return means over equal numbers of steps, each at its last one.

    Steps left over are the first ones: a collapse at the end of training must show.
    """
    size = -(-len(steps) // REWARD_POINTS) or 1
    places = range(len(steps) % size, len(steps), size)
    return [steps[i + size - 1] for i in places], [fmean(values[i : i + size]) for i in places]


def _is_plain(stage: Stage) -> bool:
    """Return True if a stage trains the model without thoughts, such as a plain student."""
    return not stage.thinks or stage.student == "plain"


def _settings(config: Config) -> dict[str, str]:
    """Return what must agree between runs that differ in their seed alone.

    The model that a stage starts from may lie in a folder with the seed in its name, as those of
    ``quietstar train --controls``.
    """
    seed = rf"(seed[-_. =]?){config.training.seed}(?!\d)"
    return {
        key: re.sub(seed, r"\1*", value) if key.startswith("model.") else value
        for key, value in flat(config).items()
        if re.sub(r"^stages\.[^.]+\.", "", key) not in _SAME_RUN
    }


def compare_runs(folders: Sequence[Path], trust_code: bool = False) -> dict[str, Any]:
    """Compare finished runs; those that differ in their seed alone are a group.

    Args:
        folders: Of the runs.
        trust_code: Import what their configs name; only objectives of the user's own need it.

    Returns:
        ``groups``, each with its ``name``, ``runs``, ``seeds``, whether it ``is_plain`` (its last
        stage trained without thoughts), the ``settings`` that differ from the first group's,
        ``metrics`` (by key: ``n``, ``mean``, its 95 % interval ``ci95`` by Student's t over the
        seeds, and the ``values`` in the order of the seeds) and ``warnings`` (by name: in how many
        of the runs the health check failed), some ``thoughts`` of its first run (the text
        ``before``, the ``thought``), and of each run the ``curves`` (by key: steps and values; held
        out, and in training the smoothed ``policy_reward``) and
        the ``ends`` of its stages (``stage``, ``thought_tokens``, ``accuracy``).

    Raises:
        UserError: A folder holds no finished run, or two hold the same settings and seed.
    """
    groups: defaultdict[tuple[tuple[str, str], ...], list[dict[str, Any]]] = defaultdict(list)
    for folder in folders:
        with trusting(trust_code):
            run = read_run(folder)
        group = groups[tuple(sorted(run["settings"].items()))]
        if twin := next((other for other in group if other["seed"] == run["seed"]), None):
            raise UserError(
                f"RUN ({folder}): has the settings and the seed ({run['seed']}) of "
                f"{twin['folder']}, and would count as another seed. Leave one of them out."
            )
        group.append(run)
    first = next(iter(groups.values()))[0]["settings"]
    result, names = [], Counter()
    for runs in groups.values():
        runs.sort(key=lambda run: run["seed"])
        folder = runs[0]["folder"].resolve().name
        name = _SEED_IN_NAME.sub("", folder).removesuffix(f"-{runs[0]['seed']}") or folder
        names[name] += 1
        metrics = {}
        for key in METRICS:
            if values := [run["metrics"][key] for run in runs if key in run["metrics"]]:
                metrics[key] = {"n": len(values), **mean_over_seeds(values), "values": values}
        result.append({
            "name": f"{name} ({names[name]})" if names[name] > 1 else name,
            "runs": [str(run["folder"]) for run in runs],
            "seeds": [run["seed"] for run in runs],
            "is_plain": runs[0]["is_plain"],
            "settings": _differences(runs[0]["settings"], first),
            "metrics": metrics,
            "ends": [run["ends"] for run in runs],
            "curves": [run["curves"] for run in runs],
            "thoughts": runs[0]["thoughts"],
            "warnings": dict(Counter(sorted(name for run in runs for name in run["warnings"]))),
        })  # fmt: skip
    return {"groups": result}


_OF_STAGE = re.compile(r"stages\.([^.]+)\.(.+)")


def _differences(settings: Mapping[str, str], first: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that differ from the first group's, and "" for those that are missing.

    Where runs have other stages, these are named, and the last ones are compared.
    """
    found, stages, last = {}, [], []
    for given in (settings, first):
        matches = {key: _OF_STAGE.fullmatch(key) for key in given}
        names = list(dict.fromkeys(match[1] for match in matches.values() if match))
        stages.append(names)
        shared = {key: given[key] for key, match in matches.items() if not match}
        last.append(shared | {match[2]: given[key] for key, match in matches.items()
                              if match and match[1] == names[-1]})  # fmt: skip
    if stages[0] != stages[1]:
        found["stages"] = ", ".join(stages[0]) or "one"
        settings, first = last
    keys = [key for key in {**first, **settings} if settings.get(key) != first.get(key)]
    return found | {key: settings.get(key, "") for key in keys}


def _changes(group: Mapping[str, Any]) -> list[str]:
    """Name the settings that tell a group from the first one, but for those that it has not.

    One that several stages share is named once.
    """
    named = [(_OF_STAGE.fullmatch(key), key, value) for key, value in group["settings"].items()]
    times = Counter((match[2], value) for match, _, value in named if match)
    texts = [
        f"{match[2] if match and times[match[2], value] > 1 else key}: {value}"
        for match, key, value in named
        if value
    ]
    changed = list(dict.fromkeys(texts))
    more = len(changed) - MOST_DIFFERENCES
    return changed[:MOST_DIFFERENCES] + ([f"and {more} more"] if more > 0 else [])


def _fired(group: Mapping[str, Any]) -> str:
    """Name the guards that fired in a group, and in how many of its runs."""
    count = len(group["seeds"])
    return ", ".join(f"{name} in {n} of {count}" for name, n in group["warnings"].items())


def write_comparison(path: Path, result: Mapping[str, Any]) -> Path:
    """Write the page of what `compare_runs` found; returns its path."""
    groups = result["groups"]
    cards = [_against_cost(groups), *(_curves(groups, key) for key in CURVES)]
    about = [(group["name"], ", ".join(map(str, group["seeds"])),
              "; ".join(_changes(group)) or MISSING, _fired(group) or "none")
             for group in groups]  # fmt: skip
    headings = ("Run", "Seeds", "Settings unlike the first", "Guards that fired")
    thoughts = [
        (group["name"], *(Cell(one[key], kind="text") for key in ("before", "thought")))
        for group in groups
        for one in group["thoughts"]
    ]
    lead = "Greedy thoughts at the last evaluation, in the first held-out texts."
    found = Table("What they think", ("Run", "Text", "Thought"), thoughts, widths=(20, 40, 40))
    differ = Table("What differs", headings, about, widths=(20, 12, 44, 24))
    intervals = "Means over seeds, with 95% intervals by Student's t where there are several."
    sections = [
        Section("groups", "What differs", [differ]),
        Section("thoughts", "What they think", [Line(lead), found] if thoughts else []),
        Section("curves", "Curves", [Cards(drawn)] if (drawn := [c for c in cards if c]) else []),
        Section("metrics", "Held-out metrics at the end", [Line(intervals), _table(groups)]),
    ]
    return write_html(
        path, sections, title=f"{len(groups)} runs · quietstar report",
        eyebrow="Quiet-STaR report", heading="Runs compared",
        top=[Line(_verdict(groups), "verdict as-is")],
    )  # fmt: skip


def _traces(
    groups: Sequence[Mapping[str, Any]],
    points: Callable[[Mapping[str, Any], int], tuple[Sequence[float], Sequence[float], list[str]]],
    line: str = "thick",
) -> list[Trace]:
    """Return a trace for each run: x, y and hints of ``points``, called with a group and a seed."""
    traces = []
    for group, (color, symbol) in zip(groups, LOOKS, strict=False):
        name = literal(group["name"], 40)
        for number, seed in enumerate(group["seeds"]):
            x, y, hints = points(group, number)
            texts = [f"{name}, seed {seed}, {hint}" for hint in hints]
            if x:
                label = name if number == 0 else ""
                traces.append(Trace(label, color, x, y, texts, symbol, line))
    return traces


def _curves(groups: Sequence[Mapping[str, Any]], key: str) -> Card | None:
    """Draw a metric of the groups that have it; None if no run has several values."""
    form = METRICS[key].form if key in METRICS else ".4f"

    def points(group: Mapping[str, Any], number: int) -> tuple[list[int], list[float], list[str]]:
        steps, values = group["curves"][number][_name_in(group, key) or key]
        hints = [f"step {x}: {show(y, form)}" for x, y in zip(steps, values, strict=True)]
        return steps, values, hints

    traces = _traces(groups, points)
    if not any(len(trace.x) > 1 for trace in traces):
        return None
    caption = "Held out, a line for each seed."
    if key == REWARD:
        caption = "In training, smoothed; a line for each seed, in units of loss.reward."
    elif plain_runs := [g["name"] for g in groups if _name_in(g, key) not in (None, key)]:
        caption += f" {', '.join(plain_runs)}: without thoughts."
    if len(groups) > len(LOOKS):
        caption += f" The first {len(LOOKS)} runs alone are drawn."
    values = [value for trace in traces for value in trace.y]
    y_range = padded(min(values), max(values)) if key == "mixed_nll" else with_zero(values)
    title, unit = CURVES[key]
    axes = ("steps of the last stage", unit)
    chart = draw_lines([Panel(traces)], axes, y_range, form.endswith("%"), True)
    return Card(key, title, caption, chart)


def _against_cost(groups: Sequence[Mapping[str, Any]]) -> Card | None:
    """Draw the ends of all stages, unless all that count cost the same.

    The last stage of a run counts, and earlier ones that think, such as those of a curriculum.
    """

    def points(group: Mapping[str, Any], number: int) -> tuple[list[float], list[float], list[str]]:
        ends = group["ends"][number]
        hints = [f"{literal(end['stage'], 40)}: {show(end['accuracy'], '.1%')}, "
                 f"{end['thought_tokens']:.0f} tokens of thought" for end in ends]  # fmt: skip
        return [e["thought_tokens"] for e in ends], [e["accuracy"] for e in ends], hints

    traces = _traces(groups, points, line="")
    if len({cost for trace in traces for cost in (trace.x[-1], *filter(None, trace.x))}) < 2:
        return None
    y_range = with_zero([share for trace in traces for share in trace.y])
    chart = draw_lines([Panel(traces)], ("tokens of a thought", "accuracy"), y_range, True, True)
    caption = "At the end of each stage, over the tokens of a thought; fewer are faster."
    return Card("cost", "Accuracy against its cost", caption, chart)


def _table(groups: Sequence[Mapping[str, Any]]) -> Table:
    """Return a row for each metric and group; a metric that repeats another one is left out."""
    rows = []
    for key, (_, _, form, *_) in METRICS.items():
        if key == "accuracy" and not any(group["is_plain"] for group in groups):
            continue  # all answers are with thoughts
        for group in groups:
            if found := group["metrics"].get(key):
                seeds = " · ".join(show(x, form) for x in found["values"])
                mean = Cell(show(found["mean"], form), [seeds] if found["n"] > 1 else [], "strong")
                interval = show(found["ci95"], form)
                rows.append((label_of(key), group["name"], str(found["n"]), mean, interval))
    headings = ("metric", "run", "seeds", "mean", "95% CI")
    return Table("Metrics", headings, rows, 2, widths=(30, 20, 8, 20, 22))


def _name_in(group: Mapping[str, Any], key: str) -> str | None:
    """Return the metric of a group that goes by ``key``: with thoughts, or that of a plain run."""
    names = [key, _OF_PLAIN_RUNS.get(key)]
    if group["is_plain"]:  # a student is scored with thoughts, too
        names.reverse()
    return next((name for name in names if name in group["metrics"]), None)


def _verdict(groups: Sequence[Mapping[str, Any]]) -> str:
    """Say which group is best by the first metric that all have, and whether it stands out."""
    keys = [key for key in ("accuracy", *CURVES) if all(_name_in(group, key) for group in groups)]
    if not keys:
        return "These runs have no held-out metric in common."

    def said(group: Mapping[str, Any], name: str) -> str:
        label, unit, form, *_ = METRICS[name]
        return f"{label} {show(group['metrics'][name]['mean'], form)} {unit}".rstrip()

    ranked = []
    for group in groups:
        name = _name_in(group, keys[0])
        assert name is not None, "all groups have one"
        text = f"{group['name']}: {said(group, name)}"
        without = {"accuracy": "accuracy_without_thoughts", **_OF_PLAIN_RUNS}.get(name, "base_nll")
        if not group["is_plain"] and without in group["metrics"]:
            text += f" ({said(group, without)})"
        ranked.append((group["metrics"][name], text))
    ranked.sort(key=lambda pair: pair[0]["mean"], reverse=keys[0] != "mixed_nll")
    text = "; ".join(text for _, text in ranked[:2])
    if len(ranked) == 1:
        return f"{text}."
    best, second = ranked[0][0], ranked[1][0]
    if best["ci95"] is not None and second["ci95"] is not None:
        ends = sorted([best["ci95"], second["ci95"]])
        if ends[0][1] < ends[1][0]:
            return f"{text}; their 95% intervals do not overlap."
        if min(best["n"], second["n"]) > 2:  # that of two is wider than most differences
            return f"{text}; their 95% intervals overlap."
    return f"{text}; too few seeds to tell them apart."


def comparison_view(result: Mapping[str, Any]) -> RenderableType:
    """Show the result of `compare_runs`: a row for each metric and group, then what groups are."""
    lines = []
    for group in result["groups"]:
        parts = [f"{group['name']}: seeds {', '.join(map(str, group['seeds']))}"]
        parts += filter(None, [", ".join(_changes(group))])
        lines.append(Line("; ".join([*parts, f"warnings: {_fired(group) or 'none'}"])))
    title = Line("held-out metrics at the end, over seeds", "title")
    return view([title, _table(result["groups"]), *lines])
