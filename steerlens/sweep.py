"""The grid of cells: every hook at every coefficient, as tables."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.cells import Job
from steerlens.data import ContrastivePairs
from steerlens.directions import Directions
from steerlens.engine import make_plan, run_cells
from steerlens.errors import DirectionError, SweepError
from steerlens.hooks import Layers, hook_layer, readout_hook, resolve_hooks
from steerlens.loss import (
    MARGIN,
    WEIGHT,
    Budget,
    contrastive_steering_loss,
    contrastive_steering_loss_noref,
)
from steerlens.models import HookedModel, provenance
from steerlens.plain import (
    Baseline,
    CellOutput,
    Cost,
    Workload,
    forward_equivalents,
    make_workload,
    run_baseline,
)
from steerlens.tables import LAYER_COLUMNS, SWEEP_COLUMNS, Row, to_frame
from steerlens.tokens import SteeredPositions, tokenize_pairs
from steerlens.uncertainty import bootstrap_interval

Progress = Callable[[int, int], None]
"""Called after every cell with the cells done and the cells in all."""


@dataclass(frozen=True)
class SweepSettings:
    """Everything besides model, pairs and directions that decides a sweep's numbers."""

    hook_names: tuple[str, ...]
    coefficients: tuple[float, ...]
    position: int
    steered_positions: SteeredPositions
    budget: str
    margin: float
    weight: float
    n_bootstrap: int
    seed: int
    batch_size: int | None


@dataclass(frozen=True)
class SweepResult:
    """`table` has one row a cell (`SWEEP_COLUMNS`), `layers` one row a hook (`LAYER_COLUMNS`).

    Both carry settings, model provenance and fingerprints in their `attrs`.
    """

    table: pd.DataFrame
    layers: pd.DataFrame
    directions: Directions
    settings: SweepSettings

    def __repr__(self) -> str:
        return (
            f"SweepResult({len(self.settings.hook_names)} hooks x "
            f"{len(self.settings.coefficients)} coefficients, {self.directions.method})"
        )


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
    A cell whose numbers overflow is a row of NaN, not coherent, with a warning. Raises `SweepError`
    on coefficients that are not finite, `DirectionError` when a hook or its readout has no
    direction, `SweepError` on a bad budget or number of resamples, `HookError` on an unknown hook,
    and as `tokenize_pairs`, `make_workload` and `run_baseline` do.
    """
    hook_names = resolve_hooks(model, directions.hook_names if layers is None else layers)
    readouts = {name: readout_hook(name, int(model.cfg.n_layers)) for name in hook_names}
    check_directions(directions, [*hook_names, *readouts.values()])
    settings = SweepSettings(
        hook_names=hook_names,
        coefficients=checked_coefficients(coefficients),
        position=directions.position,
        steered_positions=steered_positions,
        budget=str(_logprob_budget(budget)),
        margin=_finite("margin", margin),
        weight=_finite("weight", weight),
        n_bootstrap=_at_least("n_bootstrap", n_bootstrap, 2),
        seed=_at_least("seed", seed, 0),
        batch_size=batch_size,
    )
    workload = make_workload(
        model,
        tokenize_pairs(model, pairs),
        position=settings.position,
        steered_positions=steered_positions,
        batch_size=batch_size,
    )
    cost = Cost()
    baseline = run_baseline(
        model, workload, tuple(dict.fromkeys([*hook_names, *readouts.values()])), cost=cost
    )
    check_width(directions, baseline)
    rows: list[Row] = []
    n_cells = len(hook_names) * len(settings.coefficients)
    pushes = tuple(c for c in settings.coefficients if c != 0)
    jobs = [Job(name, directions[name], pushes, readouts[name]) for name in hook_names if pushes]
    plan = make_plan(model, workload, baseline, jobs, batch_size=batch_size, cost=cost)
    steered = run_cells(plan, jobs, cost=cost)
    for hook_name in hook_names:
        readout = readouts[hook_name]
        unsteered = baseline.cell(readout)
        cells = {cell.coefficient: cell for cell in (next(steered) if pushes else [])}
        for coefficient in settings.coefficients:
            cell = unsteered if coefficient == 0 else cells[coefficient]
            where: dict[str, Any] = {
                "hook_name": hook_name,
                "layer": hook_layer(hook_name),
                "readout_hook": readout,
            }
            rows.append({**where, **measure(cell, unsteered, directions[readout], settings)})
            if progress is not None:
                progress(len(rows), n_cells)

    attrs = record(model, pairs, directions, asdict(settings), workload=workload, cost=cost)
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
                )
                for name in hook_names
            ],
            LAYER_COLUMNS,
            attrs,
        ),
        directions=directions,
        settings=settings,
    )


def record(
    model: HookedModel,
    pairs: ContrastivePairs,
    directions: Directions,
    settings: Mapping[str, Any],
    *,
    workload: Workload,
    cost: Cost,
) -> dict[str, Any]:
    """What a table carries in its attrs: settings, where its numbers come from, what they cost.

    `cost` is given in forward-equivalents of the pairs' `workload`.
    """
    return {
        "settings": dict(settings),
        "method": directions.method,
        "directions_seed": directions.seed,
        "fitted_on": directions.fingerprint,
        "measured_on": pairs.fingerprint,
        "model": provenance(model).to_dict(),
        "forward_equivalents": round(forward_equivalents(cost, model, workload), 3),
    }


def measure_layers(
    model: HookedModel,
    pairs: ContrastivePairs,
    directions: Directions,
    *,
    layers: Layers | None = None,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """The per-layer table alone (`LAYER_COLUMNS`), from the unsteered model: no cell is run.

    Raises as `sweep`.
    """
    return sweep(
        model, pairs, directions, layers=layers, coefficients=[0.0], batch_size=batch_size
    ).layers


def measure(
    cell: CellOutput,
    unsteered: CellOutput,
    direction: Float[Tensor, " d_model"],
    settings: SweepSettings,
) -> Row:
    """The numbers of one cell (`SWEEP_COLUMNS` without the hook's own).

    `direction` is the readout hook's unit direction. Means and the loss are over pairs, in float64.
    """
    unit = direction.double().cpu()
    positive, negative = cell.positive.double(), cell.negative.double()
    logprob, baseline = cell.logprob.double(), unsteered.logprob.double()
    mean_baseline = float(baseline.mean())
    row: dict[str, Any] = {
        "coefficient": cell.coefficient,
        "n_pairs": len(logprob),
        "baseline_logprob_nats": mean_baseline,
        "coherent": False,
    }
    if not all(bool(part.isfinite().all()) for part in (positive, negative, logprob)):
        warnings.warn(
            f"NaN or inf at coefficient {cell.coefficient:g}: the cell is left undefined",
            RuntimeWarning,
            stacklevel=2,
        )
        return row
    projection = (positive - negative) @ unit
    degradation = baseline - logprob
    loss = contrastive_steering_loss(
        positive,
        negative,
        logprob,
        unit,
        baseline,
        margin=settings.margin,
        weight=settings.weight,
    )
    mean_logprob = float(logprob.mean())
    min_logprob = Budget.parse(settings.budget).min_logprob(mean_baseline)
    return row | {
        "projection": float(projection.mean()),
        **_interval("projection", projection, settings),
        "projection_shift": float(((positive - unsteered.positive.double()) @ unit).mean()),
        "separation": float((positive - negative).norm(dim=-1).mean()),
        "logprob_nats": mean_logprob,
        "degradation_nats": float(degradation.mean()),
        **_interval("degradation", degradation, settings),
        "coherence_penalty": float(loss.coherence_penalty),
        "loss": float(loss.loss),
        "coherent": mean_logprob >= min_logprob,
    }


def layer_row(
    hook_name: str,
    baseline: Baseline,
    direction: Float[Tensor, " d_model"],
    *,
    margin: float = MARGIN,
    weight: float = WEIGHT,
) -> Row:
    """The per-layer numbers of the unsteered model at one hook (`LAYER_COLUMNS`)."""
    cell = baseline.cell(hook_name)
    positive, negative = cell.positive.double(), cell.negative.double()
    differences = positive - negative
    norms = differences.norm(dim=-1)
    projection = differences @ direction.double().cpu()
    loss = contrastive_steering_loss_noref(
        positive,
        negative,
        cell.logprob.double(),
        margin=margin,
        weight=weight,
    )
    return {
        "hook_name": hook_name,
        "layer": hook_layer(hook_name),
        "separation": float(norms.mean()),
        "projection": float(projection.mean()),
        "projection_std": float(projection.std()),
        "agreement": float((projection / norms).mean()),
        "explained_variance": float(projection.square().sum() / norms.square().sum()),
        "resid_norm": float(torch.cat([positive, negative]).norm(dim=-1).mean()),
        "logprob_nats": float(cell.logprob.double().mean()),
        "coherence_penalty": float(loss.coherence_penalty),
        "loss": float(loss.loss),
        "prediction_trusted": False,
        "boundary_on": "none",
    }


def _logprob_budget(text: str) -> Budget:
    budget = Budget.parse(text)
    if budget.is_divergence:
        raise SweepError(
            f"a sweep measures logprob, so its budget is relative= or nats=, not {budget.kind}=; "
            "find_boundary takes the others"
        )
    return budget


def _interval(
    name: str, values: Float[Tensor, " pair"], settings: SweepSettings
) -> dict[str, float]:
    low, high = bootstrap_interval(
        values.numpy().astype(np.float64), n_resamples=settings.n_bootstrap, seed=settings.seed
    )
    return {f"{name}_ci_low": low, f"{name}_ci_high": high}


def checked_coefficients(coefficients: Sequence[float | int]) -> tuple[float, ...]:
    """The coefficients as distinct floats, in order.

    Raises `SweepError` when there is none, or one that is not a finite number.
    """
    given: Any = coefficients  # what the annotation promises is what is checked here
    try:
        if isinstance(given, str):
            raise TypeError("text")
        # Adding 0.0 turns -0.0 into 0.0, so that the unsteered cell is recognised and listed once.
        checked = tuple(dict.fromkeys(float(c) + 0.0 for c in given))
    except (TypeError, ValueError, OverflowError) as error:
        raise SweepError(f"expected a list of finite coefficients, got {given!r:.80}") from error
    if not checked:
        raise SweepError("expected at least one coefficient, got none")
    for coefficient in checked:
        _finite("coefficient", coefficient)
    return checked


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise SweepError(f"expected a finite {name}, got {value}")
    return float(value)


def _at_least(name: str, value: int, least: int) -> int:
    if value < least:
        raise SweepError(f"{name} must be at least {least}, got {value}")
    return value


def check_directions(directions: Directions, hook_names: Sequence[str]) -> None:
    """Raise `DirectionError` when a hook has no direction."""
    missing = [name for name in dict.fromkeys(hook_names) if name not in directions]
    if missing:
        raise DirectionError(
            f"no direction was fitted at {', '.join(missing)}; pass the same layers to "
            "collect_differences, which adds the readout hooks by itself"
        )


def check_width(directions: Directions, baseline: Baseline) -> None:
    """Raise `DirectionError` when the directions are another width than the activations."""
    expected, found = baseline.positive.shape[-1], directions.vectors.shape[-1]
    if expected != found:
        raise DirectionError(
            f"the directions have d_model {found}, this model's activations {expected}; fit them "
            "on this model"
        )
