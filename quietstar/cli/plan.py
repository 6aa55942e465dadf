"""``quietstar plan``: the memory that a run will need, before it runs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from quietstar.config import Config
from quietstar.errors import UserError
from quietstar.training.memory_plan import ENGINES, Estimate, estimate_run
from quietstar.training.setup import check_batch, quiet_libraries

GPU_GIB = (16, 24, 40, 48, 80, 141)
"""Memory of common GPUs."""
EXIT_DOES_NOT_FIT = 1
_GIB, _MIB = 2**30, 2**20


def plan(config: Config, options: dict[str, str]) -> int | None:
    """Print the table; returns an exit code that says whether it fits ``--memory``.

    Args:
        config: Of the run.
        options: ``engine``, ``processes``, ``memory`` (GiB) and ``json`` (a file), all optional.

    Raises:
        UserError: An option or the config cannot be.
    """
    quiet_libraries()
    processes = int(_number("processes", options.get("processes", "1")))
    memory = _number("memory", options["memory"]) if "memory" in options else None
    engine = options.get("engine", "single" if processes == 1 else "ddp")
    if engine not in ENGINES:
        raise UserError(f"--engine: {engine!r} is unknown; known: {', '.join(ENGINES)}")
    if engine == "single" and processes > 1:
        raise UserError(f"--engine: single is one process, not {processes}; give another engine")
    check_batch(config, processes)
    estimate = estimate_run(config, engine, processes)
    console = Console(highlight=False)
    console.print(_table(estimate, f"memory of each of {processes} processes, {engine}"))
    console.print(_verdict(estimate.total / _GIB, memory))
    if "json" in options:
        totals = {"total": estimate.total, "total_on_cpu": estimate.total_on_cpu}
        figures = {**asdict(estimate), **totals}
        Path(options["json"]).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    fits = memory is None or estimate.total <= memory * _GIB
    return None if fits else EXIT_DOES_NOT_FIT


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf or (name == "processes" and value != int(value)):
        raise UserError(f"--{name}: {text!r} must be a number above 0; write --{name} 8")
    return value


def _table(estimate: Estimate, title: str) -> Table:
    rows = {
        "weights": estimate.weights,
        "optimiser": estimate.optimizer,
        "gathered layers, gradients under way": estimate.exchange,
        "at the peak of a step": estimate.step,
        "  rollout": estimate.rollout,
        "    of it keys and values": estimate.cache,
        "  forward and backward": estimate.learning + estimate.learning_gradients,
        "    of it gradients": estimate.learning_gradients,
        "    of it a chunk of logits": estimate.logits,
        "  all gradients": estimate.gradients,
    }
    table = Table(title=title)
    table.add_column("for")
    table.add_column("MiB", justify="right")
    for name, size in rows.items():
        table.add_row(name, f"{size / _MIB:,.0f}", style="dim" if name.startswith(" ") else None)
    table.add_section()
    table.add_row(
        "total, above the imported process", f"{estimate.total / _MIB:,.0f}", style="bold"
    )
    table.add_row("on a CPU, with what a run loads besides", f"{estimate.total_on_cpu / _MIB:,.0f}")
    return table


def _verdict(gib: float, memory: float | None) -> str:
    if memory is not None:
        word = "fits" if gib <= memory else "does not fit"
        return f"{gib:.1f} GiB: {word} into {memory:g} GiB"
    fitting = [size for size in GPU_GIB if gib <= size]
    smallest = f"fits a GPU of {fitting[0]} GiB" if fitting else "fits no GPU of 141 GiB"
    return f"{gib:.1f} GiB: {smallest} (a GPU's own context takes about half a GiB more)"
