"""The geometry of the loss: differences, boundary and loss in one plane of activation space."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.data.pairs import ContrastivePairs
from steerlens.directions.directions import Directions
from steerlens.engine.batches import make_batches
from steerlens.engine.cells import Job
from steerlens.engine.plain_loop import run_baseline
from steerlens.engine.plan import make_plan, run_cells
from steerlens.engine.slopes import label_slopes
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.engine.workload import Baseline, Cost, Workload, make_workload
from steerlens.errors import InputError, finite
from steerlens.loss import MARGIN, WEIGHT, coherence_penalty
from steerlens.measure.boundary import BoundarySettings, checked_settings
from steerlens.measure.plane_boundary import BoundaryShape, boundary_shape, check_plane
from steerlens.measure.rows import check_directions, record
from steerlens.models.hooks import Layers, hook_layer, readout_hook, resolve_hooks
from steerlens.models.loading import HookedModel
from steerlens.models.weight_processing import check_processing
from steerlens.progress import Progress, silent, under
from steerlens.tables import (
    CONTOUR_COLUMNS,
    GEOMETRY_COLUMNS,
    Row,
    fragment,
    hook_label,
    measured,
    to_frame,
)

SHARES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Where the loss is measured along every push, in boundaries of that angle."""


@dataclass(frozen=True)
class LossGeometry:
    """`points` has one row a hook and pair (`GEOMETRY_COLUMNS`), `contours` one a measured push.

    `contours` (`CONTOUR_COLUMNS`) holds the loss where the pairs were pushed in the plane, `shape`
    (`SHAPE_COLUMNS`) the boundary of every angle. The plane at each hook is that of the frozen
    direction and the main orthogonal one. All tables carry settings, provenance and the
    `forward_equivalents` spent in their attrs, `shape` also how far was `searched` at each hook.
    """

    points: pd.DataFrame
    contours: pd.DataFrame
    shape: pd.DataFrame

    def __repr__(self) -> str:
        n_hooks = self.points.hook_name.nunique()
        return f"LossGeometry({n_hooks} hooks, {len(self.contours)} pushes)"

    def _repr_html_(self) -> str:
        rows = []
        for hook_name, points in self.points.groupby("hook_name", sort=False):
            boundary = self.shape[self.shape.hook_name == hook_name].boundary
            rows.append(
                {
                    "layer": hook_label(str(hook_name)),
                    "pairs": len(points),
                    "separation": float(points.separation.mean()),
                    "least boundary": float(boundary.min()),
                    "largest boundary": float(boundary.max()),
                }
            )
        about = [repr(self), *measured(self.points.attrs)]
        return fragment(about, pd.DataFrame(rows), note="residual units; inf is not reached")


def loss_geometry(
    model: HookedModel,
    pairs: ContrastivePairs,
    directions: Directions,
    *,
    layers: Layers,
    n_angles: int = 16,
    budget: str = "relative=0.01",
    search_range: float | int = 4.0,
    margin: float | int = MARGIN,
    weight: float | int = WEIGHT,
    n_bootstrap: int = 2000,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> LossGeometry:
    """Measure the loss in the plane of each hook's direction and the main orthogonal one.

    A push p in the plane adds `+p` to every token of the positive prompts and `-p` to those of the
    negative ones, so that the difference of each pair moves by `2 p` at the hook (residual units).
    `shape` is `boundary_shape` at `n_angles` angles. At shares of each angle's boundary (`SHARES`;
    where it is NaN or beyond the search, of the largest that was found or, where none was found, of
    the searched range) the loss is measured in its
    reference form, read at the hook itself:

        loss(p) = -(mean_i difference_i + 2 p) . direction
                  + weight * mean_i relu(margin * baseline_i - logp_i(p))^2

    The arrows of `points` are minus the gradients of the two terms of the noref loss at p = 0, as
    the difference moves, pair by pair and within the plane: `difference_i / ||difference_i||` for
    the separation, `weight * relu((margin - 1) * logp_i) * dlogp_i/dp` for the penalty of the
    pair's labels (half of its derivative by p, as the difference moves by 2 p), every token pushed.

    Cost: a boundary search and `6 * n_angles` cells of the positive prompts a hook, two forward and
    two backward passes for all. Raises as `boundary_shape`, and `InputError` on a margin or weight
    that is not finite, or a weight below 0.

    Examples:
        >>> geometry = sl.loss_geometry(
        ...     model, pairs, directions, layers=[1], n_angles=4, budget="kl=0.1", n_bootstrap=50
        ... )
        >>> geometry  # six shares of four boundaries, and none
        LossGeometry(1 hooks, 28 pushes)
        >>> pushes = geometry.contours
        >>> np.allclose(pushes.loss, pushes.coherence_penalty - pushes.along)
        True
    """
    hook_names = resolve_hooks(model, layers)
    check_directions(directions, hook_names)
    check_processing(model, directions)
    check_plane(hook_names[:1], n_angles)
    margin, weight = finite("margin", margin), finite("weight", weight)
    if weight < 0:
        raise InputError(f"weight must be 0 or more, got {weight}")
    settings = checked_settings(
        hook_names=hook_names,
        on="positive",
        budget=budget,
        position=directions.position,
        steered_positions="all",
        search_range=search_range,
        n_bootstrap=n_bootstrap,
        seed=seed,
        batch_size=batch_size,
    )
    tell = progress or silent
    planes = [
        boundary_shape(
            model,
            pairs,
            directions,
            layer=[name],
            n_angles=n_angles,
            budget=budget,
            search_range=search_range,
            n_bootstrap=n_bootstrap,
            seed=seed,
            batch_size=batch_size,
            progress=under(tell, f"layer {i} of {len(hook_names)}"),
        )
        for i, name in enumerate(hook_names, start=1)
    ]
    tokenized = tokenize_pairs(model, pairs)
    workload = make_workload(
        model,
        tokenized,
        position=directions.position,
        steered_positions="all",
        batch_size=batch_size,
    )
    cost = Cost()
    readouts = tuple(readout_hook(name, int(model.cfg.n_layers)) for name in hook_names)
    needed = tuple(dict.fromkeys([*hook_names, *readouts]))
    baseline = run_baseline(model, workload, needed, cost=cost, progress=tell)
    logprobs = _pushed_logprobs(model, workload, baseline, planes, readouts, settings, cost, tell)
    slopes = label_slopes(
        model,
        make_batches(model, tokenized.positive, max(1, (batch_size or len(pairs)) // 2)),
        [(plane.hook_name, axis) for plane in planes for axis in plane.axes],
        steered_positions="all",
        seed=seed,
        cost=cost,
        progress=tell,
    )
    pull = weight * torch.relu((margin - 1) * baseline.logprob.double())
    ids = [pair.id for pair in pairs]
    points: list[Row] = []
    contours: list[Row] = []
    for i, (plane, along) in enumerate(zip(planes, logprobs, strict=True)):
        inside = _in_plane(baseline, plane)
        coherence = pull * slopes.logprob[2 * i : 2 * i + 2].double()
        points += _point_rows(plane.hook_name, inside, coherence, ids)
        contours += _contour_rows(plane, inside, along, baseline.logprob, margin, weight)
    given = {**asdict(settings), "n_angles": n_angles, "margin": margin, "weight": weight}
    attrs = record(model, pairs, directions, given, workload=workload, cost=cost)
    spent = sum(plane.table.attrs["forward_equivalents"] for plane in planes)
    attrs["forward_equivalents"] = round(attrs["forward_equivalents"] + spent, 3)
    searched = {plane.hook_name: plane.table.attrs["searched"] for plane in planes}
    return LossGeometry(
        points=to_frame(points, GEOMETRY_COLUMNS, attrs),
        contours=to_frame(contours, CONTOUR_COLUMNS, attrs),
        shape=_joined([plane.table for plane in planes], {**attrs, "searched": searched}),
    )


def _joined(tables: Sequence[pd.DataFrame], attrs: Mapping[str, Any]) -> pd.DataFrame:
    joined = pd.concat(list(tables))
    joined = joined.reset_index(drop=True)
    joined.attrs.clear()
    joined.attrs.update(attrs)
    return joined


@dataclass(frozen=True)
class _Inside:
    """The unsteered differences of the pairs within a plane, and their whole lengths."""

    along: Float[Tensor, " pair"]
    across: Float[Tensor, " pair"]
    norm: Float[Tensor, " pair"]


def _in_plane(baseline: Baseline, plane: BoundaryShape) -> _Inside:
    cell = baseline.cell(plane.hook_name)
    differences = cell.positive.double() - cell.negative.double()
    along, across = (differences @ axis.double().cpu() for axis in plane.axes)
    return _Inside(along, across, differences.norm(dim=-1))


def _pushed_logprobs(
    model: HookedModel,
    workload: Workload,
    baseline: Baseline,
    planes: Sequence[BoundaryShape],
    readouts: Sequence[str],
    settings: BoundarySettings,
    cost: Cost,
    progress: Progress,
) -> list[list[list[tuple[float, Float[Tensor, " pair"]]]]]:
    """Of every plane and angle: the coefficients, and each positive prompt's logprob there."""
    jobs = [
        Job(plane.hook_name, plane.at(angle), coefficients, readout)
        for plane, readout in zip(planes, readouts, strict=True)
        for angle, coefficients in zip(plane.table.angle, _coefficients(plane), strict=True)
    ]
    plan = make_plan(
        model,
        replace(workload, negative=()),
        replace(baseline, negative=baseline.negative[:, :0]),
        jobs,
        batch_size=settings.batch_size,
        cost=cost,
        progress=progress,
    )
    by_job: list[list[tuple[float, Float[Tensor, " pair"]]]] = []
    what, n_pushes = "loss in the plane: pushes", len(jobs) * len(SHARES)
    progress(what, 0, n_pushes)
    for cells in run_cells(plan, jobs, cost=cost):
        by_job.append([(cell.coefficient, cell.logprob) for cell in cells])
        progress(what, len(by_job) * len(SHARES), n_pushes)
    found = iter(by_job)
    return [[next(found) for _ in plane.table.angle] for plane in planes]


def _coefficients(plane: BoundaryShape) -> list[tuple[float, ...]]:
    """Shares of every angle's boundary; where that is unknown, of the largest one known."""
    known = [float(b) for b in plane.table.boundary if math.isfinite(b)]
    fallback = max(known, default=plane.table.attrs["searched"])
    reach = [float(b) if math.isfinite(b) else fallback for b in plane.table.boundary]
    return [tuple(share * distance for share in SHARES) for distance in reach]


def _point_rows(
    hook_name: str,
    inside: _Inside,
    coherence: Float[Tensor, "axis pair"],
    ids: Sequence[str],
) -> list[Row]:
    place = {"hook_name": hook_name, "layer": hook_layer(hook_name)}
    columns = {
        "along": inside.along,
        "across": inside.across,
        "separation": inside.norm,
        "separation_along": inside.along / inside.norm,
        "separation_across": inside.across / inside.norm,
        "coherence_along": coherence[0].cpu(),
        "coherence_across": coherence[1].cpu(),
    }
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        {**place, "pair": name, **dict(zip(columns, row, strict=True))}
        for name, row in zip(ids, values, strict=True)
    ]


def _contour_rows(
    plane: BoundaryShape,
    inside: _Inside,
    along: Sequence[Sequence[tuple[float, Float[Tensor, " pair"]]]],
    baseline: Float[Tensor, " pair"],
    margin: float,
    weight: float,
) -> list[Row]:
    mean = float(inside.along.mean()), float(inside.across.mean())
    unsteered = baseline.double()
    rows: list[Row] = []
    for angle, boundary, cells in zip(plane.table.angle, plane.table.boundary, along, strict=True):
        turn = math.radians(angle)
        for coefficient, logprob in [(0.0, baseline), *cells]:
            penalty = float(
                coherence_penalty(logprob.double(), unsteered, margin=margin, weight=weight)
            )
            x = mean[0] + 2 * coefficient * math.cos(turn)
            rows.append(
                {
                    "hook_name": plane.hook_name,
                    "layer": hook_layer(plane.hook_name),
                    "angle": angle,
                    "coefficient": coefficient,
                    "boundary": boundary,
                    "along": x,
                    "across": mean[1] + 2 * coefficient * math.sin(turn),
                    "degradation_nats": float((unsteered - logprob.double()).mean()),
                    "coherence_penalty": penalty,
                    "loss": penalty - x,
                }
            )
    return rows
