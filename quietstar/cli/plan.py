"""``quietstar train --plan``: the memory that a run will need, and seconds by a model of cost."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from quietstar.cli.options import Parser, number, whole
from quietstar.config.loading import load_config, resolve_config_file
from quietstar.errors import UserError
from quietstar.system.files import write_json

if TYPE_CHECKING:
    from quietstar.training.memory_plan import Estimate

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
GPU_GIB = (16, 24, 40, 48, 80, 141)
"""Memory of common GPUs."""
MOST_ON_A_NODE = 8
EXIT_DOES_NOT_FIT = 1
_GIB, _MIB = 2**30, 2**20


def add_options(parser: Parser) -> None:
    """Add ``--plan`` and what belongs to it."""
    parser.flag("--plan", "say what memory a run needs; exit 1 if above --memory")
    engines = f"of --plan: {', '.join(ENGINES)}"
    parser.add_argument("--engine", choices=ENGINES, metavar="NAME", help=engines)
    value, gib = parser.value, number(0.0, 1e6, "GiB of one GPU", above=True)
    most = whole(1, 2**20, "no cluster has more")
    value("--processes", most, 1, "N", "of --plan: GPUs of the run")
    value("--memory", gib, None, "GIB", "of --plan: what each GPU has")
    parser.output("--json", "of --plan: file for its numbers")


def plan(parser: Parser, args: argparse.Namespace, overrides: Sequence[str]) -> int | None:
    """Print the table; return an exit code that says whether the run fits ``--memory``."""
    parser.warn_idle(args, {"--force": None if args.json else "without --json"})
    engine = args.engine or ("single" if args.processes == 1 else "ddp")
    if engine == "single" and args.processes > 1:
        raise UserError(
            f"--engine (single): is one process, not {args.processes}; give another engine"
        )
    config = load_config(args.config, overrides, args.preset)
    inputs = {"--config": resolve_config_file(args.config)[0]}
    for stage in config.stage_configs().values():
        named = {"model.name_or_path": stage.model.name_or_path,
                 "model.tokenizer": stage.model.tokenizer, "data.train": stage.data.train,
                 "data.eval": stage.data.eval,
                 "judge.model": stage.judge.model,
                 "loss.teacher": getattr(stage.loss, "teacher", None)}  # fmt: skip
        inputs |= {f"{key} ({name})": Path(name) for key, name in named.items() if name}
    parser.check(args, inputs)

    from quietstar.training.build import check_batch, quiet_libraries
    from quietstar.training.memory_plan import estimate_run  # imports torch

    quiet_libraries()
    check_batch(config, args.processes)
    estimate = estimate_run(config, engine, args.processes)
    console = Console(highlight=False)
    console.print(_table(estimate, f"memory of each of {args.processes} processes, {engine}"))
    console.print(_cost_table(estimate))
    gib = estimate.total / _GIB
    fits = args.memory is None or gib <= args.memory
    fitting = [size for size in GPU_GIB if gib <= size]
    verdict = f"fits a GPU of {fitting[0]} GiB" if fitting else "fits no GPU of 141 GiB"
    verdict += " (a GPU's own context takes about half a GiB more)"
    if args.memory is not None:
        verdict = f"{'fits' if fits else 'does not fit'} into {args.memory:g} GiB"
    console.print(f"{gib:.1f} GiB: {verdict}")
    command = [args.config, *(["--preset", args.preset] if args.preset else []), *overrides]
    console.print(
        f"launch: {_launcher(engine, args.processes)} {shlex.join(command)}", soft_wrap=True
    )
    totals = {"total": estimate.total, "total_on_cpu": estimate.total_on_cpu,
              "resident": estimate.resident}  # fmt: skip
    if args.json is not None:
        write_json(args.json, {**asdict(estimate), **totals})
    return None if fits else EXIT_DOES_NOT_FIT


def _launcher(engine: str, processes: int) -> str:
    """Return the command that launches such a run, up to its config."""
    if engine == "single":
        return "launch/single.sh"
    if processes <= MOST_ON_A_NODE:
        return f"launch/node.sh {engine}"
    nodes = f"--nodes {-(-processes // MOST_ON_A_NODE)} --gpus-per-node {MOST_ON_A_NODE}"
    return f"sbatch {nodes} launch/slurm.sh {engine}"


def _table(estimate: Estimate, title: str) -> Table:
    rows = {
        "weights": estimate.weights,
        "optimizer": estimate.optimizer,
        "average and start of the weights": estimate.average,
        "gathered layers, gradients in transit": estimate.exchange,
        "at the peak of a step": estimate.step,
        "  rollout": estimate.rollout,
        "    of which keys and values": estimate.cache,
        "  forward and backward": estimate.learning + estimate.learning_gradients,
        "    of which gradients": estimate.learning_gradients,
        "    of which a chunk of logits": estimate.logits,
        "  all gradients": estimate.gradients,
    }
    table = Table(title=title)
    table.add_column("for")
    table.add_column("MiB", justify="right")
    for name, size in rows.items():
        table.add_row(name, f"{size / _MIB:,.0f}", style="dim" if name.startswith(" ") else None)
    table.add_section()
    total = f"{estimate.total / _MIB:,.0f}"
    table.add_row("total, above the imported process", total, style="bold")
    resident = f"{estimate.resident / _MIB:,.0f}"
    table.add_row("the whole process on a CPU, with libraries and heap", resident)
    return table


def _cost_table(estimate: Estimate) -> Table:
    table = Table(title="seconds of a step by the model of cost, not measured")
    table.add_column("GPU, bfloat16")
    for column in ("step", "rollout", "learning", "loss", "optimizer", "of the peak"):
        table.add_column(column, justify="right")
    for name, cost in estimate.costs.items():
        parts = (cost.seconds, cost.rollout, cost.learning, cost.loss, cost.optimizer)
        table.add_row(name, *(f"{part:.3f}" for part in parts), f"{cost.mfu:.0%}")
    return table
