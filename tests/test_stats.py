"""Intervals, null bands and corrected p-values by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from steerlens.stats import (
    allowed_gap,
    bootstrap_interval,
    bootstrap_intervals,
    false_discovery,
    holm,
    null_band,
    ratio_interval,
    relative_gap,
)


def test_the_band_by_hand() -> None:
    """Values -1, 0, 1: mean 0, standard deviation 1, so the reach is t(0.975, 2) sqrt(4/3)."""
    kind = np.array([-1.0, 0.0, 1.0])
    found = null_band(3.0, [kind])
    reach = 4.302653 * math.sqrt(4 / 3)
    assert (found.low, found.high) == pytest.approx((-reach, reach))
    assert found.p_value == pytest.approx(2 * t.sf(3 / math.sqrt(4 / 3), 2))


def test_the_harder_kind_decides() -> None:
    narrow, wide = np.array([-0.1, 0.0, 0.1]), np.array([0.0, 2.0, 4.0])
    found = null_band(5.0, [narrow, wide])
    alone = null_band(5.0, [wide])
    assert found == alone
    assert null_band(5.0, [narrow]).p_value < found.p_value


@pytest.mark.parametrize(
    ("value", "kinds"),
    [
        (1.0, [np.array([1.0])]),
        (1.0, [np.array([0.5, 0.5])]),
        (1.0, [np.array([0.0, math.nan])]),
        (math.nan, [np.array([0.0, 1.0])]),
    ],
)
def test_an_undefined_band_is_nan(value: float, kinds: list[np.ndarray]) -> None:
    found = null_band(value, kinds)
    assert all(math.isnan(x) for x in (found.low, found.high, found.p_value))


def test_one_more_of_the_null_is_inside_19_times_of_20() -> None:
    generator = np.random.default_rng(0)
    inside, small = 0, 0
    for _ in range(1000):
        values = generator.normal(2, 3, size=21)
        found = null_band(float(values[0]), [values[1:]])
        inside += found.low <= values[0] <= found.high
        small += found.p_value < 0.05
    assert 0.93 < inside / 1000 < 0.97
    assert small == 1000 - inside


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.04 times 3, 2, 1; the last may not fall below the one before."""
    found = holm(np.array([0.02, math.nan, 0.01, 0.04]))
    assert found[[0, 2, 3]].tolist() == pytest.approx([0.04, 0.03, 0.04])
    assert math.isnan(found[1])
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]


def test_false_discovery_by_hand() -> None:
    """0.01 * 3 / 1, 0.02 * 3 / 2, 0.5 * 3 / 3."""
    found = false_discovery(np.array([0.5, 0.01, math.nan, 0.02]))
    assert found[[0, 1, 3]].tolist() == pytest.approx([0.5, 0.03, 0.03])
    assert math.isnan(found[2])
    assert np.isnan(false_discovery(np.array([math.nan]))).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
@settings(deadline=None)
def test_corrections_never_lower_a_p_value_and_keep_the_order(values: list[float]) -> None:
    p = np.array(values)
    for corrected in (holm(p), false_discovery(p)):
        assert (corrected >= p - 1e-12).all()
        assert (corrected <= 1).all()
        order = p.argsort(kind="stable")
        assert (np.diff(corrected[order]) >= -1e-12).all()


def test_the_interval_of_a_ratio() -> None:
    of = np.array([1.0, 2.0, 3.0, 4.0])
    assert ratio_interval(of, of, n_resamples=200, seed=0) == (1.0, 1.0)
    low, high = ratio_interval(np.array([2.0, 1.0, 3.0, 4.0]), of, n_resamples=200, seed=0)
    assert low < 1.0 < high
    for bad in (np.array([1.0]), np.array([1.0, np.nan])):
        assert np.isnan(ratio_interval(bad, np.ones(len(bad)), n_resamples=10, seed=0)).all()


def test_intervals_of_rows_are_those_of_each() -> None:
    values = np.random.default_rng(0).normal(size=(3, 12))
    low, high = bootstrap_intervals(values, n_resamples=300, seed=1)
    for i, row in enumerate(values):
        assert (low[i], high[i]) == pytest.approx(
            bootstrap_interval(row, n_resamples=300, seed=1), abs=0.25
        )
    assert np.isnan(bootstrap_intervals(values[:, :1], n_resamples=10, seed=0)).all()


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


# The bootstrap interval


def interval(values: Any, *, n_resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    return bootstrap_interval(
        np.asarray(values, dtype=np.float64), n_resamples=n_resamples, seed=seed
    )


@pytest.mark.parametrize("value", [0.0, -1.25, 7.0])
def test_equal_values_give_an_interval_of_no_width(value: float) -> None:
    assert interval([value] * 6) == (value, value)


def test_two_values_give_themselves_as_the_interval() -> None:
    """The mean of a resample of {0, 1} is 0, 1/2 or 1; 0 and 1 each come a quarter of the time."""
    assert interval([0.0, 1.0]) == (0.0, 1.0)


def test_one_odd_value_among_ten_moves_one_end_only() -> None:
    """Of 10 values one is 1: a resample has none with probability 0.35, four or more with 0.013."""
    low, high = interval([0.0] * 9 + [1.0], n_resamples=20_000)
    assert low == 0
    assert high == pytest.approx(0.3)


def test_the_interval_holds_the_mean_and_scales_with_the_values() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, size=25)
    low, high = interval(values)
    assert low < values.mean() < high
    assert interval(10 * values + 5) == pytest.approx((10 * low + 5, 10 * high + 5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_gives_nan(bad: float) -> None:
    assert all(map(math.isnan, interval([1.0, bad, 2.0])))
    assert not any(map(math.isnan, interval([1.0, 1.5, 2.0])))


def test_the_seed_decides_the_interval() -> None:
    values = np.random.default_rng(2).normal(size=20)
    assert interval(values, seed=5) == interval(values, seed=5)
    assert interval(values, seed=5) != interval(values, seed=6)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    intervals = np.array([interval(generator.normal(size=30), seed=i) for i in range(200)])
    covered = ((intervals[:, 0] < 0) & (intervals[:, 1] > 0)).mean()
    # The upper bound catches an interval that is merely wide.
    assert 0.90 <= covered <= 0.98
    assert np.diff(intervals).mean() == pytest.approx(2 * 1.96 / math.sqrt(30), rel=0.1)
