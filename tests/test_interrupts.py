"""A run that is stopped from outside: by a full disk, an interrupt, or another process at work."""

# ruff: noqa: F401, F811 (fixtures are imported, and named as parameters)

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import Context
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import HELD_OUT, OPENINGS, Main, assert_error, environment, finish, write_pairs
from test_resume import (
    HOOKS,
    N_LAYERS,
    REQUEST,
    assert_finished_after_resume,
    half,
    interrupted,
    tree,
    whole,
)

import steerlens as sl
from steerlens import cli
from steerlens.cli import sweep_command
from steerlens.errors import FileError
from steerlens.files import locked
from steerlens.runs.unfinished import open_parts, read_started

pytestmark = pytest.mark.usefixtures("loaded_once", "few_texts")
OPTIONS = {
    "sweep": ["--coefficients=0,2", "--examples", "0", "--layers", "1"],
    "boundary": ["--layers", "1"],
    "geometry": ["--layers", "1", "--angles", "3"],
    "compare": "--layers 1 --methods mean_diff --null 2 --off-target none".split(),
    "circuits": ["--layer", "1", "--coefficient", "2", "--no-compare"],
    "layers": ["--layers", "1"],
    "reliability": ["--layers", "1"],
    "extract": ["--layers", "1", "--no-boundary"],
}
RUNS = ("sweep", "boundary", "geometry", "compare", "circuits")
FILES = ("layers", "reliability", "extract", "export", "bake", "report")
"""The commands that write a run folder, and those that write a file or a checkpoint."""


@pytest.fixture(scope="module")
def written(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands read: model and pairs, a vector, a run."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "model").symlink_to(model_folder)
    write_pairs(folder / "pairs.jsonl", [*OPENINGS, *HELD_OUT, "the cat sat", "I know"])
    answers = {"positive": " warm", "negative": " cold"}
    items = (json.dumps({"prompt": f"you are {word}", **answers}) for word in "abcdefgh")
    (folder / "items.jsonl").write_text("\n".join(items))
    for name in ("extract", "sweep"):
        finish(name, *words_of(name, folder, output(name, folder)))
    return folder


def output(name: str, folder: Path) -> Path:
    return folder / (name if name in (*RUNS, "bake") else f"{name}.safetensors")


def words_of(name: str, written: Path, out: Path) -> list[str | Path]:
    """The arguments of a command that writes to `out`."""
    vector = written / "extract.safetensors"
    if name == "export":
        return [vector, out]
    if name == "bake":
        return [vector, "--coefficient", "2", "--out", out]
    if name == "report":
        return [written / "sweep", "--out", out]
    data: list[str | Path] = [
        "--model",
        (written / "model").resolve(),
        "--pairs",
        written / "pairs.jsonl",
    ]
    items = ["--items", written / "items.jsonl"] if name == "compare" else []
    return [*data, *items, *OPTIONS[name], "--quiet", "--out", out]


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
    run: Main, sweep: Main, whole: dict[str, bytes], small_disk: Path
) -> None:
    folder = small_disk / "run"
    assert_error(sweep("--quiet", "--out", folder), "No space left", "make room", "resume")
    started = read_started(folder)
    assert started is not None
    assert 0 < len(started.has_part) < N_LAYERS
    assert_error(run("sweep", "--quiet", "--resume", folder), "No space left", "make room")
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert_finished_after_resume(run, folder, whole)


@pytest.mark.parametrize("name", [*RUNS, *FILES])
def test_a_disk_that_fills_at_any_write_blocks_no_later_run(
    name: str, run: Main, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write ends on the disk: there it fails. Of runs, some moments, others of each."""
    calls, room, fsync = [], 1000, os.fsync

    def fill(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fill)
    out = output(name, tmp_path / "whole")
    assert run(name, *words_of(name, written, out)).code == 0
    wrote, moments = tree(tmp_path / "whole"), range(len(calls))
    step = len(calls) // 2
    for at in moments if name in FILES else moments[RUNS.index(name) % step :: step]:
        folder = tmp_path / str(at)
        words = words_of(name, written, output(name, folder))
        calls, room = [], at
        outcome = run(name, *words)
        assert (outcome.code, "No space left" in outcome.words) == (2, True)
        assert "unexpected" not in outcome.words
        left = {path: content for path, content in tree(folder).items() if path in wrote}
        assert {path for path in left if left[path] != wrote[path]} <= {f"{name}/run.json"}
        room = 1000
        again = run(name, *words)
        if again.code:
            assert_error(again, f"steerlens {name} --resume")
            assert run(name, "--resume", output(name, folder), "--quiet").code == 0
        found = tree(folder)
        assert found.keys() == wrote.keys()
        assert {path for path in found if found[path] != wrote[path]} <= {f"{name}/run.json"}


# An interrupt


def test_an_interrupt_says_how_to_go_on_at_any_moment(
    run: Main, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    folder = interrupted
    before = sorted(path.name for path in (folder / "parts").iterdir())
    steps = [(sl, "load_model"), (sl, "Study")]
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


def hold(kinds: dict[Path, str], ready: Any) -> None:
    with ExitStack() as locks:
        for path, kind in kinds.items():
            locks.enter_context(locked(path, is_folder=kind == "folder"))
        ready.set()
        time.sleep(600)


@contextmanager
def held(kinds: dict[Path, str]) -> Iterator[None]:
    """Inside the block another process writes to these folders and files, until it is killed."""
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork here")
    context = multiprocessing.get_context("fork")  # which has the imports; PyTorch does not run
    ready = context.Event()
    holder = context.Process(target=hold, args=(kinds, ready), daemon=True)
    holder.start()
    assert ready.wait(60)
    try:
        yield
    finally:
        holder.kill()
        holder.join()


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to whose outputs of all commands another process writes."""
    folder = tmp_path_factory.mktemp("taken")
    kinds = {name: "folder" if name in RUNS else "file" for name in (*RUNS, *FILES)}
    with held({output(name, folder): kind for name, kind in kinds.items()}):
        yield folder


def test_the_second_of_two_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with held({tmp_path: "folder"}):
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
        assert started.request["hook_names"] == HOOKS
    assert read_started(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*RUNS, *FILES])
def test_every_command_that_writes_is_refused_where_another_writes(
    name: str,
    run: Main,
    written: Path,
    taken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = output(name, taken)
    refused = run(name, *words_of(name, written, out))
    assert_error(refused, f"another run is writing to '{out}'", "another --out")
    ran: list[bool] = []
    kind = next(c for c in cli.COMMANDS if c.__name__.lower() == name)
    monkeypatch.setattr(kind, "run", lambda command: ran.append(True))
    out = output(name, tmp_path / "out")
    out.parent.mkdir()
    assert (run(name, *words_of(name, written, out)).code, ran) == (0, [True])
    assert [path.name for path in out.parent.iterdir()] in ([], [out.name])


def test_a_run_beside_another_in_one_folder_loses_nothing(
    run: Main, model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins while the first measures; it knows nothing of the first's lock."""
    out = tmp_path / "run"
    options = ["--model", str(model_folder), "--pairs", str(pairs_file), "--layers", "1"]
    study, said = sl.Study, []

    def study_beside(*args: Any, **settings: Any) -> Any:
        said.append(Context().run(run, "boundary", *options, "--quiet", "--out", out))
        return study(*args, **settings)

    monkeypatch.setattr(sl, "Study", study_beside)
    assert run("boundary", *options, "--quiet", "--out", out).code == 0
    assert len(said) == 1
    assert_error(said[0], f"another run is writing to '{out}'")
    assert sl.read_run(out).command == "boundary"


# A reader that goes away


@pytest.mark.skipif(os.name != "posix", reason="the shell of Unix")
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("STEERLENS methods >&- 2>&-", 0),
        ("STEERLENS methods > /dev/full", 2),
        ("PYTHONIOENCODING=ascii STEERLENS vectors show é.safetensors > said", 0),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 STEERLENS vectors show é.safetensors", 0),
        ("STEERLENS extract EXTRACT >&-", 0),
        ("STEERLENS extract EXTRACT | true", 141),
    ],
)
def test_where_nobody_reads_stdout_nothing_is_lost(
    line: str, code: int, written: Path, tmp_path: Path
) -> None:
    (tmp_path / "é.safetensors").write_bytes((written / "extract.safetensors").read_bytes())
    extract = " ".join(map(str, words_of("extract", written, tmp_path / "v.safetensors")))
    line = line.replace("EXTRACT", extract.replace("--quiet", ""))
    line = line.replace("STEERLENS", f"{sys.executable} -m steerlens")
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        cwd=tmp_path,
        env=environment(),
        check=False,
    )
    assert done.returncode == code, done.stderr
    for word in (b"Traceback", b"Exception ignored", b"Error"):
        assert word not in done.stderr.replace(b"unexpected OSError", b"")
    if "said" in line:
        assert (tmp_path / "said").stat().st_size > 100
    if "extract" in line:
        vector = sl.SteeringVector.load(tmp_path / "v.safetensors")
        assert vector.hook_names == (HOOKS[1],)


# A command's pool; its first tasks end when a worker is up.
POOL = """
import time
from steerlens.cli.sweep_command import executor_of
if __name__ == "__main__":
    with executor_of(workers=2, dask=None) as pool:
        assert list(pool.map(time.sleep, (1, 1))) == [None, None]
        tasks = [pool.submit(time.sleep, 600) for _ in range(2)]
        print(1, flush=True)
        tasks[0].result()
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks Linux who lives")
def test_workers_end_when_their_parent_is_killed() -> None:
    command = [sys.executable, "-c", POOL]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"1\n"
        workers = workers_of(parent.pid)
        assert len(workers) == 2
        time.sleep(1)
        assert all(map(psutil.pid_exists, workers))
        parent.kill()
    wait_until(lambda: not any(map(psutil.pid_exists, workers)))


def workers_of(parent: int) -> list[int]:
    children = psutil.Process(parent).children(recursive=True)
    return [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 90
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.1)
