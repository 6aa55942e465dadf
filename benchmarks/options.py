"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quietstar.cli.main import run_command
from quietstar.cli.options import Parser, device, number, whole
from quietstar.sampling.positions import SCORED_RULES
from quietstar.system.files import write_json

POSITIONS = ("all", "every", "random", *SCORED_RULES)


def run(main: Callable[[list[str]], int]) -> None:
    """Run a benchmark on the arguments of this process, and exit with its code."""
    sys.exit(run_command(main, sys.argv[1:]))


def report_result(table: Table, result: object, file: Path | None) -> int:
    """Print the table, write the figures as JSON if asked; returns the exit code."""
    Console().print(table)
    if file:
        write_json(file, result)
    return 0


def add_json(parser: Parser) -> None:
    """Add ``--json``, the file for all figures, and ``--force``."""
    parser.output("--json", "all figures")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings for the JSON file: all options but files and what to do with them."""
    others = ("json", "plot", "force", "methods")
    return {name: value for name, value in vars(args).items() if name not in others}


def add_machine(parser: Parser) -> None:
    """Add the options that say where, how often and into which file is measured."""
    add = parser.add_argument
    add("--repeats", type=whole(1), default=5, metavar="N", help="measurements; the median counts")
    add("--device", type=device, metavar="NAME", help="default: a GPU if there is one")
    add("--threads", type=whole(1, 4096), metavar="N", help="default: what torch takes")
    add_json(parser)


def sizes_parser(name: str, description: str | None) -> Parser:
    """Model, sizes, precision, repeats: what step and rollout share."""
    parser = Parser(f"python -m benchmarks.{name}", description)
    add = parser.add_argument
    add("--model", default="mistral-tiny", help="a built-in name or a folder")
    add("--seq-len", type=whole(2), default=256, help="S, tokens of a text")
    add("--thought-length", type=whole(1), default=9, help="T, free tokens of a thought")
    add("--lookahead", type=whole(1), default=4, help="A, true tokens scored after it")
    add("--num-thoughts", type=whole(1), default=2, help="K, thoughts of a position")
    add("--batch-size", type=whole(1), default=1, help="B, texts")
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="bfloat16: autocast over float32 weights")  # fmt: skip
    add("--positions", choices=POSITIONS, default="all",
        help="the floor is that of their tokens")  # fmt: skip
    add("--share", type=number(0.0, 1.0, above=True), default=0.25,
        help="of the positions, where not all think")  # fmt: skip
    add("--vocab-size", type=whole(8), help="of a built-in model; by default its own")
    add_machine(parser)
    return parser


def step_parser(name: str, description: str | None) -> Parser:
    """The arguments of step and sweep."""
    parser = sizes_parser(name, description)
    add = parser.add_argument
    add("--paper-losses", action="store_true",
        help="no loss on the thought's own prediction, as the floor")  # fmt: skip
    add("--block-tokens", type=whole(0),
        help="that learn at once; by default as training does, 0: all")  # fmt: skip
    add("--activation-checkpointing", action="store_true", help="as in training")
    add("--compile", action="store_true", help="the decoder layers of the step, not of the floor")
    return parser
