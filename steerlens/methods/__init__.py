"""Fit directions: every method by its name."""

from steerlens.methods.fitting import default_position, fit, fit_methods
from steerlens.methods.registry import (
    METHODS,
    Method,
    fit_directions,
    method_of,
    null_directions,
)
from steerlens.methods.training import Trained, train_directions

__all__ = [
    "METHODS",
    "Method",
    "Trained",
    "default_position",
    "fit",
    "fit_directions",
    "fit_methods",
    "method_of",
    "null_directions",
    "train_directions",
]
