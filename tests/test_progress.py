"""Progress: whole stages and few lines in a log, bars in a real terminal and in a notebook."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import nbformat
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbclient import NotebookClient

import steerlens as sl
from steerlens import progress as module
from steerlens.progress import EVERY, Progress, part_of, printable, silent, under

ROOT = Path(__file__).resolve().parent.parent


def test_parts_and_headings() -> None:
    calls: list[tuple[str, int, int]] = []
    tell: Progress = lambda *call: calls.append(call)  # noqa: E731
    part_of(tell, "activations: prompts", before=8, total=16)("rows", 3, 8)
    part_of(tell, "gradients: pairs")("rows", 3, 8)
    under(tell, "step 2 of 6")("cells", 1, 5)
    assert calls == [
        ("activations: prompts", 11, 16),
        ("gradients: pairs", 3, 8),
        ("step 2 of 6, cells", 1, 5),
    ]
    silent("cells", 1, 2)
    assert len(calls) == 3


def test_control_characters_are_not_obeyed() -> None:
    assert printable("cells\n\x1b[2J\u202e of\t x") == r"cells \x1b[2J\u202e of x"
    assert printable("cells: prompts, ä 次") == "cells: prompts, ä 次"


# A log


class Log(io.StringIO):
    """What replaces stderr, and the seconds of its clock."""

    now = 100.0

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        with redirect_stderr(self), sl.show_progress() as progress:
            yield progress

    def lines(self) -> list[str]:
        """Its lines, without the times in them."""
        return re.sub(r" \[[\d:]+<[\d:]*\??\]", "", self.getvalue()).splitlines()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    stream = Log()
    monkeypatch.setattr(module, "monotonic", lambda: stream.now)
    return stream


def test_a_log_has_a_line_every_few_seconds_and_the_last_of_each_stage(log: Log) -> None:
    with log.shown() as progress:
        for done in range(13):
            progress("cells", done, 12)
            log.now += 1.0
        progress("slopes: prompts", 0, 2)
        progress("slopes: prompts", 2, 2)
        progress("nothing to do", 0, 0)
    assert log.lines() == [
        *("0/12 cells", "5/12 cells", "10/12 cells", "12/12 cells", "2/2 slopes: prompts")
    ]
    assert re.match(r"0/12 \[00:00<\?\] cells\n5/12 \[00:00<00:00\]", log.getvalue())


def test_a_log_says_where_an_exception_stopped_it(log: Log) -> None:
    def work() -> None:
        with log.shown() as progress:
            progress("cells", 0, 12)
            progress("cells", 1, 12)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        work()
    assert log.lines() == ["0/12 cells", "1/12 cells"]


def test_a_stage_ends_when_another_begins_and_when_steps_are_undone(log: Log) -> None:
    with log.shown() as progress:
        for stage, done, total in (
            *(("cells", 0, 12), ("cells", 3, 12), ("slopes", 2, 4), ("slopes", 1, 4)),
            *(("slopes", 3, 5), ("slopes", 5, 5), ("slopes", 0, 5)),
        ):
            progress(stage, done, total)
    assert log.lines() == [*("0/12 cells", "3/12 cells", "2/4 slopes", "5/5 slopes", "0/5 slopes")]


CALLS = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 4), st.floats(0, 4)), min_size=1, max_size=40
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CALLS)
def test_lines_are_few_and_every_stage_has_a_last_one(
    log: Log, calls: list[tuple[str, int, float]]
) -> None:
    log.seek(0)
    log.truncate()
    began = log.now = log.now + EVERY
    ends, running = [], None
    with log.shown() as progress:
        for stage, done, wait in calls:
            log.now += wait
            progress(stage, done, 4)
            if running is not None and (stage != running[0] or done < running[1]):
                ends.append(running)
            running = (stage, done)
            if done == 4:
                ends.append(running)
                running = None
    ends += [] if running is None else [running]
    lines = log.lines()
    rest = iter(lines)
    assert all(f"{done}/4 {stage}" in rest for stage, done in ends)
    assert len(lines) - len(ends) <= 1 + (log.now - began) / EVERY


def run_script(code: str, *, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env={**os.environ, **env},
    )


WORK = """
import time
import steerlens as sl
with sl.show_progress() as progress:
    for done in range(61):
        progress("cells", done, 60)
        time.sleep(0.02)
    progress("slopes: [bold]prompts\\x1b[2J", 0, 5)
    progress("slopes: [bold]prompts\\x1b[2J", 2, 5)
    print("said in between")
    time.sleep(0.3)
    if FAIL:
        raise InterruptedError("in the middle")
    progress("slopes: [bold]prompts\\x1b[2J", 5, 5)
print("after")
"""
DONE, TIMES = r"\u2588{20} 60/60 ", r"\[\d\d:\d\d<(\d\d:\d\d|\?)\]"


@pytest.mark.parametrize("env", [{}, {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}])
def test_a_pipe_gets_plain_lines_on_stderr(env: dict[str, str]) -> None:
    done = run_script("FAIL = False" + WORK, env=env)
    assert (done.returncode, done.stdout) == (0, "said in between\nafter\n")
    first, second, third = done.stderr.splitlines()
    assert re.fullmatch(rf"0/60 {TIMES} cells", first)
    assert re.fullmatch(rf"60/60 {TIMES} cells", second)
    assert re.fullmatch(rf"5/5 {TIMES} slopes: \[bold\]prompts\\x1b\[2J", third)


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


def screen(written: str) -> list[str]:
    """The lines that stay on a terminal after carriage returns."""
    rows = []
    for row in written.split("\n"):
        shown = ""
        for drawn in row.split("\r"):
            shown = drawn + shown[len(drawn) :]
        rows.append(shown.rstrip())
    return [row for row in rows if row]


def test_a_terminal_shows_a_bar_that_stays_when_the_stage_is_over() -> None:
    written = in_pty("FAIL = False" + WORK)
    assert "\x1b" not in written
    # The bar was there on the way, with counts and times.
    assert re.search(rf"\r\u2588{{5,18}}\S? +[2-5]\d/60 {TIMES} cells", written)
    cells, printed, slopes, after = screen(written)
    assert re.fullmatch(rf"{DONE}{TIMES} cells", cells)
    # What was printed while a bar was there stands above it.
    assert (printed, after) == ("said in between", "after")
    assert re.fullmatch(rf"\u2588{{20}} 5/5 {TIMES} slopes: \[bold\]prompts\\x1b\[2J", slopes)


BY_ITSELF = (
    "from steerlens.progress import by_default\nprogress, FAIL = by_default(None), False"
    + (WORK.replace("with sl.show_progress() as progress:", "if True:"))
)


def test_bars_are_there_by_themselves_in_a_terminal_alone() -> None:
    cells, *_, after = screen(in_pty(BY_ITSELF))
    assert re.fullmatch(rf"{DONE}{TIMES} cells", cells)
    assert after == "after"
    piped = run_script(BY_ITSELF, env={})
    assert (piped.stdout, piped.stderr) == ("said in between\nafter\n", "")
    assert sl.progress.by_default(silent) is silent


def test_an_exception_leaves_the_bar_where_it_stopped() -> None:
    shown = screen(in_pty("FAIL = True" + WORK))
    assert re.fullmatch(rf"\u2588{{8}} +2/5 {TIMES} slopes: \[bold\]prompts\\x1b\[2J", shown[2])
    assert shown[3].startswith("Traceback")
    assert shown[-1] == "InterruptedError: in the middle"


def test_a_terminal_that_cannot_redraw_gets_lines() -> None:
    written = in_pty("FAIL = False" + WORK, term="dumb")
    assert "\x1b" not in written
    assert re.fullmatch(rf"0/60 {TIMES} cells", written.splitlines()[0])
    assert re.search(rf"\n60/60 {TIMES} cells\r\n", written)


def test_a_narrow_terminal_keeps_the_numbers() -> None:
    code = "FAIL = False" + WORK.replace("cells", "step 2 of 9, boundary: pushes settled")
    shown = screen(in_pty(code, columns=60))
    assert re.fullmatch(rf"{DONE}{TIMES} step 2 of 9, bo\w*", shown[0])


@pytest.mark.parametrize("quiet", [False, True])
def test_a_command_in_a_terminal(model_folder: Path, pairs_file: Path, quiet: bool) -> None:
    options = ["--model", str(model_folder), "--pairs", str(pairs_file), "--layers", "1"]
    options += ["--quiet"] if quiet else []
    # The warning of four pairs is another matter.
    code = "import warnings; warnings.simplefilter('ignore'); from steerlens.cli import main; "
    written = in_pty(f"{code}main({['layers', *options]})", columns=160)
    if quiet:
        assert written == ""
        return
    assert "\x1b[1m" in written  # rich's own styles are obeyed
    shown = screen(written)
    assert any(re.fullmatch(rf"\u2588+ 8/8 {TIMES} activations: prompts", line) for line in shown)
    assert any(line.startswith("Fitting mean_diff on 4 pairs") for line in shown)
    assert any(line.startswith("baseline logprob") for line in shown)
    assert any(line.startswith("next: steerlens boundary") for line in shown)


# A notebook


def test_a_notebook_has_bars_that_are_updated_in_place_and_says_where_a_cell_failed() -> None:
    """Drawn as text where ipywidgets is not there; without control characters."""
    code = "FAIL = True" + WORK.replace("range(61)", "(0, 30, 60)")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client = NotebookClient(
        notebook, timeout=120, allow_errors=True, resources={"metadata": {"path": ROOT}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"})
    outputs = notebook.cells[0].outputs
    text = "".join(output.get("text", "") for output in outputs if output.get("name") == "stderr")
    cells, slopes = screen(text)
    assert "cells: 100%" in cells
    assert "60/60 [" in cells
    assert r"slopes: [bold]prompts\x1b[2J:  40%" in slopes
    assert "2/5 [" in slopes
    assert "\x1b" not in text
    assert outputs[-1].ename == "InterruptedError"
