"""``quietstar export``: adapters merged into the weights of their base; thoughts for Inspect."""

from collections.abc import Sequence
from pathlib import Path

from quietstar.cli.options import Parser, add_trust, existing, require_trained, say
from quietstar.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the merged model, or logs, into a folder; `UserError` where that cannot be done."""
    parser = Parser(
        "quietstar export",
        "Writes a saved model with its adapters merged into its weights, or the thoughts\n"
        "of a run or an evaluation as logs that inspect view shows.",
    )
    for option, metavar, what in (
        ("--model", "DIR", "folder of a saved model"),
        ("--inspect-log", "SOURCE", "folder of a run, or FILE.json of quietstar eval --out"),
    ):
        parser.value(option, existing, None, metavar, what)
    parser.add_argument("--out", type=existing, required=True, metavar="DIR",
                        help="new folder; logs are added to the one that is there")  # fmt: skip
    add_trust(parser)
    parser.flag("--plain", "write the causal LM alone, which thinks no more: a distilled student")
    args = parser.read(arguments)
    out = Path(args.out)
    if (args.model is None) == (args.inspect_log is None):
        raise UserError("--model: give either --model or --inspect-log")
    if args.inspect_log is not None:
        parser.warn_idle(args, dict.fromkeys(("--plain", "--trust-remote-code"),
                                             "with --inspect-log"))  # fmt: skip
        if out.exists() and not out.is_dir():
            raise UserError(f"--out ({out}): is no folder. Give the folder of the logs.")
        from quietstar.reports.inspect_log import export_logs  # imports torch

        for path in export_logs(Path(args.inspect_log), out):
            say(f"log: {path}")
        return

    from quietstar.model.merging import merge  # these import torch
    from quietstar.training.build import quiet_libraries

    require_trained(args.model)
    quiet_libraries()
    out = merge(Path(args.model), out, args.plain, trust_remote_code=args.trust_remote_code)
    say(f"the {'plain' if args.plain else 'merged'} model is in {out}")
