"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from quietstar.cli.main import run_command
from quietstar.cli.options import Parser, device, output_file, whole


def run(main: Callable[[list[str]], int]) -> None:
    """Run a benchmark on the arguments of this process, and exit with its code."""
    sys.exit(run_command(main, sys.argv[1:]))


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``, the file for all figures."""
    parser.add_argument("--json", type=output_file(), metavar="FILE", help="all figures")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings for the JSON file: all options but files and what to do with them."""
    return {
        name: value
        for name, value in vars(args).items()
        if name not in ("json", "plot", "methods", "sweep")
    }


def add_machine(parser: Parser) -> None:
    """Add the options that say where, how often and into which file is measured."""
    add = parser.add_argument
    add("--repeats", type=whole(1), default=5, metavar="N", help="measurements; the median counts")
    add("--device", type=device, metavar="NAME", help="default: a GPU if there is one")
    add("--threads", type=whole(1, 4096), metavar="N", help="default: what torch takes")
    add_json(parser)
