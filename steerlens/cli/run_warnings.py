"""The warnings of a run: shown on stderr as they come, and kept for its record."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from steerlens.cli.printing import LINES, note
from steerlens.progress import visible

_warned: ContextVar[tuple[str, ...]] = ContextVar("warned", default=())


@contextmanager
def keeping_warnings() -> Iterator[None]:
    """Inside the block `warned` has the warnings given so far; they are shown all the same."""
    before = _warned.set(())
    with warnings.catch_warnings():
        show = warnings.showwarning

        def keep_and_show(message: Warning | str, *args: Any, **options: Any) -> None:
            keep_warning(str(message))
            show(visible(str(message), LINES), *args, **options)

        warnings.showwarning = keep_and_show
        try:
            yield
        finally:
            _warned.reset(before)


def warned() -> tuple[str, ...]:
    """The texts of the warnings and of `warn`, each once, in the order in which they came."""
    return _warned.get()


def warn(text: str) -> None:
    """Print a note on stderr, and keep it for the record."""
    keep_warning(text)
    note(text)


def keep_warning(text: str) -> None:
    """Keep a warning for the record that was shown already."""
    _warned.set(tuple(dict.fromkeys((*_warned.get(), text))))
