"""``quietstar export``: adapters merged into the weights of their base."""

from collections.abc import Sequence
from pathlib import Path

from quietstar.cli.options import Parser, add_trust, existing, require_trained, say


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the merged model into a new folder; raises `UserError` where that cannot be done."""
    summary = "Writes a saved model with its adapters merged into its weights."
    parser = Parser("quietstar export", summary)
    for option, what in (("--model", "folder of a saved model"), ("--out", "new folder")):
        parser.add_argument(option, type=existing, required=True, metavar="DIR", help=what)
    add_trust(parser)
    parser.flag("--plain", "write the causal LM alone, which thinks no more: a distilled student")
    args = parser.read(arguments)

    from quietstar.model.merging import merge  # these import torch
    from quietstar.training.build import quiet_libraries

    require_trained(args.model)
    quiet_libraries()
    out = merge(
        Path(args.model), Path(args.out), args.plain, trust_remote_code=args.trust_remote_code
    )
    say(f"the {'plain' if args.plain else 'merged'} model is in {out}")
