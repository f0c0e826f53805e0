"""A run that is stopped from outside: by a full disk, a signal, or another process at work."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_cli import Main, assert_error, content, model_folder, pairs_file, run, sweep  # noqa: F401 (fixtures)
from test_resume import (  # noqa: F401 (fixtures)
    HOOKS,
    LONG,
    N_LAYERS,
    NULLS,
    REQUEST,
    Stop,
    assert_finished,
    assert_finished_after_resume,
    assert_same_run,
    interrupted,
    long_command,
    stop,
    whole,
)

import steerlens as sl
from steerlens import cli
from steerlens.cli import command, sweep_command
from steerlens.errors import FileError
from steerlens.runs.unfinished import open_parts, read_started

# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for some parts; skipped where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(
    run: Main,  # noqa: F811
    sweep: Main,  # noqa: F811
    whole: dict[str, bytes],  # noqa: F811
    small_disk: Path,
) -> None:
    folder = small_disk / "run"
    assert_error(sweep(*NULLS, "--quiet", "--out", folder), "No space left", "make room", "resume")
    started = read_started(folder)
    assert started is not None
    assert 0 < len(started.has_part) < N_LAYERS
    assert_error(run("sweep", "--quiet", "--resume", folder), "No space left", "make room")
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert_finished_after_resume(run, folder, whole)


# An interrupt


def test_an_interrupt_says_how_to_go_on_at_any_moment(
    run: Main,  # noqa: F811
    sweep: Main,  # noqa: F811
    stop: Stop,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    folder = interrupted(stop)
    before = sorted(path.name for path in (folder / "parts").iterdir())
    steps = [(command, "load_model"), (sweep_command, "collect_differences"), (command, "Study")]
    for module, name in steps:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupt)
            outcome = run("sweep", "--quiet", "--resume", folder)
        assert (outcome.code, f"--resume {folder}" in outcome.words) == (130, True)
        assert sorted(path.name for path in (folder / "parts").iterdir()) == before
    with monkeypatch.context() as patch:
        patch.setattr(sweep_command, "print_layers", interrupt)
        outcome = run("sweep", "--resume", folder)
    assert (outcome.code, "are whole" in outcome.words) == (130, True)
    assert sl.read_run(folder).tables["sweep"].hook_name.nunique() == N_LAYERS


# One process a folder


HOLD = """
import sys
from pathlib import Path
from steerlens.files import locked
with locked(Path(sys.argv[1]), is_folder=sys.argv[2] == "folder"):
    print(1, flush=True)
    input()
"""


@contextmanager
def held(path: Path, kind: str) -> Iterator[subprocess.Popen[bytes]]:
    """Inside the block another process writes there, until it is killed."""
    words = [sys.executable, "-c", HOLD, str(path), kind]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, env=environment(), **pipes) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"1\n"
        yield holder
        holder.kill()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(sl.__file__).parent.parent)}


def test_the_second_of_two_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with held(tmp_path, "folder"):
        with (
            pytest.raises(FileError, match=f"another run is writing to '{tmp_path}'"),
            open_parts(tmp_path, REQUEST, options={}),
        ):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [".steerlens.lock"]
    assert (tmp_path / ".steerlens.lock").exists()  # of the killed one, which blocks nobody
    with open_parts(tmp_path, REQUEST, options={}):
        started = read_started(tmp_path)
        assert started is not None
        assert started.hook_names == tuple(HOOKS)
    assert read_started(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


COMMANDS = {
    "sweep": ["--coefficients=0,2", "--examples", "0", "--layers", "1", "--out"],
    "boundary": ["--layers", "1", "--out"],
    "geometry": ["--layers", "1", "--angles", "3", "--out"],
    "compare": ["--layers", "1", "--methods", "mean_diff", "--out"],
    "circuits": ["--layer", "1", "--coefficient", "2", "--no-compare", "--out"],
    "layers": ["--layers", "1", "--out"],
    "reliability": ["--layers", "1", "--out"],
    "extract": ["--layers", "1", "--no-boundary", "--out"],
}
"""Every command that writes, but those below, which need what these write."""
RUNS = ("sweep", "boundary", "geometry", "compare", "circuits")


@pytest.mark.parametrize("name", [*COMMANDS, "export", "bake", "report"])
def test_every_command_that_writes_is_refused_where_another_writes(
    name: str,
    run: Main,  # noqa: F811
    model_folder: Path,  # noqa: F811
    pairs_file: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vector = tmp_path / "v.safetensors"
    out = tmp_path / "out" / (name if name in (*RUNS, "bake") else f"{name}.safetensors")
    options: list[str | Path] = ["--model", model_folder, "--pairs", pairs_file]
    words: dict[str, list[str | Path]] = {
        **{command: [*options, *more, out] for command, more in COMMANDS.items()},
        "export": [vector, out],
        "bake": [vector, "--coefficient", "2", "--out", out],
        "report": [tmp_path / "run", "--out", out],
    }
    out.parent.mkdir()
    with held(out, "folder" if name in RUNS else "file"):
        outcome = run(name, *words[name])
        assert_error(outcome, f"another run is writing to '{out}'", "choose another --out")
    ran: list[bool] = []
    kind = next(c for c in cli.COMMANDS if c.__name__.lower() == name)
    monkeypatch.setattr(kind, "run", lambda command: ran.append(True))
    assert (run(name, *words[name]).code, ran) == (0, [True])
    assert list(tmp_path.iterdir()) == [out.parent]
    assert [path.name for path in out.parent.iterdir()] in ([], [out.name])


@pytest.mark.parametrize("second", ["boundary", "sweep"])
def test_a_run_beside_another_in_one_folder_loses_nothing(
    second: str,
    run: Main,  # noqa: F811
    model_folder: Path,  # noqa: F811
    pairs_file: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second begins while the first measures, in a process of its own."""
    out = tmp_path / "run"
    options = ["--model", str(model_folder), "--pairs", str(pairs_file), "--layers", "1", "--quiet"]
    study, said = command.Study, []

    def study_beside(*args: Any, **settings: Any) -> Any:
        words = [sys.executable, "-m", "steerlens", second, *options, "--out", str(out)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
        said.append((done.returncode, done.stderr))
        return study(*args, **settings)

    monkeypatch.setattr(command, "Study", study_beside)
    assert run("boundary", *options, "--out", out).code == 0
    ((code, told),) = said
    assert (code, f"another run is writing to '{out}'" in "".join(told.splitlines())) == (2, True)
    assert sl.read_run(out).command == "boundary"


def tried(
    signal: str, span: int, kills: int, log: Path, *command: str | Path
) -> tuple[str, list[str]]:
    """A command that gets so many signals (see `killed.py`): what it said, and the log."""
    script = Path(__file__).parent / "killed.py"
    seed = os.environ.get("STEERLENS_SEED", "3")
    arguments = [sys.executable, script, signal, seed, span, kills, log, *command]
    done = subprocess.run(
        [*map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(sl.__file__).parent.parent,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, log.read_text(encoding="utf-8").splitlines()


def assert_nothing_kept_is_run_again(lines: list[str]) -> None:
    kept = [i for i, line in enumerate(lines) if line.startswith("kept ")]
    assert len(kept) > 2
    for i in kept:
        assert lines[i].replace("kept", "ran") not in lines[i:]


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGINT"])
def test_stopped_by_a_signal_until_it_is_finished(
    signal: str,
    model_folder: Path,  # noqa: F811
    pairs_file: Path,  # noqa: F811
    whole: dict[str, bytes],  # noqa: F811
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    options = ["--model", model_folder, "--pairs", pairs_file, "--coefficients=-2,0,2", *NULLS]
    command = ["sweep", *options, "--examples", "0", "--out", out]
    said, lines = tried(signal, 90, 40, tmp_path / "log", *command)
    assert {"SIGKILL": "ended -9", "SIGINT": "ended 130"}[signal] in lines
    assert ("--resume" in said) is (signal == "SIGINT")
    assert_nothing_kept_is_run_again(lines)
    assert_finished(out, whole)


@pytest.mark.parametrize("name", LONG)
def test_every_long_command_goes_on_after_a_kill(
    name: str,
    long_command: Callable[..., list[str | Path]],  # noqa: F811
    tmp_path: Path,
) -> None:
    """In as many places as `STEERLENS_KILLS` says, spread over all that the command does."""
    kills, out = int(os.environ.get("STEERLENS_KILLS", "3")), tmp_path / "run"
    undisturbed = long_command(name, tmp_path / "whole")
    _, lines = tried("SIGKILL", 1, 0, tmp_path / "undisturbed", *undisturbed)
    (n_calls,) = [int(line.split()[1]) for line in lines if line.startswith("calls")]
    span = max(1, 3 * n_calls // (2 * kills))
    _, lines = tried("SIGKILL", span, kills, tmp_path / "log", *long_command(name, out))
    print(name, n_calls, "calls;", lines.count("ended -9"), "kills")
    assert lines.count("ended -9") > 1
    assert_nothing_kept_is_run_again(lines)
    assert_same_run(out, content(tmp_path / "whole"))
