"""Cells on an executor's workers and on Dask's: the serial numbers, whatever happens to them."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import Swept

import steerlens as sl
from steerlens.engine import cells, workers
from steerlens.errors import ModelError, WorkerError
from steerlens.models.hooks import resid_post

COEFFICIENTS = [-3.0, 0.0, 0.5, 4.0]


class Inline(Executor):
    """Runs a task when it is submitted; what `spoil` raises is the task's error."""

    def __init__(self, spoil: Callable[[int], None] = lambda n: None) -> None:
        self.n_run = 0
        self._spoil = spoil

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.n_run += 1
        try:
            self._spoil(self.n_run)
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class LastFirst(Executor):
    """Keeps the first `n` tasks, and then runs them in reverse order."""

    def __init__(self, n: int) -> None:
        self.kept: list[Callable[[], None]] = []
        self._n = n

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.kept.append(lambda: future.set_result(fn(*args, **kwargs)))
        if len(self.kept) == self._n:
            for run in reversed(self.kept):
                run()
        return future


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        2, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as executor:
        yield executor


@pytest.fixture
def advances(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, int]]:
    """Where unsteered residuals are advanced from (None: the start), and the block they enter."""
    real, seen = cells.advance_part, []

    def noting(model: Any, part: Any, start: Any, block: int) -> Any:
        seen.append((None if start is None else start.block, block))
        return real(model, part, start, block)

    monkeypatch.setattr(cells, "advance_part", noting)
    return seen


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What tasks that ran in this process keep."""
    yield
    workers._models.clear()
    workers._standing.clear()


@pytest.fixture(scope="session")
def swept(loaded: Any, pairs: sl.ContrastivePairs, fitted: sl.Directions) -> Swept:
    """A sweep of the loaded model on `pairs`; what is given overrides that."""

    def run(model: Any = loaded, pairs: sl.ContrastivePairs = pairs, **options: Any) -> Any:
        options = {"coefficients": COEFFICIENTS, "n_bootstrap": 50} | options
        return sl.sweep(model, pairs, fitted, **options)

    return run


@pytest.fixture(scope="session")
def serial(swept: Swept) -> sl.measure.SweepResult:
    """That sweep, in this process."""
    return swept()


def assert_same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """To the bit, and the same attrs."""
    assert found.to_csv() == expected.to_csv()
    assert found.attrs == expected.attrs


# The serial run's numbers


@pytest.mark.parametrize("positions", ["all", "last"])
def test_a_sweep_in_processes_has_the_same_bytes(
    loaded: Any,
    pairs: sl.ContrastivePairs,
    continued: sl.ContrastivePairs,
    pool: ProcessPoolExecutor,
    positions: Any,
    swept: Swept,
    serial: Any,
) -> None:
    given = pairs if positions == "all" else continued
    options: dict[str, Any] = {"steered_positions": positions, "pairs": given}
    expected = serial if positions == "all" else swept(**options)
    found = swept(**options, executor=pool)
    for name in ("table", "layers", "points"):
        assert_same(getattr(found, name), getattr(expected, name))
    assert found.table.projection.nunique() > 10


def test_a_boundary_in_processes_has_the_same_bytes(
    loaded: Any, pairs: sl.ContrastivePairs, fitted: sl.Directions, pool: ProcessPoolExecutor
) -> None:
    options: dict[str, Any] = {"budget": "kl=0.05", "n_bootstrap": 50}
    expected = sl.find_boundary(loaded, pairs, fitted, **options)
    found = sl.find_boundary(loaded, pairs, fitted, **options, executor=pool)
    assert_same(found.layers, expected.layers)
    assert_same(found.curves, expected.curves)


def test_a_comparison_in_processes_has_the_same_bytes(
    loaded: Any, pairs: sl.ContrastivePairs, pool: ProcessPoolExecutor
) -> None:
    items = sl.PreferenceItems(
        (
            sl.PreferenceItem("you felt", " warm and good", " so cold", "1"),
            sl.PreferenceItem("the river was", " good", " cold", "2"),
            sl.PreferenceItem("I said it was", " kind", " very bad", "3"),
        ),
        "feelings",
    )
    options: dict[str, Any] = {
        "methods": ["mean_diff"],
        "layers": [1, 2],
        "neutral": ["the river was so cold", "it was warm", "I felt the rain", "what a night"],
        "n_null": 2,
        "n_bootstrap": 50,
    }
    expected = sl.compare(loaded, pairs, items, **options)
    found = sl.compare(loaded, pairs, items, **options, executor=pool)
    assert_same(found.table, expected.table)


def test_a_vector_in_a_worker_has_the_same_bytes(
    loaded: Any, pairs: sl.ContrastivePairs, fitted: sl.Directions
) -> None:
    vector = sl.SteeringVector.from_directions(
        loaded, fitted, layers=[0, 1], operator=sl.steering.Ablate()
    )
    options: dict[str, Any] = {"coefficients": [0, 0.5, 1], "n_bootstrap": 2}
    executor = Inline()
    found = sl.sweep(loaded, pairs, vector, executor=executor, **options)
    assert executor.n_run == 1
    assert_same(found.table, sl.sweep(loaded, pairs, vector, **options).table)


def test_threads_take_turns_and_give_the_same_bytes(swept: Swept, serial: Any) -> None:
    with ThreadPoolExecutor(3) as executor:
        found = swept(executor=executor)
    assert_same(found.table, serial.table)


def test_a_task_is_a_hook_and_their_order_changes_nothing(swept: Swept, serial: Any) -> None:
    """Also where a worker goes back to an earlier layer."""
    executor = LastFirst(serial.table.hook_name.nunique())
    found = swept(executor=executor)
    assert len(executor.kept) == serial.table.hook_name.nunique() > 2
    assert_same(found.table, serial.table)


def test_a_worker_runs_the_unsteered_blocks_once(
    loaded: Any, advances: list[Any], swept: Swept
) -> None:
    """It goes on from where its last task stood; one that goes backwards cannot."""
    n_from_start = {}
    executors = {"serial": None, "inline": Inline(), "backwards": LastFirst(loaded.cfg.n_layers)}
    for name, executor in executors.items():
        advances.clear()
        swept(executor=executor)
        n_from_start[name] = sum(start is None for start, _ in advances)
    assert n_from_start["serial"] == n_from_start["inline"] < n_from_start["backwards"]


def test_a_hook_by_the_plain_loop_does_not_move_the_worker(
    advances: list[Any], monkeypatch: pytest.MonkeyPatch, swept: Swept
) -> None:
    monkeypatch.setattr(
        "steerlens.engine.plan.not_exact", lambda *args: (False, {resid_post(1): "no"})
    )
    tables, moves = {}, {}
    for name, executor in {"serial": None, "inline": Inline()}.items():
        advances.clear()
        with pytest.warns(RuntimeWarning, match=r"blocks\.1\."):
            tables[name] = swept(executor=executor).table
        # Those that stand there already are advanced by nothing.
        moves[name] = [move for move in advances if move[0] != move[1]]
    assert_same(tables["inline"], tables["serial"])
    assert moves["inline"] == moves["serial"]
    assert any(start is not None for start, _ in moves["serial"])


def test_hooks_that_cannot_be_resumed_after_run_by_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, swept: Swept, serial: Any
) -> None:
    monkeypatch.setattr("steerlens.engine.exactness.n_skippable", lambda model: 0)
    with pytest.warns(RuntimeWarning, match="not one list"):
        plainly = swept()
    with pytest.warns(RuntimeWarning, match="not one list"):
        found = swept(executor=Inline())
    assert_same(found.table, plainly.table)
    cost = found.table.attrs["forward_equivalents"]
    assert cost > serial.table.attrs["forward_equivalents"]


def test_a_workers_warnings_are_given_here(
    monkeypatch: pytest.MonkeyPatch, swept: Swept, serial: Any
) -> None:
    """The first pass of every worker runs out of memory."""
    real, failed = cells.start_cells, []

    def short(*args: Any) -> Any:
        import warnings

        if not failed:
            failed.append(True)
            warnings.warn("out of memory: half of it", RuntimeWarning, stacklevel=1)
        return real(*args)

    monkeypatch.setattr(cells, "start_cells", short)
    with pytest.warns(RuntimeWarning, match="half of it"):
        found = swept(executor=Inline())
    assert_same(found.table, serial.table)


# What cannot be given to workers


@pytest.mark.filterwarnings("ignore:the directions were fitted on other weights")
def test_a_model_made_elsewhere_is_refused(llama: Any, swept: Swept) -> None:
    with pytest.raises(ModelError, match="load_model gave"):
        swept(llama, executor=Inline())
    swept(executor=Inline())


@pytest.mark.parametrize("given", [4, "processes", object()])
def test_what_is_no_executor_is_refused(loaded: Any, given: Any) -> None:
    with pytest.raises(WorkerError, match=r"expected a concurrent\.futures\.Executor"):
        workers.check_executor(given, loaded)
    workers.check_executor(Inline(), loaded)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forked_processes_are_refused(swept: Swept) -> None:
    context = multiprocessing.get_context("fork")
    with (
        ProcessPoolExecutor(1, mp_context=context) as executor,
        pytest.raises(WorkerError, match=r"get_context\('spawn'\)"),
    ):
        swept(executor=executor)


@pytest.mark.filterwarnings("ignore:the directions were fitted on other weights")
def test_a_model_that_was_changed_is_found_out(model_folder: Path, swept: Swept) -> None:
    changed = sl.load_model(str(model_folder), device="cpu", progress=False)
    weight = changed.original_model.lm_head.weight
    swept(changed, executor=Inline())
    with torch.no_grad():
        weight *= 1.1
    with pytest.raises(WorkerError, match="was the model changed after load_model"):
        swept(changed, executor=Inline())


def test_a_worker_with_other_versions_is_refused(
    monkeypatch: pytest.MonkeyPatch, swept: Swept
) -> None:
    real = workers.provenance
    seen: list[Any] = []

    def other(model: Any) -> Any:
        """Here as it is; on every worker of another version."""
        seen.append(model)
        return real(model) if len(seen) == 1 else replace(real(model), torch="0.1")

    monkeypatch.setattr(workers, "provenance", other)
    with pytest.raises(WorkerError, match=r"torch 0\.1 \(expected"):
        swept(executor=Inline())


# Workers that fail


def test_what_others_finished_is_given_before_the_error(swept: Swept) -> None:
    def spoil(n: int) -> None:
        if n == 2:
            raise OSError("the node is gone")

    seen: list[int] = []
    with pytest.raises(WorkerError, match=r"a worker failed \(OSError: the node is gone\)"):
        swept(
            executor=Inline(spoil),
            progress=lambda what, done, total: seen.append(done) if what == "cells" else None,
        )
    executor = Inline()
    swept(executor=executor)
    assert executor.n_run > 2


def test_an_error_of_ours_comes_as_it_was(swept: Swept) -> None:
    def spoil(n: int) -> None:
        raise ModelError("no such model here")

    with pytest.raises(ModelError, match="no such model here"):
        swept(executor=Inline(spoil))


def test_a_pool_whose_worker_is_killed_ends_with_an_error(swept: Swept) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        os.kill(executor.submit(os.getpid).result(), signal.SIGKILL)
        with pytest.raises(WorkerError, match="BrokenProcessPool"):
            swept(executor=executor)


# Dask


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


def test_the_same_bytes_also_when_a_worker_is_killed_in_mid_run(
    client: Any, swept: Swept, serial: Any
) -> None:
    expected = serial.table.to_csv()
    executor = client.get_executor()
    assert swept(executor=executor).table.to_csv() == expected
    pids = client.run(os.getpid)
    assert len(set(pids.values())) == 2
    killed: list[int] = []

    def kill(what: str, done: int, total: int) -> None:
        if what == "cells" and done and not killed:
            killed.append(min(pids.values()))
            os.kill(killed[0], signal.SIGKILL)

    found = swept(executor=executor, progress=kill)
    assert found.table.to_csv() == expected
    assert killed


def test_a_task_that_kills_every_worker_ends_the_run(client: Any, swept: Swept) -> None:
    with pytest.raises(WorkerError, match="a worker failed"):
        swept(executor=Deadly(client.get_executor()))
    # The others go on working.
    swept(executor=client.get_executor())
