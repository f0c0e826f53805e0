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
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from steerlens.progress import Progress, silent
from steerlens.stats import intervals

FIRST_STEP = 1.2
"""How far beyond the prediction the first evaluation lies: predictions tend to be too small."""
_SURE, _SURE_BEYOND, _SURE_ALONE = 0.018, 0.014, 0.006
"""How much doubt a crossing may be in: between what was measured, beyond it, with one side alone.
It is off by 0.4 times as much (as a log) in the median, nine in ten by less than 1.2 times."""
_SURE_NEAR, _SURE_FAR = 0.2, 0.12
"""How much doubt the ends of an interval may be in, which are known less well than they matter."""
_CHANGE, _LEAST_CHANGE = 0.25, 0.15
"""By which share bends are taken to change where one alone is known, and at least."""
_NEAREST, _FARTHEST = 1.015, 1.8
"""How far from what was measured a crossing may lie whatever its doubt, and may at most."""
_GUESSED = 1.05
"""How far from it may lie what is no crossing of the curve, but between a loss and a ceiling."""
_REACH, _NEAR_0 = 1.8, 4.0
"""How far beyond what was measured an interval's end is looked for at a time, and how far before
the crossing: nearer to 0 rounding would decide a bend."""
_APART = 1.04
_HELD = 2.0
_MAX_ROUNDS = 12
_MAX_FOR_ENDS = 4
_WIDE_GAP = 1.6
_STEEPEST = 6.0
_GRID = 3000
_CHOICES = 25
_FLAT = 1e6
_INTERVAL_GRID = 160
UNDEFINED = 10.0
"""Times the allowance: a loss beyond that bounds the search, and is not interpolated."""

Points = tuple[tuple[float, float], ...]


class Place(NamedTuple):
    """Where a curve crosses: the coefficient, and how far it moves with the bend there.

    `moves` is in logs of `c` for each e-fold of the bend, 0.5 without a slope.
    """

    c: float
    moves: float = 0.5


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
        """The line with D(c) added; one far beyond allowance and slope as a ceiling."""
        if not loss <= UNDEFINED * (self.allowance + abs(self.curve.slope) * c):
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

    def wanted(self, ends: Sequence[Place] = ()) -> float | None:
        """Where D has to be known before crossing and ends are certain; None where they are."""
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
        if float(self.curve.loss(np.array([at]))[0]) < 0.99 * self.allowance:
            # The estimate is no crossing of the curve.
            if abs(math.log(nearest / at)) > math.log(_GUESSED):
                return at
        elif (best := self._best(points, ends)) is not None:
            return best
        return self._doubtful_middle(points, nearest)

    def _best(self, points: Sequence[float], ends: Sequence[Place]) -> float | None:
        """Where a loss settles most of the places in doubt, crossing and ends; None without doubt.

        The doubt of a place: how far it lies from what was measured, as a log, times how much bends
        were seen to change, times how far it moves with them.
        """
        sure = _SURE if self.at <= points[-1] else _SURE_BEYOND
        sure = sure if self.curve.behind else _SURE_ALONE
        change = self._change()
        bent = max(change, self._change_inward())
        sought = [(self.at, max(bent * self._moves() / sure, 1 / math.log(_FARTHEST)))]
        if len(points) < _MAX_FOR_ENDS:
            last = max(points[-1], self.at)
            reach = min(_REACH * last, self.limit, math.sqrt(last * self.ceiling))
            sought += [
                (
                    min(max(c, self.at / _NEAR_0), reach),
                    change * moves / (_SURE_NEAR if c < self.at else _SURE_FAR),
                )
                for c, moves in ends
                if not math.isnan(c)
            ]
        places, weights = np.array(sought).T
        at, known = np.log(places), np.log(points)
        choices = np.append(at, np.linspace(at.min(), at.max(), _CHOICES))
        far = np.abs(at - known[:, None]).min(axis=0)
        if not (weights * far)[far > math.log(_NEAREST)].max(initial=0.0) > 1:
            return None
        left = weights * np.minimum(far, np.abs(at - choices[:, None]))
        order = np.lexsort([(left**2).sum(axis=1), (left > 1).sum(axis=1)])
        return float(np.exp(choices[order[0]]))

    def _change(self) -> float:
        """The share of the largest bend by which neighbours differ at most, one behind included."""
        bends = np.array([bend for _, bend in (*self.curve.behind[-1:], *self.curve.ahead)])
        if len(bends) == 1:
            return _CHANGE
        steps, largest = float(np.abs(np.diff(bends)).max()), float(np.abs(bends).max())
        return max(steps / largest, _LEAST_CHANGE) if largest else _LEAST_CHANGE

    def _change_inward(self) -> float:
        """What the two innermost points change by for an e-fold of c, if the estimate is nearer."""
        if len(self.curve.ahead) < 2 or self.at >= self.curve.ahead[0][0]:
            return 0.0
        (c, bend), (further, other) = self.curve.ahead[:2]
        largest = max(abs(bend), abs(other))
        is_apart = further > _APART * c and largest > 0
        return abs(bend - other) / largest / math.log(further / c) if is_apart else 0.0

    def _moves(self) -> float:
        """Of the estimate: where the bend differs by a share, by `c^2 bend / (c D'(c))` of that."""
        [bend] = self.curve.bend(np.array([self.at])).tolist()
        rise = self.curve.slope + 2 * self.at * bend
        return abs(bend * self.at) / rise if rise > 0 else _FLAT

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
    ends: Callable[[int, Line], Sequence[Place]] | None = None,
    progress: Progress = silent,
) -> list[Line]:
    """Search all lines side by side: `Line.at` of each is its boundary.

    Every round evaluates, in one run, all lines of which the crossing, or an end of the interval,
    is still in doubt. A line that does not settle in a dozen rounds
    ends as NaN.

    Args:
        lines: Each at the coefficient to begin with.
        evaluate: See `Evaluate`.
        opposite: Index of a line -> that of the line whose c > 0 is its own c < 0.
        ends: The ends of a line's interval, given its index; None where nobody asks for them.
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
            is_looked_for = bool(line.curve.ahead) and line.at < math.inf
            next_one = line.wanted(ends(k, line) if ends is not None and is_looked_for else ())
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
) -> tuple[Place, Place]:
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
    every = prompt_losses(line, slopes, losses, grid)
    beyond = every - allowed[:, None]
    lower, upper = intervals(beyond.T, groups=groups, seed=seed, n_bootstrap=n_bootstrap)
    if np.isnan(lower).any():
        return Place(math.nan), Place(math.nan)
    ends = np.stack([upper, lower])
    mean = beyond.mean(axis=0)
    bent = np.abs(every.mean(axis=0) - line.curve.slope * grid) + np.abs(ends - mean)
    rises = np.gradient(ends[:, 1:], np.log(grid[1:]), axis=1)
    places = []
    for c, of, rise in zip(first_crossings(grid, ends, np.zeros(2)), bent, rises, strict=True):
        i = int(np.searchsorted(grid, c).clip(1, len(grid) - 1))
        places.append(Place(float(c), of[i] / rise[i - 1] if rise[i - 1] > 0 else 1.0))
    low, high = places
    return low, high


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
    apart = [len(at) - 1]
    for i in reversed(range(len(at) - 1)):
        if abs(at[apart[0]] - at[i]) > (_APART - 1) * abs(at[apart[0]]):
            apart.insert(0, i)
    at, values = at[apart], values[apart]
    if len(at) == 1:
        return np.repeat(values, len(c), axis=0)
    from scipy.interpolate import PchipInterpolator

    inside = PchipInterpolator(at, values)(np.clip(c, at[0], at[-1]))
    rise = onward * (values[-1] - values[-2]) / (at[-1] - at[-2])
    further = np.clip(c - at[-1], 0.0, (_HELD - 1) * abs(at[-1]))
    joined: NDArray[np.float64] = inside + further.reshape(-1, *[1] * (values.ndim - 1)) * rise
    return joined
