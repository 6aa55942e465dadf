"""Held-out figures of a saved Quiet-STaR model: the gain of thinking and the gain of content.

    python eval/held_out.py --model runs/x/final --data text.jsonl [--seq-len 256] [--sequences 64]

Greedy thoughts at every position, beside the controls: thoughts exchanged among positions, and
pause tokens. Prints a table; ``--json FILE`` writes the figures.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from quietstar import QuietStarForCausalLM
from quietstar.config import DataConfig
from quietstar.data import build_data, load_tokenizer
from quietstar.errors import UserError
from quietstar.training.evaluation import compare, figures
from quietstar.training.reporter import evaluation_table


def main() -> None:
    """Evaluate and print."""
    args = parse()
    model = QuietStarForCausalLM.from_pretrained(args.model)
    data = DataConfig(
        train=args.data, eval_fraction=0.5, seq_len=args.seq_len, eval_sequences=args.sequences
    )
    _, held_out, _ = build_data(data, load_tokenizer(args.model), seed=args.seed)
    totals = {}
    for batch in held_out.batches(args.batch_size):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            for kind, metrics in compare(model, batch).items():
                totals[kind] = totals[kind] + metrics if kind in totals else metrics
    result = figures(totals)
    Console().print(evaluation_table([(0, result)]))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a saved Quiet-STaR model")
    parser.add_argument("--data", required=True, help="as data.train of a config")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"held_out: error: {error}\n")
        sys.exit(2)
