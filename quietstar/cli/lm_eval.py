"""``quietstar lm-eval``: lm-evaluation-harness's own command, with the model ``quietstar``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the harness on its own arguments.

    Raises:
        UserError: The harness is not installed.
    """
    try:
        import lm_eval.__main__ as harness  # imports torch

        import quietstar.evaluation.harness  # noqa: F401  (registers the model)
    except ImportError as problem:
        raise UserError(
            f"lm-eval needs lm-evaluation-harness ({problem}); pip install 'quietstar[lm-eval]'"
        ) from problem
    sys.argv = ["quietstar lm-eval", *(arguments or [])]
    harness.cli_evaluate()
