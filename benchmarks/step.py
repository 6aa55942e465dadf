"""``python -m benchmarks.step``: seconds and memory of a training step, beside the floor.

Step and floor run in turn in one process; the figures are medians. The floor is measured with
several batch sizes and the fastest counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.floor import floor_batches, floor_step, share_of
from benchmarks.measure import environment, in_turn, peak_mb, precision
from benchmarks.models import make_contest
from benchmarks.options import report_result, run, settings_of, step_parser
from quietstar.backbone.compiling import compile_layers, require_compiler
from quietstar.backbone.devices import find_device
from quietstar.losses.groups import resolve_chunk_tokens

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}
"""Of bfloat16 matrix products without sparsity, by part of the device's name."""


def main(arguments: list[str]) -> int:
    """Run the benchmark, print a table, write JSON if asked."""
    args = step_parser("step", __doc__).read(arguments)
    result = bench_step(args)
    table = Table(title=f"training step of {args.model}, {args.dtype}")
    for column in ("step s", "floor s", "step / floor", "peak MB above model"):
        table.add_column(column, justify="right")
    figures = ("step_seconds", "floor_seconds", "step_over_floor", "peak_mb_above_model")
    table.add_row(*[f"{result[name]:.3f}" for name in figures[:3]], f"{result[figures[3]]:.0f}")
    return report_result(table, result, args.json)


def bench_step(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one setting; keys as in the JSON file."""
    device = find_device(args.device)
    contest = make_contest(args, device)
    model, plain, tokens = contest.model.train(), contest.plain, contest.tokens
    if args.paper_losses:
        loss = model.objective.settings
        model.configure(loss=loss.model_copy(update={"thought_weight": 0.0}))
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable()
    if args.compile:
        require_compiler("--compile", "leave it out")
        compile_layers(model.causal_lm)
    tokens_at_once = "auto" if args.block_tokens is None else args.block_tokens or None
    model.learn_chunk_tokens = resolve_chunk_tokens(
        tokens_at_once, device, sharded=False, checkpointing=args.activation_checkpointing
    )

    def step() -> None:
        with precision(args.dtype, device):
            output = model(tokens, sample_ids=torch.arange(args.batch_size, device=device))
        assert output.loss is not None, "forward gives a loss"
        output.loss.backward()
        model.zero_grad(set_to_none=True)

    def floor(rows: int) -> None:
        with precision(args.dtype, device):
            floor_step(plain, contest.sizes, rows, share_of(args))
        plain.zero_grad(set_to_none=True)

    peak = peak_mb(step, device)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    batches = floor_batches(args.seq_len)
    step_seconds, floor_seconds, rows = in_turn(step, floor, batches, args.repeats)
    return {
        "step_seconds": step_seconds,
        "floor_seconds": floor_seconds,
        "step_over_floor": step_seconds / floor_seconds,
        "peak_mb_above_model": peak,
        "peak_mb_above_gradients": peak - gradients / 2**20,
        **_flops(lambda: floor(rows), step_seconds, device),
        "settings": settings_of(args),
        "environment": environment() | {"floor_batch_rows": rows},
    }


def _flops(floor: Callable[[], None], seconds: float, device: str) -> dict[str, Any]:
    """FLOP of the floor's matrix products, and how much of the device's peak a step makes of them.

    Attention on CPUs is not counted: torch's counter does not know its kernel.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        floor()
    total = counter.get_total_flops()
    found = {"floor_tflop": total / 1e12, "tflop_per_second": total / 1e12 / seconds}
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else ""
    for gpu, peak in PEAK_TFLOPS.items():
        if gpu in name:
            found["share_of_peak"] = found["tflop_per_second"] / peak
    return found


if __name__ == "__main__":
    run(main)
