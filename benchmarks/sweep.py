"""``python -m benchmarks.sweep``: how time and memory of a step grow with its sizes.

Every setting runs in a fresh process, beside its own floor. Exponents are slopes of straight lines
through the logarithms.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.measure import environment
from benchmarks.options import run, settings_of, step_parser
from benchmarks.processes import in_fresh_process
from benchmarks.step import bench_step
from quietstar.cli.options import whole
from quietstar.errors import UserError
from quietstar.system.files import write_json

AXES = {
    "S": ("seq_len", (64, 128, 256, 512, 1024)),
    "T": ("thought_length", (4, 8, 12, 16, 24)),
    "K": ("num_thoughts", (1, 2, 3, 4)),
    "A": ("lookahead", (1, 2, 4, 8)),
    "V": ("vocab_size", (2048, 8192, 32768, 131072)),
}
"""By letter: the setting, and its values."""
FIGURES = {
    "step_seconds": "step, s",
    "step_over_floor": "step / floor",
    "peak_mb_above_gradients": "peak MB above model and gradients",
}


def main(arguments: Sequence[str]) -> int:
    """Run all settings, print a table, write JSON and the plot if asked.

    Raises:
        UserError: An unknown axis.
    """
    parser = step_parser("sweep", __doc__)
    parser.add_argument("--axes", default="STKAV", help="letters of the sizes to change")
    parser.add_argument("--step-tokens", type=whole(1), metavar="N",
        help="texts a step: N / S, so that all lengths have as many tokens")  # fmt: skip
    parser.output("--plot", "of all figures", ".svg", ".png", metavar="FILE.svg")
    args = parser.read(arguments)
    unknown = set(args.axes) - set(AXES)
    if unknown or not args.axes:
        raise UserError(f"--axes ({args.axes}): must be letters of {''.join(AXES)}")
    found: dict[str, list[dict[str, Any]]] = {}
    for axis in args.axes:  # a sweep takes long: what is known is written before the next axis
        found[axis] = sweep(axis, args)
        Console().print(growth_table(axis, found[axis]))
        if args.json:
            result = {"axes": found, "settings": settings_of(args), "environment": environment()}
            write_json(args.json, result)
        if args.plot:
            write_plot(args.plot, found)
    return 0


def sweep(axis: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures for every value of a size, the others as they are."""
    name, values = AXES[axis]
    rows = []
    for value in track(values, f"{axis}: {name}", console=Console(stderr=True), transient=True):
        changed = argparse.Namespace(**{**vars(args), name: value})
        if args.step_tokens:
            changed.batch_size = max(1, args.step_tokens // changed.seq_len)
        found = in_fresh_process(bench_step, changed)
        rows.append({"value": value, **{figure: found[figure] for figure in FIGURES}})
    return rows


def exponent(rows: Sequence[dict[str, Any]], figure: str) -> float:
    """Slope of log(figure) over log(value)."""
    values = [row["value"] for row in rows]
    figures = [max(row[figure], 1e-9) for row in rows]
    return float(np.polyfit(np.log(values), np.log(figures), 1)[0])


def growth_table(axis: str, rows: Sequence[dict[str, Any]]) -> Table:
    """A row for every value, and the exponents below."""
    name, _ = AXES[axis]
    shown = Table(title=f"{name} ({axis})", title_justify="left", box=box.SIMPLE_HEAD,
                  show_footer=True)  # fmt: skip
    shown.add_column(axis, footer="exponent")
    for figure, title in FIGURES.items():
        footer = f"{exponent(rows, figure):+.2f}"
        shown.add_column(title, justify="right", footer=footer)
    for row in rows:
        shown.add_row(
            f"{row['value']:,}", f"{row['step_seconds']:.3f}", f"{row['step_over_floor']:.3f}",
            f"{row['peak_mb_above_gradients']:,.0f}",
        )  # fmt: skip
    return shown


def write_plot(path: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    """Every figure over every size; sizes and seconds logarithmic."""
    figure = Figure(figsize=(2.4 * len(found), 2.6 * len(FIGURES)), layout="constrained")
    grid = figure.subplots(len(FIGURES), len(found), squeeze=False)
    for column, (axis, rows) in enumerate(found.items()):
        values = [row["value"] for row in rows]
        for axes, (name, title) in zip(grid[:, column], FIGURES.items(), strict=True):
            axes.plot(values, [row[name] for row in rows], "o-", color="#0072b2")
            axes.set_xscale("log")
            axes.set_xticks(values, [f"{value:,}" for value in values], rotation=45)
            axes.minorticks_off()
            axes.set_xlabel(axis)
            if name == "step_seconds":
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
            if column == 0:
                axes.set_ylabel(title.replace(" above", "\nabove"))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    run(main)
