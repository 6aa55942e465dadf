"""``python -m benchmarks.rollout``: seconds and memory of sampling all thoughts, beside the floor.

The floor: a plain causal LM's forward without gradient over as many tokens, with logits where a
token is sampled. Both run in turn in one process; the figures are medians.
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table

from benchmarks.floor import floor_batches, floor_rollout, share_of
from benchmarks.measure import environment, in_turn, peak_mb, precision
from benchmarks.models import make_contest
from benchmarks.options import report_result, run, settings_of, sizes_parser
from quietstar.backbone.devices import find_device


def main(arguments: list[str]) -> int:
    """Run the benchmark, print a table, write JSON if asked."""
    args = sizes_parser("rollout", __doc__).read(arguments)
    result = bench_rollout(args)
    table = Table(title=f"sampling of thoughts, {args.model}, {args.dtype}")
    for column in ("rollout s", "floor s", "rollout / floor", "tokens/s", "peak MB above model"):
        table.add_column(column, justify="right")
    fine = ("rollout_seconds", "floor_seconds", "rollout_over_floor")
    coarse = ("tokens_per_second", "peak_mb_above_model")
    cells = [f"{result[name]:.3f}" for name in fine] + [f"{result[name]:,.0f}" for name in coarse]
    table.add_row(*cells)
    return report_result(table, result, args.json)


def bench_rollout(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one setting; keys as in the JSON file."""
    device = find_device(args.device)
    contest = make_contest(args, device)
    model, tokens = contest.model, contest.tokens
    sampled = 0

    def rollout() -> None:
        nonlocal sampled
        with precision(args.dtype, device):
            thoughts = model.draw(
                tokens, num_thoughts=args.num_thoughts, temperature=1.0
            ).tokens  # fmt: skip
        sampled = thoughts.numel()

    def floor(rows: int) -> None:
        with precision(args.dtype, device):
            floor_rollout(contest.plain, contest.sizes, rows, share_of(args))

    peak = peak_mb(rollout, device)
    batches = floor_batches(args.seq_len)
    mine, floor_seconds, rows = in_turn(rollout, floor, batches, args.repeats)
    return {
        "rollout_seconds": mine,
        "floor_seconds": floor_seconds,
        "rollout_over_floor": mine / floor_seconds,
        "tokens_per_second": sampled / mine,
        "peak_mb_above_model": peak,
        "settings": settings_of(args),
        "environment": environment() | {"floor_batch_rows": rows},
    }


if __name__ == "__main__":
    run(main)
