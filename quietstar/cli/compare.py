"""``quietstar compare``: finished runs over their seeds, in one table."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from quietstar.cli.options import Parser, existing
from quietstar.system.files import write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write the figures; a folder that is no finished run is a `UserError`."""
    parser = Parser(
        "quietstar compare",
        "Compares finished runs. Runs whose settings differ in the seed alone are a\n"
        "group; each figure gets its mean and 95 % interval over the seeds of a group.",
    )
    parser.add_argument("runs", nargs="+", type=existing, metavar="RUN", help="folder of a run")
    parser.output("--json", "all figures, with the value of every seed")
    args = parser.read(arguments)
    parser.warn_idle(args, {"--force": None if args.json else "without --json"})
    parser.check(args, {f"RUN ({run})": Path(run) for run in args.runs})

    from quietstar.reports.comparison import compare_runs, comparison_view  # imports torch

    result = compare_runs([Path(run) for run in args.runs])
    Console(highlight=False).print(comparison_view(result))
    if args.json is not None:
        write_json(args.json, result)
    return 0
