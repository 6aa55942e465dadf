"""``quietstar report``: a run's page, runs over their seeds, or evaluations item by item."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from quietstar.cli import options
from quietstar.cli.options import Parser, existing
from quietstar.errors import UserError
from quietstar.system.files import write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Write pages, print the comparison; what is no run or evaluation is a `UserError`."""
    parser = Parser(
        "quietstar report",
        "Writes the page of a run anew, or compares finished runs. Runs whose settings\n"
        "differ in the seed alone are a group; each metric gets its mean and 95 %\n"
        "interval over the seeds of a group.\n"
        "Of files that quietstar eval --out has written, compares each with the first,\n"
        "item by item.",
    )
    parser.add_argument("runs", nargs="+", type=existing, metavar="RUN",
                        help="folder of a run, or FILE.json of an evaluation")  # fmt: skip
    parser.output("--out", "page that compares the runs or evaluations", ".html")
    parser.output("--json", "all metrics, with the value of every seed")
    parser.add_argument("--trust-code", action="store_true",
                        help="import the objectives of your own that the runs name")  # fmt: skip
    args = parser.read(arguments)
    paths = [Path(run) for run in args.runs]
    files = [path for path in paths if path.suffix == ".json" or path.is_file()]
    is_written = args.json is not None or args.out is not None
    is_compared = len(paths) > 1 or args.json is not None
    imports = "on evaluations" if files else None if is_compared else "on one run"
    parser.warn_idle(args, {"--force": None if is_written else "without --out or --json",
                            "--trust-code": imports})  # fmt: skip
    if len(paths) == 1 and args.out is not None and not files:
        raise UserError(
            f"--out ({args.out}): compares runs, and there is one, whose page lies in its folder. "
            "Give more runs, or leave it out."
        )
    _check_files(paths, files)
    items = [path.with_suffix(".items.jsonl") for path in files]
    parser.check(args, {f"RUN ({path})": path for path in (*paths, *items)})

    # These import torch.
    if files:
        from quietstar.reports.paired import compare_evaluations, paired_view, write_paired

        result, view, write = compare_evaluations(paths), paired_view, write_paired
    else:
        from quietstar.reports import write_report
        from quietstar.reports.comparison import compare_runs, comparison_view, write_comparison

        if len(paths) == 1:
            options.say(f"report: {write_report(paths[0])}")
            if args.json is None:
                return 0
        result, view, write = (
            compare_runs(paths, args.trust_code),
            comparison_view,
            write_comparison,
        )
    Console(highlight=False).print(view(result))
    if args.json is not None:
        write_json(args.json, result)
    if args.out is not None:
        options.say(f"page: {write(args.out, result)}")
    return 0


def _check_files(paths: Sequence[Path], files: Sequence[Path]) -> None:
    """Refuse evaluations that cannot be compared: one alone, one twice, or beside runs."""
    if files and len(files) < len(paths):
        run = next(path for path in paths if path not in files)
        raise UserError(
            f"RUN ({run}): is no file of an evaluation, but {files[0]} is. Compare either runs or "
            "evaluations."
        )
    if len(files) == 1:
        raise UserError(
            f"RUN ({files[0]}): is one evaluation, and there is no other to compare it with. Give "
            "more; quietstar eval --report writes the page of one."
        )
    if twice := [path for place, path in enumerate(files) if path in files[:place]]:
        raise UserError(f"RUN ({twice[0]}): is given twice. Leave one out.")
