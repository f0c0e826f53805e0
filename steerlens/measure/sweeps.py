"""The grid of cells: every hook at every coefficient, as tables."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from steerlens.directions.directions import Directions
from steerlens.engine.checkpoint import Kept, digest
from steerlens.engine.plan import finished_cells
from steerlens.engine.workload import CellOutput, Finished, Job
from steerlens.measure.preparation import Preparation, check_directions, check_width
from steerlens.measure.rows import checked_coefficients, logprob_budget, measure, point_rows
from steerlens.measure.settings import SweepSettings
from steerlens.models.hooks import hook_layer
from steerlens.models.identity import provenance
from steerlens.models.weight_processing import check_processing
from steerlens.stats import false_discovery, null_band
from steerlens.tables import (
    LAYER_COLUMNS,
    POINT_COLUMNS,
    SWEEP_COLUMNS,
    Row,
    fragment,
    hook_label,
    measured,
    shortened,
    to_frame,
)


@dataclass(frozen=True)
class SweepResult:
    """`table` has one row a cell (`SWEEP_COLUMNS`), `layers` one row a hook (`LAYER_COLUMNS`).

    `points` has one row a hook and pair (`POINT_COLUMNS`): the unsteered differences. All
    carry settings, model provenance and fingerprints in their `attrs`.
    """

    table: pd.DataFrame
    layers: pd.DataFrame
    points: pd.DataFrame
    directions: Directions
    settings: SweepSettings

    def __repr__(self) -> str:
        return (
            f"SweepResult({len(self.settings.hook_names)} hooks x "
            f"{len(self.settings.coefficients)} coefficients, {shortened(self.directions.method)})"
        )

    def _repr_html_(self) -> str:
        rows = []
        for hook_name, cells in self.table.groupby("hook_name", sort=False):
            row = {"layer": hook_label(str(hook_name))}
            for cell in cells.itertuples():
                mark = "" if cell.coherent else " !"
                row[f"c = {cell.coefficient:g}"] = (
                    f"{cell.projection:.4g} ({cell.degradation_nats:+.3f}){mark}"
                )
            rows.append(row)
        note = "projection (degradation, nats per token); ! beyond the budget"
        return fragment([repr(self), *measured(self.table.attrs)], pd.DataFrame(rows), note=note)


def run_sweep(
    study: Preparation,
    coefficients: Sequence[float | int],
    *,
    nulls: Mapping[str, Sequence[Directions]] | None = None,
) -> SweepResult:
    """`Study.sweep`."""
    before = study.spent
    logprob_budget(study.budget)
    study.check_readouts()
    settings = SweepSettings(
        **vars(study.settings), coefficients=checked_coefficients(coefficients)
    )
    along, baseline = _along(study, nulls or {}), study.baseline
    checkpoint, known = study.engine.checkpoint, {}
    if checkpoint is not None:
        of = _fingerprint(study, settings, along)
        kept = {name: checkpoint.load(name, of) for name in study.hook_names}
        known = {name: hook for name, hook in kept.items() if hook is not None}
        study.engine.cost.blocks += sum(hook.blocks for hook in known.values())
    rows: dict[str, Sequence[Row]] = {name: hook.rows for name, hook in known.items()}
    for name, hook in _finished_hooks(study, settings, along, known):
        rows[name] = hook.rows
        if checkpoint is not None:
            checkpoint.keep(name, of, hook)
    table = _with_q_values([row for name in study.hook_names for row in rows[name]])
    attrs = {
        **study.record(settings, since=before),
        "nulls": {kind: [null.seed for null in some] for kind, some in (nulls or {}).items()},
    }
    ids = [pair.id for pair in study.pairs]
    points = [
        row
        for name in study.hook_names
        for row in point_rows(name, baseline, study.directions[name], ids)
    ]
    return SweepResult(
        table=to_frame(table, SWEEP_COLUMNS, attrs),
        layers=to_frame(list(study.layer_rows.values()), LAYER_COLUMNS, attrs),
        points=to_frame(points, POINT_COLUMNS, attrs),
        directions=study.directions,
        settings=settings,
    )


@dataclass(frozen=True, eq=False)
class _Along:
    """Directions to push along: those that are measured (no `kind`), or one null."""

    directions: Directions
    kind: str = ""


def _along(study: Preparation, nulls: Mapping[str, Sequence[Directions]]) -> tuple[_Along, ...]:
    """The directions of the study, then every null, kind by kind."""
    every = [_Along(null, kind) for kind, some in nulls.items() for null in some]
    for null in every:
        check_directions(null.directions, study.hook_names)
        check_width(null.directions, study.model)
    check_processing(study.model, *(null.directions for null in every))
    return (_Along(study.directions), *every)


def _finished_hooks(
    study: Preparation,
    settings: SweepSettings,
    along: Sequence[_Along],
    known: Mapping[str, Kept],
) -> Iterator[tuple[str, Kept]]:
    """The hooks that are not known, each when the cells of all its jobs are finished."""
    pushes = tuple(c for c in settings.coefficients if c != 0)
    plan = study.plan if pushes else None  # before the first cell is told of
    n_of_hook = len(settings.coefficients) + (len(along) - 1) * len(pushes)
    n_done, n_cells = n_of_hook * len(known), n_of_hook * len(study.hook_names)
    tell = study.engine.progress
    tell("cells", n_done, n_cells)
    jobs = {
        Job(name, pushed.directions[name], pushes, study.readouts[name]): pushed
        for name in study.hook_names
        for pushed in along
        if pushes
    }
    passed = {job for job in jobs if job.hook_name in known}
    finished = iter(()) if plan is None else finished_cells(plan, list(jobs), known=passed)
    ready: dict[str, dict[_Along, Finished]] = {}
    for done in finished:
        at_hook = ready.setdefault(done.job.hook_name, {})
        at_hook[jobs[done.job]] = done
        if jobs[done.job].kind:
            n_done += len(pushes)
            tell("cells", n_done, n_cells)
        if len(at_hook) == len(along):
            del ready[done.job.hook_name]
            in_order = {pushed: at_hook[pushed] for pushed in along}
            hook = _finished_hook(study, settings, done.job.hook_name, in_order)
            for _ in hook.rows:
                n_done += 1
                tell("cells", n_done, n_cells)
            yield done.job.hook_name, hook
    if not jobs:
        for name in study.hook_names:
            if name not in known:
                yield name, _finished_hook(study, settings, name, {})
                n_done += n_of_hook
                tell("cells", n_done, n_cells)


def _finished_hook(
    study: Preparation,
    settings: SweepSettings,
    hook_name: str,
    finished: Mapping[_Along, Finished],
) -> Kept:
    """The rows of a hook's cells, without q-values, and what the cells took."""
    readout = study.readouts[hook_name]
    unsteered, direction = study.baseline.cell(readout), study.directions[readout]
    cells = {
        cell.coefficient: cell
        for pushed, done in finished.items()
        if not pushed.kind
        for cell in done.cells
    }
    at_null = [(pushed.kind, done.cells) for pushed, done in finished.items() if pushed.kind]
    rows: list[Row] = []
    for coefficient in settings.coefficients:
        cell = unsteered if coefficient == 0 else cells[coefficient]
        where: dict[str, Any] = {
            "hook_name": hook_name,
            "layer": hook_layer(hook_name),
            "readout_hook": readout,
        }
        row = {**where, **measure(cell, unsteered, direction, settings)}
        if coefficient != 0 and at_null and "projection" in row:
            row |= _null_columns(row["projection"], coefficient, at_null, direction)
        rows.append(row)
    return Kept(rows=tuple(rows), blocks=sum(done.blocks for done in finished.values()))


def _fingerprint(study: Preparation, settings: SweepSettings, along: Sequence[_Along]) -> str:
    """The sha256 of all that decides a cell: the unsteered activations too, to the bit."""
    baseline = study.baseline
    return digest(
        provenance(study.model).to_dict(),
        study.pairs.fingerprint,
        asdict(settings),
        [
            (pushed.kind, pushed.directions.hook_names, pushed.directions.readout_names)
            for pushed in along
        ],
        [pushed.directions.vectors for pushed in along],
        baseline.hook_names,
        (baseline.positive, baseline.negative, baseline.logprob),
    )


def _null_columns(
    projection: float,
    coefficient: float,
    at_null: Sequence[tuple[str, Sequence[CellOutput]]],
    direction: Float[Tensor, " d_model"],
) -> dict[str, float]:
    """The band of the projection under null vectors at this coefficient, and its p-value."""
    unit = direction.double().cpu()
    of_kind: dict[str, list[float]] = {}
    for kind, cells in at_null:
        (cell,) = (cell for cell in cells if cell.coefficient == coefficient)
        difference = cell.positive.double() - cell.negative.double()
        of_kind.setdefault(kind, []).append(float((difference @ unit).mean()))
    band = null_band(projection, [np.array(values) for values in of_kind.values()])
    return {"null_low": band.low, "null_high": band.high, "p_value": band.p_value}


def _with_q_values(rows: Sequence[Row]) -> list[Row]:
    p_values = np.array([float(row.get("p_value", math.nan)) for row in rows])
    q_values = false_discovery(p_values).tolist()
    return [{**row, "q_value": q} for row, q in zip(rows, q_values, strict=True)]
