"""What ends a command early; the command line prints it as one line, without a traceback."""

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


class Preempted(Exception):
    """A signal asked a run to end; its checkpoint is saved, and the message says where."""
