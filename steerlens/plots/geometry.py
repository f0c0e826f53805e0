"""The differences of the pairs, the coherence boundary and the loss in one plane."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

from steerlens.errors import InputError
from steerlens.measure.plane import LossGeometry
from steerlens.plots.figure import Figure
from steerlens.plots.marks import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Arrows,
    Axis,
    Contours,
    Frame,
    Layout,
    Line,
    Mark,
    Panel,
    Points,
    Rule,
)
from steerlens.plots.sweeps import RESIDUAL, by_hook, check_columns, check_distinct, numbers

N_GRID = 61
N_LEVELS = 16
ARROW = 0.16
"""Length of a kind's longest arrow, as a share of the panel."""
HALF = 0.78
"""Half the side of the panel that shows the pairs from near by, as a share of their spread."""


def differences(points: pd.DataFrame) -> Figure:
    """The pairs' differences on the frozen direction and the main axis orthogonal to it.

    Takes the table of points of a sweep or of a geometry; one frame a layer. A pair to the right of
    0 differs the way the direction says. Raises `InputError` on another table.

    Examples:
        >>> result = sl.sweep(model, pairs, directions, layers=[1, 2], coefficients=[0])
        >>> figure = sl.plots.differences(result.points)
        >>> figure
        Figure('Differences of the pairs', 1 panels, 2 frames)
        >>> figure.at("2")
        Figure('Differences of the pairs', 1 panels)
    """
    names = ["hook_name", "layer", "pair", "along", "across", "separation"]
    check_columns(points, names, "the table of points")
    frames = []
    for label, rows in by_hook(points).items():
        across = rows.across.where(rows.across.notna(), 0.0)
        marks: list[Mark] = [
            Rule(0.0, "x"),
            Rule(0.0, "y"),
            Points(
                numbers(rows.along),
                numbers(across),
                "a pair",
                BLUE,
                size=7,
                hover=tuple(
                    f"{row.pair}\nalong {row.along:.4g}, across {row.across:.4g}, "
                    f"length {row.separation:.4g}"
                    for row in rows.itertuples()
                ),
            ),
            Points(
                (float(rows.along.mean()),), (float(across.mean()),), "mean", ORANGE, "diamond", 11
            ),
        ]
        frames.append(Frame(label, (_plane(marks, "", reach=None),)))
    caption = (
        "Each point is the difference of one pair, unsteered, on the frozen direction (across the "
        "page) and on the main axis of what is left of the differences (up the page), in residual "
        "units. The diamond is their mean."
    )
    layout = Layout(width=720, height=560, slider="layer")
    return Figure("Differences of the pairs", caption, tuple(frames), layout)


def loss_geometry(geometry: LossGeometry) -> Figure:
    """The loss in the plane of the frozen direction and the main orthogonal one, layer by layer.

    Takes the tables of `steerlens.loss_geometry`. On the left the contours of the loss over where
    the mean difference is pushed to, and the measured boundary; on the right the pairs from near
    by, with an arrow for each term of the loss: which way it pushes the pair. Between the measured
    pushes the square root of the penalty is interpolated (shape-preserving, `scipy`'s pchip).
    Raises `InputError` on other tables, on tables of different hooks, and on pushes between which
    nothing can be interpolated.

    Examples:
        >>> geometry = sl.loss_geometry(
        ...     model, pairs, directions, layers=[1], n_angles=4, budget="kl=0.1", n_bootstrap=50
        ... )
        >>> sl.plots.loss_geometry(geometry)
        Figure('Loss geometry', 2 panels)
    """
    given: Any = geometry  # what the annotation promises is what is checked here
    if not isinstance(given, LossGeometry):
        raise InputError(
            f"expected the LossGeometry of steerlens.loss_geometry, got {type(given).__name__}"
        )
    points, contours, shape = geometry.points, geometry.contours, geometry.shape
    plane = ["hook_name", "layer", "along", "across"]
    arrows = [f"{term}_{axis}" for term in ("separation", "coherence") for axis in plane[2:]]
    check_columns(
        points, [*plane, "pair", *arrows], "the points of a loss geometry", finite=plane[2:]
    )
    heights = ["angle", "coefficient", "coherence_penalty", "loss"]
    check_columns(
        contours, [*plane, *heights], "the contours of a loss geometry", finite=heights[:2]
    )
    ends = ["boundary", "boundary_ci_low", "boundary_ci_high"]
    check_columns(
        shape,
        ["hook_name", "layer", "angle", *ends],
        "the shape of a loss geometry",
        finite=["angle"],
    )
    _check_pushes(contours)
    pushes, shapes = by_hook(contours), by_hook(shape)
    for label in by_hook(points):
        for what, tables in (("contours", pushes), ("shape", shapes)):
            if label not in tables:
                raise InputError(
                    f"the points have hook {label}, the {what} only {', '.join(tables)}"
                )
    frames = [
        Frame(label, (_far(rows, pushes[label], shapes[label]), _near(rows)))
        for label, rows in by_hook(points).items()
    ]
    caption = (
        "Left: where the mean difference of the pairs (diamond) is pushed to in the plane of the "
        "frozen direction and the main orthogonal one, the loss there (minus the projection plus "
        "the coherence penalty), and the coherence boundary as measured, with its 95% interval "
        "(dotted). Right: the pairs from near by; arrows are minus the gradient of each term, "
        "lengths to scale within a term only: separation pushes outward, coherence to where the "
        "labels' logprob rises. Axes in residual units."
    )
    layout = Layout(columns=2, width=620, height=560, slider="layer")
    return Figure("Loss geometry", caption, tuple(frames), layout)


def _check_pushes(contours: pd.DataFrame) -> None:
    """Raise `InputError` on pushes between which nothing can be interpolated."""
    check_distinct(
        contours, ["hook_name", "angle", "coefficient"], "give the contours of one loss geometry"
    )
    furthest = contours.groupby("hook_name", sort=False).coefficient.max()
    for column, is_wrong, expected in (
        ("angle", not contours.angle.between(0, 360, inclusive="left").all(), "from 0 up to 360"),
        ("coefficient", bool((contours.coefficient < 0).any()), "0 or more"),
        ("coefficient", bool((furthest == 0).any()), "above 0 in some push of every hook"),
        ("coherence_penalty", bool((contours.coherence_penalty < 0).any()), "0 or more"),
    ):
        if is_wrong:
            raise InputError(f"the contours of a loss geometry: expected {column} {expected}")


def _far(points: pd.DataFrame, pushes: pd.DataFrame, shape: pd.DataFrame) -> Panel:
    mean = float(points.along.mean()), float(points.across.mean())
    marks: list[Mark] = [_contours(pushes, mean)]
    for column, dash, width, name in (
        ("boundary_ci_low", "dot", 1.0, ""),
        ("boundary_ci_high", "dot", 1.0, ""),
        ("boundary", "solid", 2.4, "coherence boundary"),
    ):
        x, y = _ring(shape, column, mean)
        marks.append(Line(x, y, name, ORANGE, "dot" if dash == "dot" else "solid", width))
    known = shape[np.isfinite(shape.boundary)]
    x, y = _ring(known, "boundary", mean)
    marks.append(
        Points(
            x[:-1],
            y[:-1],
            "coherence boundary",
            ORANGE,
            size=5,
            hover=tuple(
                f"push of {row.boundary:.4g} at {row.angle:.0f} degrees\n"
                f"({row.boundary_ci_low:.4g} to {row.boundary_ci_high:.4g})"
                for row in known.itertuples()
            ),
        )
    )
    marks += [
        Points(numbers(points.along), numbers(points.across), "a pair", BLUE, size=4),
        Points((mean[0],), (mean[1],), "mean difference", ORANGE, "diamond", 11),
    ]
    reach = 1.05 * 2 * float(pushes.coefficient.max())
    return _plane(marks, "The loss, and the boundary", reach=(mean, reach))


def _near(points: pd.DataFrame) -> Panel:
    x, y = numbers(points.along), numbers(points.across)
    spread = max(max(x) - min(x), max(y) - min(y), 1e-9)
    marks: list[Mark] = [Rule(0.0, "x"), Rule(0.0, "y")]
    for term, name, color in (
        ("separation", "separation: outward", BLUE),
        ("coherence", "coherence: to better logprob", GREEN),
    ):
        dx, dy = numbers(points[f"{term}_along"]), numbers(points[f"{term}_across"])
        lengths = [math.hypot(*pair) for pair in zip(dx, dy, strict=True)]
        known = [i for i, length in enumerate(lengths) if math.isfinite(length)]
        longest = max((lengths[i] for i in known), default=0.0)
        scale = ARROW * 2 * HALF * spread / longest if longest > 0 else 0.0
        pairs = [str(pair) for pair in points.pair]
        marks.append(
            Arrows(
                tuple(x[i] for i in known),
                tuple(y[i] for i in known),
                tuple(scale * dx[i] for i in known),
                tuple(scale * dy[i] for i in known),
                name,
                color,
                hover=tuple(f"{pairs[i]}: {term} ({dx[i]:.3g}, {dy[i]:.3g})" for i in known),
            )
        )
    marks.append(Points(x, y, "a pair", GREY, size=5))
    middle = ((max(x) + min(x)) / 2, (max(y) + min(y)) / 2)
    return _plane(marks, "Both terms, pair by pair", reach=(middle, HALF * spread))


def _plane(
    marks: Sequence[Mark], title: str, *, reach: tuple[tuple[float, float], float] | None
) -> Panel:
    x = y = None
    if reach is not None:
        (a, b), r = reach
        x, y = (a - r, a + r), (b - r, b + r)
    return Panel(
        marks,
        Axis(f"along the frozen direction ({RESIDUAL})", x),
        Axis(f"along the main orthogonal axis ({RESIDUAL})", y),
        title,
        square=True,
    )


def _ring(
    shape: pd.DataFrame, column: str, mean: tuple[float, float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The closed curve of the mean difference pushed by `column` at every angle."""
    turn = np.radians(shape.angle.to_numpy(dtype=float))
    reach = shape[column].to_numpy(dtype=float)
    reach = np.where(np.isfinite(reach), reach, math.nan)
    x, y = mean[0] + 2 * reach * np.cos(turn), mean[1] + 2 * reach * np.sin(turn)
    return numbers([*x, x[0]] if len(x) else []), numbers([*y, y[0]] if len(y) else [])


def _contours(pushes: pd.DataFrame, mean: tuple[float, float]) -> Contours:
    reach = 2 * float(pushes.coefficient.max())
    side = np.linspace(-1.05 * reach, 1.05 * reach, N_GRID)
    x, y = mean[0] + side, mean[1] + side
    push_x, push_y = np.meshgrid(side / 2, side / 2)
    loss = interpolated_penalty(pushes, push_x, push_y) - x[None, :]
    inside = loss[np.isfinite(loss)]
    low, high = (0.0, 1.0) if not inside.size else (inside.min(), np.quantile(inside, 0.85))
    levels = np.linspace(low, high if high > low else low + 1, N_LEVELS)
    z = tuple(numbers(row) for row in loss)
    return Contours(numbers(x), numbers(y), z, numbers(levels), "loss")


def interpolated_penalty(
    pushes: pd.DataFrame,
    x: Float[np.ndarray, "row column"],
    y: Float[np.ndarray, "row column"],
) -> Float[np.ndarray, "row column"]:
    """The coherence penalty at the pushes (x, y), from those measured; NaN beyond them.

    Along every measured angle, and between the angles, the square root of the penalty is
    interpolated by pchip, which neither overshoots nor rises where the measured values fall. Pushes
    on which the model overflowed are left out; with fewer than three angles left all is NaN.
    """
    from scipy.interpolate import PchipInterpolator

    known = pushes[np.isfinite(pushes.coherence_penalty)]
    by_angle = {
        float(rows.angle.iloc[0]): rows.sort_values("coefficient")
        for _, rows in known.groupby("angle")
        if len(rows) > 1
    }
    if len(by_angle) < 3:
        return np.full_like(x, math.nan)
    shares = np.linspace(0, 1, 25)
    roots = [
        PchipInterpolator(
            rows.coefficient / rows.coefficient.max(), np.sqrt(rows.coherence_penalty)
        )(shares)
        for rows in by_angle.values()
    ]
    ends = [float(rows.coefficient.max()) for rows in by_angle.values()]
    # Once round on either side, so that the curve closes smoothly.
    angles = np.array([*by_angle])
    round_angles = np.concatenate([angles - 360, angles, angles + 360])
    furthest = PchipInterpolator(round_angles, np.tile(ends, 3))
    around = PchipInterpolator(round_angles, np.tile(np.stack(roots), (3, 1)))
    angle, distance = np.degrees(np.arctan2(y, x)) % 360, np.hypot(x, y)
    share = distance / furthest(angle)
    columns: NDArray[np.float64] = around(angle.ravel())
    place = np.clip(share.ravel(), 0, 1) * (len(shares) - 1)
    left = np.minimum(place.astype(int), len(shares) - 2)
    row = np.arange(len(columns))
    step = place - left
    root = columns[row, left] * (1 - step) + columns[row, left + 1] * step
    penalty: NDArray[np.float64] = np.where(share.ravel() <= 1, root**2, math.nan)
    return penalty.reshape(x.shape)
