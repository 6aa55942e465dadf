"""Pages: a run's ``report.html``, thoughts in a text, an evaluation."""

from quietstar.reports.run import write_report

__all__ = ["write_report"]
