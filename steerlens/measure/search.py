"""Find where a loss first exceeds its allowance, outward from 0, from few evaluations of it.

Pure arithmetic on numbers: nothing here knows of models. The loss D(c), which may be negative, is
modelled as `slope * c + c^2 * bend(c)`: the slope at 0 is known exactly from a gradient, and the
bend changes little with c, so a few evaluations of it decide where D crosses. Where the loss of the
opposite push is searched too, it is the same function at c < 0: the bends of both sides say what
the bend is at 0, as a second difference does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from steerlens.progress import Progress, silent
from steerlens.stats import intervals

FIRST_STEP = 1.25
"""How far beyond the prediction the first evaluation lies: predictions tend to be too small."""
_SURE, _SURE_ALONE = 0.05, 0.025
"""How much an estimate may depend on a bend that was measured elsewhere; with one side alone."""
_NEAREST, _FARTHEST = 1.015, 1.3
"""How far from what was measured an estimate may lie whatever it depends on, and may at most."""
_GUESSED = 1.05
"""How far from it may lie what is no crossing of the curve, but between a loss and a ceiling."""
_REACH = 1.7
"""How far beyond what was measured an interval may end."""
_APART = 1.04
_HELD = 2.0
_MAX_ROUNDS = 12
_MAX_FOR_ENDS = 4
_WIDE_GAP = 1.6
_STEEPEST = 6.0
_GRID = 3000
_INTERVAL_GRID = 160
UNDEFINED = 10.0
"""Times the allowance: a loss beyond that bounds the search, and is not interpolated."""

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Curve:
    """What is known of a loss D(c): its slope at 0 and bends, `(D - slope * c) / c^2`.

    `ahead` are bends `(c, bend)` at c > 0; `behind` those at c < 0, of the opposite push, nearest
    to 0.
    """

    slope: float
    ahead: Points = ()
    behind: Points = ()

    @property
    def known(self) -> Points:
        """All bends, by c."""
        return (*self.behind, *self.ahead)

    def bend(self, c: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
        """The bend at `c >= 0`."""
        at, bends = np.array(self.known).T
        return interpolated(c, at, bends, onward=0.5)

    def loss(self, c: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
        """D(c)."""
        return loss_of(self.slope, self.bend(c), c, self.ahead[-1][0])


@dataclass(frozen=True)
class Line:
    """One search outward from 0, up to `limit`, for the first c with D(c) > `allowance`."""

    curve: Curve
    allowance: float
    limit: float
    at: float
    """The next coefficient to evaluate; in the end the boundary, inf when it is beyond `limit`."""
    ceiling: float = math.inf
    """The smallest coefficient seen at which D is undefined, or far beyond the allowance."""

    def measured(self, c: float, loss: float) -> "Line":
        """The line with D(c) added; one far beyond the allowance as a ceiling."""
        if not loss <= UNDEFINED * self.allowance:
            return replace(self, ceiling=min(c, self.ceiling))
        bend = (loss - self.curve.slope * c) / c**2
        ahead = tuple(sorted({**dict(self.curve.ahead), c: bend}.items()))
        return replace(self, curve=replace(self.curve, ahead=ahead))

    def beside(self, opposite: "Line") -> "Line":
        """The line with what the opposite push says of c < 0."""
        nearest = opposite.curve.ahead[:2]
        behind = tuple((-c, bend) for c, bend in reversed(nearest))
        return replace(self, curve=replace(self.curve, behind=behind))

    def estimate(self, widest_step: float) -> "Line":
        """The line at its estimated crossing, at most `widest_step` times beyond what is known.

        inf when D stays within the allowance up to the limit, and was evaluated within 5% of it.
        """
        known = [c for c, _ in self.curve.ahead]
        if not known:
            return replace(self, at=self.ceiling / 4)
        low = min(known) / widest_step
        high = min(max(known) * widest_step, self.limit, self.ceiling)
        at = crossing(self.curve.loss, self.allowance, high)
        if not math.isfinite(at):
            at = high
            if high == self.ceiling:
                at = math.sqrt(max(known) * high)
            elif max(known) >= self.limit / _GUESSED:
                at = math.inf
        return replace(self, at=max(at, low))

    def wanted(self) -> float | None:
        """Where D has to be known before the estimate can be relied on; None where it can."""
        points = [c for c, _ in self.curve.ahead]
        if not points or self.at == math.inf:
            return None if points else self.at
        first, at = points[0], self.at
        drawn_on = float(self.curve.loss(np.array([first]))[0])
        if (
            len(points) == 1
            and drawn_on < self.allowance / 3
            and self.curve.slope * first > self.allowance
        ):
            # By its slope it crossed before: look half way, lest it did and came back.
            return first / 2
        nearest = min(points, key=lambda c: abs(math.log(c / at)))
        far = abs(math.log(nearest / at))
        if far > math.log(_NEAREST) and far > self._far_enough():
            return at
        return self._doubtful_middle(points, nearest)

    def _far_enough(self) -> float:
        """How far from what was measured the estimate may lie: `|log|` of their ratio.

        Where the bend there differs by a share, the crossing moves by that times
        `c^2 bend / (c D'(c))`: a half without a slope, less where the slope spends the allowance,
        more where it earns some.
        """
        at, slope = self.at, self.curve.slope
        [bend] = self.curve.bend(np.array([at])).tolist()
        if slope * at + bend * at**2 < 0.99 * self.allowance:
            return math.log(_GUESSED)
        sure, rise = _SURE if self.curve.behind else _SURE_ALONE, slope + 2 * at * bend
        return min(math.log(_FARTHEST), sure * rise / abs(bend * at)) if rise > 0 and bend else 0.0

    def wanted_for(self, end: float) -> float | None:
        """Where D has to be known too for an end of the interval that lies beyond; None if not."""
        points = [c for c, _ in self.curve.ahead]
        end = min(end, 2 * self.at, self.limit, self.ceiling)
        if self.at == math.inf or end <= _REACH * points[-1] or len(points) >= _MAX_FOR_ENDS:
            return None
        return math.sqrt(max(self.at, points[-1]) * end)

    def _doubtful_middle(self, points: Sequence[float], nearest: float) -> float | None:
        """A coefficient to look at, where the estimate lies in a wide gap that the curve leaps.

        That is, where D at the nearest point differs from the allowance by more than a sixth power
        would make it: then the interpolation across the gap is not to be relied on.
        """
        below, above = [c for c in points if c < self.at], [c for c in points if c >= self.at]
        if not below or not above or min(above) < _WIDE_GAP * max(below):
            return None
        loss = float(self.curve.loss(np.array([nearest]))[0])
        ratio = abs(math.log(loss / self.allowance)) if loss > 0 else math.inf
        is_leap = ratio > 0.1 + _STEEPEST * abs(math.log(nearest / self.at))
        return math.sqrt(max(below) * self.at) if is_leap else None

    def reentry(self) -> float:
        """The smallest measured c beyond the boundary that is within the allowance; NaN if none."""
        slope, beyond = self.curve.slope, self.at * 1.001
        within = [
            c
            for c, bend in self.curve.ahead
            if c > beyond and slope * c + bend * c**2 <= self.allowance
        ]
        return min(within, default=math.nan)


Evaluate = Callable[[Sequence[tuple[int, float]]], Sequence[float]]
"""`evaluate([(line index, c), ...])`: D at each of them, from one batched run."""


def search(
    lines: Sequence[Line],
    evaluate: Evaluate,
    *,
    opposite: Mapping[int, int] | None = None,
    far_end: Callable[[int, Line], float] | None = None,
    progress: Progress = silent,
) -> list[Line]:
    """Search all lines side by side: `Line.at` of each is its boundary.

    Every round evaluates, in one run, all lines whose estimate cannot be relied on yet, or whose
    interval reaches far beyond what was measured. A line that does not settle in a dozen rounds
    ends as NaN.

    Args:
        lines: Each at the coefficient to begin with.
        evaluate: See `Evaluate`.
        opposite: Index of a line -> that of the line whose c > 0 is its own c < 0.
        far_end: The far end of a line's interval, given its index; None where nobody asks for it.
        progress: Told of the lines that have settled.
    """
    found = list(lines)
    opposite = opposite or {}
    wanted: dict[int, float] = {k: min(line.at, line.limit) for k, line in enumerate(found)}
    progress("lines settled", 0, len(found))
    for round_number in range(_MAX_ROUNDS):
        points = list(wanted.items())
        for (k, c), loss in zip(points, evaluate(points), strict=True):
            found[k] = found[k].measured(c, loss)
        changed = wanted.keys() | {opposite[k] for k in wanted if k in opposite}
        for k in changed:
            line = found[k].beside(found[opposite[k]]) if k in opposite else found[k]
            found[k] = line.estimate(2.0 if round_number else 4.0)
        wanted = {}
        for k in sorted(changed):
            line = found[k]
            next_one = line.wanted()
            if next_one is None and far_end is not None and line.at < math.inf:
                next_one = line.wanted_for(far_end(k, line))
            if next_one is not None:
                wanted[k] = min(next_one, line.limit)
        progress("lines settled", len(found) - len(wanted), len(found))
        if not wanted:
            return found
    progress("lines settled", len(found), len(found))
    unsettled = {k for k in wanted if found[k].wanted() is not None}
    return [replace(line, at=math.nan) if k in unsettled else line for k, line in enumerate(found)]


def loss_of(
    slope: float | Float[np.ndarray, "curve 1"],
    bend: Float[np.ndarray, "*curve c"],
    c: Float[np.ndarray, " c"],
    last: float,
) -> Float[np.ndarray, "*curve c"]:
    """`slope * c + c^2 * bend`, and no downturn that was not seen.

    Beyond `2 * last`, up to which `bend` goes on, a bend below 0 shrinks as 1 / c, so that the
    loss goes on along a line.
    """
    beyond = np.maximum(c / (_HELD * last), 1.0)
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
        losses: Of each prompt, at the coefficients of `line.curve.known`; between and beyond them
            what its bend differs by from the mean's is interpolated as that is, and goes on half
            as steeply.
        allowed: What each prompt adds to the allowance, which is their mean.
        groups: As of `interval`, and so are `seed` and `n_bootstrap`.
    """
    grid = interval_grid(line)
    beyond = prompt_losses(line, slopes, losses, grid) - allowed[:, None]
    lower, upper = intervals(beyond.T, groups=groups, seed=seed, n_bootstrap=n_bootstrap)
    if np.isnan(lower).any():
        return math.nan, math.nan
    low, high = first_crossings(grid, np.stack([upper, lower]), np.zeros(2))
    return float(low), float(high)


def interval_grid(line: Line, n_points: int = _INTERVAL_GRID) -> Float[np.ndarray, " c"]:
    """Where intervals look at a curve: from 0 on, as one may end before all that was measured."""
    nearest = min(line.at, line.limit) / 200
    return np.append(0.0, np.geomspace(nearest, line.limit, n_points))


def prompt_losses(
    line: Line,
    slopes: Float[np.ndarray, " prompt"],
    losses: Float[np.ndarray, "prompt distance"],
    c: Float[np.ndarray, " c"],
) -> Float[np.ndarray, "prompt c"]:
    """Each prompt's loss at `c >= 0`, its mean that of the line; see `crossing_interval`."""
    at = np.array([x for x, _ in line.curve.known])
    slopes_apart = slopes - slopes.mean()
    bends = (losses - losses.mean(axis=0) - slopes_apart[:, None] * at) / at**2
    bent = interpolated(c, at, bends.T, onward=0.25).T
    every: NDArray[np.float64] = line.curve.loss(c) + slopes_apart[:, None] * c + c**2 * bent
    return every


def interpolated(
    c: Float[np.ndarray, " c"],
    at: Float[np.ndarray, " point"],
    values: Float[np.ndarray, "point *curve"],
    *,
    onward: float,
) -> Float[np.ndarray, "c *curve"]:
    """Monotone cubic between the points (PCHIP), constant before the first.

    Beyond the last point it goes on at `onward` times the slope of the last piece, up to twice as
    far out.
    """
    # Points a little apart: between nearer ones rounding would decide the slope.
    apart = [*(np.flatnonzero(np.abs(np.diff(at)) > (_APART - 1) * np.abs(at[1:]))), len(at) - 1]
    at, values = at[apart], values[apart]
    if len(at) == 1:
        return np.repeat(values, len(c), axis=0)
    from scipy.interpolate import PchipInterpolator

    inside = PchipInterpolator(at, values)(np.clip(c, at[0], at[-1]))
    rise = onward * (values[-1] - values[-2]) / (at[-1] - at[-2])
    further = np.clip(c - at[-1], 0.0, (_HELD - 1) * abs(at[-1]))
    joined: NDArray[np.float64] = inside + further.reshape(-1, *[1] * (values.ndim - 1)) * rise
    return joined
