"""``quietstar report``: the page of a run, or runs compared over their seeds."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from quietstar.cli import options
from quietstar.cli.options import Parser, existing
from quietstar.errors import UserError
from quietstar.system.files import write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Write pages, print the comparison; a folder that is no run is a `UserError`."""
    parser = Parser(
        "quietstar report",
        "Writes the page of a run anew, or compares finished runs. Runs whose settings\n"
        "differ in the seed alone are a group; each figure gets its mean and 95 %\n"
        "interval over the seeds of a group.",
    )
    parser.add_argument("runs", nargs="+", type=existing, metavar="RUN", help="folder of a run")
    parser.output("--out", "page that compares the runs", ".html")
    parser.output("--json", "all figures, with the value of every seed")
    parser.add_argument("--trust-code", action="store_true",
                        help="import the objectives of your own that the runs name")  # fmt: skip
    args = parser.read(arguments)
    is_written = args.json is not None or args.out is not None
    is_compared = len(args.runs) > 1 or args.json is not None
    parser.warn_idle(args, {"--force": None if is_written else "without --out or --json",
                            "--trust-code": None if is_compared else "on one run"})  # fmt: skip
    if len(args.runs) == 1 and args.out is not None:
        raise UserError(
            f"--out ({args.out}): compares runs, and there is one, whose page lies in its folder. "
            "Give more runs, or leave it out."
        )
    parser.check(args, {f"RUN ({run})": Path(run) for run in args.runs})
    folders = [Path(run) for run in args.runs]

    # These import torch.
    from quietstar.reports import write_report
    from quietstar.reports.comparison import compare_runs, comparison_view, write_comparison

    if len(folders) == 1:
        options.say(f"report: {write_report(folders[0])}")
        if args.json is None:
            return 0
    result = compare_runs(folders, args.trust_code)
    Console(highlight=False).print(comparison_view(result))
    if args.json is not None:
        write_json(args.json, result)
    if args.out is not None:
        options.say(f"page: {write_comparison(args.out, result)}")
    return 0
