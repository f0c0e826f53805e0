"""Run the cells of many hooks for about what their arithmetic costs.

A plan checks every hook on two prompts before its cells are resumed. Where that does not give the
numbers of the model itself, the plain loop is used, with a warning.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from steerlens.engine.backend import BareModel, for_hooks
from steerlens.engine.cells import cells_in_turn
from steerlens.engine.checkpoint import Kept, Tensors, digest, digest_of
from steerlens.engine.compiled import COMPILE_FROM
from steerlens.engine.engine import Engine
from steerlens.engine.exactness import not_exact
from steerlens.engine.positions import steers_late
from steerlens.engine.prefixes import Prepared, prepare
from steerlens.engine.tokenization import fingerprint
from steerlens.engine.workers import check_executor, gather, new_key
from steerlens.engine.workload import Baseline, CellOutput, Finished, Job, Workload
from steerlens.models.hooks import hook_layer
from steerlens.models.identity import provenance

Read: TypeAlias = Callable[[Job, CellOutput, CellOutput], CellOutput]
"""What is kept of a job's cell, given the unsteered one of the same pairs: in place of activations
what was made of them, pair by pair."""


@dataclass(frozen=True)
class Plan:
    """A workload, and the hooks after which it was seen to resume exactly.

    It is `prepared` where its pairs are one block: of several each is when its turn comes. `runner`
    is the engine with what runs: the model, or the bare one under it (see `backend.for_hooks`).
    `key` names the prepared workload to workers.
    """

    engine: Engine
    runner: Engine
    prepared: Prepared
    exact: frozenset[str]
    reuse_prefix: bool
    key: str = field(default_factory=new_key)

    @property
    def workload(self) -> Workload:
        """What the cells are run on."""
        return self.prepared.workload

    @property
    def unsteered(self) -> Baseline:
        """What the cells are compared with."""
        return self.prepared.unsteered

    @cached_property
    def digest(self) -> str:
        """The sha256 of what decides every cell besides its job; the unsteered model to the bit."""
        workload, unsteered = self.workload, self.unsteered
        batches = [
            [fingerprint(batch.prompts), batch.rows, batch.tokens.shape]
            for batch in (*workload.positive, *workload.negative)
        ]
        return digest(
            batches,
            (len(workload.positive), workload.position, workload.steered_positions),
            (workload.with_kl, workload.with_readouts, digest_of(unsteered)),
            (provenance(self.engine.model).to_dict(), self.engine.batch_size),
            (isinstance(self.runner.model, BareModel), sorted(self.exact), self.reuse_prefix),
        )

    @property
    def blocks(self) -> tuple[Sequence[int], ...]:
        """The rows of the workload's blocks; all of them together where it has none."""
        return self.workload.blocks or (range(len(self.unsteered.logprob)),)

    def of_block(self, rows: Sequence[int]) -> "Plan":
        """The plan for one of its blocks alone."""
        if len(self.blocks) == 1:
            return self
        return self.on(self.workload.block(rows), self.unsteered.block(rows))

    def on(self, workload: Workload, unsteered: Baseline) -> "Plan":
        """The plan for another workload of the same model and hooks, not checked again."""
        prepared = _prepared(self.runner, workload, unsteered, reuse_prefix=self.reuse_prefix)
        return replace(self, prepared=prepared, key=new_key())


def _prepared(
    runner: Engine, workload: Workload, unsteered: Baseline, *, reuse_prefix: bool
) -> Prepared:
    if len(workload.blocks) > 1:
        return Prepared(workload, unsteered, (), ())
    return prepare(runner, workload, unsteered, reuse_prefix=reuse_prefix)


def make_plan(engine: Engine, workload: Workload, unsteered: Baseline, jobs: Sequence[Job]) -> Plan:
    """Prepare `workload` and check every job's hook, so that `run_cells` may resume after it.

    `unsteered` is the baseline of `workload` at every readout. Every hook is checked (see
    `exactness.not_exact`), but for vectors, which are not resumed. Those that are not exact run by
    the plain loop, with a warning; so does the reuse of a prefix, which is given up for all hooks.
    What runs is checked, the bare model where there is one (see `backend.for_hooks`), against its
    own plain loop; where it cannot be resumed the Bridge is taken, with a warning. The check counts
    in the engine's cost, and its progress is told of the hooks checked. With an executor its
    workers run the cells; what is checked and what is shared is run here. Raises as
    `workers.check_executor`.
    """
    if engine.executor is not None:
        check_executor(engine.executor, engine.model)
    if not jobs:
        nothing = Prepared(workload, unsteered, (), ())
        return Plan(engine, engine, nothing, frozenset(), reuse_prefix=False)
    resumed = [job for job in jobs if job.vector is None]
    by_hook = {job.hook_name: job for job in reversed(resumed)}
    one_each = [by_hook[name] for name in dict.fromkeys(job.hook_name for job in resumed)]
    touched = [name for job in jobs for name in job.touched]
    bare = for_hooks(engine.model, touched, on_cpu=not workload.with_readouts)
    runner = engine.on(bare)
    reuse_prefix, reasons = not_exact(runner, workload, one_each)
    if reasons and runner.model is not engine.model:
        name, reason = next(iter(reasons.items()))
        _warn(
            f"Hugging Face's own blocks cannot be resumed after {name} ({reason}); passes run "
            "through the Bridge, which is slower on a GPU"
        )
        runner = engine
        reuse_prefix, reasons = not_exact(runner, workload, one_each)
    if reasons:
        name, reason = next(iter(reasons.items()))
        _warn(
            f"resuming after {name} does not reproduce this model ({reason}); such cells run as "
            "whole forward passes, which is slower"
        )
    elif one_each and not reuse_prefix and steers_late(workload.steered_positions):
        _warn(
            "the unsteered prompt's keys and values cannot be reused on this model; every "
            "token is run, which is slower"
        )
    _compile_for(runner, workload, jobs)
    prepared = _prepared(runner, workload, unsteered, reuse_prefix=reuse_prefix)
    exact = frozenset(by_hook) - frozenset(reasons)
    return Plan(engine, runner, prepared, exact, reuse_prefix=reuse_prefix)


def run_cells(
    plan: Plan, jobs: Sequence[Job], read: Read | None = None
) -> Iterator[list[CellOutput]]:
    """The cells of every job, job by job and in the order of its coefficients.

    As `read_cells`, whatever the order in which workers finish.
    """
    ready: dict[Job, list[CellOutput]] = {}
    waiting = iter(jobs)
    awaited = next(waiting, None)
    for job, cells, _ in read_cells(plan, jobs, read):
        if cells is not None:
            ready[job] = cells
        while awaited is not None and awaited in ready:
            yield ready.pop(awaited)
            awaited = next(waiting, None)


def read_cells(
    plan: Plan,
    jobs: Sequence[Job],
    read: Read | None = None,
    *,
    known: Collection[Job] = (),
) -> Iterator[tuple[Job, list[CellOutput] | None, int]]:
    """Each job's cells as they are finished, and the block-evaluations that they took.

    One block of the pairs runs after another, so that of the others what was `read` alone is held:
    of every job the cells are None but for the last block, which gives those of all pairs. Those of
    a block that the engine's checkpoint has are not run again; what `read` does must follow from
    its name and the job. `known` jobs are left out, as in `finished_cells`.
    """
    blocks = plan.blocks if any(job not in known for job in jobs) else ()
    order = torch.tensor([row for rows in blocks for row in rows]).argsort()
    parts: dict[Job, list[Tensors]] = {}
    for rows in blocks:
        keys = {} if plan.engine.checkpoint is None else _keys(plan, rows, jobs, read)
        for job, tensors, n_blocks in _of_block(plan.of_block(rows), jobs, read, keys, known=known):
            parts.setdefault(job, []).append(tensors)
            is_last = len(parts[job]) == len(blocks)
            cells = _cells_of(job, _joined(parts.pop(job), order)) if is_last else None
            yield job, cells, n_blocks


def finished_cells(
    plan: Plan, jobs: Sequence[Job], *, known: Collection[Job] = ()
) -> Iterator[Finished]:
    """The cells of the jobs as they are finished: in order, unless workers run them.

    The plan is one of a single block of pairs. Nothing is run, yielded or counted for the `known`
    jobs; but the unsteered residual goes through their hooks, so that the cells after them have the
    same bits and the same cost as if they had been run.

    Jobs should come in layer order, as each one starts from where the last one stood. As many
    coefficients run at once as the engine's batch size, or the device, has room for; out of memory
    halves that for the rest of the batch. Raises as `workers.gather` where workers run them.
    """
    _compile_for(plan.runner, plan.workload, jobs)
    jobs = jobs[: 1 + max((i for i, job in enumerate(jobs) if job not in known), default=-1)]
    if plan.engine.executor is not None:
        yield from gather(
            plan.engine,
            plan.runner.model,
            plan.prepared,
            jobs,
            key=plan.key,
            exact=plan.exact,
            reuse_prefix=plan.reuse_prefix,
            known=known,
        )
        return
    yield from cells_in_turn(plan.runner, plan.prepared, jobs, plan.exact, known=known)


def _of_block(
    plan: Plan,
    jobs: Sequence[Job],
    read: Read | None,
    keys: Mapping[Job, str],
    *,
    known: Collection[Job],
) -> Iterator[tuple[Job, Tensors, int]]:
    """The cells of one block: those that were kept under `keys`, then the others, kept first."""
    checkpoint, kept = plan.engine.checkpoint, set[Job]()
    for job, key in keys.items():
        found = None if checkpoint is None or job in known else checkpoint.load(key, key)
        if found is not None:
            plan.engine.cost.blocks += found.blocks
            kept.add(job)
            yield job, found.tensors, found.blocks
    for finished in finished_cells(plan, jobs, known={*known, *kept}):
        job, cells = finished.job, finished.cells
        if read is not None:
            unsteered = plan.unsteered.cell(job.readout)
            cells = [read(job, cell, unsteered) for cell in cells]
        tensors = {
            name: torch.stack([getattr(cell, name) for cell in cells])
            for name in ("positive", "negative", "logprob", "kl", "logprobs")
            if cells and getattr(cells[0], name) is not None
        }
        if not plan.workload.with_readouts:
            tensors |= {name: tensors[name][..., :0] for name in ("positive", "negative")}
        if checkpoint is not None and job in keys:
            checkpoint.keep(keys[job], keys[job], Kept(tensors=tensors, blocks=finished.blocks))
        yield job, tensors, finished.blocks


def _joined(parts: Sequence[Tensors], order: Int[Tensor, " pair"]) -> Tensors:
    """The tensors of all blocks in the pairs' order; by token, as wide as those of any block."""
    if len(parts) == 1:
        return parts[0]
    joined = {}
    for name in parts[0]:
        values = [of_block[name] for of_block in parts]
        width = max(value.shape[-1] for value in values)
        if name in ("kl", "logprobs"):
            values = [
                functional.pad(value, (0, width - value.shape[-1]), value=torch.nan)
                for value in values
            ]
        together = torch.cat(values, dim=1)
        # A side that is not run has no rows.
        joined[name] = together[:, order] if together.shape[1] else together
    return joined


def _cells_of(job: Job, tensors: Tensors) -> list[CellOutput]:
    """The cells of a job from what is kept of them: a row of each tensor a coefficient."""
    return [
        CellOutput(coefficient, **{name: values[i] for name, values in tensors.items()})
        for i, coefficient in enumerate(job.coefficients)
    ]


def _keys(
    plan: Plan, rows: Sequence[int], jobs: Sequence[Job], read: Read | None
) -> dict[Job, str]:
    """Under which name the cells of each job are kept that a block of pairs has."""
    of_all = (plan.digest, list(rows), None if read is None else read.__name__)
    whats = [job.direction if job.vector is None else job.vector.fingerprint for job in jobs]
    return {
        job: digest(of_all, job.hook_name, job.readout, job.coefficients, job.along, what)
        for job, what in zip(jobs, whats, strict=True)
    }


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def _compile_for(runner: Engine, workload: Workload, jobs: Sequence[Job]) -> None:
    """Compile the blocks where there is so much arithmetic that it pays."""
    model = runner.model
    if isinstance(model, BareModel) and _arithmetic(model, workload, jobs) > COMPILE_FROM:
        model.compile_blocks()


def _arithmetic(runner: BareModel, workload: Workload, jobs: Sequence[Job]) -> float:
    """Floating-point operations of the cells."""
    n_layers = len(runner.blocks)
    n_positive, n_negative = (
        sum(batch.tokens.numel() for batch in side)
        for side in (workload.positive, workload.negative)
    )
    passed = sum(
        len(job.coefficients)
        * (
            n_positive * (n_layers - job.first_block)
            + n_negative * (hook_layer(job.readout) + 1 - job.first_block)
        )
        for job in jobs
    )
    return runner.block_operations * passed
