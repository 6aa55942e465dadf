"""Numbers as text. A missing number is a dash."""

from __future__ import annotations

import math
from statistics import NormalDist

MISSING = "–"


def plain(value: float | None, digits: int = 4) -> str:
    """Format a number with a fixed number of decimals."""
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 4) -> str:
    """Format a number with its sign."""
    return MISSING if value is None else f"{value:+.{digits}f}".replace("-", "−")


def percent(share: float | None) -> str:
    """Format ``0.924`` as ``92.4%``."""
    return MISSING if share is None else f"{plain(100 * share, 1)}%"


def points(difference: float | None) -> str:
    """Format a difference of shares, ``0.6``, in percentage points: ``+60.0``."""
    return MISSING if difference is None else signed(100 * difference, 1)


def percent_range(bounds: tuple[float, float] | None) -> str:
    """Format an interval of shares as ``88.0–96.0%``."""
    return MISSING if bounds is None else f"{plain(100 * bounds[0], 1)}–{percent(bounds[1])}"


def points_range(bounds: tuple[float, float] | None) -> str:
    """Format an interval of differences of shares as ``+50.0 to +70.0``."""
    return MISSING if bounds is None else f"{points(bounds[0])} to {points(bounds[1])}"


def duration(seconds: float) -> str:
    """Format ``5025`` as ``1 h 24 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def wilson(share: float, n: float) -> tuple[float, float]:
    """Return the 95% score interval of a share of ``n`` (Wilson 1927)."""
    n = round(n)
    share = round(share * n) / n
    z = NormalDist().inv_cdf(0.975)
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)
