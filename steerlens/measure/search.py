"""Find where a loss first exceeds its allowance, outward from 0, from few evaluations of it.

Pure arithmetic on numbers: nothing here knows of models. The loss D(c), which may be negative, is
modelled as `slope * c + c^2 * bend(c)`: the slope at 0 is known exactly from a gradient, and the
bend changes little with c, so a few evaluations of it decide where D crosses. Most evaluations are
made on a part of the prompts (the probes); a few on all of them correct the offset.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from steerlens.progress import Progress, silent
from steerlens.stats import intervals

FIRST_STEP = 1.25
"""How far beyond the prediction the first evaluation lies: predictions tend to be too small."""
_PROBE_STEP = 0.25
_REFINED_STEP = 0.04
_FULL_STEP = 0.15
_FAR_STEP = math.log(1.6)
_APART = 1.04
_MAX_PROBES = 12
_MAX_REFINEMENTS = 4
_MAX_FULL = 12
_MAX_DOUBTS = 3
_WIDE_GAP = 1.6
_STEEPEST = 6.0
_GRID = 3000
_INTERVAL_GRID = 160
UNDEFINED = 10.0
"""Times the allowance: a loss beyond that bounds the search, and is not interpolated."""


@dataclass(frozen=True)
class Curve:
    """What is known of a loss D(c), c > 0: its slope at 0 and bends, `(D - slope * c) / c^2`.

    `probes` are bends `(c, bend)` on the probes, with the probes' own slope; `full` those on all
    prompts, at coefficients that are among the probes' too.
    """

    slope: float
    probes: tuple[tuple[float, float], ...] = ()
    full: tuple[tuple[float, float], ...] = ()

    def bend(self, c: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
        """The probes' bend at `c`, shifted to that of all prompts where those are known."""
        bend = _interpolate(c, self.probes, extrapolate=True)
        if not self.full:
            return bend
        at = dict(self.probes)
        offsets = tuple((x, y - at[x]) for x, y in self.full)
        return bend + _interpolate(c, offsets, extrapolate=False)

    def loss(self, c: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
        """D(c)."""
        return loss_of(self.slope, self.bend(c), c, self.probes[-1][0])


@dataclass(frozen=True)
class Line:
    """One search outward from 0, up to `limit`, for the first c with D(c) > `allowance`.

    `probe_slope` is the slope of the probes alone.
    """

    curve: Curve
    probe_slope: float
    allowance: float
    limit: float
    at: float
    """The next coefficient to evaluate; in the end the boundary, inf when it is beyond `limit`."""
    ceiling: float = math.inf
    """The smallest coefficient seen at which D is undefined, or far beyond the allowance."""

    def measured(self, c: float, loss: float) -> "Line":
        """The line with D(c) of the probes added; one far beyond the allowance as a ceiling."""
        if not loss <= UNDEFINED * self.allowance:
            return replace(self, ceiling=min(c, self.ceiling))
        bend = (loss - self.probe_slope * c) / c**2
        return replace(self, curve=replace(self.curve, probes=_with(self.curve.probes, c, bend)))

    def measured_on_all(self, c: float, loss: float) -> "Line":
        """The line with D(c) of all prompts added, when the probes' was measured there too."""
        if not loss <= UNDEFINED * self.allowance:
            return replace(self, ceiling=min(c, self.ceiling))
        if c not in dict(self.curve.probes):
            return self
        bend = (loss - self.curve.slope * c) / c**2
        return replace(self, curve=replace(self.curve, full=_with(self.curve.full, c, bend)))

    def estimate(self, widest_step: float) -> "Line":
        """The line at its estimated crossing, at most `widest_step` times beyond what is known.

        inf when D stays within the allowance up to the limit, and was evaluated within 15% of it.
        """
        known = [c for c, _ in self.curve.probes]
        if not known:
            return replace(self, at=self.ceiling / 4)
        low = min(known) / widest_step
        high = min(max(known) * widest_step, self.limit, self.ceiling)
        at = crossing(self.curve.loss, self.allowance, high)
        if not math.isfinite(at):
            at = high
            if high == self.ceiling:
                at = math.sqrt(max(known) * high)
            elif max(known) >= self.limit * math.exp(-_FULL_STEP):
                at = math.inf
        return replace(self, at=max(at, low))

    def is_settled(self) -> bool:
        """Whether the probes were measured near the estimate, and no gap there is in doubt."""
        return self.step(self.curve.probes) <= _PROBE_STEP and self.doubtful_middle() is None

    def is_far_below(self) -> bool:
        """Whether D at the first point, past the prediction, is below a third of the allowance."""
        at = np.array([c for c, _ in self.curve.probes[:1]])
        return bool((self.curve.loss(at) < self.allowance / 3).all()) if len(at) else False

    def doubtful_middle(self) -> float | None:
        """A coefficient to look at, where the estimate lies in a wide gap that the curve leaps.

        That is, where D at the nearest point differs from the allowance by more than a sixth power
        would make it: then the interpolation across the gap is not to be relied on.
        """
        points = [c for c, _ in self.curve.probes]
        below, above = [c for c in points if c < self.at], [c for c in points if c >= self.at]
        if not below or not above or min(above) < _WIDE_GAP * max(below):
            return None
        nearest = np.array([min(points, key=lambda c: abs(math.log(c / self.at)))])
        loss = float(self.curve.loss(nearest)[0])
        ratio = abs(math.log(loss / self.allowance)) if loss > 0 else math.inf
        is_leap = ratio > 0.1 + _STEEPEST * abs(math.log(float(nearest[0]) / self.at))
        return math.sqrt(max(below) * self.at) if is_leap else None

    def reentry(self) -> float:
        """The smallest measured c beyond the boundary that is within the allowance; NaN if none."""
        beyond = np.array([c for c, _ in self.curve.probes if c > self.at * 1.001])
        within = beyond[self.curve.loss(beyond) <= self.allowance] if len(beyond) else beyond
        return float(within[0]) if len(within) else math.nan

    def step(self, points: Sequence[tuple[float, float]]) -> float:
        """How far the estimate is from the nearest point: `|log|` of their ratio."""
        at = min(self.at, self.limit)
        return min(abs(math.log(at / c)) for c, _ in points) if points else math.inf


Evaluate = Callable[[Sequence[tuple[int, float]], bool], Sequence[tuple[float, float]]]
"""`evaluate([(line index, c), ...], on_all)`: D on the probes and D on all prompts (NaN unless
`on_all`) for each of them, in one batched run."""


def search(lines: Sequence[Line], evaluate: Evaluate, *, progress: Progress = silent) -> list[Line]:
    """Search all lines side by side: `Line.at` of each is its boundary.

    First on the probes until the next step is small, then on all prompts, then again on the probes
    with the offset of all prompts, and on all prompts once more where that moved far. A line that
    does not settle in a dozen rounds ends as NaN. `progress` is told of the lines that have settled
    on the probes; of the rest `evaluate` knows.
    """
    found = list(lines)
    everyone: Sequence[int] = range(len(found))

    def tell() -> None:
        # The last one counts when the next part begins: doubts may be left.
        settled = sum(line.is_settled() for line in found)
        progress("lines settled", min(settled, len(found) - 1), len(found))

    progress("lines settled", 0, len(found))
    _measure(found, everyone, evaluate, on_all=False, widest_step=4.0)
    # Far below what was predicted there: look half way, lest it crossed before and came back.
    doubted = [k for k in everyone if found[k].is_far_below()]
    for k in doubted:
        found[k] = replace(found[k], at=found[k].curve.probes[0][0] / 2)
    _measure(found, doubted, evaluate, on_all=False, widest_step=4.0)
    tell()
    _settle_on_probes(found, everyone, evaluate, tell)
    for _ in range(_MAX_DOUBTS):
        doubted = [k for k in everyone if found[k].doubtful_middle() is not None]
        for k in doubted:
            found[k] = replace(found[k], at=found[k].doubtful_middle() or found[k].at)
        _measure(found, doubted, evaluate, on_all=False, widest_step=2.0)
        _settle_on_probes(found, doubted, evaluate, tell)
    progress("lines settled", len(found), len(found))
    active = everyone
    for _ in range(_MAX_FULL):
        _measure(found, active, evaluate, on_all=True, widest_step=1.5)
        moving: Sequence[int] = active
        for _ in range(_MAX_REFINEMENTS):
            moving = [k for k in moving if found[k].step(found[k].curve.probes) > _REFINED_STEP]
            # The offset between probes and all prompts holds near a measured one only.
            moving = [k for k in moving if found[k].step(found[k].curve.full) < _FAR_STEP]
            _measure(found, moving, evaluate, on_all=False, widest_step=1.5)
        active = [k for k in active if found[k].step(found[k].curve.full) > _FULL_STEP]
    for k in active:
        found[k] = replace(found[k], at=math.nan)
    return found


def _settle_on_probes(
    lines: list[Line], which: Sequence[int], evaluate: Evaluate, tell: Callable[[], None]
) -> None:
    active = which
    for _ in range(_MAX_PROBES):
        active = [k for k in active if lines[k].step(lines[k].curve.probes) > _PROBE_STEP]
        if not active:
            return
        _measure(lines, active, evaluate, on_all=False, widest_step=2.0)
        tell()


def loss_of(
    slope: float | Float[np.ndarray, "curve 1"],
    bend: Float[np.ndarray, "*curve c"],
    c: Float[np.ndarray, " c"],
    last: float,
) -> Float[np.ndarray, "*curve c"]:
    """`slope * c + c^2 * bend`, and no downturn that was not seen.

    Beyond `1.5 * last`, up to which `bend` is known, a bend below 0 shrinks as 1 / c, so that the
    loss goes on along a line.
    """
    beyond = np.maximum(c / (1.5 * last), 1.0)
    loss: NDArray[np.float64] = slope * c + c**2 * np.where(bend < 0, bend / beyond, bend)
    return loss


def crossing(
    loss: Callable[[Float[np.ndarray, " c"]], Float[np.ndarray, " c"]],
    allowance: float,
    limit: float,
) -> float:
    """The smallest c in (0, limit] with `loss(c) > allowance`, inf when there is none.

    Looked for on a geometric grid over four decades and interpolated between its points.
    """
    grid = np.geomspace(limit * 1e-4, limit, _GRID)
    values = loss(grid)
    return float(first_crossings(grid, values[None], np.array([allowance]))[0])


def first_crossings(
    grid: Float[np.ndarray, " c"],
    losses: Float[np.ndarray, "curve c"],
    allowances: Float[np.ndarray, " curve"],
) -> Float[np.ndarray, " curve"]:
    """Where each curve first exceeds its allowance, linear between grid points; inf where never."""
    is_over = losses > allowances[:, None]
    first = is_over.argmax(axis=1)
    rows = np.arange(len(losses))
    before = np.maximum(first - 1, 0)
    low, high = losses[rows, before], losses[rows, first]
    share = np.divide(
        allowances - low, high - low, out=np.zeros_like(high), where=(high > low) & (first > 0)
    )
    crossed = grid[before] + np.clip(share, 0, 1) * (grid[first] - grid[before])
    return np.where(is_over.any(axis=1), crossed, np.inf)


def crossing_interval(
    line: Line,
    slopes: Float[np.ndarray, " prompt"],
    losses: Float[np.ndarray, "prompt distance"],
    allowed: Float[np.ndarray, " prompt"],
    *,
    groups: Sequence[int],
    seed: int,
    n_bootstrap: int,
) -> tuple[float, float]:
    """Between which distances the mean loss of other prompts may cross its allowance, with 95%.

    At every distance the loss beyond the allowance has an `interval` over prompts, by group; low
    is where its upper end first exceeds 0, high where its lower end does (inf where never).

    Args:
        line: The search that has ended.
        slopes: Of each prompt's loss at 0, nats per token and residual unit.
        losses: Of each prompt, at the distances measured on all prompts; between and beyond them
            a prompt's curve bends as the search's own.
        allowed: What each prompt adds to the allowance, which is their mean.
        groups: As of `interval`, and so are `seed` and `n_bootstrap`.
    """
    distances = np.array([c for c, _ in line.curve.full])
    nearest = min(line.at, line.limit) / 200
    grid = np.append(0.0, np.geomspace(nearest, line.limit, _INTERVAL_GRID))
    slopes_apart = slopes - slopes.mean()
    bends = (losses - losses.mean(axis=0) - slopes_apart[:, None] * distances) / distances**2
    bent = np.stack([np.interp(grid, distances, of_prompt) for of_prompt in bends])
    apart = slopes_apart[:, None] * grid + grid**2 * bent
    beyond = line.curve.loss(grid) + apart - allowed[:, None]
    lower, upper = intervals(beyond.T, groups=groups, seed=seed, n_bootstrap=n_bootstrap)
    if np.isnan(lower).any():
        return math.nan, math.nan
    low, high = first_crossings(grid, np.stack([upper, lower]), np.zeros(2))
    return float(low), float(high)


def _measure(
    lines: list[Line],
    active: Sequence[int],
    evaluate: Evaluate,
    *,
    on_all: bool,
    widest_step: float,
) -> None:
    if not active:
        return
    points = [(k, min(lines[k].at, lines[k].limit)) for k in active]
    for (k, c), (of_probes, of_all) in zip(points, evaluate(points, on_all), strict=True):
        line = lines[k].measured(c, of_probes)
        if on_all:
            line = line.measured_on_all(c, of_all)
        lines[k] = line.estimate(widest_step)


def _with(
    points: tuple[tuple[float, float], ...], c: float, value: float
) -> tuple[tuple[float, float], ...]:
    return tuple(sorted({**dict(points), c: value}.items()))


def _interpolate(
    c: NDArray[np.float64], points: Sequence[tuple[float, float]], *, extrapolate: bool
) -> NDArray[np.float64]:
    """Linear between the points; beyond them along the last piece, at most half as far again."""
    x, y = np.array(points).T
    inside: NDArray[np.float64] = np.interp(c, x, y)
    if not extrapolate or len(x) == 1:
        return inside
    # The end pieces by points a little apart: between nearer ones rounding would decide the slope.
    second = int(np.argmax(x >= _APART * x[0])) or len(x) - 1
    last_but = int(np.nonzero(x <= x[-1] / _APART)[0][-1]) if x[0] <= x[-1] / _APART else 0
    rise_below = (y[second] - y[0]) / (x[second] - x[0])
    rise_above = (y[-1] - y[last_but]) / (x[-1] - x[last_but])
    below = y[0] + rise_below * (np.maximum(c, x[0] / 1.5) - x[0])
    above = y[-1] + rise_above * (np.minimum(c, 1.5 * x[-1]) - x[-1])
    return np.where(c < x[0], below, np.where(c > x[-1], above, inside))
