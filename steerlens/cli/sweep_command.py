"""`steerlens sweep`, and the executor whose workers run its cells: `--workers`, `--dask`."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import steerlens as sl
from steerlens.cli import options as opt
from steerlens.cli.command import PairsCommand
from steerlens.cli.long_command import FolderCommand
from steerlens.cli.options import OWN_TOKENS
from steerlens.cli.printing import note, print_cells, print_layers, progress_of, warn
from steerlens.errors import WorkerError
from steerlens.models.packaged import DEFAULT_MODEL

NEW_TOKENS = 40
"""What the model writes after a prompt that is shown."""


@dataclass(frozen=True, kw_only=True)
class Sweep(FolderCommand, PairsCommand):
    """Projection against lost logprob, every layer and coefficient."""

    model: str = DEFAULT_MODEL
    test_pairs: str | None = None
    max_pairs: int | None = None
    layers: str = "all"
    coefficients: str = "-0.1norm,-0.05norm,0,0.05norm,0.1norm"
    dense: int | None = None
    vector: str | None = None
    method: str = "mean_diff"
    position: str | None = None
    labels: str | None = None
    own_tokens: int = OWN_TOKENS
    budget: str = "relative=0.01"
    examples: int = 2
    workers: int | None = None
    dask: str | None = None

    def measure(self) -> None:
        coefficients = sl.measure.rows.checked_coefficients(opt.strengths_of(self.coefficients))
        if self.dense is not None:
            sl.measure.dense.with_dense(coefficients, self.dense)
        sl.measure.rows.check_logprob_budget(self.budget)
        opt.labels_of(self)
        # Workers that cannot be had are told of before a model is loaded.
        with executor_of(workers=self.workers, dask=self.dask) as executor:
            self._run(coefficients, executor)

    def _run(self, coefficients: Any, executor: Executor | None) -> None:
        task = self.prepare(self.layers)
        request = task.request(
            "sweep",
            coefficients=coefficients,
            examples_at="the middle one of hook_names, whatever the numbers: an illustration",
        )
        with self.opened(request) as run:
            how: dict[str, Any] = {"budget": self.budget, **opt.labels_of(self)}
            with task.progress() as progress:
                study = task.study(progress, parts=run.parts, executor=executor, **how)
                result = study.sweep(coefficients, dense=self.dense)
            tables = {"sweep": result.table, "layers": result.layers, "points": result.points}
            if self.examples and (task.vector is None or len(task.vector) == 1):
                tables |= self._example_tables(study, result.table, coefficients)
            spent = result.table.attrs["forward_equivalents"]
            run.write(tables, study.directions, forward_equivalents=spent)
        print_layers(result.layers)
        print_cells(result)
        run.note(f"{len(result.table)} cells")

    def _example_tables(self, study: Any, cells: Any, asked: Any) -> dict[str, Any]:
        """`generations` at every coefficient asked for, `tokens` at both ends, of some prompts."""
        hook_name = study.hook_names[len(study.hook_names) // 2]
        is_shown = cells.asked.isin([sl.measure.rows.as_asked(c) for c in asked])
        coefficients = cells[is_shown & (cells.hook_name == hook_name)].coefficient
        coefficients = coefficients.drop_duplicates().tolist()
        ids = [pair.id for pair in study.pairs][: self.examples]
        prompts = study.tokens.positive[: self.examples]
        note(f"Examples: {len(ids)} prompts at {hook_name}")
        with progress_of() as progress:
            steered = (study.model, prompts, study.directions)
            shared: dict[str, Any] = {"layer": hook_name, "ids": ids, "progress": progress}
            generations = sl.measure.generation_table(
                *steered, coefficients=coefficients, max_new_tokens=NEW_TOKENS, **shared
            )
            ends = [min(coefficients), max(coefficients)]
            tokens = sl.token_damage(
                *steered, coefficients=ends, batch_size=self.batch_size, **shared
            )
        short = generations[generations.end == "context"]
        for prompt, n_tokens in short.groupby("prompt", sort=False).n_tokens.max().items():
            text = f"{n_tokens} of {NEW_TOKENS} new tokens fit the model's context"
            warn(f"note: {text} after prompt {prompt!r}")
        return {"generations": generations, "tokens": tokens}


@contextmanager
def executor_of(*, workers: int | None, dask: str | None) -> Iterator[Executor | None]:
    """The executor that was asked for, for a block; None when none was.

    After an error or an interrupt its processes are ended at once. Raises `WorkerError` when both
    are given, when Dask is not installed, and when its scheduler does not answer.
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
    has_affinity = hasattr(os, "sched_getaffinity")
    n_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    pool = ProcessPoolExecutor(
        n,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(max(1, n_cores // n), os.getpid()),
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
