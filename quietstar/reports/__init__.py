"""One page about a run: ``report.html`` from the files of its folder."""

from quietstar.reports.page import write_report

__all__ = ["write_report"]
