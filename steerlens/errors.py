"""Errors that say what was expected, what came, and what to do."""

import warnings
from typing import Any

__all__ = [
    "FileError",
    "HookError",
    "InputError",
    "MemoryLimitError",
    "ModelError",
    "SteerlensError",
    "WorkerError",
]


class SteerlensError(ValueError):
    """Base of every error steerlens raises on purpose; the CLI prints it as one line."""


class InputError(SteerlensError):
    """What a caller gave cannot be used: pairs, directions, settings, vectors, tables."""


class ModelError(SteerlensError):
    """A model cannot be found, fetched, checked or loaded, or its own numbers are not finite."""


class HookError(SteerlensError):
    """A hook name is unknown on this model, or a hook that was asked for did not fire."""


class MemoryLimitError(SteerlensError):
    """What was asked for cannot fit into the memory of the model's device."""


class FileError(SteerlensError):
    """A file or folder cannot be read as what it should be, or not written without a loss."""


class WorkerError(SteerlensError):
    """Cells cannot be given to an executor, or what ran them there failed or has another model."""


def told(value: Any) -> str:
    """What was given, as an error says it: up to 80 characters of its repr, in one line."""
    if hasattr(value, "dtype") and getattr(value, "shape", None):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    try:
        return f"{value!r:.200}".replace("\n", " ")[:80]
    except ValueError:  # Python refuses to write thousands of digits
        return f"{type(value).__name__} with a number of more digits than can be written"


def in_one_line(error: Exception) -> str:
    """What another library's error says, up to a traceback in it; its class where it is silent."""
    text = " ".join(str(error).partition("Traceback")[0].split())
    return text or type(error).__name__


_FORMER = {
    **dict.fromkeys(
        (
            *("ActivationError", "CircuitError", "DirectionError", "ExportError", "PairError"),
            *("PlotError", "ProcessingError", "SteeringError", "SweepError"),
        ),
        InputError,
    ),
    "OutputError": FileError,
    "ReportError": FileError,
}
"""A kind of error of version 0.1.0 -> the kind that is raised now."""


def __getattr__(name: str) -> Any:
    if name not in _FORMER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    text = f"{__name__}.{name} is now {_FORMER[name].__name__}, and goes with 0.3"
    warnings.warn(text, DeprecationWarning, stacklevel=2)
    return _FORMER[name]
