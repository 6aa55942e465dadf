"""Errors that are the user's to correct: the command line prints them without a traceback."""

from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user; the message is one line with value, rule, reason and remedy."""


class ConfigError(UserError):
    """Everything that is wrong with a config, one line per problem.

    Attributes:
        problems: The lines, each ``source: key: value, rule, remedy``.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        """Keeps the problems; the message has one on each line."""
        self.problems: list[str] = list(problems)
        super().__init__("\n".join(self.problems))
