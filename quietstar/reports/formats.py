"""Numbers as text, the same on all pages and in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import binomtest

from quietstar.evaluation.controls import FEW_ITEMS

MISSING = "–"


def show(value: float | Sequence[float] | None, form: str = ".4f") -> str:
    """Format a number, or the ends of an interval.

    Args:
        value: None is missing.
        form: Format specification, or ``points`` (a difference of shares in percentage points) or
            ``p`` (a p-value). With a sign no value but zero reads as zero.
    """
    if value is None:
        return MISSING
    if isinstance(value, Sequence):
        low, high = (show(end, form) for end in value)
        return f"{low.removesuffix('%')}–{high}" if form.endswith("%") else f"{low} to {high}"
    if form == "p":
        return "< 0.001" if value < 0.001 else f"{value:.3f}"
    if form == "points":
        value, form = 100 * value, "+.1f"
    text = format(value, form)
    if form.startswith("+") and value and not float(text):
        text = f"{value:+.2g}"
    return text.replace("-", "−")


def share_of(share: float | None, n: float | None) -> str:
    """Format a share of ``n`` items as a percentage, or ``3 of 8`` where they are few."""
    if share is None or n is None or n >= FEW_ITEMS:
        return show(share, ".1%")
    is_whole = abs(share * n - round(share * n)) < 0.01
    return f"{show(share * n, '.0f' if is_whole else '.1f')} of {n:.0f}"


def wilson(share: float, n: float | None) -> tuple[float, float] | None:
    """Return the 95% score interval of a share of ``n`` (Wilson 1927); None if there is none."""
    if n is None or n < 1 or not 0 <= share <= 1:
        return None
    ends = binomtest(round(share * n), round(n)).proportion_ci(method="wilson")
    return float(ends.low), float(ends.high)


def shown_text(text: str) -> str:
    """Strip the space around a text; show signs for an empty one and for nothing but space."""
    return text.strip() or ("␣" if text else MISSING)
