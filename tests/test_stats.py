"""Intervals, ranks among nulls and sign flips by hand."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from steerlens.errors import InputError
from steerlens.models.tolerance import allowed_gap, relative_gap
from steerlens.stats import (
    effective_groups,
    flip_p,
    interval,
    intervals,
    least_max_rank_p,
    max_rank_p,
    rank_p,
    ratio_interval,
    refit_spread,
    resampled_counts,
    smallest_effect,
)

# Gaps of what should be equal


def test_the_allowed_gap_is_the_rounding_where_that_is_more() -> None:
    assert allowed_gap(torch.float32) == allowed_gap(torch.float64) == 1e-4
    assert allowed_gap(torch.bfloat16, roundings=4) == 4 * 2**-7
    assert allowed_gap(torch.float16, least=1e-2) == 1e-2


def test_relative_gaps_of_rows_by_hand() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, math.nan]])
    gaps = relative_gap(expected + torch.tensor([0.0, 0.5]), expected, floor=0.1)
    assert gaps[:2].tolist() == pytest.approx([0.1, 5.0])
    assert not bool(gaps[2] <= 1)


# Intervals


@pytest.mark.parametrize("value", [0.0, -1.25, 7.0, 1e9])
def test_equal_values_give_an_interval_of_no_width(value: float) -> None:
    assert interval([value] * 6) == (value, value)


def test_few_groups_give_students_interval() -> None:
    """1 and 3: mean 2, standard error 1, t(0.975, 1) = 12.706."""
    expected = (2 - 12.7062, 2 + 12.7062)
    assert interval([1.0, 3.0]) == pytest.approx(expected, abs=1e-4)
    values = [0.0, 2.0, 3.0, 3.0, 3.0, 3.0]  # the groups' means are 1 and 3, but 4 of 6 are in b
    low, high = interval(values, groups=["a", "a", "b", "b", "b", "b"])
    # mean 7/3; the sums (2, 12) about mean times size are -8/3 and 8/3, one has a third of all
    reach = 12.7062 * math.sqrt(64 / 9 * (3 / 2 + 3)) / 6
    assert (low, high) == pytest.approx((7 / 3 - reach, 7 / 3 + reach), abs=1e-3)


def test_many_values_give_the_quantiles_of_the_studentised_means() -> None:
    values = np.random.default_rng(0).exponential(size=12)
    n, mean = len(values), values.mean()
    counts = resampled_counts(n, n_resamples=500, seed=3)
    drawn = [np.repeat(values, count.astype(int)) for count in counts]
    t_values = [(d.mean() - mean) / (d.std(ddof=1) / math.sqrt(n)) for d in drawn]
    upper, lower = np.quantile(t_values, [0.975, 0.025])
    error = values.std(ddof=1) / math.sqrt(n)
    found = interval(values, seed=3, n_bootstrap=500)
    assert found == pytest.approx((mean - upper * error, mean - lower * error))
    assert found[1] - mean > mean - found[0]  # values skewed to the right: further up


def test_uneven_groups_give_students_interval() -> None:
    """Ten values in one group and one in each of ten: as good as 20^2 / 110 = 3.64 groups."""
    values, groups = np.arange(20.0), [0] * 10 + list(range(1, 11))
    assert effective_groups(groups) == pytest.approx(400 / 110)
    rest = np.array([values[:10].sum() - 95.0, *(values[10:] - 9.5)])
    shares = np.array([10, *[1] * 10]) / 20
    # sums: squares of shares 0.275; u is 0.5, and 0.0025 / 0.95 ten times
    u = 0.5 + 10 * 0.0025 / 0.95
    df = 1 / (0.275 + u**2 - (0.25 + 10 * (0.0025 / 0.95) ** 2))
    assert df == pytest.approx(3.312, abs=1e-3)
    reach = t.ppf(0.975, df) * math.sqrt((rest**2 / (1 - shares)).sum()) / 20
    assert interval(values, groups=groups) == pytest.approx((9.5 - reach, 9.5 + reach))


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, pd.Series])
def test_values_and_groups_are_lists_or_arrays_of_any_kind(make: Any) -> None:
    """A value whose group is None is one of its own, as a pair is."""
    values, groups = [1, 2, 4, 8, 5], [0, 0, 1, 2, 3]
    expected = interval([float(value) for value in values], groups=groups)
    assert interval(make(values), groups=make(groups)) == expected
    assert interval(values, groups=[0, 0, None, None, None]) == expected
    assert rank_p(3, make(values)) == rank_p(3.0, values)
    for wrong in ([values], ["a", "b"]):
        with pytest.raises(InputError, match="expected a list of numbers"):
            interval(wrong)
        with pytest.raises(InputError, match="expected a list of numbers"):
            rank_p(1.0, wrong)


def test_nearly_all_values_alike_give_students_interval() -> None:
    """One of 20 is 1: a third of all draws have no spread to be studentised with."""
    low, high = interval([1.0] + [0.0] * 19)
    reach = t.ppf(0.975, 19) * 0.05
    assert (low, high) == pytest.approx((0.05 - reach, 0.05 + reach))


NUMBERS = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=12)


@given(NUMBERS, st.floats(0.1, 50), st.floats(-50, 50))
@settings(deadline=None)
def test_an_interval_goes_with_unit_and_origin(
    values: list[float], scale: float, shift: float
) -> None:
    found = interval(values, n_bootstrap=50)
    moved = interval(scale * np.array(values) + shift, n_bootstrap=50)
    size = 1 + max(map(abs, (*found, *moved)))
    assert moved == pytest.approx([scale * end + shift for end in found], abs=1e-6 * size)


@given(NUMBERS, st.integers(2, 4))
@settings(deadline=None)
def test_repeats_within_their_group_change_nothing(values: list[float], times: int) -> None:
    groups = [i for i in range(len(values)) for _ in range(times)]
    repeated = interval(np.repeat(values, times), groups=groups, n_bootstrap=50)
    once = interval(values, n_bootstrap=50)
    assert repeated == pytest.approx(once, abs=1e-6 * (1 + max(map(abs, once))))


def test_what_groups_share_makes_the_interval_wider() -> None:
    generator = np.random.default_rng(1)
    shared = np.repeat(generator.normal(size=10), 8)
    groups = np.repeat(np.arange(10), 8).tolist()
    own = generator.normal(size=80)
    width = {
        name: np.diff(interval(own + part * shared, groups=of))[0]
        for name, part, of in (("pairs", 3, None), ("groups", 3, groups), ("none", 0, groups))
    }
    assert width["groups"] > 2 * width["pairs"]
    assert width["none"] < width["pairs"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_gives_nan(bad: float) -> None:
    assert all(map(math.isnan, interval([1.0, bad, 2.0])))
    assert not any(map(math.isnan, interval([1.0, 1.5, 2.0])))


def test_one_group_has_no_interval() -> None:
    assert all(map(math.isnan, interval([1.0])))
    assert all(map(math.isnan, interval([])))
    assert all(map(math.isnan, interval([1.0, 2.0, 3.0], groups=["a"] * 3)))
    with pytest.raises(InputError, match="a group for each of 3 values, got 2"):
        interval([1.0, 2.0, 3.0], groups=["a", "b"])


def test_the_seed_decides_the_interval() -> None:
    values = np.random.default_rng(2).normal(size=20)
    assert interval(values, seed=5) == interval(values, seed=5)
    assert interval(values, seed=5) != interval(values, seed=6)


def test_intervals_of_rows_are_those_of_each() -> None:
    values = np.random.default_rng(0).normal(size=(3, 12))
    values[1, 0] = math.nan
    low, high = intervals(values, seed=1)
    for i in (0, 2):
        assert (low[i], high[i]) == pytest.approx(interval(values[i], seed=1), rel=1e-12)
    assert np.isnan([low[1], high[1]]).all()


def test_the_interval_of_a_ratio() -> None:
    of = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    assert ratio_interval(of, of) == (1.0, 1.0)
    assert ratio_interval(of, np.ones(7)) == interval(of)
    low, high = ratio_interval(of[[1, 0, 2, 4, 3, 5, 6]], of)
    assert low < 1.0 < high
    # Numerator and denominator are drawn together: the ratio is far surer than either.
    assert high - low < np.diff(interval(of))[0] / of.mean()
    for bad in (np.array([1.0]), np.array([1.0, np.nan])):
        assert np.isnan(ratio_interval(bad, np.ones(len(bad)))).all()
    assert np.isnan(ratio_interval(of, np.zeros(7))).all()


# Rank p-values


def test_rank_p_values_by_hand() -> None:
    nulls = [-1.0, 0.0, 1.0]
    assert rank_p(3.0, nulls) == 1 / 4
    assert rank_p(-1.0, nulls) == 3 / 4  # both sides count
    assert rank_p(0.0, nulls) == 1.0
    assert rank_p(0.1 + 0.2, [0.3, 0.0]) == 2 / 3  # equal but for rounding


@pytest.mark.parametrize(("value", "nulls"), [(math.nan, [1.0]), (1.0, [math.nan]), (1.0, [])])
def test_an_undefined_rank_is_nan(value: float, nulls: list[float]) -> None:
    assert math.isnan(rank_p(value, nulls))


def test_the_maximum_over_hooks_by_hand() -> None:
    """The second hook's unit is a thousand times the first's, and neither decides by it."""
    nulls = np.array([[1.0, 1000.0], [-2.0, 0.0], [0.0, -2000.0], [1.0, 1000.0]])
    found = max_rank_p(np.array([4.0, 500.0]), nulls)
    # Root mean squares with the value seen: (22 / 5)^0.5 and (6.25e6 / 5)^0.5, so 1.91 and 0.45;
    # the largest of the draws are 0.89, 0.95, 1.79 and 0.89.
    assert found.tolist() == pytest.approx([1 / 5, 1.0])
    alone = max_rank_p(np.array([1.5]), nulls[:, :1])[0]
    assert alone == rank_p(1.5, nulls[:, 0]) == pytest.approx(2 / 5)
    # Where hooks have other draws each is a family; the other's p-values are multiples of 1/6.
    some = np.vstack([nulls, [[math.nan, 9000.0], [math.nan, math.nan]]])
    assert max_rank_p(np.array([4.0, 500.0]), some)[0] == pytest.approx(1 / 5 + 1 / 6)
    for seen in (some[0], [9.0, 9e4]):
        assert (least_max_rank_p(np.array(seen), some) <= max_rank_p(np.array(seen), some)).all()
    assert np.isnan(max_rank_p(np.array([1.0]), np.full((3, 1), math.nan))).all()
    assert np.isnan(max_rank_p(np.array([math.nan]), nulls[:, :1])).all()


def test_sign_flips_by_hand() -> None:
    """Of the 16 flips of four equal groups 2 are as far as no flip; of the other row's, all."""
    values = np.array([[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    alone, family = flip_p(values, n_flips=20000)
    assert alone[:2].tolist() == pytest.approx([2 / 16, 1.0], abs=0.01)
    # The second row never reaches 2, so the family is the first row alone but for shared flips.
    assert family[0] >= alone[0]
    assert family[1] == 1.0
    assert math.isnan(alone[2])
    assert math.isnan(family[2])
    # Two groups of two have four flips, two of them as far.
    assert flip_p(values[:1], groups="aabb", n_flips=20000)[0][0] == pytest.approx(0.5, abs=0.02)


def test_refits_move_a_draw_as_much_as_the_interval() -> None:
    """Where the items are nearly alike: Student's t of the mean over the refits' spread."""
    rows = 1 + 1e-6 * np.tile([1.0, -1.0], (2, 20))
    refits = np.stack([np.tile([-1.0, 1.0], 100), np.full(200, math.nan)])
    spread, df = refit_spread(refits, 9)
    assert spread[0] == pytest.approx(math.sqrt(200 / 199 * 9 / 8))
    assert df == pytest.approx(1 / (1 / 8 + 1 / 199))
    alone, family = flip_p(rows, refits=refits, n_fitted=9, n_flips=20000)
    assert alone[0] == pytest.approx(2 * t.sf(1 / spread[0], df), abs=0.02)
    assert alone[1] == pytest.approx(1 / 20001)  # 40 of one sign
    assert family[0] >= alone[0]
    # Rows that vary together are one comparison.
    together = flip_p(rows[[0, 0]], refits=refits[[0, 0]], n_fitted=9)
    assert together[1].tolist() == together[0].tolist()
    # One group of items, or of pairs, has no spread to be told by.
    assert flip_p(rows, groups=[0] * 40, refits=refits, n_fitted=9)[0].tolist() == [1.0, 1.0]


def test_the_smallest_effect_by_hand() -> None:
    """t(0.975, 9) = 2.2622 and t(0.8, 9) = 0.8834."""
    assert smallest_effect(-1.0, 1.0, 10) == pytest.approx((2.2622 + 0.8834) / 2.2622, abs=1e-4)
    assert math.isnan(smallest_effect(-1.0, 1.0, 1))
