"""Cells on the workers of an executor: a task a hook, sent, run and gathered.

A worker loads the model once and keeps it. What it needs of the unsteered model it computes
itself, but for the baseline, which comes with the task.
"""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import threading
import uuid
import warnings
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from steerlens.engine.backend import BareModel, for_hooks
from steerlens.engine.batches import Batch
from steerlens.engine.cells import Carried, carry_past, fast_cells
from steerlens.engine.engine import Engine
from steerlens.engine.plain_loop import plain_cells, run_baseline
from steerlens.engine.prefixes import Prepared, prepare
from steerlens.engine.workload import Baseline, CellOutput, Finished, Job, Workload
from steerlens.errors import SteerlensError, WorkerError
from steerlens.models.hooked_model import HookedModel
from steerlens.models.identity import provenance
from steerlens.models.loading import load_arguments, load_model
from steerlens.models.tolerance import allowed_gap


@dataclass(frozen=True)
class Task:
    """The jobs at one hook, on one workload, for a worker.

    `key` names the workload, which a worker prepares once; `sender` is the process of the run. With
    `resumes` they may start after the hook; the unsteered blocks up to that of the job that they
    come `after` are not counted. `is_bare` and `is_compiled` say what runs (`backend.for_hooks`).
    """

    key: str
    sender: int
    arguments: dict[str, Any]
    provenance: dict[str, str]
    workload: Workload
    unsteered: Baseline
    batch_size: int | None
    reuse_prefix: bool
    resumes: bool
    is_bare: bool
    is_compiled: bool
    after: Job | None
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Answer:
    """The finished jobs of a task, in its order, and the warnings given."""

    finished: tuple[Finished, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Standing:
    """A workload as a worker keeps it: prepared, with the residuals where its last job stood."""

    prepared: Prepared
    carried: Carried


def check_executor(executor: Any, model: HookedModel) -> None:
    """See that an executor can run the model: its workers load it by `load_model`.

    Raises `ModelError` for a model not made by `load_model`, and `WorkerError` for what is no
    executor, and for a pool of forked processes: after a fork PyTorch's threads may wait for ever.
    """
    if not isinstance(executor, Executor):
        raise WorkerError(
            f"expected a concurrent.futures.Executor, got {type(executor).__name__}; of a Dask "
            "client that is client.get_executor()"
        )
    context = getattr(executor, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise WorkerError(
            "processes that are forked cannot run PyTorch safely; expected ProcessPoolExecutor("
            "n, mp_context=multiprocessing.get_context('spawn'))"
        )
    load_arguments(model)


def new_key() -> str:
    """A name for a prepared workload that no other has."""
    return uuid.uuid4().hex


def gather(
    engine: Engine,
    runner: HookedModel,
    prepared: Prepared,
    jobs: Sequence[Job],
    *,
    key: str,
    exact: frozenset[str],
    reuse_prefix: bool,
    known: Collection[Job],
) -> Iterator[Finished]:
    """The cells of every job that is not `known`, in the order that workers finish them.

    The jobs at a hook are a task, and early layers, which cost most, should come first: so that
    workers end together. The cost grows by what one process would have spent: not by the unsteered
    blocks that every worker runs for itself. When a task fails those that have begun are waited
    for, and given too, before its error is raised: a `SteerlensError` as it was, another as
    `WorkerError`. When the caller stops, tasks that have not begun are dropped.
    """
    shared = _shared_task(engine, runner, prepared, key=key, reuse_prefix=reuse_prefix)
    tasks: list[tuple[list[Job], Task]] = []
    after: Job | None = None
    for (_, resumes), group in groupby(jobs, key=lambda job: (job.hook_name, job.resumes(exact))):
        at_hook = list(group)
        n_passed = next((i for i, job in enumerate(at_hook) if job not in known), len(at_hook))
        if resumes and n_passed:
            after = _to_cpu(at_hook[n_passed - 1])
        if to_run := [job for job in at_hook if job not in known]:
            task = replace(
                shared,
                unsteered=_at(prepared.unsteered, [job.readout for job in to_run]),
                resumes=resumes,
                after=after,
                jobs=tuple(map(_to_cpu, to_run)),
            )
            tasks.append((to_run, task))
        if resumes:
            after = _to_cpu(at_hook[-1])
    yield from _answered(engine, tasks)


def _shared_task(
    engine: Engine, runner: HookedModel, prepared: Prepared, *, key: str, reuse_prefix: bool
) -> Task:
    """What the tasks of all hooks have in common, without jobs."""
    return Task(
        key=key,
        sender=os.getpid(),
        arguments=dict(load_arguments(engine.model)),
        provenance=provenance(engine.model).to_dict(),
        workload=_on(prepared.workload, torch.device("cpu")),
        unsteered=prepared.unsteered,
        batch_size=engine.batch_size,
        reuse_prefix=reuse_prefix,
        resumes=False,
        is_bare=isinstance(runner, BareModel),
        is_compiled=isinstance(runner, BareModel) and runner.compiled is not None,
        after=None,
        jobs=(),
    )


def _answered(engine: Engine, tasks: Sequence[tuple[list[Job], Task]]) -> Iterator[Finished]:
    """Submit the tasks and give their jobs as they come back (see `gather`)."""
    executor: Any = engine.executor
    futures: dict[Future[bytes], list[Job]] = {}
    failed: Exception | None = None
    try:
        try:
            for at_hook, task in tasks:
                # As bytes: pools of processes would pass tensors as open files, which are few.
                futures[executor.submit(run_task, pickle.dumps(task))] = at_hook
        except Exception as error:  # of a pool that is broken or shut
            failed = error
            futures = {future: of for future, of in futures.items() if not future.cancel()}
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    answer: Answer = pickle.loads(future.result())
                except Exception as error:  # of the worker, the network between, the scheduler
                    failed = failed or error
                    # Not every executor tells of a task that was dropped, so it is not waited for.
                    waiting = {other for other in waiting if not other.cancel()}
                    continue
                for text in answer.warnings:
                    warnings.warn(text, RuntimeWarning, stacklevel=3)
                for job, finished in zip(futures[future], answer.finished, strict=True):
                    engine.cost.blocks += finished.blocks
                    yield replace(finished, job=job)
    finally:
        for future in futures:
            future.cancel()
    if isinstance(failed, SteerlensError):
        raise failed
    if failed is not None:
        raise WorkerError(
            f"a worker failed ({type(failed).__name__}: {failed}); see its log. What the others "
            "finished is kept where the run has a folder"
        ) from failed


_turn = threading.Lock()
_models: dict[str, Any] = {}
_standing: dict[str, _Standing] = {}


def run_task(pickled: bytes) -> bytes:
    """The pickled `Answer` to a `Task`, on this worker's own model; called by the executor.

    Threads of one process take turns. Raises `WorkerError` when the model that the worker loads is
    not the one that was measured unsteered.
    """
    task: Task = pickle.loads(pickled)
    end_with(task.sender)
    with _turn, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        engine = Engine(_runner_of(task, _model_of(task)), task.batch_size)
        finished = _finished(task, engine, _standing_of(task, engine))
    texts = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    return pickle.dumps(Answer(tuple(finished), tuple(dict.fromkeys(texts))))


_watching = threading.Event()


def end_with(sender: int) -> None:
    """In a worker that the process `sender` started: end at once when that one does.

    A process that is killed cannot tell its workers, and a pool's wait for more for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid != sender or _watching.is_set():
        return
    _watching.set()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _finished(task: Task, engine: Engine, standing: _Standing) -> list[Finished]:
    """The task's jobs one after another; the worker then stands where the last one did."""
    device = engine.model.cfg.device
    prepared = replace(standing.prepared, unsteered=task.unsteered)
    carried = Carried.at_start(prepared)
    if task.resumes and task.after is not None:
        carried = carry_past(engine, prepared, _to(task.after, device), standing.carried)
    finished = []
    for job in task.jobs:
        before = engine.cost.blocks
        if task.resumes:
            cells, carried = fast_cells(engine, prepared, _to(job, device), carried)
        else:
            cells = plain_cells(engine, prepared.workload, _to(job, device))
        blocks = engine.cost.blocks - before
        finished.append(Finished(job, [_alone(cell) for cell in cells], blocks))
    if task.resumes:
        _standing[task.key] = replace(standing, carried=carried)
    return finished


def _model_of(task: Task) -> Any:
    key = repr(sorted(task.arguments.items(), key=str))
    if key not in _models:
        _models.clear()  # before the next one is loaded: there may be no room for two
        _standing.clear()
        model = load_model(**task.arguments, progress=False)
        here = provenance(model).to_dict()
        other = [
            f"{name} {here[name]} (expected {value})"
            for name, value in task.provenance.items()
            if here[name] != value
        ]
        if other:
            raise WorkerError(
                f"this worker has another model or other versions: {', '.join(other)}; install "
                "on every worker what the run was started with"
            )
        _models[key] = model
    return _models[key]


def _runner_of(task: Task, model: Any) -> Any:
    """What runs: the model, or the bare one under it where the task says so."""
    if not task.is_bare:
        return model
    touched = [name for job in task.jobs for name in job.touched]
    runner = for_hooks(model, touched, on_cpu=not task.workload.with_readouts)
    if task.is_compiled and isinstance(runner, BareModel):
        runner.compile_blocks()
    return runner


def _standing_of(task: Task, engine: Engine) -> _Standing:
    if task.key not in _standing:
        while len(_standing) > 1:  # a search goes to and fro between two
            del _standing[next(iter(_standing))]
        workload = _on(task.workload, torch.device(engine.model.cfg.device))
        _check_same_model(engine, workload, task.unsteered)
        prepared = prepare(engine, workload, task.unsteered, reuse_prefix=task.reuse_prefix)
        _standing[task.key] = _Standing(prepared, Carried.at_start(prepared))
    return _standing[task.key]


def _check_same_model(engine: Engine, workload: Workload, unsteered: Baseline) -> None:
    """Raise `WorkerError` unless the first batch's labels have the logprobs that came with it."""
    batches = workload.positive[:1]
    if not batches:
        return
    row = batches[0].rows[0]
    one = replace(workload, positive=(replace(batches[0].row(0), rows=(0,)),), negative=())
    here = run_baseline(engine, one, unsteered.hook_names[:1]).logprob[0]
    gap = abs(float(here) - float(unsteered.logprob[row]))
    allowed = allowed_gap(engine.model.cfg.dtype, roundings=4)
    if not gap <= allowed:
        raise WorkerError(
            f"the model of this worker gives the {batches[0].prompts[0].where} a logprob that is "
            f"off by {gap:.2g} nats (expected at most {allowed:.2g}): was the model changed after "
            "load_model, by hooks or in its weights? Save the changed model and load that"
        )


def _on(workload: Workload, device: torch.device) -> Workload:
    return replace(
        workload,
        positive=tuple(_batch_on(batch, device) for batch in workload.positive),
        negative=tuple(_batch_on(batch, device) for batch in workload.negative),
    )


def _batch_on(batch: Batch, device: torch.device) -> Batch:
    return replace(
        batch, tokens=batch.tokens.to(device), attention_mask=batch.attention_mask.to(device)
    )


def _at(unsteered: Baseline, readouts: Sequence[str]) -> Baseline:
    """The baseline at some readouts, so that no more is sent than is read."""
    names = tuple(dict.fromkeys(readouts))
    rows = [unsteered.hook_names.index(name) for name in names]
    return replace(
        unsteered,
        hook_names=names,
        positive=torch.stack([unsteered.positive[row] for row in rows]),
        negative=torch.stack([unsteered.negative[row] for row in rows]),
        widths=tuple(unsteered.widths[row] for row in rows) if unsteered.widths else (),
    )


def _alone(cell: CellOutput) -> CellOutput:
    """The cell without the tensors that its own are views of: they would be sent along."""
    return replace(
        cell,
        positive=cell.positive.clone(),
        negative=cell.negative.clone(),
        logprob=cell.logprob.clone(),
        kl=None if cell.kl is None else cell.kl.clone(),
        logprobs=None if cell.logprobs is None else cell.logprobs.clone(),
    )


def _to_cpu(job: Job) -> Job:
    # A view would take the tensor that it looks at along; cells are read where they come back.
    return replace(job, direction=job.direction.detach().cpu().clone(), along=None)


def _to(job: Job, device: Any) -> Job:
    return replace(job, direction=job.direction.to(device))
