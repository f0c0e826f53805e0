"""Run the cells of many hooks for about what their arithmetic costs.

A plan checks every hook on two prompts before its cells are resumed. Where that does not give the
numbers of the model itself, the plain loop is used, with a warning.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from steerlens.engine import plain_loop
from steerlens.engine.backend import BareModel, for_hooks
from steerlens.engine.batches import Batch
from steerlens.engine.cells import Carried, Finished, Job, cells_in_turn, fast_cells, plain_cells
from steerlens.engine.compiled import COMPILE_FROM
from steerlens.engine.memory import is_out_of_memory
from steerlens.engine.prefixes import Prepared, prepare
from steerlens.engine.resume import n_skippable
from steerlens.engine.workers import Crew, gather, make_crew, new_key
from steerlens.engine.workload import Baseline, CellOutput, Cost, Workload
from steerlens.errors import SteerlensError
from steerlens.models.hooks import hook_layer
from steerlens.models.loading import HookedModel
from steerlens.progress import Progress, part_of, silent

SPLIT = ("continuation", "last")
"""Steered positions before which a prompt is unsteered, so that its keys and values can be kept."""


@dataclass(frozen=True)
class Plan:
    """A workload that is prepared, and the hooks after which it was seen to resume exactly.

    `runner` is what runs: the model, or the bare one under it (see `bare.for_hooks`).
    """

    model: HookedModel
    runner: HookedModel
    prepared: Prepared
    exact: frozenset[str]
    reuse_prefix: bool
    crew: Crew | None = None
    key: str = field(default_factory=new_key)


def make_plan(
    model: HookedModel,
    workload: Workload,
    unsteered: Baseline,
    jobs: Sequence[Job],
    *,
    batch_size: int | None,
    cost: Cost,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Plan:
    """Prepare `workload` and check every job's hook, so that `run_cells` may resume after it.

    `unsteered` is the baseline of `workload` at every readout. Every hook is checked on two prompts
    a side, the shortest and the longest: resumed at coefficient 0 it has to give the unsteered
    model, and the first job at its smallest coefficient what the plain loop gives. Hooks at which
    that differs by more than 1e-4 (of a readout's norm, or nats; 8 times the rounding of a
    half-precision dtype) run by the plain loop, with a warning; so does the reuse of a prefix,
    which is given up for all hooks. The check compares what runs, the bare model where there is one
    (see `bare.for_hooks`), with its own plain loop; where it cannot be resumed the Bridge is taken,
    with a warning. `cost` is added to, the check included. `progress` is told of the hooks checked.
    With an `executor` its workers run the cells; what is checked and what is shared is run here.
    Raises as `workers.make_crew`.
    """
    crew = None if executor is None else make_crew(executor, model)
    if not jobs:
        prepared = Prepared(workload, unsteered, (), (), batch_size)
        return Plan(model, model, prepared, frozenset(), reuse_prefix=False, crew=crew)
    by_hook = {job.hook_name: job for job in reversed(jobs)}
    one_each = [by_hook[name] for name in dict.fromkeys(job.hook_name for job in jobs)]
    check = partial(
        _check, _check_workload(workload), one_each, cost=cost, progress=progress or silent
    )
    runner = for_hooks(model, [*by_hook, *(job.readout for job in jobs)])
    reuse_prefix, reasons = check(runner)
    if reasons and runner is not model:
        name, reason = next(iter(reasons.items()))
        warnings.warn(
            f"Hugging Face's own blocks cannot be resumed after {name} ({reason}); passes run "
            "through the Bridge, which is slower on a GPU",
            RuntimeWarning,
            stacklevel=2,
        )
        runner = model
        reuse_prefix, reasons = check(runner)
    if reasons:
        name, reason = next(iter(reasons.items()))
        warnings.warn(
            f"resuming after {name} does not reproduce this model ({reason}); such cells run as "
            "whole forward passes, which is slower",
            RuntimeWarning,
            stacklevel=3,
        )
    elif reuse_prefix is False and workload.steered_positions in SPLIT:
        warnings.warn(
            "the unsteered prompt's keys and values cannot be reused on this model; every "
            "token is run, which is slower",
            RuntimeWarning,
            stacklevel=3,
        )
    if isinstance(runner, BareModel) and _arithmetic(runner, workload, jobs) > COMPILE_FROM:
        runner.compile_blocks()
    prepared = prepare(
        runner, workload, unsteered, batch_size=batch_size, reuse_prefix=reuse_prefix, cost=cost
    )
    exact = frozenset(by_hook) - frozenset(reasons)
    return Plan(model, runner, prepared, exact, reuse_prefix=reuse_prefix, crew=crew)


def plan_for(plan: Plan, workload: Workload, unsteered: Baseline, *, cost: Cost) -> Plan:
    """The plan for another workload of the same model and hooks, not checked again."""
    prepared = prepare(
        plan.runner,
        workload,
        unsteered,
        batch_size=plan.prepared.batch_size,
        reuse_prefix=plan.reuse_prefix,
        cost=cost,
    )
    return replace(plan, prepared=prepared, key=new_key())


def run_cells(plan: Plan, jobs: Sequence[Job], *, cost: Cost) -> Iterator[list[CellOutput]]:
    """The cells of every job, job by job and in the order of its coefficients.

    As `finished_cells`, whatever the order in which workers finish.
    """
    ready: dict[int, list[CellOutput]] = {}
    n_given = 0
    for finished in finished_cells(plan, jobs, cost=cost):
        ready[finished.index] = finished.cells
        while n_given in ready:
            yield ready.pop(n_given)
            n_given += 1


def finished_cells(
    plan: Plan, jobs: Sequence[Job], *, cost: Cost, known: Collection[str] = ()
) -> Iterator[Finished]:
    """The cells of the jobs as they are finished: in order, unless workers run them.

    Nothing is run or yielded for jobs at the `known` hooks, and nothing is added to `cost` for
    them; but the unsteered residual goes through them, so that the cells after them have the
    same bits and the same cost as if they had been run.

    Jobs should come in layer order, as each one starts from where the last one stood. As many
    coefficients run at once as the plan's batch size, or the device, has room for; out of memory
    halves that for the rest of the batch. `cost` is added to. Raises as `workers.gather` where
    workers run them.
    """
    if plan.crew is not None:
        yield from gather(
            plan.crew,
            plan.prepared,
            jobs,
            runner=plan.runner,
            key=plan.key,
            exact=plan.exact,
            reuse_prefix=plan.reuse_prefix,
            known=known,
            cost=cost,
        )
        return
    yield from cells_in_turn(plan.runner, plan.prepared, jobs, plan.exact, known=known, cost=cost)


def _check(
    workload: Workload,
    jobs: Sequence[Job],
    runner: HookedModel,
    *,
    cost: Cost,
    progress: Progress,
) -> tuple[bool, dict[str, str]]:
    """Whether a prefix can be reused, and hook name -> why it cannot be resumed after."""
    readouts = tuple(dict.fromkeys(job.readout for job in jobs))
    baseline = plain_loop.baseline_of(runner, workload, readouts, cost)
    tell = part_of(progress, "checks: hooks")
    reuses = [True, False] if workload.steered_positions in SPLIT else [False]
    for reuse_prefix in reuses:
        reasons = _reasons(
            runner,
            workload,
            baseline,
            jobs,
            reuse_prefix=reuse_prefix,
            cost=cost,
            progress=tell,
        )
        if not reasons:
            break
    return reuse_prefix, reasons


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


def _check_workload(workload: Workload) -> Workload:
    return replace(
        workload,
        positive=_ends(workload.positive),
        negative=_ends(workload.negative),
        with_kl=False,
    )


def _reasons(
    model: HookedModel,
    workload: Workload,
    unsteered: Baseline,
    jobs: Sequence[Job],
    *,
    reuse_prefix: bool,
    cost: Cost,
    progress: Progress,
) -> dict[str, str]:
    """Hook name -> why it cannot be resumed after; empty when all can."""
    if n_skippable(model) != int(model.cfg.n_layers):
        return {job.hook_name: "its blocks are not one list" for job in jobs}
    # Eight times the rounding of a half-precision dtype; rounding of float32 never comes near.
    tolerance = max(1e-4, 8 * torch.finfo(model.cfg.dtype).eps)
    reasons: dict[str, str] = {}
    prepared: Prepared | None = None
    carried: Carried | None = None
    for i, job in enumerate(jobs):
        progress("hooks", i, len(jobs))
        expected = [unsteered.cell(job.readout)]
        if i == 0:
            smallest = replace(job, coefficients=(min(job.coefficients, key=abs),))
            expected += plain_cells(model, workload, smallest, cost)
        at = replace(job, coefficients=tuple(cell.coefficient for cell in expected))
        try:
            if prepared is None:
                prepared = prepare(
                    model,
                    workload,
                    unsteered,
                    batch_size=None,
                    reuse_prefix=reuse_prefix,
                    cost=cost,
                )
            carried = carried or Carried.at_start(prepared)
            found, carried = fast_cells(model, prepared, at, carried, cost)
        except SteerlensError:
            raise
        except Exception as error:  # whatever a model's own code raises when its blocks are skipped
            if is_out_of_memory(error):
                raise
            reasons[job.hook_name] = f"{type(error).__name__}: {error}"
            continue
        differences = (_difference(f, e, tolerance) for f, e in zip(found, expected, strict=True))
        reason = next((text for text in differences if text is not None), None)
        if reason is not None:
            reasons[job.hook_name] = reason
    progress("hooks", len(jobs), len(jobs))
    return reasons


def _difference(found: CellOutput, expected: CellOutput, tolerance: float) -> str | None:
    """What differs by more than `tolerance`: of a readout's norm, or of a logprob in nats."""
    for name in ("positive", "negative", "logprob"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        scale = theirs.norm(dim=-1).clamp(min=1e-6) if theirs.ndim == 2 else torch.tensor(1.0)
        gap = (ours - theirs).norm(dim=-1) if theirs.ndim == 2 else (ours - theirs).abs()
        off = gap / scale
        is_undefined = ~theirs.isfinite().all(dim=-1) if theirs.ndim == 2 else ~theirs.isfinite()
        # Not `off > tolerance`: that is false for NaN, which is a difference where none belongs.
        if not bool((is_undefined | (off <= tolerance)).all()):
            return f"{name} differs by {float(off.nan_to_num(torch.inf).max()):.2g}"
    return None


def _ends(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """The shortest and the longest prompt of length-sorted batches, as padded as they are."""
    if not batches:
        return ()
    first, last = batches[0], batches[-1]
    return (first.ends(),) if first is last else (first.row(0), last.row(len(last.prompts) - 1))
