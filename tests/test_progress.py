"""Progress: its arithmetic by hand, and what is seen of it in a log, a terminal and a notebook."""

import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from steerlens import progress as room
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

ROOT = Path(__file__).resolve().parent.parent
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


def run_script(code: str, *, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )


WORK = """
import steerlens as sl
with sl.show_progress() as progress:
    for done in range(4):
        progress("cells", done, 3)
    print("said in between")
    for done in range(3):
        progress("slopes: [bold]prompts\\x1b[2J", done, 5)
    if FAIL:
        raise InterruptedError("in the middle")
    progress("slopes: [bold]prompts\\x1b[2J", 5, 5)
"""


@pytest.mark.parametrize("env", [{}, {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}])
def test_a_pipe_gets_plain_lines_on_stderr(env: dict[str, str]) -> None:
    done = run_script("FAIL = False" + WORK, env=env)
    assert (done.returncode, done.stdout) == (0, "said in between\n")
    assert done.stderr.splitlines() == [
        "cells 0/3, 0 s",
        "cells 3/3, 0 s",
        "slopes: [bold]prompts?[2J 5/5, 0 s",
    ]


def test_an_exception_ends_the_lines_of_a_pipe() -> None:
    done = run_script("FAIL = True" + WORK)
    lines = done.stderr.splitlines()
    assert lines[2] == "slopes: [bold]prompts?[2J 2/5, stopped after 0 s"
    assert lines[3].startswith("Traceback")


# A terminal


def in_pty(code: str, *, term: str = "xterm-256color", columns: int = 80) -> str:
    """All that a script writes to a terminal, control sequences with it."""
    pty = pytest.importorskip("pty", reason="pseudo-terminals are of Unix")
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env={**env, "TERM": term},
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            part = b""
        if not part:
            break
        written += part
    os.close(ours)
    process.wait(timeout=60)
    return written.decode()


SLOW = """
import time
import steerlens as sl
with sl.show_progress() as progress:
    for done in range(61):
        progress("cells", done, 60)
        time.sleep(0.02)
    print("said in between")
    progress("slopes: [bold]prompts", 0, 5)
    progress("slopes: [bold]prompts", 2, 5)
    time.sleep(0.6)
    if FAIL:
        raise InterruptedError("in the middle")
    progress("slopes: [bold]prompts", 5, 5)
print("after")
"""
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


def screen(written: str) -> list[str]:
    """The lines that stay on a terminal after carriage returns, moves up and erased lines."""
    lines, row, column = [""], 0, 0
    for sequence, letter in re.findall(r"\x1b\[([?0-9;]*[A-Za-z])|([\s\S])", written):
        if letter == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif letter == "\r":
            column = 0
        elif letter:
            lines[row] = lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
            column += 1
        elif sequence == "2K":
            lines[row] = ""
        elif sequence.endswith("A"):
            row -= int(sequence[:-1] or 1)
        else:
            assert sequence.endswith("m") or sequence in ("?25h", "?25l"), sequence
    return [line.rstrip() for line in lines if line.strip()]


def test_a_terminal_shows_a_bar_and_keeps_a_line_for_each_stage() -> None:
    written = in_pty("FAIL = False" + SLOW)
    # The bar was there, with counts and times.
    assert re.search(r"cells .*\u2501.* \d+/60, \d+ s, \d+ s left", written)
    shown = screen(written)
    assert re.fullmatch(r"cells 60/60, \d+ s", shown[0])
    assert shown[1] == "said in between"
    assert re.fullmatch(r"slopes: \[bold\]prompts 5/5, \d+ s", shown[2])
    assert shown[3:] == ["after"]
    assert written.count(HIDE_CURSOR) == written.count(SHOW_CURSOR) == 1


def test_an_exception_leaves_the_terminal_clean() -> None:
    written = in_pty("FAIL = True" + SLOW)
    assert "\u2501" in written
    shown = screen(written)
    assert re.fullmatch(r"slopes: \[bold\]prompts 2/5, stopped after \d+ s", shown[2])
    assert shown[3].startswith("Traceback")
    assert shown[-1] == "InterruptedError: in the middle"
    assert "\u2501" not in "".join(shown)
    assert written.rindex(SHOW_CURSOR) > written.rindex(HIDE_CURSOR)


def test_a_terminal_that_cannot_redraw_gets_lines() -> None:
    written = in_pty("FAIL = False" + SLOW, term="dumb")
    assert "\x1b" not in written
    assert written.splitlines()[0] == "cells 0/60, 0 s"
    assert re.search(r"cells 60/60, \d+ s", written)


def test_a_narrow_terminal_keeps_the_numbers() -> None:
    code = "FAIL = False" + SLOW.replace("cells", "step 2 of 9, boundary on probes: pushes settled")
    written = in_pty(code, columns=60)
    assert re.search(r"step 2\S* .*\u2026 .*\u2501.* \d+/60, \d+ s, \d+ s left", written)


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


def executed(code: str, *, allow_errors: bool = False) -> nbformat.NotebookNode:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client = NotebookClient(
        notebook, timeout=120, allow_errors=allow_errors, resources={"metadata": {"path": ROOT}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    return notebook


NOTEBOOK = """
import time
import steerlens as sl
with sl.show_progress() as progress:
    for stage in ("cells", "slopes: <b>prompts</b>"):
        for done in range(401):
            progress(stage, done, 400)
    time.sleep(0.3)
    progress("intervals", 1, 3)
    if FAIL:
        raise InterruptedError("in the middle")
    progress("intervals", 3, 3)
"""


def test_an_executed_notebook_holds_the_end_alone() -> None:
    (cell,) = executed("FAIL = False" + NOTEBOOK).cells
    (output,) = cell.outputs
    assert output.output_type == "display_data"
    assert len(str(output)) < 1000
    assert set(output.data) == {"text/html", "text/plain"}
    assert re.fullmatch(
        r"<div>cells 400/400, \d+ s</div>"
        r"<div>slopes: &lt;b&gt;prompts&lt;/b&gt; 400/400, \d+ s</div>"
        r"<div>intervals 3/3, \d+ s</div>",
        output.data["text/html"],
    )
    assert output.data["text/plain"].splitlines()[0].startswith("cells 400/400, ")


def test_a_cell_that_fails_says_where() -> None:
    (cell,) = executed("FAIL = True" + NOTEBOOK, allow_errors=True).cells
    shown, error = cell.outputs
    assert "intervals 1/3, stopped after" in shown.data["text/html"]
    assert "<progress" not in shown.data["text/html"]
    assert error.ename == "InterruptedError"
    with pytest.raises(CellExecutionError):
        executed("FAIL = True" + NOTEBOOK)


def test_ipython_is_not_imported_to_look_for_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert room._notebook_display() is None
    assert "IPython" not in sys.modules
