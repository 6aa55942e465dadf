"""What the benchmarks' command lines have in common: a mistake is one line, before the work."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from quietstar.cli.devices import device_option
from quietstar.errors import UserError


class BenchParser(argparse.ArgumentParser):
    """Help with defaults; mistakes as this project's errors.

    Args:
        name: Of the benchmark.
        description: Its first lines.
    """

    def __init__(self, name: str, description: str | None) -> None:
        super().__init__(
            f"quietstar bench {name}",
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """In one line.

        Raises:
            UserError: Always.
        """
        raise UserError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def at_least(least: int) -> Callable[[str], int]:
    """A whole number not below ``least``."""

    def parse(text: str) -> int:
        if not (text.removeprefix("-").isdecimal() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least {least}")
        return int(text)

    return parse


def share(text: str) -> float:
    """A share of the positions."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return value


def new_file(text: str) -> str:
    """A file that can be written when the work is done; its folder is made."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()
    except OSError as problem:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {problem}") from problem
    return text


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add what says where, how often and where to."""
    add = parser.add_argument
    add("--repeats", type=at_least(1), default=5, help="measurements; the median counts")
    add("--device", type=device_option, help="by default a GPU if there is one")
    add("--threads", type=at_least(1), help="by default torch's own")
    add("--json", type=new_file, metavar="FILE", help="for all figures")
