"""Errors that say what was expected, what came, and what to do."""

import math
import operator
from typing import Any


class SteerlensError(ValueError):
    """Base of every error steerlens raises on purpose; the CLI prints it as one line."""


class PairError(SteerlensError):
    """A contrastive pair, or a file of them, cannot be used."""


class ModelError(SteerlensError):
    """A model cannot be found, fetched, checked or loaded."""


class HookError(SteerlensError):
    """A hook name is unknown on this model, or a hook that was asked for did not fire."""


class ActivationError(SteerlensError):
    """Activations are not finite, or a position lies outside a prompt."""


class DirectionError(SteerlensError):
    """A direction cannot be fitted or is missing."""


class ProcessingError(SteerlensError):
    """Numbers of models with different weight processing were about to be put together."""


class SweepError(SteerlensError):
    """A sweep was asked for with settings that have no meaning."""


class WorkerError(SteerlensError):
    """Cells cannot be given to an executor, or what ran them there failed or has another model."""


class MemoryLimitError(SteerlensError):
    """What was asked for cannot fit into the memory of the model's device."""


class OutputError(SteerlensError):
    """An output folder cannot be written without losing what is there."""


class SteeringError(SteerlensError):
    """A steering vector cannot be applied, combined or read as asked."""


class ExportError(SteerlensError):
    """A steering vector cannot be carried by the format or model that was asked for."""


class CircuitError(SteerlensError):
    """A model cannot be taken apart into heads and MLPs, or a question about its circuit fails."""


class PlotError(SteerlensError):
    """A table lacks what a figure is drawn from, or a figure is asked for what it does not have."""


class ReportError(SteerlensError):
    """A run folder cannot be read as one."""


def told(value: Any) -> str:
    """What was given, as an error says it: up to 80 characters of its repr."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python refuses to write thousands of digits
        return f"{type(value).__name__} with a number of more digits than can be written"


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
