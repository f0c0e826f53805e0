"""Null bands and corrected p-values by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from steerlens.stats import (
    bootstrap_interval,
    bootstrap_intervals,
    false_discovery,
    holm,
    null_band,
    ratio_interval,
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
