"""`steerlens sweep --workers` and `--dask`: the same bytes, and errors in one line."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from commands import Main, assert_error, content

from steerlens.cli.sweep_command import executor_of
from steerlens.errors import WorkerError


def test_a_worker_writes_the_same_bytes(sweep: Main, swept_folder: Path, tmp_path: Path) -> None:
    """Of two, see test_workers.py."""
    threads = torch.get_num_threads()
    outcome = sweep("--quiet", "--workers", "1", "--out", tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    assert torch.get_num_threads() == threads
    found, expected = content(tmp_path), content(swept_folder)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == ["run.json"]
    assert multiprocessing.active_children() == []


def test_what_cannot_be_started_is_said_in_one_line(sweep: Main, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert_error(sweep("--workers", "2", "--dask", "tcp://h:1", "--out", out), "one of them")
    assert_error(sweep("--dask", "nowhere", "--out", out), "no Dask scheduler answers", "nowhere")
    assert not out.exists()


def test_workers_are_ended_after_an_error() -> None:
    import time

    def fail() -> None:
        with executor_of(workers=1, dask=None) as executor:
            assert executor is not None
            executor.submit(time.sleep, 600)
            executor.submit(time.sleep, 600)
            while not multiprocessing.active_children():
                time.sleep(0.01)
            raise WorkerError("enough")

    with pytest.raises(WorkerError, match="enough"):
        fail()
    for process in multiprocessing.active_children():
        process.join(60)
    assert multiprocessing.active_children() == []


def test_none_is_asked_for() -> None:
    with executor_of(workers=None, dask=None) as executor:
        assert executor is None
