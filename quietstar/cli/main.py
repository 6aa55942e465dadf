"""The console command ``quietstar``: a table of subcommands, one module each.

A mistake of the user ends in one line per problem on stderr and exit code 2; a fault of ours in one
line that says so and names a file with the traceback. Nothing here imports torch before the config
is known to be valid.
"""

import argparse
import atexit
import difflib
import errno
import gc
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

from quietstar.errors import ConfigError, Preempted, UserError, reason_of, visible
from quietstar.system import signals
from quietstar.system.processes import is_connection_lost, launched_rank, leave_launch
from quietstar.system.signals import Stopped
from quietstar.system.watch import first_failure
from quietstar.version import __version__

EXIT_USER_ERROR = 2
EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h
EXIT_IO = 74  # EX_IOERR
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: to be tried again
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
STDOUT = "<stdout>"
"""Name of the standard output as a file."""
SECONDS_FOR_RANK_0 = 10.0
"""How long other ranks leave an error to rank 0 before they print it themselves."""
SECONDS_FOR_WORD = 2.0
"""How long other ranks outlive a stop, so that the launcher kills rank 0 after its line."""
# The interpreter's last collections walk through half a million objects of torch and transformers:
# over a second that a scheduler waits after its signal. What is frozen is not looked at.
atexit.register(gc.freeze)

COMMANDS = {
    "init": ("init", "Write a config for your records: quietstar init --data FILE"),
    "train": ("train", "Train a model: quietstar train --config FILE [--KEY VALUE ...]"),
    "eval": ("evaluate", "Score tasks with and without thoughts: quietstar eval --model DIR ..."),
    "report": ("report", "Write a run's page, or compare runs, or evaluations"),
    "judge": ("judge", "Compare texts by a judge: quietstar judge --pairs FILE --model DIR ..."),
    "reward-model": (
        "reward_model",
        "Train a reward model: quietstar reward-model --pairs FILE --model DIR ...",
    ),
    "teach": ("teach", "Keep what a model that thinks predicts: quietstar teach --model DIR ..."),
    "generate": (
        "generate",
        "Continue a prompt, chat, or show thoughts: quietstar generate --model DIR ...",
    ),
    "export": ("export", "Merge adapters, or write logs: quietstar export --model DIR --out DIR"),
}
"""By name: module of ``quietstar.cli``; a summary."""
RENAMED = {
    "compare": "report",
    "plan": "train --plan",
    "lm-eval": "eval lm-eval",
    "chat": "generate --chat",
    "inspect": "generate --inspect TEXT",
    "merge": "export",
    "calibrate": "eval --tasks FILE.txt (its table of gates), then generate --gate entropy:NATS",
    "bench": "python -m benchmarks.step (in a checkout)",
}
"""Commands of earlier versions, and what took their place."""
EXTRAS = {"lm_eval": "lm-eval", "reasoning_gym": "tasks", "tqdm": "lm-eval"}
"""By module: the extra of this package that installs it."""
RESUME_HINTS = {
    "train": "; start again with --resume auto",
    "eval": "; the same command continues from the finished items, if it has --out",
    "judge": "; the same command continues from the finished lines",
    "reward-model": "; the same command continues from the last checkpoint, if there is one",
    "teach": "; the same command continues from the finished parts",
}


def main(argv: list[str] | None = None) -> int | None:
    """Run a subcommand on ``argv`` (default: the process's); return its exit code, if any."""
    argv = sys.argv[1:] if argv is None else argv
    hint = "" if argv[1:2] == ["lm-eval"] else RESUME_HINTS.get((argv or [""])[0], "")
    return run_command(_dispatch, argv, hint)


def run_command(
    command: Callable[[list[str]], int | None], arguments: list[str], resume_hint: str = ""
) -> int | None:
    """Run a function on its arguments; whatever goes wrong becomes lines and an exit code.

    The hint is what to say after "interrupted".
    """
    _open_closed_streams()
    # bitsandbytes warns at its import about kernels that it can do without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with signals.listening(), _warnings_in_lines():
            try:
                code = command(arguments)
            except SystemExit as stop:
                code = _code_of(stop)
            sys.stdout.flush()
            atexit.register(leave_launch)  # not now: the caller may run another command
            return code
    except UserError as error:
        code = EXIT_USER_ERROR
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        told = first_failure("; ".join(problems))
    except (Preempted, KeyboardInterrupt) as stop:
        told = None if isinstance(stop, Preempted) else first_failure()
        if told is None:
            return _end_as_asked(stop, resume_hint)
        code, problems = EXIT_USER_ERROR, []  # the launcher's signal, after another rank's error
    except BrokenPipeError:  # as in `quietstar generate ... | head`
        _discard(sys.stdout)
        return EXIT_BROKEN_PIPE
    except BaseException as fault:
        told = first_failure()
        if told is None and (name := signals.requested()) is not None:  # a library's error of it
            return _end_as_asked(Stopped(name))
        problem = told or _explain(fault)
        code = EXIT_USER_ERROR if problem else EXIT_FAULT
        if isinstance(fault, OSError) and fault.strerror and _file_of(fault) == STDOUT:
            code = EXIT_IO
            _discard(sys.stdout)
        problems = [problem or _report_fault(fault)]
        if not is_connection_lost(fault):
            told = first_failure(problems[0])
    # Most errors strike every rank. Rank 0 prints at once, and when it exits, the launcher ends the
    # others while they wait here. A rank that outlives the wait is alone with its error.
    rank = launched_rank()
    if rank > 0:
        time.sleep(SECONDS_FOR_RANK_0)
    problems = problems if told is None else [told]
    for problem in problems:
        _print_line(f"error: {problem}", f"[rank {rank}] " if rank > 0 else "")
    _tell_launcher(problems)
    return code


def _open_closed_streams() -> None:
    """Lead streams that the caller closed nowhere; the next file would get their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def _discard(stream: Any) -> None:
    """Lead a stream nowhere that takes no more; at its exit Python would fail over the rest."""
    with suppress(OSError):  # it is a file's in a terminal, and an object's in a notebook
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _code_of(stop: SystemExit) -> Any:
    """Return the exit code of argparse, which ends so after its help; nothing else may.

    Raises:
        UserError: Some other code called ``sys.exit``, as a part of the user's own could.
    """
    last = traceback.extract_tb(stop.__traceback__)[-1]
    if last.filename == argparse.__file__:
        return stop.code
    raise UserError(
        f"line {last.lineno} of {last.filename} ended the command before its work was done "
        f"(SystemExit: {stop.code}). Remove that call."
    ) from stop


def _end_as_asked(stop: BaseException, resume_hint: str = "") -> int:
    """Say on rank 0 what asked for the end; return the exit code."""
    if launched_rank() == 0:
        name = stop.signal if isinstance(stop, Stopped) else "SIGINT"
        word = "interrupted" if name == "SIGINT" else f"{name} asked for an end"
        _print_line(str(stop) if isinstance(stop, Preempted) else f"{word}{resume_hint}")
    elif isinstance(stop, Preempted):
        time.sleep(SECONDS_FOR_WORD)
    asked = signals.requested() or ("SIGTERM" if isinstance(stop, Preempted) else "SIGINT")
    return EXIT_INTERRUPTED if asked == "SIGINT" else EXIT_PREEMPTED


def _tell_launcher(problems: list[str]) -> None:
    """Leave an error where torchrun looks for it, and prints it below its own traceback."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        error = {"message": visible("; ".join(problems)), "timestamp": int(time.time())}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump(error, file)


def _explain(fault: BaseException) -> str | None:
    """Say what the system or the machine lacks, if that is what an exception is about."""
    text, kind = str(fault), type(fault).__name__
    if isinstance(fault, ModuleNotFoundError):
        module = (fault.name or "").partition(".")[0]
        if module in EXTRAS:
            remedy = f"pip install 'quietstar[{EXTRAS[module]}]'"
            return f"this needs {module}, which is not installed; {remedy}"
    if isinstance(fault, MemoryError) or "OutOfMemory" in kind or "can't allocate memory" in text:
        return (
            f"out of memory: {reason_of(fault)}. Lower training.micro_batch_size, --batch-size or "
            "the length of the texts; quietstar train --plan predicts what a run needs."
        )
    if isinstance(fault, OSError) and fault.strerror:
        is_full = fault.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "Free space" if is_full else "Check the file and its disk"
        return f"{_file_of(fault)}: {fault.strerror}. {remedy}, then start again."
    if kind == "PanicException":  # of a library in Rust
        return (
            f"a tokenizer fails over a text ({reason_of(fault)}). Use another tokenizer, or leave "
            "the text out."
        )
    if is_connection_lost(fault):
        return (
            "another process of this launch has ended or hangs, so this one cannot go on; its own "
            "message, or that of the launcher, says why. Start again with --resume auto."
        )
    return None


def _file_of(fault: OSError) -> str:
    """Name the file that a system call failed on; a failed write alone names none.

    The innermost function that has a file open at the time is the one that writes.
    """
    if isinstance(fault.filename, str):
        return fault.filename
    frames = [frame for frame, _ in traceback.walk_tb(fault.__traceback__)]
    for value in (value for frame in reversed(frames) for value in frame.f_locals.values()):
        if isinstance(value, io.IOBase) and isinstance(name := getattr(value, "name", None), str):
            return name
    return STDOUT  # flushed at the end


def _report_fault(fault: BaseException) -> str:
    """Write the traceback into a new file; return the line that names it."""
    name = f"{type(fault).__name__}: {reason_of(fault)[:160]}"
    try:
        descriptor, path = tempfile.mkstemp(prefix="quietstar-traceback-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(f"quietstar {__version__}, arguments: {sys.argv[1:]}\n")
            file.writelines(traceback.format_exception(fault))
    except OSError as problem:
        path = f"nowhere ({reason_of(problem)})"
    return f"a fault of quietstar, not of yours ({name}). Report it with its traceback: {path}"


def _print_line(message: str, prefix: str = "") -> None:
    """Print one line on stderr, whatever characters of the user's files are in the message.

    A terminal breaks it between words, a file gets it whole.
    """
    line = " ".join(part.strip() for part in message.splitlines())
    line = f"{prefix}quietstar: {visible(line)}"
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except OSError:  # nobody can be told, but for the exit code
        _discard(sys.stderr)


class _Lines(logging.Handler):
    """Prints what this package logs as `_print_line` does."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record as one line."""
        _print_line(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def _warnings_in_lines() -> Iterator[None]:
    """Inside, warnings of this package are lines like its errors."""
    logger, lines = logging.getLogger("quietstar"), _Lines(logging.WARNING)
    logger.addHandler(lines)
    try:
        yield
    finally:
        logger.removeHandler(lines)


def _dispatch(argv: list[str]) -> int | None:
    name, *arguments = argv or [""]
    if name in ("-h", "--help"):
        commands = "".join(f"  {name:13}{text}\n" for name, (_, text) in COMMANDS.items())
        sys.stdout.write(
            "usage: quietstar COMMAND ...   (quietstar COMMAND --help says more)\n\n"
            "Quiet-STaR for any Hugging Face causal language model.\n\n"
            f"{commands}  --version    Print the version.\n"
        )
        return None
    if name == "--version":
        sys.stdout.write(f"quietstar {__version__}\n")
        return None
    if name in RENAMED:
        instead = RENAMED[name] if name == "bench" else f"quietstar {RENAMED[name]}"
        raise UserError(f"{name}: is no command any more; instead: {instead}")
    if name not in COMMANDS:
        given = f"there is no command {name}" if name else "no command is given"
        near = difflib.get_close_matches(name or "", COMMANDS, 1)
        given += f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"{given}; known: {', '.join(COMMANDS)} (see quietstar --help)")
    return import_module(f"quietstar.cli.{COMMANDS[name][0]}").main(arguments)
