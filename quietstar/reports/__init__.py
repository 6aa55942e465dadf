"""Pages: a run's ``report.html``, thoughts in a text, an evaluation, the gates of generation."""

from quietstar.reports.run import write_report

__all__ = ["write_report"]
