"""Numbers that a caller gives, checked."""

import math
import operator
from typing import Any

from steerlens.errors import SweepError, told


def finite(name: str, value: Any) -> float:
    """The value as a float. Raises `SweepError` unless it is finite."""
    try:
        number = float(value) if not isinstance(value, str) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise SweepError(f"expected a finite {name}, got {told(value)}")
    return number


def whole(name: str, value: Any, least: int) -> int:
    """The value as an int. Raises `SweepError` unless it is a whole number from `least` on."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise SweepError(f"{name} must be a whole number, got {told(value)}") from error
    if not least <= number < 2**63:
        raise SweepError(f"{name} must be at least {least} and below 2**63, got {told(number)}")
    return number


def whole_or_none(name: str, value: Any, least: int) -> int | None:
    """None, or as `whole`."""
    return None if value is None else whole(name, value, least)
