"""Numbers as a reader sees them: decimals that fit a column, a true minus, empty for undefined."""

import math
import re
from collections.abc import Iterable

MINUS = "\N{MINUS SIGN}"
MAX_DECIMALS = 6
NOISE = 1e-9
"""What is smaller is rounding of sums, shown as 0."""


def decimals_for(values: Iterable[float]) -> int:
    """Decimals with which the middle of the values, by size, has four significant digits."""
    sizes = sorted(abs(v) for v in values if math.isfinite(v) and abs(v) > NOISE)
    if not sizes:
        return 0
    if all(size == int(size) and size < 1e6 for size in sizes):
        return 0
    middle = sizes[len(sizes) // 2]
    return min(MAX_DECIMALS, max(0, 3 - math.floor(math.log10(middle))))


def fixed(value: float, decimals: int) -> str:
    """A finite number with so many decimals; with an exponent where those would show no digit."""
    value = 0.0 if abs(value) <= NOISE else value
    text = f"{value:.{decimals}f}"
    if (value != 0 and float(text) == 0) or abs(value) >= 1e7:
        text = f"{value:.2e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return signed(text)


def short(value: float) -> str:
    """A number in running text: three significant digits, and all before the point."""
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "infinite" if value > 0 else f"{MINUS}infinite"
    value = 0.0 if abs(value) <= NOISE else value
    whole = 1000 <= abs(value) < 1e7
    return signed(f"{value:.0f}" if whole else f"{value:.3g}")


def change(value: float) -> str:
    """A change in running text: as `short`, with its sign."""
    return f"+{short(value)}" if value > 0 and math.isfinite(value) else short(value)


def span(low: float, high: float) -> str:
    """An interval of a change in running text."""
    if math.isnan(low) and math.isnan(high):
        return "not known"
    if math.isinf(low) and low == high:
        return "beyond what was measured"
    return f"{change(low)} to {change(high)}"


def in_words(meaning: str) -> str:
    """What a column means, without the signs by which its file has what is no number."""
    return re.sub(r"\bNaN\b", "undefined", re.sub(r"-?\binf\b", "unbounded", meaning))


def minus(text: str) -> str:
    """Running text with a true minus before its numbers."""
    return re.sub(r"(?<![\w.])-(?=[\d.])", MINUS, text)


def signed(text: str) -> str:
    """The text of a number with a true minus; zero has no sign."""
    if text.startswith("-") and not any(digit in text for digit in "123456789"):
        text = text[1:]
    return text.replace("-", MINUS)
