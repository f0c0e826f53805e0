"""`--workers` and `--dask`: the executor whose workers run the cells of a command."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from steerlens.errors import WorkerError


@contextmanager
def executor_of(*, workers: int | None, dask: str | None) -> Iterator[Executor | None]:
    """The executor that was asked for, for a block; None when none was.

    Processes are started afresh ("spawn"). After an error or an interrupt they are ended at once.
    Raises `WorkerError` when both are given, when Dask is not installed, and when its scheduler
    does not answer.
    """
    if workers is not None and dask is not None:
        raise WorkerError("--workers and --dask are two ways to the same end: give one of them")
    if workers is not None:
        with _processes(workers) as pool:
            yield pool
    elif dask is not None:
        with _client(dask) as client:
            yield client.get_executor()
    else:
        yield None


@contextmanager
def _processes(n: int) -> Iterator[Executor]:
    n_threads = max(1, len(_cores()) // n)
    pool = ProcessPoolExecutor(
        n,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(n_threads, os.getpid()),
    )
    try:
        yield pool
    except BaseException:
        # What they are at may take minutes, and nobody waits for it.
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(n_threads: int, parent: int) -> None:
    """In a worker: its share of the cores; an interrupt is its parent's to answer."""
    import torch

    from steerlens.engine.workers import end_with

    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(n_threads)


def _cores() -> set[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _client(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        raise WorkerError("--dask needs Dask: pip install 'steerlens[dask]'") from error
    try:
        return Client(address, timeout="10s")
    except (OSError, ValueError, TypeError) as error:
        raise WorkerError(
            f"no Dask scheduler answers at {address!r} ({error}); expected an address such as "
            "tcp://host:8786"
        ) from error
