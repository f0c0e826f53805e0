"""What long work tells of itself, and how tqdm shows it: in a terminal, a notebook or a log.

A long function tells its `Progress` before the first step of a stage and after every step. Where
the caller gives none, a terminal or a notebook shows bars, and a pipe or a file nothing;
`show_progress` makes one that writes there too.
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
    with _place() as options:
        bars = _Bars(options)
        try:
            yield bars
        finally:
            bars.close()


def by_default(progress: Progress | None) -> Progress:
    """What was given; else bars in a terminal or a notebook, and `silent` anywhere else."""
    if progress is not None:
        return progress
    return silent if _is_log(sys.stderr) else _Bars(_options(sys.stderr))


class _Bars:
    """A `Progress` that tqdm draws, a bar for each stage."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._bar: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        from tqdm.auto import tqdm

        if total == 0:
            return
        label, bar = printable(stage), self._bar
        # A bar that is closed is disabled.
        if bar is None or bar.disable or bar.desc != label or done < bar.n:
            self.close()
            bar = self._bar = tqdm(desc=label, total=total, initial=done, **self._options)
        bar.total = total
        if done < total:
            bar.update(done - bar.n)
        else:  # drawn once, by close
            bar.n = done
            bar.close()

    def close(self) -> None:
        """Leave the bar where it is."""
        if self._bar is not None:
            self._bar.close()


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


def part_of(
    progress: Progress, stage: str, *, before: int = 0, total: int | None = None
) -> Progress:
    """A `Progress` for a stage, or a part of it, whose steps follow `before` others of `total`."""
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
    """The text; what a terminal would obey or not show is escaped (\\x1b), but for `keep`."""
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


@contextmanager
def _place() -> Iterator[dict[str, Any]]:
    """tqdm's options for where stderr leads; what is printed in a terminal meanwhile is kept."""
    from tqdm.contrib import DummyTqdmFile

    stream = sys.stderr
    with ExitStack() as redirected:
        if not _is_log(stream) and not _is_notebook(stream):
            # What is printed meanwhile goes above the bar; but into a file what was meant for it.
            redirected.enter_context(redirect_stderr(DummyTqdmFile(stream)))
            if sys.stdout.isatty():
                redirected.enter_context(redirect_stdout(DummyTqdmFile(stream)))
        yield _options(stream)


def _options(stream: Any) -> dict[str, Any]:
    """tqdm's, for a notebook's kernel, a log or a terminal."""
    if _is_notebook(stream):
        return {"mininterval": 0.5}
    if _is_log(stream):
        return {"file": _Lines(stream), "bar_format": _LINE, "mininterval": 0, "miniters": 1}
    # The label is last: it is what a narrow terminal cuts off.
    return {"file": stream, "bar_format": "{bar:20} " + _LINE, "dynamic_ncols": True}


def _is_notebook(stream: Any) -> bool:
    return type(stream).__module__.startswith("ipykernel")


def _is_log(stream: Any) -> bool:
    is_screen = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    return not is_screen and not _is_notebook(stream)


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
