"""Numbers as text. A missing number is a dash."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

MISSING = "–"


def plain(value: float | None, digits: int = 4) -> str:
    """Format a number with a fixed number of decimals."""
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 4) -> str:
    """Format a number with its sign."""
    return MISSING if value is None else f"{value:+.{digits}f}".replace("-", "−")


def signed_range(bounds: Sequence[float] | None) -> str:
    """Format an interval of signed numbers as ``−0.0120 to +0.0340``."""
    return MISSING if bounds is None else " to ".join(map(signed, bounds))


def percent(share: float | None) -> str:
    """Format ``0.924`` as ``92.4%``."""
    return MISSING if share is None else f"{plain(100 * share, 1)}%"


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


def duration(seconds: float) -> str:
    """Format ``5025`` as ``1 h 24 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def wilson(share: float, n: float | None) -> tuple[float, float] | None:
    """Return the 95% score interval of a share of ``n`` (Wilson 1927); None if there is none."""
    if n is None or n < 1 or not 0 <= share <= 1:
        return None
    n = round(n)
    share = round(share * n) / n
    z = NormalDist().inv_cdf(0.975)
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def visible(text: str) -> str:
    """Strip the space around a text; show signs for an empty one and for nothing but space."""
    return text.strip() or ("␣" if text else MISSING)
