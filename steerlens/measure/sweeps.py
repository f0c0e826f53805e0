"""The grid of cells: every hook at every coefficient, as tables."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from steerlens.directions.directions import Directions
from steerlens.engine.checkpoint import Kept, digest, digest_of
from steerlens.engine.plan import Plan, read_cells
from steerlens.engine.workload import CellOutput, Job
from steerlens.errors import InputError
from steerlens.measure.boundary import run_boundary
from steerlens.measure.dense import (
    curve,
    first_cells,
    left_out_errors,
    more_cells,
    warn_of_errors,
    with_dense,
)
from steerlens.measure.preparation import Preparation
from steerlens.measure.rows import (
    as_asked,
    by_pair,
    check_logprob_budget,
    checked_coefficients,
    measure,
    point_rows,
)
from steerlens.measure.settings import SEARCH_RANGE, SweepSettings
from steerlens.models.hooks import hook_layer
from steerlens.models.identity import provenance
from steerlens.plots.figure import Figure
from steerlens.plots.sweeps import tradeoff
from steerlens.steering import Coefficient, SteeringVector, parse_coefficient
from steerlens.tables import Row, fragment, hook_label, measured, shortened, to_frame


@dataclass(frozen=True, eq=False)
class SweepResult:
    """`table` has one row a cell (columns `sweep`), `layers` one row a hook (columns `layers`).

    `points` has one row a hook and pair (columns `points`): the unsteered differences. All
    carry settings, model provenance and fingerprints in their `attrs`.
    """

    table: pd.DataFrame
    layers: pd.DataFrame
    points: pd.DataFrame
    directions: Directions | SteeringVector
    settings: SweepSettings

    def __repr__(self) -> str:
        method = shortened(self.table.attrs["method"])
        return (
            f"SweepResult({len(self.settings.hook_names)} hooks x "
            f"{len(self.settings.coefficients)} coefficients, {method})"
        )

    def plot(self) -> Figure:
        """`plots.tradeoff` of it."""
        return tradeoff(self)

    def _repr_html_(self) -> str:
        rows = []
        for hook_name, cells in self.table.groupby("hook_name", sort=False):
            row = {"layer": hook_label(str(hook_name))}
            for cell in cells.itertuples():
                mark = {"no": " !", "undecided": " ?"}.get(str(cell.coherent), "")
                row[f"c = {cell.asked}"] = (
                    f"{cell.projection:.4g} ({cell.degradation_nats:+.3f}){mark}"
                )
            rows.append(row)
        note = "projection (degradation, nats per token); ! beyond the budget, ? undecided"
        return fragment([repr(self), *measured(self.table.attrs)], pd.DataFrame(rows), note=note)


def run_sweep(
    study: Preparation, coefficients: Sequence[Coefficient], dense: int | None = None
) -> SweepResult:
    """`Study.sweep`."""
    before = study.spent
    check_logprob_budget(study.settings.budget)
    study.check_readouts()
    asked = checked_coefficients(coefficients)
    every = asked if dense is None else with_dense(asked, dense)
    settings = SweepSettings(**vars(study.settings), coefficients=every, dense=dense)
    amounts = _amounts(study, every)
    baseline, checkpoint, known = study.baseline, study.engine.checkpoint, {}
    if checkpoint is not None:
        of = _fingerprint(study, settings)
        kept = {name: checkpoint.load(name, of) for name in study.hook_names}
        known = {name: hook for name, hook in kept.items() if hook is not None}
        study.engine.cost.blocks += sum(hook.blocks for hook in known.values())
    rows: dict[str, Sequence[Row]] = {name: hook.rows for name, hook in known.items()}
    first = {
        name: {*of} if dense is None else first_cells(of, [of[every.index(c)] for c in asked])
        for name, of in amounts.items()
    }
    for name, hook in _finished_hooks(study, settings, amounts, first, known):
        rows[name] = hook.rows
        if checkpoint is not None:
            checkpoint.keep(name, of, hook)
    if dense is not None:
        errors = {
            name: max([0.0, *(e for e in (row["left_out_error"] for row in of) if e >= 0)])
            for name, of in rows.items()
            if not all(row["exact"] for row in of)
        }
        warn_of_errors(errors)
    attrs = study.record(settings, since=before)
    ids = [pair.id for pair in study.pairs]
    points = [
        {**row, "hook_name": name, "layer": hook_layer(name)}
        for name, of in study.interventions.items()
        for row in point_rows(of.hook_name, baseline, of.direction, ids)
    ]
    table = [row for name in study.hook_names for row in rows[name]]
    return SweepResult(
        table=to_frame(table, "sweep", attrs),
        layers=to_frame(list(study.layer_rows.values()), "layers", attrs),
        points=to_frame(points, "points", attrs),
        directions=study.directions,
        settings=settings,
    )


_SIGNS = {-1: "boundary_neg", 1: "boundary_pos"}


def _amounts(
    study: Preparation, coefficients: Sequence[float | str]
) -> dict[str, tuple[float, ...]]:
    """What multiplies each hook's direction. Raises `InputError` where that is not known."""
    parsed = [parse_coefficient(c) for c in coefficients]
    measures = {name: dict.fromkeys((-1, 1), 1.0) for name in study.hook_names}
    found = dict.fromkeys(("residual", "norm", "boundary"), measures)
    if any(p.unit == "norm" for p in parsed):
        found["norm"] = {
            name: dict.fromkeys((-1, 1), of.resid_norm(study.baseline))
            for name, of in study.interventions.items()
        }
    if any(p.unit == "boundary" for p in parsed):
        rows = run_boundary(
            study, on="positive", search_range=SEARCH_RANGE, with_projection=False
        ).layers.set_index("hook_name")
        found["boundary"] = {
            name: {sign: float(rows[column].abs()[name]) for sign, column in _SIGNS.items()}
            for name in study.hook_names
        }
    amounts = {
        name: tuple(p.number * found[p.unit][name][1 if p.number > 0 else -1] for p in parsed)
        for name in study.hook_names
    }
    for name, sizes in amounts.items():
        for asked, size in zip(coefficients, sizes, strict=True):
            if not math.isfinite(size):
                raise InputError(
                    f"cannot push {name} by {asked!r}: the search found no boundary of that sign "
                    "there; give a coefficient in residual units or norms, or leave the layer out"
                )
    return amounts


def _finished_hooks(
    study: Preparation,
    settings: SweepSettings,
    amounts: Mapping[str, Sequence[float]],
    first: Mapping[str, Collection[float]],
    known: Mapping[str, Kept],
) -> Iterator[tuple[str, Kept]]:
    """The hooks that are not known, each when its cells are finished.

    Those whose `first` cells do not make a dense curve are gone through once more.
    """
    plan = (
        study.plan if any(c for of in first.values() for c in of) else None
    )  # before the first cell is told of
    n_of_hook, n_blocks = len(settings.coefficients), 1 if plan is None else len(plan.blocks)
    n_done, n_cells = (n_of_hook * len(of) * n_blocks for of in (known, study.hook_names))
    tell = study.engine.progress
    tell("cells", n_done, n_cells)
    values: dict[str, dict[float, Tensor]] = {}
    for name in study.hook_names:  # before the states of a block of pairs are held
        readout = study.readouts[name]
        unsteered, direction = study.baseline.cell(readout), study.read_along[readout]
        values[name] = {0.0: by_pair(unsteered, unsteered, direction)}
    blocks = dict.fromkeys(study.hook_names, 0)
    again: dict[str, Collection[float]] = {}
    # What was known is passed again where it was run again, so that the rest costs the same.
    passed = {name: {1.0} for name, hook in known.items() if _was_run_again(hook, first[name])}
    for cells in (first, again):
        jobs = [
            of.job(tuple(c for c in dict.fromkeys(amounts[name]) if c != 0 and c in cells[name]))
            for name, of in study.interventions.items()
            if name in cells
        ]
        finished: Iterator[tuple[str, Mapping[float, Tensor] | None, int]]
        if plan is None:
            finished = ((name, {}, 0) for name in cells if name not in known)
        else:
            finished = _cells(study, plan, jobs, known)
        for name, found, cost in finished:
            blocks[name] += cost
            if found is None:
                if cells is first:
                    n_done += n_of_hook
                    tell("cells", n_done, n_cells)
                continue
            of_hook = values[name]
            of_hook |= found
            if cells is first and settings.dense is not None:
                more = more_cells(amounts[name], of_hook)
                if more:
                    again[name] = more
                    continue
            rows = _rows(study, settings, amounts[name], name, values.pop(name))
            for _ in rows:
                n_done += 1
                tell("cells", n_done, n_cells)
            yield name, Kept(rows=rows, blocks=blocks[name])
        again |= passed


def _cells(
    study: Preparation, plan: Plan, jobs: Sequence[Job], known: Collection[str]
) -> Iterator[tuple[str, Mapping[float, Float[Tensor, "4 pair"]] | None, int]]:
    """Each hook's cells, those `by_pair`, and what they took (see `plan.read_cells`)."""
    if len(plan.blocks) == 1:  # a hook's rows are kept as soon as it is finished
        plan = replace(plan, engine=replace(plan.engine, checkpoint=None))

    jobs = [replace(job, along=study.read_along[job.readout]) for job in jobs]
    of_known = {job for job in jobs if job.hook_name in known}
    for job, cells, cost in read_cells(plan, jobs, by_pair_alone, known=of_known):
        found = None
        if cells is not None:
            found = {cell.coefficient: cell.positive.T.contiguous() for cell in cells}
        yield job.hook_name, found, cost


def by_pair_alone(job: Job, cell: CellOutput, unsteered: CellOutput) -> CellOutput:
    """The cell with the numbers `by_pair` in place of activations."""
    assert job.along is not None
    numbers = by_pair(cell, unsteered, job.along)
    return replace(cell, positive=numbers.T, negative=numbers.T[:0])


def _was_run_again(hook: Kept, first: Collection[float]) -> bool:
    run = {row["coefficient"] for row in hook.rows if row["exact"]}
    return len(run - {0.0}) > len({*first} - {0.0})


def _rows(
    study: Preparation,
    settings: SweepSettings,
    amounts: Sequence[float],
    hook_name: str,
    values: Mapping[float, Float[Tensor, "4 pair"]],
) -> tuple[Row, ...]:
    """The rows of a hook's cells, from those that were run."""
    head = {"hook_name": hook_name, "layer": hook_layer(hook_name)}
    head["readout_hook"] = study.readouts[hook_name]
    of = (study.baseline.logprob, settings, study.pairs.groups)
    errors = {} if settings.dense is None else left_out_errors(values)
    at = None if settings.dense is None else curve(values)
    return tuple(
        {
            **head,
            "asked": as_asked(asked),
            "exact": c in values,
            "left_out_error": errors.get(c, math.nan),
            **measure(c, at(c) if at and c not in values else values[c], *of),
        }
        for asked, c in zip(settings.coefficients, amounts, strict=True)
    )


def _fingerprint(study: Preparation, settings: SweepSettings) -> str:
    """The sha256 of all that decides a cell: the unsteered activations too, to the bit."""
    return digest(
        provenance(study.model).to_dict(),
        study.pairs.fingerprint,
        study.pairs.groups,
        asdict(settings),
        [of.decided for of in study.interventions.values()],
        [study.read_along[name] for name in study.readouts.values()],
        digest_of(study.baseline),
    )
