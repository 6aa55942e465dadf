"""``quietstar merge``: adapters merged into the weights of their base."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from quietstar.cli.options import Parser, existing


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the merged model into a new folder.

    Raises:
        UserError: The folder holds nothing to merge, or the new one cannot be written.
    """
    parser = Parser(
        "quietstar merge", "Writes a saved model with its adapters merged into its weights."
    )
    add = parser.add_argument
    add("--model", type=existing, required=True, metavar="DIR", help="folder of a saved model")
    add("--out", type=existing, required=True, metavar="DIR", help="new folder")
    args = parser.read(arguments)

    from quietstar.model.merging import merge  # imports torch

    out = merge(Path(args.model), Path(args.out), trust_remote_code=False)
    sys.stdout.write(f"the merged model is in {out}\n")
