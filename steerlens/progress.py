"""What long work tells of itself, and how tqdm shows it: in a terminal, a notebook or a log.

A long function tells its `Progress` before the first step of a stage and after every step. Nothing
is shown unless the caller gives it one, as `show_progress` makes.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from math import inf
from time import monotonic
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps done, and the steps in all: as many done as there are
end the stage. Whatever else comes next is another stage. One without any steps is none."""

EVERY = 5.0
"""Seconds between two lines in a log, but for the last line of a stage."""
_LINE = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc}"


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Show the progress of what is given the yielded `Progress`, inside the block, with time left.

    It is tqdm's: in a terminal and a Jupyter notebook a bar for each stage, which stays when the
    stage is over; anywhere else lines on stderr: one every 5 seconds at most, and the last of every
    stage. An exception leaves the bar or the line where it stopped.

        with sl.show_progress() as progress:
            result = sl.sweep(model, pairs, directions, coefficients=[-8, 8], progress=progress)

    The time left is that of the current stage alone, from its own pace. Where the first steps are
    the slow ones (a sweep's first layers have the most blocks after them) it is too long at first.

    Examples:
        >>> with sl.show_progress() as progress:
        ...     result = sl.sweep(
        ...         model, pairs, directions, layers=[2], coefficients=[0, 4], progress=progress
        ...     )
    """
    from tqdm.auto import tqdm

    bar: Any = None

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal bar
        if total == 0:
            return
        label = printable(stage)
        # A bar that is closed is disabled.
        if bar is None or bar.disable or bar.desc != label or done < bar.n:
            if bar is not None:
                bar.close()
            bar = tqdm(desc=label, total=total, initial=done, **options)
        bar.total = total
        if done < total:
            bar.update(done - bar.n)
        else:  # drawn once, by close
            bar.n = done
            bar.close()

    with _place() as options:
        try:
            yield tell
        finally:
            if bar is not None:
                bar.close()


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


def part_of(
    progress: Progress, stage: str, *, before: int = 0, total: int | None = None
) -> Progress:
    """A `Progress` for work that is a stage of that name, or a part of it.

    The steps of a part come after `before` others and count among `total`.
    """
    return lambda _, done, of_part: progress(
        stage, before + done, of_part if total is None else total
    )


def under(progress: Progress, heading: str) -> Progress:
    """A `Progress` that puts a heading before what is being done."""
    return lambda stage, done, total: progress(f"{heading}, {stage}", done, total)


def printable(text: str) -> str:
    """The text on one line, and as `visible`."""
    return visible(" ".join(text.split()))


def visible(text: str, keep: str = "") -> str:
    """The text with an escape such as \\x1b for what a terminal would obey or not show.

    That is what `str.isprintable` says is none: control characters (of C1 too, and line ends),
    those that turn the direction of text, invisible ones and half surrogate pairs; but for `keep`.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


@contextmanager
def _place() -> Iterator[dict[str, Any]]:
    """tqdm's options for where stderr leads: a notebook's kernel, a terminal, or a log."""
    from tqdm.contrib import DummyTqdmFile

    stream = sys.stderr
    if type(stream).__module__.startswith("ipykernel"):
        yield {"mininterval": 0.5}
    elif not stream.isatty() or os.environ.get("TERM") == "dumb":
        yield {"file": _Lines(stream), "bar_format": _LINE, "mininterval": 0, "miniters": 1}
    else:
        with ExitStack() as redirected:
            # What is printed meanwhile goes above the bar; but into a file what was meant for it.
            redirected.enter_context(redirect_stderr(DummyTqdmFile(stream)))
            if sys.stdout.isatty():
                redirected.enter_context(redirect_stdout(DummyTqdmFile(stream)))
            # The label is last: it is what a narrow terminal cuts off.
            yield {"file": stream, "bar_format": "{bar:20} " + _LINE, "dynamic_ncols": True}


class _Lines:
    """A log that tqdm draws into: a line every 5 seconds at most, and the last of each bar."""

    def __init__(self, stream: Any) -> None:  # whatever stderr was replaced by
        self._stream, self._drawn, self._written = stream, "", -inf

    def write(self, text: str) -> None:
        self._drawn = text.strip() or self._drawn
        is_last = text == "\n"
        if self._drawn and (is_last or monotonic() - self._written >= EVERY):
            self._stream.write(self._drawn + "\n")
            self._stream.flush()
            self._drawn, self._written = "", monotonic()
