"""``python -m benchmarks.tuning``: what each way to tune a model costs.

Every method runs in a fresh process: load, a few steps with the optimiser, and the most memory that
all of it took above the imports.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from rich.table import Table
from torch.optim import Optimizer

from benchmarks.options import add_json, report_result, run, settings_of
from benchmarks.peak_memory import PeakMemory
from benchmarks.processes import in_fresh_process
from quietstar.cli.options import Parser, whole
from quietstar.config import OptimConfig, ThoughtsConfig, TuningConfig
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.model.tuning import WHOLE
from quietstar.training.build import quiet_libraries
from quietstar.training.optimizer import build_optimizer

METHODS = "full,lora,qlora,prefix,houlsby"


def main(arguments: list[str]) -> int:
    """Run the benchmark, print a table, write JSON if asked."""
    args = _parser().read(arguments)
    methods = args.methods.split(",")
    results = [in_fresh_process(measure, args, method) for method in methods]
    table = Table(title=f"tuning {args.model}")
    for column in ("method", "trained", "share", "optimiser MB", "peak MB", "step s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in results:
        table.add_row(
            row["method"],
            f"{row['trained_parameters']:,}",
            f"{row['trained_share']:.2%}",
            f"{row['optimizer_mb']:.0f}",
            f"{row['peak_mb']:.0f}",
            f"{row['step_seconds']:.2f}",
        )
    return report_result(table, results, args.json)


def _parser() -> Parser:
    parser = Parser("python -m benchmarks.tuning", __doc__)
    parser.add_argument("--model", required=True, help="a folder or hub id, with its tokenizer")
    parser.add_argument("--methods", default=METHODS, help="by commas")
    parser.add_argument("--seq-len", type=whole(2), default=64, help="S")
    parser.add_argument("--thought-length", type=whole(1), default=6, help="T")
    parser.add_argument("--lookahead", type=whole(1), default=2, help="A")
    parser.add_argument("--num-thoughts", type=whole(2), default=2, help="K")
    parser.add_argument("--batch-size", type=whole(1), default=1, help="B")
    parser.add_argument("--steps", type=whole(2), default=4, help="the first one is warm-up")
    add_json(parser)
    return parser


def measure(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Figures of one method, in this process; bfloat16 autocast, frozen weights in bfloat16."""
    quiet_libraries()
    dtype = torch.float32 if method in WHOLE else torch.bfloat16
    with PeakMemory() as memory:
        model = QuietStarForCausalLM.from_base(
            args.model,
            thoughts=ThoughtsConfig(
                length=args.thought_length, lookahead=args.lookahead, num_thoughts=args.num_thoughts
            ),
            tuning=TuningConfig(method=method),  # pyright: ignore[reportArgumentType]
            dtype=dtype,
        ).train()
        optimizer = build_optimizer(model, OptimConfig(), model.tuning)
        generator = torch.Generator().manual_seed(0)
        shape = (args.batch_size, args.seq_len)
        tokens = torch.randint(model.vocab_size, shape, generator=generator)
        seconds = [_step(model, optimizer, tokens) for _ in range(args.steps)]
    trained = sum(_numel(p) for p in model.parameters() if p.requires_grad)
    return {
        "method": method,
        "trained_parameters": trained,
        "trained_share": trained / sum(_numel(p) for p in model.parameters()),
        "optimizer_mb": _state_bytes(optimizer) / 2**20,
        "peak_mb": memory.mb,
        "step_seconds": statistics.median(seconds[1:] or seconds),
        "settings": settings_of(args),
    }


def _numel(parameter: torch.nn.Parameter) -> int:
    """Weights in a parameter; 4-bit ones lie two in a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()


def _step(model: QuietStarForCausalLM, optimizer: Optimizer, tokens: torch.Tensor) -> float:
    began = time.perf_counter()
    autocast = torch.autocast(tokens.device.type, torch.bfloat16)
    with autocast:
        output = model(tokens)
    assert output.loss is not None, "forward gives a loss"
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began


def _state_bytes(optimizer: Optimizer) -> int:
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


if __name__ == "__main__":
    run(main)
