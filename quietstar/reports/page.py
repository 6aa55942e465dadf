"""Puts the page together from a run folder."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from quietstar.config.yaml import YamlProblem, parse
from quietstar.errors import UserError
from quietstar.reports.artifacts import Controls, Results, Samples, read_part
from quietstar.reports.charts import CHARTS, describe, evaluation_rows, explain, has_data
from quietstar.reports.forest import difference_rows, draw_forest, variant_rows
from quietstar.reports.formats import duration
from quietstar.reports.headline import headline
from quietstar.reports.plots import Figure, draw, plotly_script
from quietstar.reports.records import Record, find_stages, read_records, series
from quietstar.reports.tables import difference_table, sample_table, tally, variant_table

REPORT_FILE = "report.html"
_PACKAGE = "quietstar.reports"
_TEMPLATE, _STYLE, _SCRIPT = "template.html.j2", "style.css", "script.js"


@dataclass(frozen=True)
class Run:
    """What a run folder says."""

    name: str
    config: str
    records: list[Record]
    stages: list[str]
    results: Results
    samples: Samples
    controls: Controls


@dataclass(frozen=True)
class Card:
    """A chart as the template needs it; its figure is embedded under the same name."""

    name: str
    title: str
    caption: str
    description: str


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder: one file that opens without a network.

    Args:
        folder: With ``metrics.jsonl`` or ``controls.json`` or both, and whatever there is of
            ``config.yaml``, ``results.json`` and ``samples.json``. What is missing is left out.

    Returns:
        The path of the page.

    Raises:
        UserError: The folder holds no figures, a file of it is damaged, or plotly is missing.
    """
    page = render(read_run(folder))
    path = folder / REPORT_FILE
    # A text of a model may hold half a surrogate pair, which UTF-8 cannot.
    path.write_bytes(page.encode("utf-8", "replace"))
    return path


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: It holds no figures, or a file of it is damaged.
    """
    metrics, controls, config = (
        folder / name for name in ("metrics.jsonl", "controls.json", "config.yaml")
    )
    records = read_records(metrics) if metrics.exists() else []
    if not records and not controls.exists():
        lack = "no complete record yet" if metrics.exists() else f"no {metrics.name}"
        raise UserError(
            f"{folder}: {lack} and no {controls.name}, so there is nothing to report; give the "
            "folder of a run (training.output_dir)"
        )
    return Run(
        name=folder.resolve().name,
        config=config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
        records=records,
        stages=find_stages(records),
        results=read_part(folder / "results.json", Results),
        samples=read_part(folder / "samples.json", Samples),
        controls=read_part(controls, Controls),
    )


def render(run: Run) -> str:
    """The page as HTML.

    Raises:
        UserError: plotly is not installed.
    """
    figures = draw_all(run)
    samples = sample_table(run.samples.samples)
    scripts = [normal(load_plotly()), normal(packaged(_SCRIPT))] if figures else []
    template = environment().get_template(_TEMPLATE)
    return template.render(
        run=run,
        facts=facts(run),
        groups=headline(run.records, run.results, run.controls),
        cards=cards(run),
        evaluations=evaluation_rows(run.records, run.stages),
        variants=variant_table(run.controls),
        differences=difference_table(run.controls),
        samples=samples,
        tally=tally(samples),
        figures=figures,
        style=Markup(packaged(_STYLE)),
        scripts=[Markup(source) for source in scripts],
        script_hashes=[hash_source(source) for source in scripts],
    )


def environment() -> Environment:
    """Jinja with every text escaped, in HTML and in JSON."""
    result = Environment(
        loader=PackageLoader(_PACKAGE, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    result.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return result


def packaged(name: str) -> str:
    """A file of this package."""
    return resources.files(_PACKAGE).joinpath(name).read_text(encoding="utf-8")


def load_plotly() -> str:
    """The source of plotly.js.

    Raises:
        UserError: plotly is not installed.
    """
    try:
        return plotly_script()
    except ImportError as error:
        raise UserError(
            f"a report needs plotly ({error}); install it: pip install plotly"
        ) from error


def normal(script: str) -> str:
    """A script as a browser reads it, with its line ends: what its hash is taken of."""
    return script.replace("\r\n", "\n").replace("\r", "\n")


def hash_source(script: str) -> str:
    """The hash by which the content security policy admits a script."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")


def cards(run: Run) -> list[Card]:
    """The charts over the steps that have something to show."""
    return [
        Card(
            name=chart.name,
            title=chart.title,
            caption=explain(chart, run.records),
            description=describe(chart, run.records),
        )
        for chart in CHARTS
        if has_data(chart, run.records)
    ]


def draw_all(run: Run) -> dict[str, Figure]:
    """All figures of the page by the name of their element."""
    figures = {
        chart.name: draw(chart, run.records, run.stages)
        for chart in CHARTS
        if has_data(chart, run.records)
    }
    if variants := variant_rows(run.controls):
        figures["variants"] = draw_forest(variants, "accuracy", ".0%", ".1%")
    if differences := difference_rows(run.controls):
        title = "difference of accuracy, points"
        figures["differences"] = draw_forest(differences, title, "", "+.1f")
    return figures


def facts(run: Run) -> list[tuple[str, str]]:
    """What the run was, in a few words."""
    seeds = "" if run.records else ", ".join(map(str, run.controls.seeds))
    found = {
        "Model": from_config(run.config, "model", "name_or_path"),
        "Data": from_config(run.config, "data", "train"),
        "Stages": " → ".join(filter(None, run.stages)),
        "Steps": str(run.records[-1].step) if run.records else "",
        "Time": "" if run.results.seconds is None else duration(run.results.seconds),
        "Step time": step_time(run.records),
        "Seeds": seeds,
    }
    return [(label, value) for label, value in found.items() if value]


def from_config(config: str, section: str, key: str) -> str:
    """A text in the config; empty if it is not there."""
    try:
        tree: Any = parse(config).data
    except YamlProblem:
        return ""
    for part in (section, key):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree if isinstance(tree, str) else ""


def step_time(records: Sequence[Record]) -> str:
    """The median time of a training step of the last stage."""
    last = [record for record in records if record.stage == records[-1].stage]
    _, seconds = series(last, "train", "seconds")
    return f"{median(seconds):.2g} s" if seconds else ""
