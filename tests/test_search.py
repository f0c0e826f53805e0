"""The search for a first crossing: on functions whose crossing is known by hand."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlens.measure.search import (
    Curve,
    Line,
    Place,
    crossing,
    crossing_interval,
    first_crossings,
    interpolated,
    search,
)
from steerlens.stats import interval


def line(slope: float, *, limit: float = 1e3, at: float = 1.0) -> Line:
    return Line(Curve(slope), 1.0, limit, at)


def run(
    losses: Sequence[Callable[[float], float]], lines: Sequence[Line], **options: Any
) -> tuple[list[Line], list[tuple[int, float]]]:
    """The lines found, and every evaluation."""
    asked: list[tuple[int, float]] = []

    def evaluate(points: Sequence[tuple[int, float]]) -> list[float]:
        asked.extend(points)
        return [losses[k](c) for k, c in points]

    return search(lines, evaluate, **options), asked


def test_a_parabola_is_found_from_its_slope_and_one_evaluation() -> None:
    """0.5 c + 0.25 c^2 = 1 at c = sqrt(5) - 1."""
    (found,), asked = run([lambda c: 0.5 * c + 0.25 * c**2], [line(0.5)])
    assert found.at == pytest.approx(math.sqrt(5) - 1, rel=1e-4)
    assert asked[0] == (0, 1.0)
    assert len(asked) <= 2


@pytest.mark.parametrize("start", [0.05, 0.5, 2.0, 9.0])
def test_steep_and_dipping_losses_are_bracketed(start: float) -> None:
    """Losses that first improve, rise with the fifth power, or flatten out."""
    losses = [
        lambda c: -0.5 * c + 0.3 * c**2,  # 1 at (0.5 + sqrt(1.45)) / 0.6
        lambda c: 0.1 * c + c**5 / 32,
        lambda c: 3 * (1 - math.exp(-c / 2)),  # 1 at 2 ln 1.5
    ]
    expected = [(0.5 + math.sqrt(1.45)) / 0.6, None, 2 * math.log(1.5)]
    slopes = [-0.5, 0.1, 1.5]
    found, asked = run(losses, [line(s, at=start) for s in slopes])
    for of, loss, value in zip(found, losses, expected, strict=True):
        assert loss(of.at) == pytest.approx(1, rel=0.05)
        if value is not None:
            assert of.at == pytest.approx(value, rel=0.02)
    assert len(asked) <= 21


def test_the_opposite_push_says_how_a_loss_bends_near_0() -> None:
    """0.3 c + 0.2 c^2 + 0.05 c^3 both ways: one evaluation 7% beyond the crossing is enough.

    Not where the bends of both sides, 0.28 and 0.2 - 0.05 c, are seen to differ by all.
    """

    def loss(c: float) -> float:
        return 0.3 * c + 0.2 * c**2 + 0.05 * c**3

    lines = [line(0.3, at=1.55), line(-0.3, at=1.3)]
    (up, down), asked = run([loss, lambda c: loss(-c)], lines, opposite={0: 1, 1: 0})
    assert loss(up.at) == pytest.approx(1, rel=0.01)
    assert up.curve.behind == tuple((-c, bend) for c, bend in reversed(down.curve.ahead[:2]))
    assert [k for k, _ in asked].count(0) == 1
    # Control: alone the same start does not do.
    _, alone = run([loss], lines[:1])
    assert len(alone) > 1
    lines = [lines[0], line(-0.3, at=4.0)]
    _, asked = run([loss, lambda c: loss(-c)], lines, opposite={0: 1, 1: 0})
    assert [k for k, _ in asked].count(0) > 1


@pytest.mark.parametrize(("slope", "n_evaluations"), [(0.6, 1), (-0.3, 2)])
def test_an_estimate_is_relied_on_where_it_does_not_hang_on_the_bend(
    slope: float, n_evaluations: int
) -> None:
    """Begun as far beyond the crossing of 1: a slope that spends most of the budget is known."""

    def loss(c: float) -> float:
        return slope * c + 0.3 * c**2

    crossing = (math.sqrt(slope**2 + 1.2) - slope) / 0.6
    lines = [line(slope, at=1.5 * crossing), line(-slope, at=2 * crossing)]
    (found, _), asked = run([loss, lambda c: loss(-c)], lines, opposite={0: 1, 1: 0})
    assert found.at == pytest.approx(crossing, rel=1e-3)
    assert [k for k, _ in asked].count(0) == n_evaluations


def test_a_far_end_is_looked_at() -> None:
    """c^2 = 1 at 1, settled by the first evaluation; an interval that ends at 1.9 needs another."""
    options: dict[str, Any] = {"ends": lambda k, found: [Place(1.9 * found.at, moves=1)]}
    (found,), asked = run([lambda c: c**2], [line(0.0, at=1.0)], **options)
    assert found.at == pytest.approx(1, rel=1e-3)
    assert [c for _, c in asked] == [1.0, pytest.approx(1.8, rel=1e-3)]
    options = {"ends": lambda k, found: [Place(1.2 * found.at, moves=1), Place(math.nan)]}
    assert len(run([lambda c: c**2], [line(0.0, at=1.0)], **options)[1]) == 1
    # A near end at 0, as of a few groups, is looked for no nearer to 0 than a quarter.
    options = {"ends": lambda k, found: [Place(0.0, moves=1)]}
    assert min(run([lambda c: c**2], [line(0.0, at=1.0)], **options)[1])[1] == pytest.approx(
        0.25, rel=1e-3
    )


def test_one_evaluation_settles_a_crossing_and_an_end() -> None:
    """Begun at 0.6: c^2 + 0.3 c^3 = 1 at 0.889, and an interval that ends at 1.3 times that."""

    def loss(c: float) -> float:
        return c**2 + 0.3 * c**3

    def evaluations(ends: Any) -> list[float]:
        sides = [loss, lambda c: loss(-c)], [line(0.0, at=0.6), line(0.0, at=1.2)]
        (found, _), asked = run(*sides, opposite={0: 1, 1: 0}, ends=ends)
        assert found.at == pytest.approx(0.889, rel=0.01)
        return [c for k, c in asked if k == 0]

    first, second = evaluations(lambda k, of: [] if k else [Place(1.3 * of.at, moves=1.2)])
    assert first == 0.6
    assert 1.04 < second / 0.889 < 1.3
    # Control: without the end, where the crossing is thought to be.
    assert evaluations(None) == [0.6, pytest.approx(0.903, rel=0.01)]


@pytest.mark.parametrize(("second", "is_certain"), [(0.0112, True), (0.0088, False)])
def test_a_crossing_before_two_points_that_differ_is_looked_at(
    second: float, is_certain: bool
) -> None:
    curve = Curve(0.0, ((3.35, 0.0112), (4.63, second)), ((-4.63, 0.0094),))
    found = Line(curve, 0.1, 100.0, 3.0).estimate(2.0)
    assert found.at < 3.35
    assert (found.wanted() is None) == is_certain


def test_near_points_are_thinned_one_by_one() -> None:
    """Only the last of a row of near points would leave the bend at c < 0 to say how it goes on."""
    at = np.array([-1.0, 100, 102, 104, 106, 108])
    bends = np.array([-5, 1, 0.98, 0.96, 0.94, 0.92])
    between, onward = interpolated(np.array([101.0, 112.0]), at, bends, onward=0.5).tolist()
    assert between == pytest.approx(0.99, abs=0.05)
    assert onward == pytest.approx(0.90)


def test_beyond_the_limit_is_infinite_and_the_limit_was_evaluated() -> None:
    (found,), asked = run([lambda c: 1e-9 * c**2], [line(0.0, limit=50.0)])
    assert found.at == math.inf
    assert (0, 50.0) in asked
    # Control: a limit beyond the crossing.
    (found,), _ = run([lambda c: 1e-3 * c**2], [line(0.0, limit=50.0)])
    assert found.at == pytest.approx(math.sqrt(1e3), rel=1e-3)


@pytest.mark.parametrize("start", [10.0, 40.0, 200.0])
def test_an_undefined_start_does_not_pull_the_crossing_towards_it(start: float) -> None:
    """1e-4 c^2 = 0.03 at sqrt(300); from 30 on there is no number."""
    loss = lambda c: 1e-4 * c**2 if c < 30 else math.nan  # noqa: E731
    start_at = Line(Curve(0.0), 0.03, 1e3, start)
    (found,), _ = run([loss], [start_at])
    assert found.at == pytest.approx(math.sqrt(300), rel=0.01)


def test_an_undefined_loss_counts_as_far_beyond_the_allowance() -> None:
    (found,), _ = run([lambda c: c**2 / 4 if c < 3 else math.nan], [line(0.0, at=40.0)])
    assert found.at == pytest.approx(2, rel=0.05)


def test_the_first_crossing_is_taken_and_a_later_reentry_is_seen() -> None:
    """2 sin(c) is above 1 from 0.52 to 2.62, and below from there to the end of the dip."""

    def loss(c: float) -> float:
        return 2 * math.sin(c) if c < 9 else c

    (found,), _ = run([loss], [line(2.0, at=3.0)])
    assert found.at == pytest.approx(math.asin(0.5), rel=0.05)
    assert loss(found.reentry()) <= 1
    assert found.reentry() > found.at
    (single,), _ = run([lambda c: c**2], [line(0.0, at=3.0)])
    assert math.isnan(single.reentry())
    near = line(0.0, at=1.0).measured(2.0, 0.9).measured(2.05, 1.5)  # what a curve smooths away
    assert replace(near, at=1.5).reentry() == 2.0


@settings(max_examples=60, deadline=None)
@given(
    slope=st.floats(-1, 1),
    bend=st.floats(0.05, 3),
    cubic=st.floats(0, 0.5),
    start=st.floats(0.05, 20),
)
def test_cubics_are_found(slope: float, bend: float, cubic: float, start: float) -> None:
    def loss(c: float) -> float:
        return slope * c + bend * c**2 + cubic * c**3

    (found,), _ = run([loss], [line(slope, at=start)])
    assert loss(found.at) == pytest.approx(1, rel=0.05)


def test_lines_are_searched_side_by_side() -> None:
    """One call of `evaluate` for all lines that still move, not one for each."""
    calls: list[int] = []

    def evaluate(points: Sequence[tuple[int, float]]) -> list[float]:
        calls.append(len(points))
        return [c**2 / (k + 1) for k, c in points]

    found = search([line(0.0, at=1.0) for _ in range(5)], evaluate)
    assert [of.at for of in found] == pytest.approx([math.sqrt(k + 1) for k in range(5)], rel=1e-3)
    assert calls[0] == 5
    assert len(calls) <= 6


def test_crossing_by_hand() -> None:
    assert crossing(lambda c: c**2, 4.0, 10.0) == pytest.approx(2, rel=1e-3)
    assert crossing(lambda c: c**2, 4.0, 1.9) == math.inf
    grid = np.array([1.0, 2.0, 3.0])
    losses = np.array([[0.0, 1.0, 3.0], [5.0, 5.0, 5.0], [0.0, 0.0, 0.0]])
    # Between 2 and 3, half way up from 1 to 3; at the grid's start; never.
    assert first_crossings(grid, losses, np.array([2.0, 2.0, 2.0])).tolist() == [2.5, 1.0, math.inf]


def test_a_leap_across_a_wide_gap_is_looked_into() -> None:
    """Flat to 2, then steep, then flat again: 1 at 3.9, and 1.49 at 6.8 where the steps land."""

    def loss(c: float) -> float:
        return float(
            np.interp(c, [0, 2, 3, 3.5, 4.1, 6.8, 20], [0, -0.3, 0.1, 0.66, 1.17, 1.49, 3])
        )

    (found,), asked = run([loss], [line(-0.3, at=0.9)])
    assert found.at == pytest.approx(3.9, rel=0.03)
    assert len(asked) < 12


@pytest.mark.parametrize("groups", [(0, 1, 2, 3, 4, 5, 6, 7), (0, 0, 1, 1, 2, 2, 3, 4)])
def test_the_interval_of_a_crossing_is_where_the_loss_beyond_the_allowance_has_0_as_an_end(
    groups: tuple[int, ...],
) -> None:
    """Prompts with losses s c + b c^2, each with an allowance a of its own."""
    slopes = np.array([0.1, 0.0, 0.2, 0.1, -0.1, 0.3, 0.1, 0.1])
    bends = np.array([0.2, 0.25, 0.4, 0.3, 0.2, 0.35, 0.1, 0.3])
    allowed = np.array([1.0, 0.9, 1.1, 1.0, 1.0, 0.8, 1.2, 1.0])
    distances = np.array([1.0, 2.0])
    losses = slopes[:, None] * distances + bends[:, None] * distances**2
    known = tuple((c, float(bends.mean())) for c in distances)
    slope = float(slopes.mean())
    found = Line(Curve(slope, known), 1.0, 50.0, at=1.8)
    drawing: dict[str, Any] = {"groups": groups, "seed": 2, "n_bootstrap": 1000}

    def beyond(c: float) -> tuple[float, float]:
        return interval(slopes * c + bends * c**2 - allowed, **drawing)

    def ends(of: Line, **options: Any) -> list[float]:
        return [end.c for end in crossing_interval(of, slopes, losses, allowed, **options)]

    low, high = ends(found, **drawing)
    assert 0 < low < crossing(found.curve.loss, 1.0, 50.0) < high < 50
    assert beyond(low)[1] == pytest.approx(0, abs=2e-3)
    assert beyond(high)[0] == pytest.approx(0, abs=2e-3)
    # Control: half way inwards both ends are on one side, and no end where the range ends before.
    assert beyond(low / 2)[1] < -0.1
    short = replace(found, limit=(low + high) / 2)
    assert ends(short, **drawing) == [pytest.approx(low, rel=1e-3), math.inf]
    assert all(map(math.isnan, ends(found, **drawing | {"groups": (0,) * 8})))
