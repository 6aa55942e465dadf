"""Numbers as text, the same on all pages and in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import binomtest

from quietstar.evaluation.controls import FEW_ITEMS

MISSING = "–"


def show(value: float | None, form: str) -> str:
    """Format a number as its metric is declared (`Metric.form`)."""
    if value is None:
        return MISSING
    if form.startswith("+"):
        return signed(value, int(form[2]))
    return format(value, form).replace("-", "−")


def plain(value: float | None, digits: int = 4) -> str:
    """Format a number with a fixed number of decimals."""
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 4) -> str:
    """Format a number with its sign."""
    if value is None:
        return MISSING
    text = f"{value:+.{digits}f}"
    if value and not float(text):  # what is no chance must not read as zero
        text = f"{value:+.2g}"
    return text.replace("-", "−")


def signed_range(bounds: Sequence[float] | None) -> str:
    """Format an interval of signed numbers as ``−0.0120 to +0.0340``."""
    return MISSING if bounds is None else " to ".join(map(signed, bounds))


def percent(share: float | None) -> str:
    """Format ``0.924`` as ``92.4%``."""
    return MISSING if share is None else f"{plain(100 * share, 1)}%"


def share_of(share: float | None, n: float | None) -> str:
    """Format a share of ``n`` items as a percentage, or ``3 of 8`` where they are few."""
    if share is None or n is None or n >= FEW_ITEMS:
        return percent(share)
    return f"{plain(share * n, 0 if abs(share * n - round(share * n)) < 0.01 else 1)} of {n:.0f}"


def percent_range(bounds: Sequence[float] | None) -> str:
    """Format an interval of shares as ``88.0–96.0%``."""
    return MISSING if bounds is None else f"{plain(100 * bounds[0], 1)}–{percent(bounds[1])}"


def points(difference: float | None) -> str:
    """Format a difference of shares, ``0.6``, in percentage points: ``+60.0``."""
    return MISSING if difference is None else signed(100 * difference, 1)


def points_range(bounds: Sequence[float] | None) -> str:
    """Format an interval of differences of shares as ``+50.0 to +70.0``."""
    return MISSING if bounds is None else " to ".join(map(points, bounds))


def probability(value: float | None) -> str:
    """Format a p-value; those below a thousandth are not told apart."""
    return MISSING if value is None else ("< 0.001" if value < 0.001 else f"{value:.3f}")


def wilson(share: float, n: float | None) -> tuple[float, float] | None:
    """Return the 95% score interval of a share of ``n`` (Wilson 1927); None if there is none."""
    if n is None or n < 1 or not 0 <= share <= 1:
        return None
    ends = binomtest(round(share * n), round(n)).proportion_ci(method="wilson")
    return float(ends.low), float(ends.high)


def shown_text(text: str) -> str:
    """Strip the space around a text; show signs for an empty one and for nothing but space."""
    return text.strip() or ("␣" if text else MISSING)
