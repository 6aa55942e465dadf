"""The console command ``quietstar``: a table of subcommands.

A mistake of the user ends in one line per problem on stderr and exit code 2. Nothing here imports
torch before the config is known to be valid.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from quietstar import __version__
from quietstar.cli.help import print_benchmarks, print_commands, print_train_help
from quietstar.config.loading import load_config
from quietstar.config.messages import COMMAND_LINE
from quietstar.errors import ConfigError, Preempted, UserError

DEFAULT_CONFIG = "configs/demo.yaml"
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: to be tried again
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
SECONDS_FOR_RANK_0 = 3.0
"""How long other ranks leave an error to rank 0 before they print it themselves."""
INTERRUPTED = {
    "train": "; --resume auto goes on from a checkpoint",
    "eval": "; the same command goes on from the finished items, if it has --out",
}
"""By command: how to go on."""
HELP_FLAGS = ("-h", "--help")
EXAMPLES = {
    "resume": "auto",
    "controls": "3",
    "allow-changes": "true",
    "model": "DIR",
    "out": "DIR",
    "engine": "zero2",
    "processes": "8",
    "memory": "80",
    "json": "FILE",
}


class Command(NamedTuple):
    """A subcommand: its line in the help, and what runs it on the arguments after its name."""

    summary: str
    run: Callable[[list[str]], int | None]


def main(argv: list[str] | None = None) -> int | None:
    """Runs a subcommand.

    Args:
        argv: Arguments after the program's name; None takes those of the process.

    Returns:
        The exit code, or None for success.
    """
    argv = sys.argv[1:] if argv is None else argv
    # At its import it tells of kernels that it can do without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return _dispatch(argv)
    except UserError as error:
        _print_error(error, launched_rank())
        return EXIT_USER_ERROR
    except Preempted as stop:
        if launched_rank() == 0:
            sys.stderr.write(f"quietstar: {stop}\n")
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        if launched_rank() == 0:
            sys.stderr.write(f"quietstar: interrupted{INTERRUPTED.get((argv or [''])[0], '')}\n")
        return EXIT_INTERRUPTED


def _dispatch(argv: list[str]) -> int | None:
    name, *arguments = argv or [""]
    if name in HELP_FLAGS:
        print_commands({name: command.summary for name, command in COMMANDS.items()})
        return None
    if name == "--version":
        sys.stdout.write(f"quietstar {__version__}\n")
        return None
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        given = f"there is no command {name}" if name else "no command is given"
        raise UserError(f"{given}; known: {known} (see quietstar --help)")
    return COMMANDS[name].run(arguments)


def launched_rank() -> int:
    """Returns the rank of this process; 0 outside a launch, whatever RANK an environment has."""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return int(rank) if rank.isdecimal() and world.isdecimal() and int(world) > 1 else 0


def _print_error(error: UserError, rank: int) -> None:
    """Prints an error once for all processes that fail with it.

    Most errors strike every rank. Rank 0 prints at once, and when it exits, the launcher ends the
    others while they wait here. A rank that outlives the wait is alone with its error.
    """
    if rank > 0:
        time.sleep(SECONDS_FOR_RANK_0)
    prefix = f"[rank {rank}] " if rank > 0 else ""
    for line in str(error).splitlines():
        sys.stderr.write(f"{prefix}quietstar: error: {line}\n")
    sys.stderr.flush()


def _train(arguments: list[str]) -> int | None:
    if any(flag in arguments for flag in HELP_FLAGS):
        print_train_help()
        return None
    problems: list[str] = []
    options, overrides = _take_options(
        arguments, ("config", "resume", "controls", "allow-changes", "local_rank"), problems
    )
    allow_changes = _is_true(options.get("allow-changes"), problems)
    num_seeds = _seeds(options.get("controls"), problems)
    resume = options.get("resume")
    if resume not in (None, "auto") and not Path(resume).exists():
        problems.append(
            f"{COMMAND_LINE}: --resume: there is no folder {resume}; give a checkpoint such as"
            " runs/x/checkpoints/step-000500, or auto for the newest of the run"
        )
    try:
        config = load_config(options.get("config", DEFAULT_CONFIG), overrides)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if problems:
        raise ConfigError(problems)

    from quietstar.reports import write_report

    if num_seeds is not None:
        from quietstar.training.controls import run_controls  # imports torch

        run_controls(config, num_seeds, on_report=write_report)
        return None

    from quietstar.training.run import run_training  # imports torch

    run_training(config, resume=resume, allow_changes=allow_changes, on_report=write_report)
    return None


def _is_true(text: str | None, problems: list[str]) -> bool:
    """Value of ``--allow-changes``."""
    if text not in (None, "true", "false"):
        problems.append(f"{COMMAND_LINE}: --allow-changes: {text} must be true or false")
    return text == "true"


def _seeds(text: str | None, problems: list[str]) -> int | None:
    """Number of seeds after ``--controls``, None without it."""
    if text is not None and not (text.isdecimal() and int(text) > 0):
        problems.append(
            f"{COMMAND_LINE}: --controls: {text} must be the number of seeds; write --controls 3"
        )
        return None
    return None if text is None else int(text)


def _take_options(
    arguments: Sequence[str], names: Sequence[str], problems: list[str]
) -> tuple[dict[str, str], list[str]]:
    """Splits ``--name value`` and ``--name=value`` of these names from the other arguments.

    ``--local_rank``, which DeepSpeed's launcher adds, is taken and not used: the environment says
    the same.
    """
    options: dict[str, str] = {}
    others = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in names:
            others.append(argument)
        elif equals and value:
            options[name] = value
        elif not equals and rest and not rest[0].startswith("--"):
            options[name] = rest.pop(0)
        else:
            example = EXAMPLES.get(name, "FILE")
            problems.append(f"{COMMAND_LINE}: --{name}: has no value; write --{name} {example}")
    return options, others


BENCHMARKS = {
    "step": "A training step beside its floor: the matrix products of its tokens.",
    "sweep": "The same over sizes (S, T, K, A, V); also: quietstar bench step --sweep.",
    "rollout": "The sampling of the thoughts beside its floor.",
    "decode": "Tokens a second with thoughts beside the ideal.",
    "tuning": "Ways to fine-tune beside each other: time, memory, weights.",
    "memory": "What a run takes beside what quietstar plan says.",
}
"""Modules of `benchmarks`, and their lines in the help."""


def _bench(arguments: list[str]) -> int | None:
    if "--sweep" in arguments:  # also as an option of the step
        arguments = ["sweep", *(a for a in arguments if a not in ("step", "--sweep"))]
    what, *rest = arguments or [""]
    if what in ("", *HELP_FLAGS):
        print_benchmarks(BENCHMARKS)
        return None if what in HELP_FLAGS else EXIT_USER_ERROR
    if what not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise UserError(
            f"there is no benchmark {what}; known: {known} (see quietstar bench --help)"
        )
    return import_module(f"benchmarks.{what}").main(rest)  # imports torch


def _merge(arguments: list[str]) -> int | None:
    usage = "usage: quietstar merge --model DIR --out DIR"
    if any(flag in arguments for flag in HELP_FLAGS):
        sys.stdout.write(f"{usage}\nWrites the saved model with its adapters merged into it.\n")
        return None
    problems: list[str] = []
    options, others = _take_options(arguments, ("model", "out"), problems)
    problems += [f"{COMMAND_LINE}: --{n}: is missing; {usage}" for n in ("model", "out")
                 if n not in options and not problems]  # fmt: skip
    problems += [f"{COMMAND_LINE}: {other}: is unknown; {usage}" for other in others]
    if problems:
        raise ConfigError(problems)

    from quietstar.model.merging import merge  # imports torch

    out = merge(Path(options["model"]), Path(options["out"]))
    sys.stdout.write(f"the merged model is in {out}\n")
    return None


def _plan(arguments: list[str]) -> int | None:
    usage = "usage: quietstar plan --config FILE [--engine NAME] [--processes N] [--memory GIB]"
    if any(flag in arguments for flag in HELP_FLAGS):
        sys.stdout.write(
            f"{usage}\n       [--json FILE] [--KEY VALUE ...]\n"
            "Prints the memory that each process of a run will need, from shapes alone; the exit\n"
            "code is 1 if that is more than --memory. Keys are those of quietstar train.\n"
            "NAME: single, ddp, zero1, zero2, zero3 or fsdp2; default single, ddp if N > 1.\n"
        )
        return None
    problems: list[str] = []
    names = ("config", "engine", "processes", "memory", "json")
    options, overrides = _take_options(arguments, names, problems)
    if problems:
        raise ConfigError(problems)
    config = load_config(options.get("config", DEFAULT_CONFIG), overrides)

    from quietstar.cli.plan import plan  # imports torch

    return plan(config, options)


def _run_module(name: str) -> Callable[[list[str]], int | None]:
    """A command whose module has a ``main``; it is imported, and torch with it, when it runs."""
    return lambda arguments: import_module(f"quietstar.{name}").main(arguments)


def _lm_eval(arguments: list[str]) -> int | None:
    """lm-evaluation-harness's own command, which then knows the model ``quietstar``."""
    try:
        import lm_eval.__main__ as harness  # imports torch

        import quietstar.evaluation.harness  # noqa: F401  (registers the model)
    except ImportError as problem:
        raise UserError(
            f"lm-eval needs lm-evaluation-harness ({problem}); pip install 'quietstar[eval]'"
        ) from problem
    sys.argv = ["quietstar lm-eval", *arguments]
    harness.cli_evaluate()
    return None


COMMANDS: dict[str, Command] = {
    "train": Command("Train a model: quietstar train --config FILE [--KEY VALUE ...]", _train),
    "plan": Command("Foretell the memory of a run: quietstar plan --config FILE", _plan),
    "eval": Command(
        "Score benchmarks with and without thoughts: quietstar eval --model DIR --tasks NAMES",
        _run_module("evaluation.command"),
    ),
    "lm-eval": Command(
        "lm-evaluation-harness: quietstar lm-eval run --model quietstar --model_args ...", _lm_eval
    ),
    "generate": Command(
        "Go on from a prompt, thinking: quietstar generate --model DIR --prompt TEXT",
        _run_module("console.generate"),
    ),
    "chat": Command(
        "Talk with a model that thinks: quietstar chat --model DIR", _run_module("console.chat")
    ),
    "inspect": Command(
        "Show the thoughts in a text: quietstar inspect --model DIR --text TEXT --out PAGE.html",
        _run_module("inspection.command"),
    ),
    "calibrate": Command(
        "Find where thinking pays, for faster generation: quietstar calibrate --model DIR",
        _run_module("calibration.command"),
    ),
    "merge": Command("Merge adapters: quietstar merge --model DIR --out DIR", _merge),
    "bench": Command(
        "Measure a step, sampling, decoding, memory: quietstar bench step|rollout|...", _bench
    ),
}
