"""What all commands have in common: the parser, kinds of values, the model, files to write.

Nothing here imports torch before a command line is known to be valid.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from quietstar.errors import UserError, visible

if TYPE_CHECKING:
    from quietstar.model.quiet_star import QuietStarForCausalLM

DEFAULT_CONFIG = "configs/demo.yaml"


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # A default of None or False is described by the help text itself.
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line: ``--option (value): rule; remedy``."""

    def __init__(self, program: str, description: str | None, usage: str | None = None) -> None:
        # An abbreviation would be ambiguous with the keys of a config.
        super().__init__(program, usage, description, formatter_class=_Help, allow_abbrev=False)

    def value(self, option: str, kind: Any, default: Any, metavar: str | None, help: str) -> None:
        """Add an option that takes a value."""
        self.add_argument(option, type=kind, default=default, metavar=metavar, help=help)

    def flag(self, option: str, help: str) -> None:
        """Add an option without a value."""
        self.add_argument(option, action="store_true", help=help)

    def read(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Parse a command line on which every argument belongs to an option, or raise."""
        known = [option for action in self._actions for option in action.option_strings]
        for argument in sys.argv[1:] if arguments is None else arguments:
            name = argument.partition("=")[0]
            if name.startswith("--") and name not in known:
                meant = difflib.get_close_matches(name, known, 1, 0.7)
                remedy = f"did you mean {meant[0]}?" if meant else f"see {self.prog} --help"
                raise UserError(f"{name}: unknown option; {remedy}")
        args, unknown = self.parse_known_args(arguments)
        if unknown:
            self.error(f"{unknown[0]}: belongs to no option")
        return args

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as a `UserError` in the form of this project."""
        option, _, problem = message.removeprefix("argument ").partition(": ")
        if problem.startswith("("):  # of the kinds of values below
            raise UserError(f"{option} {problem}")
        if choice := re.fullmatch(r"invalid choice: (.*) \(choose from (.*)\)", problem, re.S):
            value, known = (part.replace("'", "") for part in choice.groups())
            raise UserError(f"{option} ({value}): must be one of {known}")
        if problem.startswith("expected"):
            metavar = next((a.metavar for a in self._actions if option in a.option_strings), None)
            raise UserError(f"{option}: has no value; write {option} {metavar or 'VALUE'}")
        if problem.startswith("ignored explicit argument"):
            raise UserError(f"{option}: takes no value; write {option} alone")
        if option.startswith("the following arguments are required"):
            message = f"{problem}: must be given"
        raise UserError(f"{message} (see {self.prog} --help)")


def whole(least: int = 0, most: int = 2**63 - 1) -> Callable[[str], int]:
    """Make a parser of whole numbers between two bounds."""

    def parse(text: str) -> int:
        is_whole = re.fullmatch(r"[+-]?[0-9]{1,20}", text.strip()) is not None
        if not is_whole or not least <= int(text) <= most:
            is_large = text.strip().isdecimal() and (not is_whole or int(text) > most)
            upper = f" and at most {most}" if most < 2**63 - 1 or is_large else ""
            raise _wrong(text, f"must be a whole number of at least {least}{upper}")
        return int(text)

    return parse


COUNT = whole(1)
SEED = whole()
THOUGHTS = whole(1, 1000)
"""Thoughts per position, or chains per item; the bound is far above what memory allows."""


def number(least: float = 0.0, most: float = math.inf, above: bool = False) -> Callable[[str], Any]:
    """Make a parser of finite numbers between two bounds; ``above`` excludes the lower one."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not least <= value <= most or (above and value == least):
            lower = f"above {least:g}" if above else f"of at least {least:g}"
            upper = "" if most == math.inf else f" and at most {most:g}"
            raise _wrong(text, f"must be a number {lower}{upper}")
        return value

    return parse


def device(text: str) -> str:
    """Parse the name of a device that can be used here."""
    from quietstar.backbone.devices import find_device  # imports torch

    try:
        return find_device(text)
    except UserError as problem:
        raise _wrong(text, str(problem)) from None


def existing(text: str) -> str:
    """Parse a name that may be a folder or file here, or a model on the hub; expands ``~``."""
    try:
        Path(text).expanduser().exists()
        if not text.strip():
            raise ValueError("it is empty")
    except (OSError, ValueError, RuntimeError) as problem:
        raise _wrong(text, f"is no name of a model or file ({_reason(problem)})") from None
    return str(Path(text).expanduser()) if text.startswith("~") else text


def output_file(*endings: str) -> Callable[[str], Path]:
    """Make a parser of files that can be written once the work is done; makes their folder.

    Endings are those that are allowed, such as ``.html``; without any, all are.
    """

    def parse(text: str) -> Path:
        # Links are followed, so that what they point to is written, not the link.
        try:
            path = Path(os.path.realpath(Path(text).expanduser()))
            if endings and path.suffix not in endings:
                raise _wrong(text, f"must end in {' or '.join(endings)}")
            if path.is_dir():
                raise _wrong(text, "is a folder; give the name of a file in it")
            if path.exists() and not path.is_file():
                raise _wrong(text, "is no regular file")
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path if path.exists() else path.parent, os.W_OK):
                raise _wrong(text, "cannot be written (permission denied)")
        except (OSError, ValueError, RuntimeError) as problem:
            raise _wrong(text, f"cannot be written ({_reason(problem)})") from None
        return path

    return parse


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole, so that a full disk leaves the earlier one."""
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    except OSError as problem:
        raise UserError(f"{path}: cannot be written ({_reason(problem)})") from None


def write_json(path: Path | None, content: Any) -> None:
    """Write figures, if there is a file for them."""
    if path is not None:
        write_text(path, json.dumps(content, indent=2) + "\n")


def check_greedy(option: str, count: int, temperature: float | None, remedy: str) -> None:
    """Refuse several thoughts at one place if they are all the most likely one."""
    if count > 1 and not temperature:
        raise UserError(f"{option} ({count}): greedy thoughts are all identical; set {remedy} 1")


def read_text(args: argparse.Namespace, option: str, file_option: str, remedy: str) -> str:
    """Return the text of one option, or the content of the UTF-8 file that another one names.

    Raises:
        UserError: Not exactly one is given, the file cannot be read, or there is no text.
    """
    from quietstar.data.tokenizer import check_unicode  # imports torch

    text, name = (getattr(args, o.strip("-").replace("-", "_")) for o in (option, file_option))
    if (text is None) == (name is None):
        raise UserError(f"{option}: give either {option} TEXT or {file_option} FILE")
    source = option if name is None else f"{file_option} ({name})"
    if name is None:
        text = check_unicode(text, option)
    else:
        try:
            text = Path(name).expanduser().read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as problem:
            byte = f"byte {problem.start} is 0x{problem.object[problem.start]:02x}"
            raise UserError(f"{source}: is no UTF-8 ({byte}); convert it, as with iconv") from None
        except (OSError, ValueError, RuntimeError) as problem:
            raise UserError(f"{source}: cannot be read ({_reason(problem)})") from None
    if not text.strip():
        raise UserError(f"{source}: is empty; {remedy}")
    return text


def say(line: str) -> None:
    """Print one line, whatever characters of the user's files are in it."""
    Console(highlight=False).print(Text(visible(line)), soft_wrap=True)


@contextmanager
def progress(task: str, total: int, keep: bool = False) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr, which stays at the end if ``keep``; yields what advances it."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=not keep) as bars:
        bar = bars.add_task(visible(task), total=total)
        yield lambda: bars.advance(bar)


def table(headings: Sequence[str], left: Sequence[str], title: str | None = None) -> Table:
    """Start a table whose columns are aligned to the right, but for some."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in headings:
        made.add_column(heading, justify="left" if heading in left else "right")
    return made


def add_model(parser: argparse.ArgumentParser, meaning: str = "a saved Quiet-STaR model") -> None:
    """Add ``--model``, ``--dtype`` and ``--device``."""
    add = parser.add_argument
    add("--model", type=existing, required=True, metavar="DIR", help=f"folder of {meaning}")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", default="auto", choices=dtypes, help="precision of the weights")
    add("--device", type=device, metavar="NAME", help="default: a GPU if there is one")


def load_model(
    args: argparse.Namespace, needs_training: bool, remedy: str, name: str | None = None
) -> QuietStarForCausalLM:
    """Load the model of the options of `add_model`, or another one, onto its device.

    Code that comes with a model never runs. If ``needs_training``, a plain causal LM is refused
    with a `UserError` that ends in the remedy.
    """
    from quietstar.backbone.devices import find_device
    from quietstar.evaluation.scoring import load_thinker
    from quietstar.model.saving import SETTINGS_FILE
    from quietstar.training.build import quiet_libraries

    quiet_libraries()
    name = name or str(args.model)
    inside = Path(name) / "final"
    if (inside / SETTINGS_FILE).exists() and not (Path(name) / SETTINGS_FILE).exists():
        raise UserError(f"--model ({name}): is the folder of a run; its model is in {inside}")
    model = load_thinker(name, needs_training, args.dtype, remedy, trust_remote_code=False)
    return model.to(find_device(args.device))


def _wrong(value: str, rule: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"({value}): {rule}")


def _reason(problem: Exception) -> str:
    return (isinstance(problem, OSError) and problem.strerror) or str(problem)
