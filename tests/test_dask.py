"""Sweeps on Dask's workers, on this machine: those that are killed lose nothing."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import Any

import pytest
from conftest import build_llama, build_tokenizer

import steerlens as sl
from steerlens.errors import WorkerError

COEFFICIENTS = [-3.0, 0.0, 0.5, 4.0]


class Deadly(Executor):
    """Dask's executor, but one task kills its worker, whichever that is."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._n = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self._n += 1
        if self._n == 2:
            return self._executor.submit(os._exit, 1)
        return self._executor.submit(fn, *args, **kwargs)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    import dask
    from distributed import Client, LocalCluster

    options = {
        "distributed.scheduler.allowed-failures": 1,
        # A slow machine is not a dead one.
        "distributed.nanny.pre-spawn-environ.OMP_NUM_THREADS": "1",
        "distributed.comm.timeouts.connect": "120s",
    }
    with (
        dask.config.set(options),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("models") / "tiny"
    build_llama().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return sl.load_model(str(path), device="cpu", progress=False)


@pytest.fixture(scope="module")
def fitted(model: Any, pairs: sl.ContrastivePairs) -> sl.Directions:
    return sl.fit_directions(sl.collect_differences(model, pairs))


def swept(model: Any, pairs: sl.ContrastivePairs, fitted: sl.Directions, **options: Any) -> Any:
    return sl.sweep(model, pairs, fitted, coefficients=COEFFICIENTS, n_bootstrap=50, **options)


def test_the_same_bytes_also_when_a_worker_is_killed_in_mid_run(
    model: Any, pairs: sl.ContrastivePairs, fitted: sl.Directions, client: Any
) -> None:
    expected = swept(model, pairs, fitted).table.to_csv()
    executor = client.get_executor()
    assert swept(model, pairs, fitted, executor=executor).table.to_csv() == expected
    pids = client.run(os.getpid)
    assert len(set(pids.values())) == 2
    killed: list[int] = []

    def kill(what: str, done: int, total: int) -> None:
        if what == "cells" and done and not killed:
            killed.append(min(pids.values()))
            os.kill(killed[0], signal.SIGKILL)

    found = swept(model, pairs, fitted, executor=executor, progress=kill)
    assert found.table.to_csv() == expected
    assert killed


def test_a_task_that_kills_every_worker_ends_the_run(
    model: Any, pairs: sl.ContrastivePairs, fitted: sl.Directions, client: Any
) -> None:
    with pytest.raises(WorkerError, match="a worker failed"):
        swept(model, pairs, fitted, executor=Deadly(client.get_executor()))
    # The others go on working.
    swept(model, pairs, fitted, executor=client.get_executor())
