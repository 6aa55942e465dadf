"""What all commands have in common: the parser, kinds of values, the model, files to write.

Nothing here imports torch before a command line is known to be valid.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import math
import os
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quietstar.config.messages import types_of, words_of
from quietstar.config.options import Options, option_of
from quietstar.errors import UserError, reason_of, visible
from quietstar.system.files import PARTIAL, check_output, file_kind
from quietstar.system.processes import launched_rank

if TYPE_CHECKING:
    from quietstar.model.quiet_star import QuietStarForCausalLM

logger = logging.getLogger(__name__)

DEFAULT_CONFIG = "configs/demo.yaml"
_FOLDERS = ("--model", "--compare", "--data", "--data-dir", "--include-path")
"""Options whose value may be a folder that is read."""


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # A default of None or False is described by the help text itself.
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line: ``--option (value): rule; remedy``."""

    def __init__(self, program: str, description: str | None, usage: str | None = None) -> None:
        # An abbreviation would be ambiguous with the keys of a config.
        super().__init__(program, usage, description, formatter_class=_Help, allow_abbrev=False)
        self._outputs: list[str] = []
        self._kind: type[Options] | None = None

    def value(self, option: str, kind: Any, default: Any, metavar: str | None, help: str) -> None:
        """Add an option that takes a value."""
        self.add_argument(option, type=kind, default=default, metavar=metavar, help=help)

    def flag(self, option: str, help: str) -> None:
        """Add an option without a value."""
        self.add_argument(option, action="store_true", help=help)

    def output(self, option: str, help: str, *endings: str, metavar: str = "FILE") -> None:
        """Add an option that names a file to write, and ``--force``; `check` looks at the file."""
        self.value(option, file_name(*endings), None, metavar, help)
        self._outputs.append(option)
        if "--force" not in self._option_string_actions:
            self.flag("--force", "replace files that exist")

    def check(self, args: Any, more_inputs: Mapping[str, Path] | None = None) -> None:
        """Refuse files of `output` that cannot be written, or only with ``--force``."""
        check_outputs(args, self._outputs, more_inputs=more_inputs)

    def warn_idle(self, args: Any, reasons: Mapping[str, str | None]) -> None:
        """Warn of values that change nothing, for the reason that stands by their option, if any.

        As in a config, a value that is the default is not worth a warning.
        """
        for option, reason in reasons.items():
            name = self._option_string_actions[option].dest
            default = self.get_default(name)
            if self._kind is not None:
                default = self._kind.model_fields[name].get_default(call_default_factory=True)
            if reason and getattr(args, name) != default:
                logger.warning("%s: has no effect %s; leave it out", option, reason)

    def options(self, kind: type[Options]) -> None:
        """Add the options of a class, into which `read` then makes what is given."""
        self._kind = kind
        schema = kind.model_json_schema()["properties"]
        for name, field in kind.model_fields.items():
            known = schema[name]
            members = (known, *known.get("anyOf", ()))
            number = "N" if "integer" in types_of(known) else "X"
            extra: dict[str, Any] = {"metavar": "|".join(words_of(known)) or number}
            extra |= next((member["cli"] for member in members if "cli" in member), {})
            if field.annotation is bool:
                extra = {"action": "store_true"}
            text = " ".join((field.description or "").split()).rstrip(".")
            text = text[:1].lower() + text[1:] if text[1:2].islower() else text
            default = field.get_default(call_default_factory=True)
            if not field.is_required() and default not in (None, False, (), ""):
                text += f" (default: {default})"
            self.add_argument(option_of(name), dest=name, default=argparse.SUPPRESS,
                              help=text.replace("%", "%%"), **extra)  # fmt: skip

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help; unlike argparse, fail where it cannot be written."""
        (file or sys.stdout).write(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse as argparse does, but refuse an option with a value that is given twice."""
        words = sys.argv[1:] if args is None else args
        if nul := next((word for word in words if "\0" in word), None):
            raise UserError(f"{visible(nul)}: must not hold a NUL character; leave it out")
        given = [word.partition("=")[0] for word in words]
        for option, action in self._option_string_actions.items():
            if action.nargs != 0 and given.count(option) > 1:
                raise UserError(f"{option}: is given {given.count(option)} times; give it once")
        return super().parse_known_args(args, namespace)

    def read(self, arguments: Sequence[str] | None) -> Any:
        """Parse a command line on which every argument belongs to an option; checks its files."""
        known = [option for action in self._actions for option in action.option_strings]
        for argument in sys.argv[1:] if arguments is None else arguments:
            name = argument.partition("=")[0]
            if name.startswith("--") and name not in known:
                meant = difflib.get_close_matches(name, known, 1, 0.7)
                remedy = f"did you mean {meant[0]}?" if meant else f"see {self.prog} --help"
                raise UserError(f"{name}: unknown option; {remedy}")
        args, unknown = self.parse_known_args(arguments)
        if unknown:
            words = list(sys.argv[1:] if arguments is None else arguments)
            before = [word for word in words[: words.index(unknown[0])] if word.startswith("--")]
            option = before[-1].partition("=")[0] if before else None
            takes_value = option is not None and self._option_string_actions[option].nargs != 0
            remedy = f"; {option} takes one value: join a list by commas, quote one with spaces"
            self.error(f"{unknown[0]}: belongs to no option{remedy if takes_value else ''}")
        if self._kind is not None:
            if (name := getattr(args, "device", None)) is not None:
                try:
                    args.device = device(name)
                except argparse.ArgumentTypeError as problem:
                    raise UserError(f"--device {problem}") from None
            args = self._kind.of(vars(args), dashes=True)
        find_models(args)
        self.check(args)
        return args

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as a `UserError` in the form of this project."""
        option, _, problem = message.removeprefix("argument ").partition(": ")
        if problem.startswith("("):  # of the kinds of values below
            raise UserError(f"{option} {problem}")
        if choice := re.fullmatch(r"invalid choice: (.*) \(choose from (.*)\)", problem, re.S):
            value, known = (part.replace("'", "") for part in choice.groups())
            raise UserError(f"{option} ({value}): must be one of {known}. Give one of them.")
        if problem.startswith("expected"):
            metavar = next((a.metavar for a in self._actions if option in a.option_strings), None)
            raise UserError(f"{option}: has no value; write {option} {metavar or 'VALUE'}")
        if problem.startswith("ignored explicit argument"):
            raise UserError(f"{option}: takes no value; write {option} alone")
        if option.startswith("the following arguments are required"):
            message = f"{problem}: must be given"
        raise UserError(f"{message} (see {self.prog} --help)")


def whole(least: int = 0, most: int = 10**9, why: str = "") -> Callable[[str], int]:
    """Make a parser of whole numbers between two bounds; ``why`` says what the upper one is for."""

    def parse(text: str) -> int:
        is_whole = re.fullmatch(r"[+-]?[0-9]{1,20}", text) is not None  # int takes other digits too
        if not is_whole or not least <= int(text) <= most:
            reason = f" ({why})" if why else ""
            raise _wrong(
                text, f"must be a whole number of at least {least} and at most {most}{reason}"
            )
        return int(text)

    return parse


BATCH = whole(1, 2**16, "no memory holds more at once")
TOKENS = whole(1, 10**6, "no model reads more")
SEED = whole(0, 2**32 - 1, "no more seeds are known to all generators")
THOUGHTS = whole(1, 1000, "no memory holds more at one place")
"""Thoughts per position, or chains per item."""

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def number(
    least: float, most: float, why: str = "", *, above: bool = False
) -> Callable[[str], float]:
    """Make a parser of finite numbers between two bounds; ``above`` excludes the lower one."""

    def parse(text: str) -> float:
        value = float(text) if _NUMBER.fullmatch(text) else math.nan
        if not least <= value <= most or (above and value == least):
            lower = f"above {least:g}" if above else f"of at least {least:g}"
            reason = f" ({why})" if why else ""
            raise _wrong(text, f"must be a number {lower} and at most {most:g}{reason}")
        return value

    return parse


def temperature(text: str) -> float:
    """Parse the temperature of a sampler; 0 takes the most likely tokens."""
    value = number(0.0, 1000.0, "beyond, all tokens are equally likely")(text)
    if 0 < value < 0.001:
        raise _wrong(text, "must be a number of at least 0.001, or 0 for the most likely tokens")
    return value


def device(text: str) -> str:
    """Parse the name of a device that can be used here."""
    from quietstar.backbone.devices import find_device  # imports torch

    try:
        return find_device(text)
    except Exception as problem:  # torch's own, too
        raise _wrong(text, reason_of(problem)) from None


def existing(text: str) -> str:
    """Parse a name that may be a folder or file here, or a model on the hub; expands ``~``."""
    try:
        Path(text).expanduser().exists()
        if not text.strip():
            raise ValueError("it is empty")
    except (OSError, ValueError, RuntimeError) as problem:
        raise _wrong(text, f"is no name of a model or file ({reason_of(problem)})") from None
    return str(Path(text).expanduser()) if text.startswith("~") else text


def unicode_text(text: str) -> str:
    """Parse a text without halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise _wrong(text, f"character {problem.start} is half of a surrogate pair") from None
    return text


def file_name(*endings: str) -> Callable[[str], str]:
    """Make a parser of names of files to write; without endings such as ``.html`` any will do."""

    def parse(text: str) -> str:
        if not text.strip():
            raise _wrong(text, "names no file")
        if endings and not text.endswith(endings):
            raise _wrong(text, f"must end in {' or '.join(endings)}")
        if text.endswith((PARTIAL, ".lock")):
            raise _wrong(text, f"must not end in {PARTIAL} or .lock, as files of this program do")
        return text

    return parse


def check_outputs(
    args: Any,
    outputs: Sequence[str],
    may_replace: Callable[[str, Path], bool] = lambda option, path: False,
    more_inputs: Mapping[str, Path] | None = None,
) -> None:
    """Refuse files that cannot be written, that are one file, or that the command reads.

    The values of the options become absolute paths.

    Args:
        args: Options of the command, among them ``force``.
        outputs: Options that name files to write.
        may_replace: Whether an existing file may be replaced without ``--force``.
        more_inputs: Files and folders that the command reads and no option names alone.

    Raises:
        UserError: One of the files is refused.
    """
    values = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items()}
    inputs = [(option, Path(value)) for option, value in values.items()
              if isinstance(value, str) and option not in outputs]  # fmt: skip
    inputs += (more_inputs or {}).items()
    written: dict[str, Path] = {}
    for option in outputs:
        if (value := values[option]) is None:
            continue
        path = check_output(value, option, force=True)
        source = next((other for other, name in inputs if _is_same_file(name, path)), None)
        if source is not None:
            raise UserError(f"{option} ({value}): is also {source}, which is read. Give another.")
        twin = next((other for other, name in written.items() if _is_same_name(name, path)), None)
        if twin is not None:
            raise UserError(
                f"{option} ({value}): is also {twin}. Give another name to one of them."
            )
        written[option] = path
    for option, path in written.items():
        if file_kind(path) == "file":
            if args.force:
                _refuse_members(option, path, inputs)
            elif not may_replace(option, path):
                check_output(values[option], option)  # says that it exists
        setattr(args, option.strip("-").replace("-", "_"), path)


def _refuse_members(option: str, path: Path, inputs: Sequence[tuple[str, Path]]) -> None:
    """Refuse to replace a file of a folder that is read, as a model's, or of an adapter's base."""
    from quietstar.model.saving import SETTINGS_FILE, read_settings  # imports torch

    for source, name in inputs:
        first = Path(os.path.expanduser(name))
        if (source.startswith("--") and source not in _FOLDERS) or not os.path.isdir(first):
            continue
        folders = [first]
        if (first / SETTINGS_FILE).exists():
            base = read_settings(first).base_model_name_or_path  # empty if it is saved whole
            folders += [Path(base)] if base and os.path.isdir(base) else []
        for folder in folders:
            members = folder.iterdir()  # links to files elsewhere, in the hub's cache
            if folder.resolve() in path.parents or any(_is_same_file(m, path) for m in members):
                raise UserError(
                    f"{option} ({path}): lies in {folder}, which is read ({source}), and nothing "
                    "there is replaced. Give another name."
                )


def _is_same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one.expanduser(), other)
    except (OSError, ValueError, RuntimeError):
        return False


def _is_same_name(one: Path, other: Path) -> bool:
    """Say whether two names are of one file, where upper and lower case are the same, too."""
    folded = {unicodedata.normalize("NFC", str(path)).casefold() for path in (one, other)}
    return len(folded) == 1 or _is_same_file(one, other)


def check_greedy(count: int, temperature: float | None) -> None:
    """Refuse several thoughts at one place if they are all the most likely one."""
    if count > 1 and not temperature:
        raise UserError(
            f"--num-thoughts ({count}): greedy thoughts are all identical; set "
            "--thought-temperature 1"
        )


def read_text(args: Any, option: str, file_option: str, remedy: str) -> str:
    """Return the text of one option, or the content of the UTF-8 file that another one names.

    Raises:
        UserError: Not exactly one is given, the file cannot be read, or there is no text.
    """
    from quietstar.data.tokenizer import check_unicode  # imports torch
    from quietstar.evaluation.tasks import MAX_BYTES, read_document

    text, name = (getattr(args, o.strip("-").replace("-", "_")) for o in (option, file_option))
    if (text is None) == (name is None):
        raise UserError(f"{option}: give either {option} TEXT or {file_option} FILE")
    source = option if name is None else f"{file_option} ({name})"
    text = check_unicode(text, option) if name is None else read_document(name, file_option)
    if not text.strip():
        raise UserError(f"{source}: is empty; {remedy}")
    if len(text) > MAX_BYTES:
        raise UserError(f"{source}: has more than {MAX_BYTES} characters. Give a shorter text.")
    return text


def say(line: str) -> None:
    """Print one line, whatever characters of the user's files are in it.

    A terminal breaks it between words, a file gets it whole.
    """
    console = Console(highlight=False)
    text = Text(visible(line).replace("\n", "⏎"))
    console.print(text, soft_wrap=not console.is_terminal)


def table(headings: Sequence[str], left: Sequence[str], title: str | None = None) -> Table:
    """Start a table whose columns are aligned to the right, but for some."""
    made = Table(title=title and Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for heading in headings:
        made.add_column(Text(heading), justify="left" if heading in left else "right")
    return made


def add_model(parser: argparse.ArgumentParser, meaning: str = "a saved Quiet-STaR model") -> None:
    """Add the options of `load_model`; `Parser.read` reads ``--ema``."""
    add = parser.add_argument
    add("--model", type=existing, required=True, metavar="DIR",
        help=f"folder of {meaning}, or of the run that trained it")  # fmt: skip
    add("--ema", action="store_true", help="DIR is a run's folder, of which the moving average of "
        "the weights is taken")  # fmt: skip
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", default="auto", choices=dtypes, help="precision of the weights")
    add("--device", type=device, metavar="NAME", help="default: a GPU if there is one")
    add_trust(parser)
    add("--device-map", choices=("auto",), help="auto: layers that do not fit on the device wait "
        "in memory, or on disk, until it needs them")  # fmt: skip


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-remote-code``, without which no code that comes with a model runs."""
    parser.add_argument("--trust-remote-code", action="store_true",
        help="run Python code that the model or its base names")  # fmt: skip


def find_models(args: Any) -> None:
    """Replace the folders of runs in ``--model`` and ``--compare`` by those of their models."""
    trust = getattr(args, "trust_remote_code", False)  # of `add_trust`
    if getattr(args, "ema", False):  # of `add_model`
        args.model = _averaged_model(args.model)
    for name in ("model", "compare"):
        value = getattr(args, name, None)
        if isinstance(value, str):
            setattr(args, name, _trained_model(value, name, trust))
        elif value is not None:
            setattr(args, name, [_trained_model(model, name, trust) for model in value])


def _trained_model(name: str, option: str, trust: bool) -> str:
    """Return the model in the folder of a run or of a checkpoint, and any other name as it is."""
    folder = Path(name)
    if not folder.exists() and "/" in name and folder.parent.is_dir():  # no name on the hub
        others = [str(path) for path in folder.parent.iterdir() if path.is_dir()]
        near = difflib.get_close_matches(name, others, 1)
        hint = f" Did you mean {near[0]}?" if near else " Give the folder of a model or of a run."
        raise UserError(f"--{option} ({name}): there is no such folder.{hint}")
    if not folder.is_dir():
        return name
    if (folder / "trainer_state.json").exists():
        return _model_of_checkpoint(folder, trust)
    from quietstar.model.saving import SETTINGS_FILE  # imports torch
    from quietstar.training.run_dir import CHECKPOINTS_FOLDER, FINAL_FOLDER, MARKER_FILE

    inside = folder / FINAL_FOLDER
    if (folder / SETTINGS_FILE).exists():
        return name
    if (inside / SETTINGS_FILE).exists():
        return str(inside)
    if not (folder / MARKER_FILE).exists():
        return name
    from quietstar.training.checkpoint import list_checkpoints

    if not (checkpoints := list_checkpoints(folder)):
        raise UserError(
            f"--{option} ({name}): is a run that has left no model in {FINAL_FOLDER}/ and nothing "
            f"in {CHECKPOINTS_FOLDER}/. Finish it with --resume auto."
        )
    if launched_rank() == 0:
        logger.warning("--%s (%s): is a run without a final model; its newest checkpoint is taken "
                       "(%s)", option, name, checkpoints[-1])  # fmt: skip
    return _model_of_checkpoint(checkpoints[-1], trust)


def _model_of_checkpoint(folder: Path, trust: bool) -> str:
    """Return the folder of a checkpoint's model, which the first process of a launch writes."""
    from quietstar.training.build import quiet_libraries  # imports torch
    from quietstar.training.export import export_checkpoint, exported, is_checkpoint

    if not is_checkpoint(folder):
        return str(folder)
    quiet_libraries()
    while launched_rank() > 0 and exported(folder) is None:
        time.sleep(1)
    return str(export_checkpoint(folder, trust))


def _averaged_model(name: str) -> str:
    """Return the folder of the averaged model in the folder of a run."""
    from quietstar.model.saving import SETTINGS_FILE  # imports torch
    from quietstar.training.run_dir import EMA_FOLDER, FINAL_FOLDER, MARKER_FILE

    inside = Path(name) / EMA_FOLDER
    if (inside / SETTINGS_FILE).exists():
        return str(inside)
    if any((Path(name) / part).exists() for part in (MARKER_FILE, FINAL_FOLDER)):
        raise UserError(
            f"--ema: the run in --model ({name}) has left no model in {EMA_FOLDER}/. Train with "
            f"--training.ema_decay 0.999 to its end, or take {Path(name) / FINAL_FOLDER} without "
            "--ema."
        )
    raise UserError(
        f"--ema: needs the folder of a run as --model, and {name} is none. Give it, or leave --ema "
        "out."
    )


def load_model(
    args: Any,
    needs_training: bool,
    remedy: str,
    name: str | None = None,
    positions: str = "every",
) -> QuietStarForCausalLM:
    """Load the model of the options of `add_model`, or another one, onto its device.

    If ``needs_training``, a plain causal LM is refused with a `UserError` that ends in the remedy.
    """
    from quietstar.evaluation.scoring import load_onto_device
    from quietstar.training.build import quiet_libraries

    quiet_libraries()
    return load_onto_device(
        name or str(args.model), needs_training, args.dtype, remedy, device=args.device,
        device_map=getattr(args, "device_map", None), positions=positions,
        trust_remote_code=getattr(args, "trust_remote_code", False),
    )  # fmt: skip


def require_trained(name: str) -> None:
    """Refuse a folder of ``--model`` in which no Quiet-STaR model lies."""
    from quietstar.model.saving import SETTINGS_FILE  # imports torch

    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / SETTINGS_FILE).exists():
        raise UserError(
            f"--model ({name}): holds no Quiet-STaR model ({SETTINGS_FILE} is missing). Give the "
            "folder of a saved one, or of the run that trained it."
        )


def _wrong(value: str, rule: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"({value}): {rule}. Give another value.")
