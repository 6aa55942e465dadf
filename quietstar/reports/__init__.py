"""Pages: a run's ``report.html``, thoughts in a text, an evaluation."""

import logging

# It says on stderr that it looks for fonts, which the first page of an environment waits for.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

from quietstar.reports.run import write_report  # noqa: E402

__all__ = ["write_report"]
