"""Exceptions that the command line reports as a one-line error, and text that is safe to print."""

import re
from collections.abc import Iterable

_CONTROL = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


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
    """A signal asked a run to stop; its checkpoint is saved, and the message says where."""
