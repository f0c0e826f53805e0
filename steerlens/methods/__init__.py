"""Fit directions: every method by its name."""

from steerlens.methods.fitting import (
    Evidence,
    collect_evidence,
    default_position,
    fit,
    fit_from,
)
from steerlens.methods.registry import (
    METHODS,
    Method,
    fit_directions,
    method_of,
    null_directions,
)

__all__ = [
    "METHODS",
    "Evidence",
    "Method",
    "collect_evidence",
    "default_position",
    "fit",
    "fit_directions",
    "fit_from",
    "method_of",
    "null_directions",
]
