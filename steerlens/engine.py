"""Run the cells of many hooks for about what their arithmetic costs.

Every hook is checked on two prompts before its cells are resumed. Where that does not give the
numbers of the model itself, the plain loop is used, with a warning.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from steerlens import plain
from steerlens.cells import Carried, Cost, Job, fast_cells
from steerlens.errors import SteerlensError
from steerlens.hooks import hook_layer
from steerlens.models import HookedModel
from steerlens.passes import n_skippable
from steerlens.plain import Baseline, CellOutput, Workload
from steerlens.tokens import Batch


def run_cells(
    model: HookedModel,
    workload: Workload,
    jobs: Sequence[Job],
    *,
    rows_per_pass: int,
    cost: Cost,
) -> Iterator[list[CellOutput]]:
    """The cells of every job, job by job and in the order of its coefficients.

    `rows_per_pass` prompts go through the model at once; out of memory halves that for the rest of
    the batch. `cost` is added to. Jobs should come in layer order, as each one starts from where
    the last one stood. Every job is checked on two prompts a side, the shortest and the longest:
    resumed at coefficient 0 it has to give the unsteered model, and the first job at its smallest
    coefficient what the plain loop gives. A job that differs by more than 1e-4 (of a readout's
    norm, or nats; 4 times the rounding of a half-precision dtype) runs by the plain loop, with a
    warning.
    """
    if not jobs:
        return
    check = _Check.of(model, workload, jobs)
    carried, is_warned = Carried.at_start(workload), False
    for i, job in enumerate(jobs):
        check, reason = check.run(job, at_coefficient=i == 0)
        if reason is None:
            cells, carried = fast_cells(model, workload, job, carried, rows_per_pass, cost)
            yield cells
            continue
        if not is_warned:
            warnings.warn(
                f"resuming after {job.hook_name} does not reproduce this model ({reason}); such "
                "cells run as whole forward passes, which is slower",
                RuntimeWarning,
                stacklevel=2,
            )
            is_warned = True
        yield _plain_cells(model, workload, job, cost)


@dataclass(frozen=True)
class _Check:
    """Two prompts a side, the shortest and the longest, by the plain loop and by the engine."""

    model: HookedModel
    workload: Workload
    unsteered: Baseline
    carried: Carried

    @classmethod
    def of(cls, model: HookedModel, workload: Workload, jobs: Sequence[Job]) -> "_Check":
        small = replace(
            workload, positive=_ends(workload.positive), negative=_ends(workload.negative)
        )
        readouts = tuple(dict.fromkeys(job.readout for job in jobs))
        return cls(
            model, small, plain.run_baseline(model, small, readouts), Carried.at_start(small)
        )

    def run(self, job: Job, *, at_coefficient: bool) -> tuple["_Check", str | None]:
        """Why `job` cannot be resumed (None if it can), and the check for the job after it.

        The resumed pass at coefficient 0 has to give the unsteered model; `at_coefficient` also
        compares the smallest coefficient with the plain loop.
        """
        if n_skippable(self.model) != int(self.model.cfg.n_layers):
            return self, "its blocks are not one list"
        expected = [self.unsteered.cell(job.readout)]
        if at_coefficient:
            smallest = replace(job, coefficients=(min(job.coefficients, key=abs),))
            expected += _plain_cells(self.model, self.workload, smallest, Cost())
        coefficients = tuple(cell.coefficient for cell in expected)
        try:
            found, carried = fast_cells(
                self.model,
                self.workload,
                replace(job, coefficients=coefficients),
                self.carried,
                len(coefficients) * 2,
                Cost(),
            )
        except SteerlensError:
            raise
        except Exception as error:  # whatever a model's own code raises when its blocks are skipped
            return self, f"{type(error).__name__}: {error}"
        # Four times the rounding of a half-precision dtype; rounding of float32 never comes near.
        tolerance = max(1e-4, 4 * torch.finfo(self.model.cfg.dtype).eps)
        reasons = (_difference(f, e, tolerance) for f, e in zip(found, expected, strict=True))
        return replace(self, carried=carried), next((r for r in reasons if r is not None), None)


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
    first, last = batches[0], batches[-1]
    shortest = _one_row(first, 0)
    is_one = first is last and len(first.prompts) == 1
    return (shortest,) if is_one else (shortest, _one_row(last, len(last.prompts) - 1))


def _one_row(batch: Batch, row: int) -> Batch:
    keep = slice(row, row + 1)
    return Batch(
        batch.rows[keep], batch.prompts[keep], batch.tokens[keep], batch.attention_mask[keep]
    )


def _plain_cells(model: HookedModel, workload: Workload, job: Job, cost: Cost) -> list[CellOutput]:
    n_layers = int(model.cfg.n_layers)
    for batch in workload.positive:
        cost.add(batch.tokens, n_layers * len(job.coefficients))
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
