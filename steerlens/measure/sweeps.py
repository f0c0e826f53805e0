"""The grid of cells: every hook at every coefficient, as tables."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.data.pairs import ContrastivePairs
from steerlens.directions.directions import Directions
from steerlens.engine.cells import Finished, Job
from steerlens.engine.plain_loop import run_baseline
from steerlens.engine.plan import finished_cells, make_plan
from steerlens.engine.tokenization import SteeredPositions, tokenize_pairs
from steerlens.engine.workload import Baseline, CellOutput, Cost, make_workload
from steerlens.errors import finite, whole, whole_or_none
from steerlens.loss import MARGIN, WEIGHT
from steerlens.measure.rows import (
    SweepSettings,
    check_directions,
    check_width,
    checked_coefficients,
    layer_row,
    logprob_budget,
    measure,
    point_rows,
    record,
)
from steerlens.models.hooks import Layers, hook_layer, readout_hook, resolve_hooks
from steerlens.models.loading import HookedModel, provenance
from steerlens.models.weight_processing import check_processing
from steerlens.progress import Progress, silent
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
class FinishedHook:
    """The cells of one hook: their rows without q-values, and the block-evaluations they took."""

    hook_name: str
    rows: tuple[Row, ...]
    blocks: int


@runtime_checkable
class Checkpoint(Protocol):
    """Where the finished hooks of a sweep are kept, so that it can go on where it stopped.

    `steerlens.runs.unfinished.open_parts` makes one in a folder.

    Examples:
        >>> class InMemory(dict):
        ...     def finished(self, of): return dict(self)
        ...     def keep(self, hook): self[hook.hook_name] = hook
        >>> kept = InMemory()
        >>> _ = sl.sweep(model, pairs, directions, coefficients=[0, 4], checkpoint=kept)
        >>> len(kept), len(kept["blocks.1.hook_resid_post"].rows)  # hooks; cells of one
        (5, 2)
    """

    def finished(self, of: str) -> Mapping[str, FinishedHook]:
        """Hook name -> what is kept of it. `of` is the sha256 of all that decides the cells.

        Raises where what is kept is of another sweep.
        """
        ...

    def keep(self, hook: FinishedHook) -> None:
        """Keep a hook; it must be safe when this returns."""
        ...


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


def sweep(
    model: HookedModel,
    pairs: ContrastivePairs,
    directions: Directions,
    *,
    layers: Layers | None = None,
    coefficients: Sequence[float | int],
    steered_positions: SteeredPositions = "all",
    budget: str = "relative=0.01",
    margin: float | int = MARGIN,
    weight: float | int = WEIGHT,
    n_bootstrap: int = 2000,
    seed: int = 0,
    batch_size: int | None = None,
    nulls: Mapping[str, Sequence[Directions]] | None = None,
    checkpoint: Checkpoint | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Measure projection against logprob degradation at every hook and coefficient.

    In a cell at hook L with coefficient c (residual units), the positive prompts run with
    `+c * direction` and the negative ones with `-c * direction` on the tokens named by
    `steered_positions` (all real tokens by default), so that the difference moves outward for
    c > 0. It is read at `readout_hook(L)` and the position the directions were fitted at, and
    projected on the readout hook's own frozen direction. The logprob is that of the positive
    prompts' labels: the continuation's tokens where a pair has one, else every prompt token but
    the first. Steering that begins after the read position (`"continuation"`) leaves the
    projection as it was and moves the logprob alone.

    `layers` (see `resolve_hooks`) defaults to the hooks the directions were fitted for. `budget`
    says what `coherent` means (see `Budget`). Intervals are 95% bootstrap intervals over pairs.
    With `nulls` (see `null_directions`) every cell is run along each of them too, at the same
    coefficient and read along the same direction, and gets a null band, a p-value (see
    `null_band`) and a q-value over all cells with a coefficient that is not 0; that costs as
    many sweeps again. A cell whose numbers overflow is a row of NaN, not coherent, with a warning.

    A `checkpoint` is given each hook when its cells are done, and those that it has are not run
    again. With an `executor` (`ProcessPoolExecutor` with the "spawn" context, a Dask client's
    `get_executor()`, any other) its workers run the cells; each loads the model once, so it has to
    come from `load_model`. Either way the tables are the same to the bit, where device, versions
    and number of threads are.

    Raises `InputError` on coefficients that are not finite, a bad budget or number of resamples;
    `InputError` when a hook or its readout has no direction; `InputError` when they were
    fitted on a model with other weight processing; `HookError` on an unknown hook; `ModelError`
    and `WorkerError` when an executor cannot run the model or a worker fails, after what the
    others finished was kept; and as `tokenize_pairs`, `make_workload`, `run_baseline` and the
    `checkpoint` do.

    Examples:
        >>> result = sl.sweep(model, pairs, directions, layers=[2], coefficients=[-4, 0, 4])
        >>> result
        SweepResult(1 hooks x 3 coefficients, mean_diff)
        >>> projection = result.table.projection  # at the readout itself each side moves by c
        >>> (projection - projection[1]).tolist()
        [-8.00, 0.00, 8.00]
    """
    hook_names = resolve_hooks(model, directions.hook_names if layers is None else layers)
    readouts = {name: readout_hook(name, int(model.cfg.n_layers)) for name in hook_names}
    check_directions(directions, [*hook_names, *readouts.values()])
    null = _named(nulls, hook_names)
    check_processing(model, directions, *(one for _, one in null))
    settings = SweepSettings(
        hook_names=hook_names,
        coefficients=checked_coefficients(coefficients),
        position=directions.position,
        steered_positions=steered_positions,
        budget=str(logprob_budget(budget)),
        margin=finite("margin", margin),
        weight=finite("weight", weight),
        n_bootstrap=whole("n_bootstrap", n_bootstrap, 2),
        seed=whole("seed", seed, 0),
        batch_size=whole_or_none("batch_size", batch_size, 1),
    )
    workload = make_workload(
        model,
        tokenize_pairs(model, pairs),
        position=settings.position,
        steered_positions=steered_positions,
        batch_size=batch_size,
    )
    cost, tell = Cost(), progress or silent
    needed = tuple(dict.fromkeys([*hook_names, *readouts.values()]))
    baseline = run_baseline(model, workload, needed, cost=cost, progress=tell)
    check_width(directions, baseline)
    pushes = tuple(c for c in settings.coefficients if c != 0)
    known: Mapping[str, FinishedHook] = {}
    if checkpoint is not None:
        known = checkpoint.finished(
            _fingerprint(model, pairs, directions, settings, null, baseline)
        )
    along = [directions, *(one for _, one in null)]
    jobs = [
        Job(name, of[name], pushes, readouts[name]) for name in hook_names for of in along if pushes
    ]
    plan = make_plan(
        model,
        workload,
        baseline,
        jobs,
        batch_size=batch_size,
        cost=cost,
        progress=tell,
        executor=executor,
    )
    of_hook = len(settings.coefficients) + len(null) * len(pushes)
    done, n_cells = of_hook * len(known), of_hook * len(hook_names)
    tell("cells", done, n_cells)
    cost.blocks += sum(one.blocks for one in known.values())
    found: dict[str, Sequence[Row]] = {name: one.rows for name, one in known.items()}
    ready: dict[str, dict[int, Finished]] = {name: {} for name in hook_names if name not in known}

    def finish(name: str) -> None:
        nonlocal done
        of_name = ready.pop(name)
        at_null = [
            (kind, of_name[i + 1].cells) for i, (kind, _) in enumerate(null if pushes else ())
        ]
        cells = {cell.coefficient: cell for cell in (of_name[0].cells if pushes else ())}
        rows = _hook_rows(name, readouts[name], baseline, directions, settings, cells, at_null)
        found[name] = rows
        for _ in rows:
            done += 1
            tell("cells", done, n_cells)
        if checkpoint is not None:
            blocks = sum(of_job.blocks for of_job in of_name.values())
            checkpoint.keep(FinishedHook(name, tuple(rows), blocks))

    for one in finished_cells(plan, jobs, cost=cost, known=known):
        name, index = jobs[one.index].hook_name, one.index % len(along)
        ready[name][index] = one
        if index > 0:
            done += len(pushes)
            tell("cells", done, n_cells)
        if len(ready[name]) == len(along):
            finish(name)
    for name in list(ready):  # without a push there is no job
        finish(name)
    rows = [row for name in hook_names for row in found[name]]
    rows = _with_q_values(rows)
    attrs = {
        **record(model, pairs, directions, asdict(settings), workload=workload, cost=cost),
        "nulls": {kind: [one.seed for one in some] for kind, some in (nulls or {}).items()},
    }
    ids = [pair.id for pair in pairs]
    return SweepResult(
        table=to_frame(rows, SWEEP_COLUMNS, attrs),
        layers=to_frame(
            [
                layer_row(
                    name,
                    baseline,
                    directions[name],
                    margin=settings.margin,
                    weight=settings.weight,
                    n_bootstrap=settings.n_bootstrap,
                    seed=settings.seed,
                )
                for name in hook_names
            ],
            LAYER_COLUMNS,
            attrs,
        ),
        points=to_frame(
            [row for n in hook_names for row in point_rows(n, baseline, directions[n], ids)],
            POINT_COLUMNS,
            attrs,
        ),
        directions=directions,
        settings=settings,
    )


def measure_layers(
    model: HookedModel,
    pairs: ContrastivePairs,
    directions: Directions,
    *,
    layers: Layers | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The per-layer table alone (`LAYER_COLUMNS`), from the unsteered model: no cell is run.

    Raises as `sweep`.

    Examples:
        >>> table = sl.measure_layers(model, pairs, directions)
        >>> bool((table.projection <= table.separation).all())
        True
    """
    return sweep(
        model,
        pairs,
        directions,
        layers=layers,
        coefficients=[0.0],
        batch_size=batch_size,
        progress=progress,
    ).layers


def _hook_rows(
    hook_name: str,
    readout: str,
    baseline: Baseline,
    directions: Directions,
    settings: SweepSettings,
    cells: Mapping[float, CellOutput],
    at_null: Sequence[tuple[str, Sequence[CellOutput]]],
) -> list[Row]:
    """The rows of a hook's cells, without q-values."""
    unsteered = baseline.cell(readout)
    rows: list[Row] = []
    for coefficient in settings.coefficients:
        cell = unsteered if coefficient == 0 else cells[coefficient]
        where: dict[str, Any] = {
            "hook_name": hook_name,
            "layer": hook_layer(hook_name),
            "readout_hook": readout,
        }
        row = {**where, **measure(cell, unsteered, directions[readout], settings)}
        if coefficient != 0 and at_null and "projection" in row:
            row |= _null_columns(row["projection"], coefficient, at_null, directions[readout])
        rows.append(row)
    return rows


def _named(
    nulls: Mapping[str, Sequence[Directions]] | None, hook_names: Sequence[str]
) -> list[tuple[str, Directions]]:
    named = [(kind, one) for kind, some in (nulls or {}).items() for one in some]
    for _, one in named:
        check_directions(one, hook_names)
    return named


def _fingerprint(
    model: HookedModel,
    pairs: ContrastivePairs,
    directions: Directions,
    settings: SweepSettings,
    null: Sequence[tuple[str, Directions]],
    baseline: Baseline,
) -> str:
    """The sha256 of all that decides a cell: the unsteered activations too, to the bit."""
    told = {
        "model": provenance(model).to_dict(),
        "pairs": pairs.fingerprint,
        "settings": asdict(settings),
        "along": [
            (kind, of.hook_names, of.readout_names) for kind, of in (("", directions), *null)
        ],
        "baseline": baseline.hook_names,
    }
    digest = hashlib.sha256(json.dumps(told).encode())
    for tensor in _tensors(directions, null, baseline):
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(
    directions: Directions, null: Sequence[tuple[str, Directions]], baseline: Baseline
) -> Iterator[Tensor]:
    yield from (of.vectors for of in (directions, *(one for _, one in null)))
    yield from (baseline.positive, baseline.negative, baseline.logprob)


def _null_columns(
    projection: float,
    coefficient: float,
    at_null: Sequence[tuple[str, Sequence[CellOutput]]],
    direction: Float[Tensor, " d_model"],
) -> dict[str, float]:
    """The band of the projection under null vectors at this coefficient, and its p-value."""
    unit = direction.double().cpu()
    found: dict[str, list[float]] = {}
    for kind, cells in at_null:
        (cell,) = (cell for cell in cells if cell.coefficient == coefficient)
        difference = cell.positive.double() - cell.negative.double()
        found.setdefault(kind, []).append(float((difference @ unit).mean()))
    band = null_band(projection, [np.array(values) for values in found.values()])
    return {"null_low": band.low, "null_high": band.high, "p_value": band.p_value}


def _with_q_values(rows: Sequence[Row]) -> list[Row]:
    p_values = np.array([float(row.get("p_value", math.nan)) for row in rows])
    q_values = false_discovery(p_values).tolist()
    return [{**row, "q_value": q} for row, q in zip(rows, q_values, strict=True)]
