"""The loss between the measured pushes: interpolated, and cut into bands of equal height."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, UInt
from numpy.typing import NDArray

N_GRID = 61
N_LEVELS = 16


def loss_bands(pushes: pd.DataFrame, mean: tuple[float, float]) -> pd.DataFrame:
    """Areas between isolines of the loss over where the mean difference, at `mean`, is pushed to.

    A row a ring: `loss` at its lower edge, `area` that tells rings apart, `along` and `across` the
    corners of an area in `kind` "area", and of the line round it in "isoline".
    """
    import contourpy

    reach = 2 * float(pushes.coefficient.max())
    side = np.linspace(-1.05 * reach, 1.05 * reach, N_GRID)
    x, y = mean[0] + side, mean[1] + side
    along, across = np.meshgrid(x, y)
    # Minus the projection plus the penalty; a push moves the difference by twice.
    penalty = interpolated_penalty(pushes, (along - mean[0]) / 2, (across - mean[1]) / 2)
    loss = penalty - along
    known = loss[np.isfinite(loss)]
    columns = ["kind", "loss", "area", "along", "across"]
    if not known.size:
        return pd.DataFrame(columns=columns)
    low, high = float(known.min()), float(np.quantile(known, 0.85))
    levels = np.linspace(low, high if high > low else low + 1, N_LEVELS)
    lines: Any = contourpy.contour_generator(
        x, y, np.ma.masked_invalid(loss), line_type="Separate", fill_type="OuterOffset"
    )
    rows = []
    top = max(float(known.max()), float(levels[-1])) + 1
    for level, above in zip(levels, [*levels[1:], top], strict=True):
        areas = [_one_path(*ring) for ring in zip(*lines.filled(level, above), strict=True)]
        for kind, paths in (("area", areas), ("isoline", lines.lines(level))):
            rows += [
                (kind, float(level), f"{level:.6g} {number}", path[:, 0], path[:, 1])
                for number, path in enumerate(paths)
            ]
    return pd.DataFrame(rows, columns=columns)


def _one_path(
    corners: Float[np.ndarray, "corner 2"], starts: UInt[np.ndarray, "start"]
) -> Float[np.ndarray, "step 2"]:
    """An area and its holes as one closed path: out to each hole and back the same way."""
    outer, *holes = (corners[a:b] for a, b in pairwise(starts))
    return np.concatenate([outer, *(part for hole in holes for part in (hole, outer[-1:]))])


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
