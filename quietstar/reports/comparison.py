"""Several runs compared over their seeds: one table of the held-out figures at their ends."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quietstar.config import Config
from quietstar.config.loading import load_config
from quietstar.errors import ConfigError, UserError, visible
from quietstar.evaluation.controls import CONTROL_NAMES, GAINS, MADE
from quietstar.evaluation.statistics import mean_over_seeds
from quietstar.registry import importing_nothing
from quietstar.reports.pages import MISSING, percent, plain, signed
from quietstar.reports.run_files import RunFiles, series
from quietstar.training.run_dir import CONFIG_FILE, FREE_ON_RESUME, flat
from quietstar.training.stages import plan_stages

FIGURES = {
    "accuracy_without_thoughts": ("right without thoughts", percent),
    "accuracy_with_thoughts": ("right with thoughts", percent),
    **{f"accuracy_{name}": (f"right with {text}", percent) for name, text in CONTROL_NAMES.items()},
    "right_thoughts": ("right thoughts", percent),
    "base_nll": ("NLL without thoughts", plain),
    "mixed_nll": ("NLL with thoughts", plain),
    "gain": ("gain of thinking, nats", signed),
    "gain_of_content": ("gain of content, nats", signed),
    **{GAINS[name]: (f"gain over {CONTROL_NAMES[name]}, nats", signed) for name in MADE},
    "training_seconds": ("training, seconds", lambda value: plain(value, 1)),
}
"""Rows of the table: what each is called there, and how it is written."""
# More steps or other held-out texts make another run, whatever a resume may change.
_SAME_RUN = {"training.seed", *FREE_ON_RESUME} - {"training.max_steps", "data.eval_sequences"}
_SEED_IN_NAME = re.compile(r"[-_. ]?seed[-_. =]?\d+", re.IGNORECASE)
MOST_DIFFERENCES = 6
"""Settings that are named to tell a group from the first one."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    seed: int
    settings: Mapping[str, str]  # that decide its figures, seed aside
    figures: Mapping[str, float]
    warnings: frozenset[str]  # names of the guards that fired


def read_run(folder: Path) -> Run:
    """Read the config and the figures of a finished run.

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
        with importing_nothing():
            config = load_config(folder / CONFIG_FILE)
    except ConfigError as error:
        raise UserError(f"RUN ({folder}): {error.problems[0]}") from error
    files, stages = RunFiles(folder), plan_stages(config)
    of_last = [r for r in files.records if r.kind == "eval" and r.stage == stages[-1].name]
    done, total = of_last[-1].step if of_last else 0, stages[-1].last_step
    if done < total:
        raise UserError(
            f"RUN ({folder}): is evaluated up to step {done} of {total}, so its final figures are "
            "missing. Finish it with --resume auto, or leave it out."
        )
    seconds = 0.0
    for stage in stages:
        records = [record for record in files.records if record.stage == stage.name]
        times = series(records, "train", "seconds")[1]
        seconds += fmean(times or [0.0]) * stage.config.training.max_steps
    known = {key: value for key, value in of_last[-1].figures.items() if key in FIGURES}
    figures = {**known, "training_seconds": seconds}
    warnings = frozenset(guard.name for guard in files.fired)
    return Run(folder, config.training.seed, _settings(config), figures, warnings)


def _settings(config: Config) -> dict[str, str]:
    """Return what must agree between runs that differ in their seed alone.

    The model that a stage starts from may lie in a folder with the seed in its name, as those of
    ``quietstar train --controls``.
    """
    seed = rf"(seed[-_. =]?){config.training.seed}(?!\d)"
    settings = {}
    for key, value in flat(config).items():
        if re.sub(r"^stages\.[^.]+\.", "", key) not in _SAME_RUN:
            settings[key] = re.sub(seed, r"\1*", value) if key.startswith("model.") else value
    return settings


def compare_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """Compare finished runs; those that differ in their seed alone are a group.

    Returns:
        ``groups``, each with its ``name``, ``runs``, ``seeds``, the ``settings`` that differ from
        the first group's, ``figures`` (by key: ``n``, ``mean``, its 95 % interval ``ci95`` by
        Student's t over the seeds, and the ``values`` in the order of the seeds) and ``warnings``
        (by name: in how many of the runs the health check failed).

    Raises:
        UserError: A folder holds no finished run, or two hold the same settings and seed.
    """
    groups: defaultdict[tuple[tuple[str, str], ...], list[Run]] = defaultdict(list)
    for folder in folders:
        run = read_run(folder)
        group = groups[tuple(sorted(run.settings.items()))]
        if twin := next((other for other in group if other.seed == run.seed), None):
            raise UserError(
                f"RUN ({folder}): has the settings and the seed ({run.seed}) of {twin.folder}, and "
                "would count as another seed. Leave one of them out."
            )
        group.append(run)
    first = next(iter(groups.values()))[0].settings
    result, names = [], Counter()
    for runs in groups.values():
        group = _group(runs, first)
        names[group["name"]] += 1
        if (number := names[group["name"]]) > 1:
            group["name"] += f" ({number})"
        result.append(group)
    return {"groups": result}


def _group(runs: Sequence[Run], first: Mapping[str, str]) -> dict[str, Any]:
    """Return a group as JSON; ``first`` are the settings of the first group."""
    runs = sorted(runs, key=lambda run: run.seed)
    settings, folder = runs[0].settings, runs[0].folder.resolve().name
    name = _SEED_IN_NAME.sub("", folder).removesuffix(f"-{runs[0].seed}") or folder
    figures = {}
    for key in FIGURES:
        values = [run.figures[key] for run in runs if key in run.figures]
        if values:
            figures[key] = {"n": len(values), **mean_over_seeds(values), "values": values}
    return {
        "name": name,
        "runs": [str(run.folder) for run in runs],
        "seeds": [run.seed for run in runs],
        "settings": {
            key: settings.get(key, "")
            for key in {**first, **settings}
            if settings.get(key) != first.get(key)
        },
        "figures": figures,
        "warnings": dict(Counter(sorted(name for run in runs for name in run.warnings))),
    }


def comparison_view(result: Mapping[str, Any]) -> RenderableType:
    """Show the result of `compare_runs`: a row for each figure and group, then what groups are."""
    groups = result["groups"]
    table = Table(title="held-out figures at the end, over seeds", title_justify="left",
                  box=box.SIMPLE_HEAD)  # fmt: skip
    for heading in ("figure", "runs", "seeds", "mean", "95% CI"):
        left = heading in ("figure", "runs")
        table.add_column(heading, justify="left" if left else "right", no_wrap=not left)
    for key, (label, show) in FIGURES.items():
        rows = [(group, group["figures"][key]) for group in groups if key in group["figures"]]
        for place, (group, figure) in enumerate(rows):
            interval = MISSING if figure["ci95"] is None else " to ".join(map(show, figure["ci95"]))
            table.add_row(label if place == 0 else "", Text(visible(group["name"])),
                          str(figure["n"]), show(figure["mean"]), interval)  # fmt: skip
        if rows and len(groups) > 1:
            table.add_section()
    lines = []
    for group in groups:
        changed = [f"{key}: {value}" for key, value in group["settings"].items()]
        more = len(changed) - MOST_DIFFERENCES
        changed = changed[:MOST_DIFFERENCES] + ([f"and {more} more"] if more > 0 else [])
        count = len(group["seeds"])
        fired = ", ".join(f"{name} in {n} of {count}" for name, n in group["warnings"].items())
        text = f"{group['name']}: seeds {', '.join(map(str, group['seeds']))}"
        text += f"; {', '.join(changed)}" if changed else ""
        lines.append(Text(visible(f"{text}; warnings: {fired or 'none'}")))
    return Group(table, *lines)
