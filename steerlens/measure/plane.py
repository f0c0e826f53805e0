"""One plane of activation space at a hook: its boundary at every angle, its loss, its gradients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from steerlens.engine.plan import run_cells
from steerlens.engine.slopes import label_slopes
from steerlens.engine.workload import Job
from steerlens.errors import InputError
from steerlens.loss import coherence_penalty
from steerlens.measure.boundary import Text, boundary_settings
from steerlens.measure.boundary_search import all_round
from steerlens.measure.coherence import Push
from steerlens.measure.prediction import gradient_batches
from steerlens.measure.preparation import Preparation
from steerlens.measure.rows import main_orthogonal
from steerlens.measure.settings import PlaneSettings
from steerlens.measure.texts import On
from steerlens.models.hooks import hook_layer
from steerlens.plots.figure import Figure
from steerlens.plots.plane import loss_geometry as draw_geometry
from steerlens.stats import TAIL
from steerlens.tables import Row, fragment, hook_label, measured, to_frame
from steerlens.validation import Angles, checked

SHARES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Where the loss is measured along every push, in boundaries of that angle."""
_SHAPES = np.linspace(0, 2, 81)
"""How far from a circle, in that of the shape seen: the log radii about their mean, times these."""


@dataclass(frozen=True, eq=False)
class LossGeometry:
    """`points` has one row a hook and pair (columns `geometry`), `contours` one a measured push.

    `contours` (columns `contours`) holds the loss where the pairs were pushed in the plane, `shape`
    (columns `shape`) the boundary of every angle. The plane at each hook is that of the frozen
    direction and the main orthogonal one. All tables carry settings, provenance and the
    `forward_equivalents` spent in their attrs, `shape` also how far was `searched` at each hook.
    """

    points: pd.DataFrame
    contours: pd.DataFrame
    shape: pd.DataFrame

    def __repr__(self) -> str:
        n_hooks = self.points.hook_name.nunique()
        return f"LossGeometry({n_hooks} hooks, {len(self.contours)} pushes)"

    def plot(self) -> Figure:
        """`plots.loss_geometry` of it."""
        return draw_geometry(self)

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


@dataclass(frozen=True, eq=False)
class BoundaryShape:
    """`table` has one row an angle (columns `shape`) in the plane of two unit vectors.

    `direction` is the frozen direction (0 degrees), `orthogonal` the main direction of what is left
    of the pairs' differences without it (90 degrees). The `radius_ratio` columns are of all angles
    together, the same in every row (see the function of that name).
    """

    table: pd.DataFrame
    direction: Float[Tensor, " d_model"]
    orthogonal: Float[Tensor, " d_model"]

    @property
    def hook_name(self) -> str:
        """The hook of the plane."""
        return str(self.table.hook_name.iloc[0])

    @property
    def axes(self) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
        """`direction` and `orthogonal`."""
        return self.direction, self.orthogonal

    def at(self, angle: float) -> Float[Tensor, " d_model"]:
        """The unit vector `cos(angle) * direction + sin(angle) * orthogonal`; angle in degrees."""
        return turned(self.direction, self.orthogonal, angle)

    def __repr__(self) -> str:
        ratio, if_round = self.table[["radius_ratio", "radius_ratio_if_round"]].iloc[0]
        return (
            f"BoundaryShape({len(self.table)} angles, radius ratio {ratio:.3g}; "
            f"{if_round:.3g} if round)"
        )

    def _repr_html_(self) -> str:
        names = ["angle", "boundary", "boundary_ci_low", "boundary_ci_high", "predicted_boundary"]
        table = self.table[names].rename(columns=lambda name: name.replace("_", " "))
        about = [repr(self), f"layer {hook_label(self.hook_name)}", *measured(self.table.attrs)]
        return fragment(about, table, note="residual units; inf is not reached")


def run_shape(
    study: Preparation,
    hook_name: str,
    *,
    n_angles: int,
    on: On,
    search_range: float | int,
    heading: str = "",
) -> BoundaryShape:
    """`Study.boundary_shape` at one hook; progress goes under the `heading`."""
    study.pairs.check_paired("the plane's second axis is")
    before = study.spent
    fitted, text = study.fitted, Text.of(study, on)
    within = vars(boundary_settings(study, text, search_range))
    settings = PlaneSettings(**within, n_angles=n_angles)
    cell = study.baseline.cell(hook_name)
    dtype, direction = fitted[hook_name].dtype, fitted[hook_name].double()
    orthogonal = main_orthogonal((cell.positive - cell.negative).double(), direction)
    norms = torch.cat([cell.positive, cell.negative]).norm(dim=-1)
    limit = settings.search_range * float(norms.mean())
    turns = all_round(n_angles, lambda angle: turned(direction, orthogonal, angle).to(dtype))
    pushes = [Push(hook_name, along, sign, study.readouts[hook_name]) for _, along, sign in turns]
    plan = study.plan.on(*text.unsteered(study))
    if heading:
        plan = replace(plan, engine=plan.engine.under(heading))
    boundaries = text.search(study, plan, pushes, [limit] * n_angles)
    attrs = text.record(study, settings, since=before) | {"searched": limit}
    ratio = radius_ratio(
        np.array([boundary.at for boundary in boundaries]),
        np.stack([boundary.resampled() for boundary in boundaries], axis=1),
    )
    at_hook, rows = {"hook_name": hook_name, "layer": hook_layer(hook_name)}, []
    for (angle, _, _), boundary in zip(turns, boundaries, strict=True):
        reach = boundary.at if math.isfinite(boundary.at) else math.nan
        turn = math.radians(angle)
        place = {"angle": angle, "x": reach * math.cos(turn), "y": reach * math.sin(turn)}
        rows.append({**at_hook, **place, **boundary.row(), **ratio})
    return BoundaryShape(to_frame(rows, "shape", attrs), direction.to(dtype), orthogonal.to(dtype))


def run_plane(
    study: Preparation, hook_names: Sequence[str], *, n_angles: int, search_range: float | int
) -> LossGeometry:
    """`Study.plane`."""
    before = study.spent
    text = Text.of(study, "positive")
    within = vars(boundary_settings(study, text, search_range))
    settings = PlaneSettings(**within, n_angles=n_angles)
    if settings.steered_positions != "all":
        raise InputError(
            "in the plane every token is pushed, so steered_positions must be all, not "
            f"{settings.steered_positions!r}"
        )
    planes = [
        run_shape(
            study,
            name,
            n_angles=n_angles,
            on="positive",
            search_range=search_range,
            heading=f"layer {i} of {len(hook_names)}",
        )
        for i, name in enumerate(hook_names, start=1)
    ]
    baseline = study.baseline
    logprobs = _pushed_logprobs(study, planes)
    slopes = label_slopes(
        study.engine,
        gradient_batches(study.engine, study.tokens.positive),
        [((plane.hook_name, axis),) for plane in planes for axis in plane.axes],
        steered_positions="all",
        seed=settings.seed,
    )
    pull = settings.weight * torch.relu((settings.margin - 1) * baseline.logprob.double())
    ids = [pair.id for pair in study.pairs]
    points: list[Row] = []
    contours: list[Row] = []
    for i, (plane, along) in enumerate(zip(planes, logprobs, strict=True)):
        cell = baseline.cell(plane.hook_name)
        differences = cell.positive.double() - cell.negative.double()
        coherence = pull * slopes.logprob[2 * i : 2 * i + 2].double()
        points += _point_rows(plane, differences, coherence, ids)
        contours += _contour_rows(plane, differences, along, baseline.logprob, settings)
    attrs = study.record(settings, since=before)
    searched = {plane.hook_name: plane.table.attrs["searched"] for plane in planes}
    shape = pd.concat([plane.table for plane in planes], ignore_index=True)
    of_shape: dict[Any, Any] = {**attrs, "searched": searched}
    shape.attrs = of_shape
    return LossGeometry(
        to_frame(points, "geometry", attrs), to_frame(contours, "contours", attrs), shape
    )


@checked
def check_plane(hook_names: Sequence[str], n_angles: Angles) -> None:  # noqa: ARG001 (a range)
    """Raise `InputError` when there is not one hook, or too few angles for a shape."""
    if len(hook_names) != 1:
        raise InputError(f"a shape is that of one hook, not of {len(hook_names)}; name one layer")


def radius_ratio(
    radii: Float[np.ndarray, " angle"], resampled: Float[np.ndarray, "resample angle"]
) -> Row:
    """The largest radius over the smallest, its interval, and what noise makes of a circle.

    The largest of noisy radii is too large, and the smallest too small, so that a circle has a
    ratio above 1 too. `radius_ratio_if_round` is the median ratio of equal radii with the noise of
    the resamples about `radii` (in logs, correlated over angles as it is). The interval reaches
    from the least to the largest ratio, up to the square of the one seen, of which the noise would
    make the one seen with 95%: that takes the bias off. The least is that of a shape whose radii
    are all at one of the ends, of which noise makes the most.

    Args:
        radii: Of every angle, residual units; inf where it is beyond the searched range.
        resampled: The same of resampled groups, the same groups for every angle.

    Returns:
        The columns of `shape`; the ratio is inf where one radius is, NaN where all are or
        one is undefined, and the others NaN where it, or a resample, is not finite.
    """
    if np.isnan(radii).any() or np.isinf(radii.min()):
        return {}
    ratio = float(radii.max() / radii.min())
    if not np.isfinite(radii).all() or not len(resampled) or not np.isfinite(resampled).all():
        return {"radius_ratio": ratio}
    shape = np.log(radii)
    noise = np.log(resampled) - shape
    # Of the shapes with one ratio, noise makes the most of that which has no radius in between.
    extremes = np.where(shape > (shape.max() + shape.min()) / 2, shape.max(), shape.min())
    high = np.quantile(_ranges(extremes, noise), 1 - TAIL, axis=1) * (1 + 1e-9)
    low = np.quantile(_ranges(shape, noise), TAIL, axis=1) * (1 - 1e-9)
    seen = math.log(ratio)
    return {
        "radius_ratio": ratio,
        "radius_ratio_ci_low": float(ratio ** np.min(_SHAPES[seen <= high], initial=math.inf)),
        "radius_ratio_ci_high": float(ratio ** np.max(_SHAPES[low <= seen], initial=0.0)),
        "radius_ratio_if_round": float(np.exp(np.median(np.ptp(noise, axis=1)))),
    }


def _ranges(
    shape: Float[np.ndarray, " angle"], noise: Float[np.ndarray, "resample angle"]
) -> Float[np.ndarray, "share resample"]:
    """Log radius ratios of a shape that is so many times as far from a circle, with the noise."""
    ranges: NDArray[np.float64] = np.stack(
        [np.ptp(share * shape + noise, axis=1) for share in _SHAPES]
    )
    return ranges


def turned(
    direction: Float[Tensor, " d_model"], orthogonal: Float[Tensor, " d_model"], angle: float
) -> Float[Tensor, " d_model"]:
    """The direction turned by an angle (degrees) towards the orthogonal one: a unit vector.

    Computed in float64, of the direction's dtype.
    """
    turn = math.radians(angle)
    vector: Tensor = math.cos(turn) * direction.double() + math.sin(turn) * orthogonal.double()
    return vector.to(direction.dtype)


def _pushed_logprobs(
    study: Preparation, planes: Sequence[BoundaryShape]
) -> list[list[list[tuple[float, Float[Tensor, " pair"]]]]]:
    """Of every plane and angle: the coefficients, and each positive prompt's logprob there."""
    jobs = [
        Job(plane.hook_name, plane.at(angle), coefficients, study.readouts[plane.hook_name])
        for plane in planes
        for angle, coefficients in zip(plane.table.angle, _coefficients(plane), strict=True)
    ]
    workload = replace(study.workload, negative=(), with_readouts=False)
    plan = study.plan.on(workload, study.baseline.of_positive)
    by_job: list[list[tuple[float, Float[Tensor, " pair"]]]] = []
    what, n_pushes = "loss in the plane: pushes", len(jobs) * len(SHARES)
    study.engine.progress(what, 0, n_pushes)
    for cells in run_cells(plan, jobs):
        by_job.append([(cell.coefficient, cell.logprob) for cell in cells])
        study.engine.progress(what, len(by_job) * len(SHARES), n_pushes)
    pushed = iter(by_job)
    return [[next(pushed) for _ in plane.table.angle] for plane in planes]


def _coefficients(plane: BoundaryShape) -> list[tuple[float, ...]]:
    """Shares of every angle's boundary; where that is unknown, of the largest one known."""
    known = [float(b) for b in plane.table.boundary if math.isfinite(b)]
    fallback = max(known, default=plane.table.attrs["searched"])
    reach = [float(b) if math.isfinite(b) else fallback for b in plane.table.boundary]
    return [tuple(share * distance for share in SHARES) for distance in reach]


def _point_rows(
    plane: BoundaryShape,
    differences: Float[Tensor, "pair d_model"],
    coherence: Float[Tensor, "axis pair"],
    ids: Sequence[str],
) -> list[Row]:
    (along, across), norm = _in_plane(differences, plane), differences.norm(dim=-1)
    columns = {
        "along": along,
        "across": across,
        "separation": norm,
        "separation_along": along / norm,
        "separation_across": across / norm,
        "coherence_along": coherence[0].cpu(),
        "coherence_across": coherence[1].cpu(),
    }
    table = pd.DataFrame({name: values.numpy() for name, values in columns.items()}).assign(
        hook_name=plane.hook_name, layer=hook_layer(plane.hook_name), pair=list(ids)
    )
    return cast(list[Row], table.to_dict("records"))


def _in_plane(
    differences: Float[Tensor, "pair d_model"], plane: BoundaryShape
) -> list[Float[Tensor, " pair"]]:
    return [differences @ axis.double().cpu() for axis in plane.axes]


def _contour_rows(
    plane: BoundaryShape,
    differences: Float[Tensor, "pair d_model"],
    along: Sequence[Sequence[tuple[float, Float[Tensor, " pair"]]]],
    baseline: Float[Tensor, " pair"],
    settings: PlaneSettings,
) -> list[Row]:
    mean = [float(values.mean()) for values in _in_plane(differences, plane)]
    unsteered, rows = baseline.double(), list[Row]()
    for angle, boundary, cells in zip(plane.table.angle, plane.table.boundary, along, strict=True):
        turn = math.radians(angle)
        for coefficient, logprob in [(0.0, baseline), *cells]:
            penalty = float(
                coherence_penalty(
                    logprob.double(), unsteered, margin=settings.margin, weight=settings.weight
                )
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
