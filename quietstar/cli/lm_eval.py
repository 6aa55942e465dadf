"""``quietstar eval lm-eval``: lm-evaluation-harness's own command, with the model ``quietstar``."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from quietstar.errors import UserError

COMMAND = "quietstar eval lm-eval"


def run_harness(arguments: Sequence[str]) -> None:
    """Run the harness on its own arguments; what it refuses raises `UserError`."""
    import lm_eval.__main__ as harness  # imports torch; an extra

    from quietstar.evaluation.harness import one_line_errors  # registers the model

    sys.argv = [COMMAND, *arguments]
    with one_line_errors(COMMAND):
        error = argparse.ArgumentParser.error
        argparse.ArgumentParser.error = _refuse  # which prints the whole usage
        try:
            harness.cli_evaluate()
        except SystemExit as stop:
            if stop.code:
                said = stop.code if isinstance(stop.code, str) else "it says above what is wrong"
                raise UserError(f"{COMMAND}: the harness ends ({said}).") from stop
        finally:
            argparse.ArgumentParser.error = error


def _refuse(self: argparse.ArgumentParser, message: str) -> NoReturn:
    name = self.prog.removeprefix("lm-eval").strip()
    command = " ".join(filter(None, (COMMAND, name, "--help")))
    raise UserError(f"{message.removeprefix('argument ')} (see {command})")
