"""Numbers as texts. A missing number is a dash."""

from __future__ import annotations

import math

MISSING = "–"
_THIN = "\u202f"  # narrow space that does not break a line


def percent(share: float | None) -> str:
    """``0.924`` as ``92.4 %``."""
    return MISSING if share is None else f"{100 * share:.1f}{_THIN}%".replace("-", "−")


def points(difference: float | None) -> str:
    """A difference of shares, ``0.6`` as ``+60.0 points``."""
    return MISSING if difference is None else f"{signed_points(difference)} points"


def signed_points(difference: float | None) -> str:
    """A difference of shares in points, without the unit."""
    return MISSING if difference is None else signed(100 * difference, 1)


def signed(value: float | None, digits: int = 4) -> str:
    """A number with its sign."""
    return MISSING if value is None else f"{value:+.{digits}f}".replace("-", "−")


def plain(value: float | None, digits: int = 4) -> str:
    """A number with a fixed number of decimals."""
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", "−")


def percents(bounds: tuple[float, float] | None) -> str:
    """An interval of shares."""
    return MISSING if bounds is None else f"{plain(100 * bounds[0], 1)} to {percent(bounds[1])}"


def point_bounds(bounds: tuple[float, float] | None) -> str:
    """An interval of differences of shares, in points without the unit."""
    return MISSING if bounds is None else " to ".join(signed_points(bound) for bound in bounds)


def duration(seconds: float) -> str:
    """``5025`` as ``1 h 24 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def wilson(share: float, n: float) -> tuple[float, float]:
    """The 95 % score interval of a share of ``n`` (Wilson 1927)."""
    z = 1.959964  # 97.5 % quantile of the normal distribution
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    variance = max(0.0, share * (1 - share)) / n + z * z / (4 * n * n)
    half = z * math.sqrt(variance) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)
