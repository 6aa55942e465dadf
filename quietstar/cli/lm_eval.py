"""``quietstar lm-eval``: lm-evaluation-harness's own command, with the model ``quietstar``."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the harness on its own arguments."""
    import lm_eval.__main__ as harness  # imports torch; an extra

    import quietstar.evaluation.harness  # noqa: F401  (registers the model)

    sys.argv = ["quietstar lm-eval", *(arguments or [])]
    harness.cli_evaluate()
