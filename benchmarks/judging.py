"""``python -m benchmarks.judging``: pairs a second of a judge, beside a naive loop.

The judge runs what all texts begin with once, the prompt that several texts share once, and the
rest in batches. The naive loop runs every text by itself and as a whole, with the logits of its
last token. Both compare all pairs of the ``--candidates`` of every prompt in both orders, in turn
in one process, and give the same probabilities; the figures are medians. Texts are random words, of
one to two times ``--words`` in prompts, and ``--candidate-words`` in candidates.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table

from benchmarks.measure import environment
from benchmarks.models import MODELS, load_plain
from benchmarks.options import add_machine, report_result, run, settings_of
from quietstar.backbone.devices import find_device
from quietstar.cli.options import BATCH, Parser, existing, whole
from quietstar.data.tokenizer import BYTES, load_tokenizer
from quietstar.judging import Judge
from quietstar.training.build import quiet_libraries

WORDS = "river small words run down hill back where nobody had seen it before anyone could say why"


def main(arguments: list[str]) -> int:
    """Run the benchmark, print a table, write JSON if asked."""
    args = _parser().read(arguments)
    quiet_libraries()
    result = bench_judging(args)
    table = Table(title=f"{result['pairs']} pairs, {args.model}, {args.dtype}, batches of "
                        f"{args.batch_size}", title_justify="left")  # fmt: skip
    for column in ("", "seconds", "tokens run", "pairs/s"):
        table.add_column(column, justify="right")
    for name in ("judge", "naive"):
        row = result[name]
        seconds, tokens = f"{row['seconds']:.3f}", f"{row['tokens']:,}"
        table.add_row(name, seconds, tokens, f"{row['pairs_per_second']:.2f}")
    table.add_row("naive / judge", f"{result['speedup']:.2f}", "", "")
    return report_result(table, result, args.json)


def bench_judging(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one setting; keys as in the JSON file."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = find_device(args.device)
    model: Any = load_plain(args.model).to(getattr(torch, args.dtype))
    model = model.to(device).eval()
    tokenizer = load_tokenizer(BYTES if args.model in MODELS else args.model)
    judge = Judge(model, tokenizer, args.template, batch_size=args.batch_size)
    texts = _texts(args)
    tokens = 0

    def count(_: Any, given: tuple[Any, ...], output: Any) -> None:
        nonlocal tokens
        tokens += given[0].numel()  # padding included

    handle = model.get_input_embeddings().register_forward_hook(count)

    def ours() -> list[float]:
        return [p for result in judge.compare(*texts) for p in result.by_order]

    def naive() -> list[float]:
        answers, made = judge.prompts.answers("pair"), []
        for prompt, *candidates in zip(*texts, strict=True):
            for place, order in enumerate((candidates, candidates[::-1])):
                values = {"prompt": prompt, "first": order[0], "second": order[1]}
                opening = judge.prompts.opening("pair", values, asks_rationale=False)
                ids = judge.prompts.encode(opening + answers.ending + answers.gap + "1")[:-1]
                with torch.no_grad():
                    given = torch.tensor([ids], device=device)
                    output = model(input_ids=given, use_cache=False, logits_to_keep=1)
                pair = output.logits[0, -1].float()[list(answers.ids)].softmax(-1)
                made.append(pair[place].item())
        return made

    times: dict[str, list[float]] = {"judge": [], "naive": []}
    counts, results = {}, {}
    for _ in range(args.repeats):
        for name, function in (("judge", ours), ("naive", naive)):
            tokens = 0
            seconds, results[name] = _timed(function)
            times[name].append(seconds)
            counts[name] = tokens
    handle.remove()
    gap = max(abs(a - b) for a, b in zip(results["judge"], results["naive"], strict=True))
    rows: dict[str, Any] = {}
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rows[name] = {
            "seconds": median, "tokens": counts[name], "pairs_per_second": len(texts[0]) / median
        }  # fmt: skip
    return {
        **rows,
        "pairs": len(texts[0]),
        "speedup": rows["naive"]["seconds"] / rows["judge"]["seconds"],
        "largest_difference": gap,
        "settings": settings_of(args),
        "environment": environment(),
    }


def _timed(function: Callable[[], list[float]]) -> tuple[float, list[float]]:
    begun = time.perf_counter()
    result = function()  # ends with numbers on the host
    return time.perf_counter() - begun, result


def _texts(args: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    noise = random.Random(0)

    def text(words: int) -> str:
        return " ".join(noise.choices(WORDS.split(), k=noise.randint(words, 2 * words)))

    prompts, first, second = [], [], []
    for _ in range(args.prompts):
        prompt = text(args.words)
        candidates = [text(args.candidate_words) for _ in range(args.candidates)]
        for one, two in itertools.combinations(candidates, 2):
            prompts.append(prompt)
            first.append(one)
            second.append(two)
    return prompts, first, second


def _parser() -> Parser:
    parser = Parser("python -m benchmarks.judging", __doc__)
    add = parser.add_argument
    add("--model", type=existing, default="mistral-tiny", help="a built-in name or a folder")
    add("--template", default="continuation", help="what is asked")
    add("--prompts", type=whole(1, 10**5), default=16, metavar="N", help="that are asked about")
    add("--candidates", type=whole(2, 100), default=2, metavar="N", help="of every prompt")
    add("--words", type=whole(1, 10**5), default=30, metavar="N", help="least of a prompt")
    add("--candidate-words", type=whole(1, 10**5), default=16, metavar="N",
        help="least of a candidate")  # fmt: skip
    add("--batch-size", type=BATCH, default=8, metavar="N", help="texts at once")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    add_machine(parser)
    return parser


if __name__ == "__main__":
    run(main)
