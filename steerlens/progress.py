"""What long work tells of itself, and how that is shown: a bar, a notebook's cell, lines of a log.

A long function tells its `Progress` before the first step of a stage and after every step. Nothing
is shown unless the caller gives it one, as `show_progress` makes.
"""

import html
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps done, and the steps in all: as many done as there are
end the stage. Whatever else comes next is another stage. One without any steps is none."""

Clock = Callable[[], float]
"""Seconds since some moment, never falling."""

EVERY = 5.0
"""Seconds between two lines in a log, but for the last line of a stage."""
REDRAW = 0.25
"""Seconds between two pictures of a stage in a notebook."""
ENOUGH = 0.05
"""The share of a stage's steps from which on their pace says how long the others take."""
BAR_WIDTH = 20
KEPT_STAGES = 20
"""Finished stages that stay in a notebook's output."""


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Show the progress of what is given the yielded `Progress`, inside the block, with time left.

    In a terminal a bar on stderr, and a line for each finished stage; in a Jupyter notebook a bar
    that is updated in place, of which the lines of the last 20 stages stay; anywhere else lines on
    stderr: one every 5 seconds at most, and the last of every stage. An exception leaves a line
    that says where it stopped, and no bar.

        with sl.show_progress() as progress:
            result = sl.sweep(model, pairs, directions, coefficients=[-8, 8], progress=progress)

    The time left is that of the current stage alone, from its own pace: it assumes that a step to
    come takes as long as one made since the stage began. Where the first steps are the slow ones
    (a sweep's first layers have the most blocks after them) it is too long at first. Until 5% of
    the steps are made, and once the estimate has run out, nothing is said.

    Examples:
        >>> with sl.show_progress() as progress:
        ...     result = sl.sweep(
        ...         model, pairs, directions, layers=[2], coefficients=[0, 4], progress=progress
        ...     )
    """
    display = _notebook_display()
    console = None if display is not None else _terminal(sys.stderr)
    if display is not None:
        shown = in_notebook(display, time.monotonic)
    elif console is not None:
        shown = in_terminal(console, time.monotonic)
    else:
        shown = in_log(sys.stderr, time.monotonic)
    with shown as progress:
        yield progress


# For functions that tell


def silent(what: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


def part_of(
    progress: Progress, what: str, *, before: int = 0, total: int | None = None
) -> Progress:
    """A `Progress` for work that is a stage called `what`, or a part of it.

    The steps of a part come after `before` others and count among `total`.
    """
    return lambda _, done, of_part: progress(
        what, before + done, of_part if total is None else total
    )


def under(progress: Progress, heading: str) -> Progress:
    """A `Progress` that puts a heading before what is being done."""
    return lambda what, done, total: progress(f"{heading}, {what}", done, total)


# Arithmetic


@dataclass(frozen=True)
class Stage:
    """Steps `done` of `total`, `first` of them when it was first told of, at `began` (seconds).

    `told` is when it was last told of.
    """

    what: str
    done: int
    total: int
    first: int
    began: float
    told: float

    @property
    def is_over(self) -> bool:
        """Whether every step is done."""
        return self.done >= self.total


def goes_on(stage: Stage, what: str, done: int) -> bool:
    """Whether a call is of this stage still: the same work, not over, and no fewer steps done."""
    return not stage.is_over and stage.what == what and stage.done <= done


def follow(stage: Stage | None, what: str, done: int, total: int, now: float) -> Stage:
    """The stage after a call at `now`: the one before, gone on, or a new one."""
    if stage is not None and goes_on(stage, what, done):
        return replace(stage, done=done, total=total, told=now)
    return Stage(what, done, total, first=done, began=now, told=now)


def seconds_left(stage: Stage, now: float) -> float:
    """`(total - done) * (told - began) / (done - first) - (now - told)`; NaN where that is unknown.

    That is before 5% of the steps are made, and when the estimate has run out.
    """
    made = stage.done - stage.first
    if made <= 0 or made < ENOUGH * stage.total:
        return math.nan
    pace = (stage.told - stage.began) / made
    left = (stage.total - stage.done) * pace - (now - stage.told)
    return left if left > 0 else math.nan


def duration(seconds: float) -> str:
    """Whole seconds below an hour, whole minutes from there: 12 s, 1 min 24 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def times(stage: Stage, now: float) -> str:
    """How long the stage has taken, and what is left of it where that is known."""
    if stage.is_over:
        return duration(stage.told - stage.began)
    left = seconds_left(stage, now)
    taken = duration(now - stage.began)
    return taken if math.isnan(left) else f"{taken}, {duration(left)} left"


def status(stage: Stage, now: float, *, is_last: bool = False) -> str:
    """The stage as a line, such as "cells 30/240, 12 s, 1 min 24 s left".

    With `is_last` nothing comes after it: a stage that is not over has stopped.
    """
    where = f"{printable(stage.what)} {stage.done}/{stage.total}"
    if is_last and not stage.is_over:
        return f"{where}, stopped after {duration(now - stage.began)}"
    return f"{where}, {times(stage, now)}"


def printable(text: str) -> str:
    """The text on one line, control characters (which a terminal would obey) as question marks."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


# Showing


Draw = Callable[[Stage, float, bool], None]
"""Called with a stage, the time, and whether this is the last of the stage."""


@contextmanager
def _drawn(draw: Draw, clock: Clock) -> Iterator[Progress]:
    """A `Progress` that draws every call, and the last state of each stage as its last."""
    stage: Stage | None = None

    def tell(what: str, done: int, total: int) -> None:
        nonlocal stage
        if total == 0:
            return
        now = clock()
        before, stage = stage, follow(stage, what, done, total, now)
        if before is not None and not before.is_over and not goes_on(before, what, done):
            draw(before, now, True)
        draw(stage, now, stage.is_over)

    try:
        yield tell
    finally:
        if stage is not None and not stage.is_over:
            draw(stage, clock(), True)


@contextmanager
def in_log(stream: Any, clock: Clock) -> Iterator[Progress]:
    """Lines on a text stream, which is whatever stderr was replaced by: see `show_progress`."""
    last = -math.inf

    def draw(stage: Stage, now: float, is_last: bool) -> None:
        nonlocal last
        if is_last or now - last >= EVERY:
            last = now
            stream.write(status(stage, now, is_last=is_last) + "\n")
            stream.flush()

    with _drawn(draw, clock) as progress:
        yield progress


@contextmanager
def in_terminal(console: Any, clock: Clock) -> Iterator[Progress]:
    """A bar for the stage that runs, redrawn while it does, and a line for each finished one.

    `console` is rich's.
    """
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    running: Stage | None = None

    def render() -> Any:
        stage = running
        if stage is None:
            return Text()
        numbers = Text(f"{stage.done}/{stage.total}, {times(stage, clock())}")
        label = Text(printable(stage.what))
        label.truncate(max(console.width - BAR_WIDTH - len(numbers) - 3, 10), overflow="ellipsis")
        bar = ProgressBar(total=stage.total, completed=stage.done, width=BAR_WIDTH)
        grid = Table.grid(padding=(0, 1))
        for _ in range(3):
            grid.add_column(no_wrap=True)
        grid.add_row(label, bar, numbers)
        return grid

    def draw(stage: Stage, now: float, is_last: bool) -> None:
        nonlocal running
        running = None if is_last else stage
        if is_last:
            live.refresh()
            console.print(Text(status(stage, now, is_last=True)), soft_wrap=True)

    live = Live(
        console=console,
        get_renderable=render,
        refresh_per_second=4,
        transient=True,
        # What is printed meanwhile goes above the bar; but into a file what was meant for it.
        redirect_stdout=sys.stdout.isatty(),
    )
    with live, _drawn(draw, clock) as progress:
        yield progress


@contextmanager
def in_notebook(display: Any, clock: Clock) -> Iterator[Progress]:
    """One output that is updated in place: `display` is IPython's."""
    finished: list[str] = []
    handle: Any = None
    drawn: Stage | None = None
    last = -math.inf

    def draw(stage: Stage, now: float, is_last: bool) -> None:
        nonlocal handle, drawn, last
        is_same = drawn is not None and drawn.began == stage.began and drawn.what == stage.what
        if is_last:
            finished.append(status(stage, now, is_last=True))
        elif is_same and now - last < REDRAW:
            return
        drawn, last = stage, now
        running = None if is_last else stage
        bundle = {
            "text/html": as_html(finished, running, now),
            "text/plain": "\n".join([*_kept(finished), *_running(running, now)]),
        }
        if handle is None:
            handle = display(bundle, raw=True, display_id=True)
        else:
            handle.update(bundle, raw=True)

    with _drawn(draw, clock) as progress:
        yield progress


def as_html(finished: Sequence[str], running: Stage | None, now: float) -> str:
    """Finished stages as lines of text, the running one with a `<progress>` before its line."""
    rows = [f"<div>{html.escape(line)}</div>" for line in _kept(finished)]
    if running is not None:
        (line,) = _running(running, now)
        bar = f'<progress value="{running.done}" max="{max(running.total, 1)}"></progress>'
        rows.append(f"<div>{bar} {html.escape(line)}</div>")
    return "".join(rows)


def _kept(finished: Sequence[str]) -> list[str]:
    earlier = len(finished) - KEPT_STAGES
    first = [f"{earlier} stages before"] if earlier > 0 else []
    return [*first, *finished[-KEPT_STAGES:]]


def _running(stage: Stage | None, now: float) -> list[str]:
    return [] if stage is None else [status(stage, now)]


def _notebook_display() -> Any | None:
    """IPython's `display` in a Jupyter kernel, else None. IPython is not imported for it."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if getattr(shell, "kernel", None) is None:
        return None
    from IPython.display import display

    return display


def _terminal(stream: Any) -> Any | None:
    """A rich console on the stream where it is a terminal that can redraw a line, else None."""
    if not stream.isatty():
        return None
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    return console if console.is_terminal and not console.is_dumb_terminal else None
