"""``quietstar bench step``: seconds and memory of a training step, beside the floor.

Step and floor run in turn in one process; the figures are medians. The floor is measured with
several batch sizes and the fastest counts.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quietstar.bench.floor import floor_step
from quietstar.bench.memory import PeakMemory
from quietstar.config import LossConfig, MixingHeadConfig, ThoughtsConfig
from quietstar.cpu_memory import keep_freed_memory
from quietstar.engine.layout import Layout
from quietstar.engine.positions import SCORED_RULES
from quietstar.engine.self_check import use_thinking_attention
from quietstar.evaluation.loading import find_device
from quietstar.learning import resolve_block_tokens
from quietstar.loading import load_base
from quietstar.model import QuietStarForCausalLM

MODELS: dict[str, dict[str, Any]] = {
    "mistral-tiny": {
        "model_type": "mistral",
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 688,
        "vocab_size": 2048,
        "sliding_window": None,
        "max_position_embeddings": 8192,
    }
}
POSITIONS = ("all", "every", "random", *SCORED_RULES)
FLOOR_BATCHES = (4, 8, 16)
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}
"""Of bfloat16 matrix products without sparsity, by part of the device's name."""


def main(arguments: list[str]) -> int:
    """Run the benchmark, print a table, write JSON if asked."""
    args = make_parser("quietstar bench step", __doc__).parse_args(arguments)
    result = bench_step(args)
    table = Table(title=f"training step of {args.model}, {args.dtype}")
    for column in ("step s", "floor s", "step / floor", "peak MB above model"):
        table.add_column(column, justify="right")
    figures = ("step_seconds", "floor_seconds", "step_over_floor", "peak_mb_above_model")
    table.add_row(*[f"{result[name]:.3f}" for name in figures[:3]], f"{result[figures[3]]:.0f}")
    Console().print(table)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The arguments of a step."""
    parser = argparse.ArgumentParser(name, description=description)
    parser.add_argument("--model", default="mistral-tiny", help="a built-in name or a folder")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--thought-length", type=int, default=9)
    parser.add_argument("--lookahead", type=int, default=4)
    parser.add_argument("--num-thoughts", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="bfloat16: autocast over float32 weights")  # fmt: skip
    parser.add_argument("--positions", choices=POSITIONS, default="all",
                        help="the floor stays that of all positions")  # fmt: skip
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--vocab-size", type=int, default=None, help="of a built-in model")
    parser.add_argument("--paper-losses", action="store_true",
                        help="no loss on the thought's own prediction, as the floor")  # fmt: skip
    parser.add_argument("--block-tokens", type=int, default=None,
                        help="that learn at once; by default as training does, 0: all")  # fmt: skip
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", help="by default a GPU if there is one")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", metavar="FILE")
    return parser


def bench_step(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one setting; keys as in the JSON file."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = load_model(args.model, args.vocab_size)
    plain = copy.deepcopy(base)
    names = ("positions", "share", "num_thoughts", "lookahead")
    model = make_thinker(base, args, **{name: getattr(args, name) for name in names}).train()
    if args.paper_losses:
        model.configure(model.thoughts, LossConfig(thought_weight=0.0))
    if args.activation_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    device = find_device(args.device)
    tokens_at_once = "auto" if args.block_tokens is None else args.block_tokens or None
    model.block_tokens = resolve_block_tokens(tokens_at_once, device, in_pieces=False)
    if device == "cpu":  # as in training
        keep_freed_memory()
    model = model.to(device)
    plain.to(device)  # pyright: ignore[reportArgumentType]  (a wrapper hides its type)
    tokens = torch.randint(base.config.vocab_size, (args.batch_size, args.seq_len), device=device)
    layout = Layout(
        args.batch_size, args.seq_len, args.num_thoughts, args.thought_length, args.lookahead
    )

    def step() -> None:
        with _precision(args.dtype, device):
            output = model(tokens, sample_ids=torch.arange(args.batch_size, device=device))
        assert output.loss is not None, "forward gives a loss"
        output.loss.backward()
        model.zero_grad(set_to_none=True)

    def floor(rows: int) -> None:
        with _precision(args.dtype, device):
            floor_step(plain, layout, rows)
        plain.zero_grad(set_to_none=True)

    peak = _peak_mb(step, device)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    rows = min(FLOOR_BATCHES, key=lambda rows: _seconds(lambda: floor(rows), 2))
    times = [(_seconds(step, 1), _seconds(lambda: floor(rows), 1)) for _ in range(args.repeats)]
    step_seconds, floor_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "step_seconds": step_seconds,
        "floor_seconds": floor_seconds,
        "step_over_floor": step_seconds / floor_seconds,
        "peak_mb_above_model": peak,
        "peak_mb_above_gradients": peak - gradients / 2**20,
        **_flops(lambda: floor(rows), step_seconds, device),
        "settings": {k: v for k, v in vars(args).items() if k != "json"},
        "environment": environment() | {"floor_batch_rows": rows},
    }


def environment() -> dict[str, Any]:
    """Versions and machine."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }


def load_model(name: str, vocab_size: int | None = None) -> PreTrainedModel:
    """A model of `MODELS` with random weights, or one of a folder."""
    if name not in MODELS:
        return load_base(name)
    fields = dict(MODELS[name])
    if vocab_size is not None:
        fields["vocab_size"] = vocab_size
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields)
    )


def make_thinker(
    base: PreTrainedModel, args: argparse.Namespace, **thoughts: Any
) -> QuietStarForCausalLM:
    """A Quiet-STaR model around a plain one."""
    use_thinking_attention(base)
    config = ThoughtsConfig(length=args.thought_length, **thoughts)
    size = base.config.vocab_size
    return QuietStarForCausalLM(base, config, MixingHeadConfig(), LossConfig(), size)


def _precision(dtype: str, device: str) -> contextlib.AbstractContextManager:
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16)


def _seconds(run: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times) if repeats > 1 else times[0]


def _flops(floor: Callable[[], None], seconds: float, device: str) -> dict[str, Any]:
    """FLOP of the floor's matrix products, and how much of the device's peak a step makes of them.

    Attention on CPUs is not counted: torch's counter does not know its kernel.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        floor()
    total = counter.get_total_flops()
    found = {"floor_tflop": total / 1e12, "tflop_per_second": total / 1e12 / seconds}
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    for gpu, peak in PEAK_TFLOPS.items():
        if gpu in name:
            found["share_of_peak"] = found["tflop_per_second"] / peak
    return found


def _peak_mb(run: Callable[[], None], device: str) -> float:
    """Most memory above that before the first of two runs: resident, or the GPU's allocated."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with PeakMemory() as memory:
        run()
        run()
    return memory.mb
