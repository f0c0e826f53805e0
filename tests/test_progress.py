"""Progress: its arithmetic by hand, and what of it is drawn when, in a log and in a notebook."""

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlens.progress import (
    EVERY,
    KEPT_STAGES,
    Progress,
    Stage,
    as_html,
    duration,
    follow,
    in_log,
    in_notebook,
    part_of,
    printable,
    seconds_left,
    silent,
    status,
    times,
    under,
)

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)"> cells'


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# Arithmetic


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.4, "0 s"),
        (12.0, "12 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (84.0, "1 min 24 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (7500.0, "2 h 5 min"),
        (7169.9, "1 h 59 min"),
        (360_000.0, "100 h 0 min"),
    ],
)
def test_durations_by_hand(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_time_left_by_hand() -> None:
    """30 of 240 cells in 12 s: 0.4 s each, so 210 more take 84 s."""
    stage = Stage("cells", done=30, total=240, first=0, began=100.0, told=112.0)
    assert seconds_left(stage, 112.0) == pytest.approx(84)
    assert status(stage, 112.0) == "cells 30/240, 12 s, 1 min 24 s left"
    # 4 s later nothing was told: 16 s gone, 80 to come.
    assert seconds_left(stage, 116.0) == pytest.approx(80)
    assert status(stage, 116.0) == "cells 30/240, 16 s, 1 min 20 s left"


def test_time_left_is_undefined_before_a_step_and_once_it_has_run_out() -> None:
    begun = Stage("cells", done=0, total=10, first=0, began=0.0, told=0.0)
    assert math.isnan(seconds_left(begun, 5.0))
    assert status(begun, 5.0) == "cells 0/10, 5 s"
    # 9 of 10 in 9 s: 1 s left, of which 3 have passed.
    late = Stage("cells", done=9, total=10, first=0, began=0.0, told=9.0)
    assert math.isnan(seconds_left(late, 12.0))
    assert status(late, 12.0) == "cells 9/10, 12 s"
    assert seconds_left(late, 9.5) == pytest.approx(0.5)


def test_steps_that_were_done_before_have_no_pace() -> None:
    """50 of 100 were there; 10 more took 20 s, so 40 take 80 s: not 13 s."""
    stage = Stage("cells", done=60, total=100, first=50, began=0.0, told=20.0)
    assert seconds_left(stage, 20.0) == pytest.approx(80)


def test_the_last_line_says_how_it_ended() -> None:
    over = Stage("cells", done=240, total=240, first=0, began=0.0, told=96.0)
    assert status(over, 500.0) == status(over, 500.0, is_last=True) == "cells 240/240, 1 min 36 s"
    assert times(over, 500.0) == "1 min 36 s"
    stopped = Stage("cells", done=30, total=240, first=0, began=0.0, told=12.0)
    assert status(stopped, 15.0, is_last=True) == "cells 30/240, stopped after 15 s"


def test_a_stage_ends_when_another_begins() -> None:
    first = follow(None, "cells", 0, 4, 10.0)
    assert follow(first, "cells", 3, 4, 13.0) == Stage("cells", 3, 4, 0, 10.0, 13.0)
    over = follow(first, "cells", 4, 4, 14.0)
    assert over.is_over
    # Another name, steps undone, and the same name after the end.
    for stage, what, done in ((first, "slopes", 1), (over, "cells", 1)):
        assert follow(stage, what, done, 4, 20.0) == Stage(what, done, 4, done, 20.0, 20.0)
    halfway = follow(first, "cells", 3, 4, 13.0)
    assert follow(halfway, "cells", 2, 4, 20.0).began == 20.0


def test_parts_and_headings() -> None:
    told: list[tuple[str, int, int]] = []
    tell: Progress = lambda *given: told.append(given)  # noqa: E731
    part_of(tell, "activations: prompts", before=8, total=16)("rows", 3, 8)
    part_of(tell, "gradients: pairs")("rows", 3, 8)
    under(tell, "step 2 of 6")("cells", 1, 5)
    assert told == [
        ("activations: prompts", 11, 16),
        ("gradients: pairs", 3, 8),
        ("step 2 of 6, cells", 1, 5),
    ]
    silent("cells", 1, 2)
    assert len(told) == 3


def test_control_characters_are_not_obeyed() -> None:
    assert printable("cells\n\x1b[2J\u202e of\t x") == "cells ?[2J? of x"
    assert printable("cells: prompts, ä 次") == "cells: prompts, ä 次"


# A log


@contextmanager
def log(clock: Clock) -> Iterator[tuple[Progress, io.StringIO]]:
    stream = io.StringIO()
    with in_log(stream, clock) as progress:
        yield progress, stream


def test_a_log_has_a_line_every_few_seconds_and_the_last_of_each_stage() -> None:
    clock = Clock()
    with log(clock) as (progress, stream):
        for done in range(13):
            progress("cells", done, 12)
            clock.now += 1.0
        progress("slopes: prompts", 0, 2)
        progress("slopes: prompts", 2, 2)
        progress("nothing to do", 0, 0)
    assert stream.getvalue().splitlines() == [
        "cells 0/12, 0 s",
        "cells 5/12, 5 s, 7 s left",
        "cells 10/12, 10 s, 2 s left",
        "cells 12/12, 12 s",
        "slopes: prompts 2/2, 0 s",
    ]


def test_a_log_says_where_an_exception_stopped_it() -> None:
    clock, stream = Clock(), io.StringIO()

    def work() -> None:
        with in_log(stream, clock) as progress:
            progress("cells", 0, 12)
            progress("cells", 1, 12)
            clock.now += 2.0
            raise InterruptedError

    with pytest.raises(InterruptedError):
        work()
    assert stream.getvalue().splitlines() == ["cells 0/12, 0 s", "cells 1/12, stopped after 2 s"]


def test_a_stage_that_another_cuts_off_is_not_lost() -> None:
    clock = Clock()
    with log(clock) as (progress, stream):
        progress("cells", 0, 12)
        progress("cells", 3, 12)
        progress("slopes", 1, 1)
    assert stream.getvalue().splitlines()[1:] == [
        "cells 3/12, stopped after 0 s",
        "slopes 1/1, 0 s",
    ]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 4), st.floats(0, 4)),
        min_size=1,
        max_size=40,
    )
)
def test_lines_are_few_and_every_stage_has_a_last_one(calls: list[tuple[str, int, float]]) -> None:
    clock, running, n_stages = Clock(), None, 0
    with log(clock) as (progress, stream):
        for what, done, wait in calls:
            clock.now += wait
            progress(what, done, 4)
            is_new = running is None or what != running[0] or done < running[1]
            n_stages += is_new
            running = None if done == 4 else (what, done)
    lines = stream.getvalue().splitlines()
    lasts = [line for line in lines if "stopped" in line or " 4/4," in line]
    assert len(lasts) == n_stages
    assert len(lines) - len(lasts) <= 1 + (clock.now - 100.0) / EVERY


# A notebook


class Display:
    """What IPython's `display` is asked for, first and then."""

    def __init__(self) -> None:
        self.bundles: list[dict[str, str]] = []

    def __call__(self, bundle: dict[str, str], *, raw: bool, display_id: bool) -> "Display":
        assert raw
        assert display_id
        assert self.bundles == []
        self.bundles.append(bundle)
        return self

    def update(self, bundle: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.bundles.append(bundle)


def test_a_notebook_has_one_output_that_is_updated() -> None:
    clock, display = Clock(), Display()
    with in_notebook(display, clock) as progress:
        for done in range(5):
            progress("cells", done, 4)
            clock.now += 0.1
        progress(HOSTILE, 0, 2)
        clock.now += 30.0
        progress(HOSTILE, 1, 2)
    pages = [bundle["text/html"] for bundle in display.bundles]
    # 0 at once, 3 after 0.3 s, 4 as the last; then the first of the next, 1, and where it stopped.
    assert [re.findall(r"(\d)/\d", page)[-1] for page in pages] == list("034011")
    assert pages[1] == (
        '<div><progress value="3" max="4"></progress> cells 3/4, 0 s, 0 s left</div>'
    )
    assert pages[2] == "<div>cells 4/4, 0 s</div>"
    assert '<progress value="1" max="2">' in pages[4]
    assert "<progress" not in pages[5]
    assert "onerror=&quot;alert(2)&quot;&gt; cells 1/2, stopped after 30 s</div>" in pages[5]
    for page in pages:
        assert "<script" not in page
        assert "<img" not in page
    assert display.bundles[2]["text/plain"] == "cells 4/4, 0 s"


def test_a_notebook_without_progress_shows_nothing() -> None:
    display = Display()
    with in_notebook(display, Clock()) as progress:
        progress("cells", 0, 0)
    assert display.bundles == []


def test_many_stages_stay_few_lines() -> None:
    lines = [f"stage {i} 1/1, 0 s" for i in range(100)]
    page = as_html(lines, None, 0.0)
    assert page.count("<div>") == KEPT_STAGES + 1
    assert page.startswith("<div>80 stages before</div><div>stage 80 ")
    assert as_html(lines[:3], None, 0.0).count("<div>") == 3
