"""The console command ``quietstar``: a table of subcommands, one module each.

A mistake of the user ends in one line per problem on stderr and exit code 2. Nothing here imports
torch before the config is known to be valid.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module

from quietstar import __version__
from quietstar.errors import ConfigError, Preempted, UserError, visible

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: to be tried again
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
SECONDS_FOR_RANK_0 = 10.0
"""How long other ranks leave an error to rank 0 before they print it themselves."""

COMMANDS = {
    "train": ("train", "Train a model: quietstar train --config FILE [--KEY VALUE ...]"),
    "plan": ("plan", "Estimate the memory of a run: quietstar plan --config FILE"),
    "eval": ("evaluate", "Score tasks with and without thoughts: quietstar eval --model DIR ..."),
    "lm-eval": ("lm_eval", "Run lm-evaluation-harness: quietstar lm-eval run --model quietstar"),
    "generate": ("generate", "Continue a prompt: quietstar generate --model DIR --prompt TEXT"),
    "chat": ("generate:chat", "Talk with a model that thinks: quietstar chat --model DIR"),
    "inspect": ("inspect", "Show the thoughts in a text: quietstar inspect --model DIR ..."),
    "calibrate": ("calibrate", "Find where thinking pays: quietstar calibrate --model DIR"),
    "merge": ("merge", "Merge adapters into their base: quietstar merge --model DIR --out DIR"),
}
"""By name: module of ``quietstar.cli``, with its function if that is not ``main``; a summary."""
EXTRAS = {"lm_eval": "lm-eval", "pandas": "pandas", "peft": "peft", "reasoning_gym": "tasks",
          "scipy": "eval", "tqdm": "lm-eval"}  # fmt: skip
"""By module: the extra of this package that installs it."""
RESUME_HINTS = {
    "train": "; --resume auto continues from a checkpoint",
    "eval": "; the same command continues from the finished items, if it has --out",
}


def main(argv: list[str] | None = None) -> int | None:
    """Run a subcommand on ``argv`` (default: the process's); return its exit code, if any."""
    argv = sys.argv[1:] if argv is None else argv
    return run_command(_dispatch, argv, RESUME_HINTS.get((argv or [""])[0], ""))


def run_command(
    command: Callable[[list[str]], int | None], arguments: list[str], resume_hint: str = ""
) -> int | None:
    """Run a function on its arguments; a mistake of the user becomes lines and an exit code.

    The hint is what to say after "interrupted".
    """
    # bitsandbytes warns at its import about kernels that it can do without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return command(arguments)
    except UserError as error:
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        remedy = f"pip install 'quietstar[{EXTRAS[module]}]'"
        problems = [f"this needs {module}, which is not installed; {remedy}"]
    except (Preempted, KeyboardInterrupt) as stop:
        is_preempted = isinstance(stop, Preempted)
        if launched_rank() == 0:
            _print_line(str(stop) if is_preempted else f"interrupted{resume_hint}")
        return EXIT_PREEMPTED if is_preempted else EXIT_INTERRUPTED
    except SystemExit as stop:  # argparse, after --help
        if stop.code:
            raise
        return None
    # Most errors strike every rank. Rank 0 prints at once, and when it exits, the launcher ends the
    # others while they wait here. A rank that outlives the wait is alone with its error.
    rank = launched_rank()
    if rank > 0:
        time.sleep(SECONDS_FOR_RANK_0)
    for problem in problems:
        _print_line(f"error: {problem}", f"[rank {rank}] " if rank > 0 else "")
    return EXIT_USER_ERROR


def launched_rank() -> int:
    """Return the rank of this process; 0 outside a launch, whatever RANK an environment has."""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return int(rank) if rank.isdecimal() and world.isdecimal() and int(world) > 1 else 0


def _print_line(message: str, prefix: str = "") -> None:
    """Print one line on stderr, whatever characters of the user's files are in the message."""
    line = " ".join(part.strip() for part in message.splitlines())
    sys.stderr.write(f"{prefix}quietstar: {visible(line)}\n")
    sys.stderr.flush()


def _dispatch(argv: list[str]) -> int | None:
    name, *arguments = argv or [""]
    if name in ("-h", "--help"):
        commands = "".join(f"  {name:11}{text}\n" for name, (_, text) in COMMANDS.items())
        sys.stdout.write(
            "usage: quietstar COMMAND ...   (quietstar COMMAND --help says more)\n\n"
            "Quiet-STaR for any Hugging Face causal language model.\n\n"
            f"{commands}  --version  Print the version.\n"
        )
        return None
    if name == "--version":
        sys.stdout.write(f"quietstar {__version__}\n")
        return None
    if name == "bench":
        what = arguments[0] if arguments and not arguments[0].startswith("-") else "step"
        raise UserError(
            "there is no command bench: benchmarks are not part of the package; in a checkout run "
            f"python -m benchmarks.{what}"
        )
    if name not in COMMANDS:
        given = f"there is no command {name}" if name else "no command is given"
        raise UserError(f"{given}; known: {', '.join(COMMANDS)} (see quietstar --help)")
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(import_module(f"quietstar.cli.{module}"), function or "main")(arguments)
