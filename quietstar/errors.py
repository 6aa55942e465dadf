"""Exceptions that the command line reports as a one-line error, and text that is safe to print.

`reading` turns whatever transformers, safetensors, tokenizers, pyarrow, PEFT or the system raise
over a user's file into such an error, so that no loading code lists types of exceptions.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_CONTROL = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)

_STYLES = re.compile(r"\x1b\[[0-9;]*m")


def visible(text: str) -> str:
    """Escape the characters that could move a terminal's cursor or reverse its line."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)


class UserError(ValueError):
    """A mistake of the user; the message is one line with value, rule, reason and remedy."""


class ConfigError(UserError):
    """Everything that is wrong with a config, one line per problem.

    Attributes:
        problems: Lines of the form ``source: key: value, rule, remedy``.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        """Keep the problems; the message has one on each line."""
        self.problems: list[str] = list(problems)
        super().__init__("\n".join(self.problems))


class Preempted(Exception):
    """A signal asked a run to stop; what could be saved is saved, and the message says where."""


@contextmanager
def reading(what: str, remedy: str) -> Iterator[None]:
    """Blame what is read inside for anything that goes wrong there, in one line.

    Args:
        what: The thing of the user's, with its value, such as ``--model (runs/x)``.
        remedy: What the user can do, as a sentence.

    Raises:
        UserError: In place of any other exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as problem:
        raise UserError(f"{what}: cannot be read ({reason_of(problem)}). {remedy}") from problem


def reason_of(problem: BaseException) -> str:
    """Say in a few words what is wrong; the text of a library is cut to one short line."""
    if isinstance(problem, json.JSONDecodeError):
        return f"no valid JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}"
    if isinstance(problem, UnicodeDecodeError):
        return f"byte {problem.start} is {problem.object[problem.start]:#04x}, which is no UTF-8"
    if isinstance(problem, RecursionError):
        return "it is nested too deeply"
    if isinstance(problem, MemoryError):
        return "it does not fit into memory"
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    text = " ".join(_STYLES.sub("", str(problem)).split())
    if "Weights only load failed" in text:  # torch then advises to unpickle everything
        return "it is damaged, or holds a pickle that would run code"
    if "unexpected pos" in text or "PytorchStreamWriter" in text or "iostream error" in text:
        return "the disk is full, or failed while it was written"
    if isinstance(problem, KeyError):
        return f"it has no {text}"
    name = type(problem).__name__
    if name == "SafetensorError":
        return f"no whole safetensors file: {text[:200]}"
    if name == "ValidationError" and (errors := getattr(problem, "errors", None)):  # pydantic's
        first = errors()[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {first['msg']}" if place else str(first["msg"])
    return text[:300] or name
