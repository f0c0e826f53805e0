"""Run the cells of many hooks for about what their arithmetic costs.

A plan checks every hook on two prompts before its cells are resumed. Where that does not give the
numbers of the model itself, the plain loop is used, with a warning.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from steerlens import plain
from steerlens.cells import Carried, Job, carry_past, fast_cells
from steerlens.errors import SteerlensError
from steerlens.hooks import hook_layer
from steerlens.memory import is_out_of_memory
from steerlens.models import HookedModel
from steerlens.parts import Prepared, prepare
from steerlens.passes import n_skippable
from steerlens.plain import Baseline, CellOutput, Cost, Workload
from steerlens.progress import Progress, part_of, silent
from steerlens.tokens import Batch


@dataclass(frozen=True)
class Plan:
    """A workload that is prepared, and the hooks after which it was seen to resume exactly."""

    model: HookedModel
    prepared: Prepared
    exact: frozenset[str]
    reuse_prefix: bool


def make_plan(
    model: HookedModel,
    workload: Workload,
    unsteered: Baseline,
    jobs: Sequence[Job],
    *,
    batch_size: int | None,
    cost: Cost,
    progress: Progress | None = None,
) -> Plan:
    """Prepare `workload` and check every job's hook, so that `run_cells` may resume after it.

    `unsteered` is the baseline of `workload` at every readout. Every hook is checked on two prompts
    a side, the shortest and the longest: resumed at coefficient 0 it has to give the unsteered
    model, and the first job at its smallest coefficient what the plain loop gives. Hooks at which
    that differs by more than 1e-4 (of a readout's norm, or nats; 4 times the rounding of a
    half-precision dtype) run by the plain loop, with a warning; so does the reuse of a prefix,
    which is given up for all hooks. `cost` is added to, the check included. `progress` is told of
    the hooks checked.
    """
    if not jobs:
        prepared = Prepared(workload, unsteered, (), (), batch_size)
        return Plan(model, prepared, frozenset(), reuse_prefix=False)
    by_hook = {job.hook_name: job for job in reversed(jobs)}
    one_each = [by_hook[name] for name in dict.fromkeys(job.hook_name for job in jobs)]
    small = _check_workload(workload)
    baseline = plain.run_baseline(
        model, small, tuple(dict.fromkeys(job.readout for job in one_each)), cost=cost
    )
    check = partial(
        _reasons,
        *(model, small, baseline, one_each),
        cost=cost,
        progress=part_of(progress or silent, "checks: hooks"),
    )
    reuse_prefix = workload.steered_positions in ("continuation", "last")
    reasons = check(reuse_prefix=reuse_prefix)
    if reuse_prefix and reasons:
        reuse_prefix = False
        reasons = check(reuse_prefix=False)
        if not reasons:
            warnings.warn(
                "the unsteered prompt's keys and values cannot be reused on this model; every "
                "token is run, which is slower",
                RuntimeWarning,
                stacklevel=3,
            )
    if reasons:
        name, reason = next(iter(reasons.items()))
        warnings.warn(
            f"resuming after {name} does not reproduce this model ({reason}); such cells run as "
            "whole forward passes, which is slower",
            RuntimeWarning,
            stacklevel=3,
        )
    prepared = prepare(
        model, workload, unsteered, batch_size=batch_size, reuse_prefix=reuse_prefix, cost=cost
    )
    exact = frozenset(by_hook) - frozenset(reasons)
    return Plan(model, prepared, exact, reuse_prefix=reuse_prefix)


def plan_for(plan: Plan, workload: Workload, unsteered: Baseline, *, cost: Cost) -> Plan:
    """The plan for another workload of the same model and hooks, not checked again."""
    prepared = prepare(
        plan.model,
        workload,
        unsteered,
        batch_size=plan.prepared.batch_size,
        reuse_prefix=plan.reuse_prefix,
        cost=cost,
    )
    return replace(plan, prepared=prepared)


def run_cells(
    plan: Plan, jobs: Sequence[Job], *, cost: Cost, known: Collection[str] = ()
) -> Iterator[list[CellOutput]]:
    """The cells of every job, job by job and in the order of its coefficients.

    Nothing is run or yielded for jobs at the `known` hooks, and nothing is added to `cost` for
    them; but the unsteered residual goes through them, so that the cells after them have the
    same bits and the same cost as if they had been run.

    Jobs should come in layer order, as each one starts from where the last one stood. As many
    coefficients run at once as the plan's batch size, or the device, has room for; out of memory
    halves that for the rest of the batch. `cost` is added to.
    """
    carried = Carried.at_start(plan.prepared)
    for job in jobs:
        if job.hook_name in known:
            if job.hook_name in plan.exact:
                carried = carry_past(plan.model, plan.prepared, job, carried)
        elif job.hook_name in plan.exact:
            cells, carried = fast_cells(plan.model, plan.prepared, job, carried, cost)
            yield cells
        else:
            yield _plain_cells(plan.model, plan.prepared.workload, job, cost)


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
    # Four times the rounding of a half-precision dtype; rounding of float32 never comes near.
    tolerance = max(1e-4, 4 * torch.finfo(model.cfg.dtype).eps)
    reasons: dict[str, str] = {}
    prepared: Prepared | None = None
    carried: Carried | None = None
    for i, job in enumerate(jobs):
        progress("hooks", i, len(jobs))
        expected = [unsteered.cell(job.readout)]
        if i == 0:
            smallest = replace(job, coefficients=(min(job.coefficients, key=abs),))
            expected += _plain_cells(model, workload, smallest, cost)
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
    """The shortest and the longest prompt of length-sorted batches, each on its own."""
    if not batches:
        return ()
    first, last = batches[0], batches[-1]
    shortest = first.row(0)
    is_one = first is last and len(first.prompts) == 1
    return (shortest,) if is_one else (shortest, last.row(len(last.prompts) - 1))


def _plain_cells(model: HookedModel, workload: Workload, job: Job, cost: Cost) -> list[CellOutput]:
    n_layers = int(model.cfg.n_layers)
    for batch in workload.positive:
        # A divergence takes the unsteered model's logits too.
        cost.add(batch.tokens, n_layers * len(job.coefficients) * (1 + workload.with_kl))
    for batch in workload.negative:
        cost.add(batch.tokens, (hook_layer(job.readout) + 1) * len(job.coefficients))
    return list(
        plain.run_cells(
            model,
            workload,
            hook_name=job.hook_name,
            direction=job.direction,
            coefficients=job.coefficients,
            readout=job.readout,
        )
    )
