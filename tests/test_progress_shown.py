"""Progress as it is seen: in a pipe, in a real terminal, in an executed notebook."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from test_cli import model_folder, pairs_file  # noqa: F401 (fixtures)

from steerlens import progress

ROOT = Path(__file__).resolve().parent.parent


# A pipe


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


@pytest.mark.parametrize("quiet", [False, True])
def test_a_command_in_a_terminal(model_folder: Path, pairs_file: Path, quiet: bool) -> None:  # noqa: F811
    options = ["--model", str(model_folder), "--pairs", str(pairs_file), "--layers", "1"]
    options += ["--quiet"] if quiet else []
    written = in_pty(f"from steerlens.cli import main; main({['layers', *options]})", columns=160)
    if quiet:
        assert written == ""
        return
    shown = screen(written)
    assert any(re.fullmatch(r"activations: prompts 8/8, \d+ s", line) for line in shown)
    assert any(line.startswith("Fitting mean_diff on 4 pairs") for line in shown)
    assert shown[-1].startswith("baseline logprob")
    assert written.count(SHOW_CURSOR) == written.count(HIDE_CURSOR) == 1


# A notebook


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
    assert progress._notebook_display() is None
    assert "IPython" not in sys.modules
