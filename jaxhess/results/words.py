"""Numbers and estimates as a report prints them."""

from __future__ import annotations

import math

from jaxhess.krylov.errors import Estimate


def estimate_words(estimate: Estimate) -> tuple[str, str]:
    """The value, and its 95% interval in words, for a table."""
    low, high = estimate.interval()
    if math.isnan(low):
        return number(estimate.value, 4), "error not known"
    return number(estimate.value, 4), f"95%: {number(low, 4)} to {number(high, 4)}"


def number(x: float, digits: int) -> str:
    """Rounded to so many digits, plain where that is readable: 120, 0.00058, 3.2e−13; "unknown" for NaN."""
    if math.isnan(x):
        return "unknown"
    rounded = float(f"{x:.{digits}g}")
    text = f"{rounded:.0f}" if 10**digits <= abs(rounded) < 1e6 else f"{x:.{digits}g}"
    return text.replace("-", "\N{MINUS SIGN}")
