"""``python -m benchmarks.decode``: tokens a second with thoughts, beside the ideal.

The ideal: a bare loop of the plain model's cached forwards, T + 1 of one token a row for each new
token, on its own (sdpa) attention, with neither sampling nor mixing. Both run in turn in one
process; the figures are medians. Memory is what new tokens with their thoughts add. With ``--gate``
a coin that is the same in every repeat says which texts think before a token: the ideal is then one
forward of all texts for each new token, and T of those that think, whose cache lies ready.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.measure import environment
from benchmarks.models import load_plain, make_thinker
from benchmarks.options import add_machine, report_result, run, settings_of
from benchmarks.peak_memory import PeakMemory
from quietstar.backbone.devices import find_device
from quietstar.cli.options import Parser, number, whole
from quietstar.generation.gates import Gate
from quietstar.generation.generate import predict_next
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.sampling.decoding import Decoder
from quietstar.sampling.thoughts import Sampling
from quietstar.training.build import quiet_libraries


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, print a table, write JSON if asked."""
    args = _parser().read(arguments)
    # Its new name is not known to the oldest transformers that serves.
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")
    quiet_libraries()
    result = bench_decode(args)
    title = f"decoding, {args.model}, {args.dtype}, T {args.thought_length}, prefix {args.prefix}"
    title += "" if args.gate is None else f", gate {args.gate:g}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("batch", "tokens/s", "ideal", "of the ideal", "MB added"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        table.add_row(
            str(row["batch_size"]), f"{row['tokens_per_second']:.2f}",
            f"{row['ideal_tokens_per_second']:.2f}", f"{row['share_of_ideal']:.3f}",
            f"{row['mb_added']:.1f}",
        )  # fmt: skip
    return report_result(table, result, args.json)


def bench_decode(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all batch sizes; keys as in the JSON file."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    base = load_plain(args.model).to(dtype).eval()
    plain = copy.deepcopy(base)
    device = find_device(args.device)
    model = make_thinker(base, args).to(device, dtype).eval()
    plain.to(device)  # pyright: ignore[reportArgumentType]  (a wrapper hides its type)
    rows = [_measure(model, plain, batch_size, args) for batch_size in args.batch_sizes]
    return {"rows": rows, "settings": settings_of(args), "environment": environment()}


@dataclass(frozen=True, kw_only=True)
class Coin(Gate):
    """A gate that decides as it was drawn before, whatever the prediction."""

    draws: Iterator[Tensor]  # which texts think, (batch,), for every new token

    def decide(self, logits: Tensor) -> Tensor:
        """Return the next draw."""
        return next(self.draws).to(logits.device)


@torch.no_grad()
def _measure(
    model: QuietStarForCausalLM, plain: PreTrainedModel, batch_size: int, args: argparse.Namespace
) -> dict[str, Any]:
    text = torch.randint(model.vocab_size, (batch_size, args.prefix), device=model.device)
    coins = torch.rand(args.tokens, batch_size, generator=torch.Generator().manual_seed(0))
    thinks = coins < (1.0 if args.gate is None else args.gate)
    times, added = [], 0.0
    for repeat in range(args.repeats + 1):  # the first warms up
        mine, memory = _think(model, text, thinks)
        ideal = _ideal(plain, text, thinks, args.thought_length)
        if repeat:
            times.append((mine, ideal))
        added = memory
    mine, ideal = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "batch_size": batch_size,
        "thinking_share": float(thinks.float().mean()),
        "tokens_per_second": batch_size / mine,
        "ideal_tokens_per_second": batch_size / ideal,
        "share_of_ideal": ideal / mine,
        "mb_added": added,
    }


def _think(model: QuietStarForCausalLM, text: Tensor, thinks: Tensor) -> tuple[float, float]:
    """Seconds of a step that appends a token to every row, and MB that steps add.

    ``thinks``, (tokens, batch), says which rows think before which new token.
    """
    sampling = Sampling(1, model.thoughts.length, None, 0)
    real = torch.ones_like(text[:, :-1], dtype=torch.bool)
    decoder = Decoder(
        model.causal_lm, model.output_head, model.start_vectors, model.end_vectors,
        sampling, text[:, :-1], real, torch.arange(len(text), device=text.device),
    )  # fmt: skip
    newest = text[:, -1]

    def step(newest: Tensor) -> Tensor:
        return predict_next(model, decoder, gate, newest)[0].argmax(-1)

    everyone = torch.ones_like(thinks[:1])
    gate = Coin("entropy", draws=iter(torch.cat([everyone, thinks, thinks])))
    newest = step(newest)  # makes room in the cache
    begun = _now()
    for _ in thinks:
        newest = step(newest)
    seconds = (_now() - begun) / len(thinks)
    with PeakMemory() as memory:  # by itself: its watching takes time
        for _ in thinks:
            newest = step(newest)
    return seconds, memory.mb


def _ideal(plain: PreTrainedModel, text: Tensor, thinks: Tensor, length: int) -> float:
    """Seconds of a cached forward of all rows and T of those that think, one token a row.

    Every number of rows has a cache of its own; the thoughts' keys are cropped.
    """
    counts = thinks.sum(1).tolist()
    caches = {rows: DynamicCache(config=plain.config) for rows in {len(text), *counts} if rows}

    def forward(tokens: Tensor) -> None:
        cache = caches[len(tokens)]
        plain(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    for rows in caches:
        forward(text[:rows])
    newest, seconds = text[:, -1:], 0.0
    for count in counts:
        for rows in caches:
            if rows < len(text):
                forward(newest[:rows])  # keeps their texts as long; not timed
        begun = _now()
        forward(newest)
        for _ in range(length if count else 0):
            forward(newest[:count])
        seconds += _now() - begun
        if count:
            caches[count].crop(-length)
    return seconds / len(counts)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _parser() -> Parser:
    parser = Parser("python -m benchmarks.decode", __doc__)
    parser.add_argument("--model", default="mistral-tiny", help="a built-in name or a folder")
    parser.add_argument("--prefix", type=whole(1), default=256, help="tokens of the text before")
    parser.add_argument("--tokens", type=whole(1), default=16, help="new ones in every repeat")
    parser.add_argument("--thought-length", type=whole(1), default=8, help="T")
    parser.add_argument("--gate", type=number(0.0, 1.0, above=True), metavar="SHARE",
                        help="share of tokens after a thought; default: all")  # fmt: skip
    parser.add_argument("--batch-sizes", type=whole(1), nargs="+", default=[1, 8],
                        help="texts at once")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of the weights")  # fmt: skip
    add_machine(parser)
    return parser


if __name__ == "__main__":
    run(main)
