"""Columns, frames and files; the bootstrap interval."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from steerlens.stats import bootstrap_interval
from steerlens.tables import LAYER_COLUMNS, SWEEP_COLUMNS, to_frame, write_csv, write_parquet

# Copied from the design, so that a renamed or moved column shows here.
SWEEP_NAMES = [
    "hook_name",
    "layer",
    "coefficient",
    "readout_hook",
    "n_pairs",
    "projection",
    "projection_ci_low",
    "projection_ci_high",
    "projection_shift",
    "separation",
    "logprob_nats",
    "baseline_logprob_nats",
    "degradation_nats",
    "degradation_ci_low",
    "degradation_ci_high",
    "coherence_penalty",
    "loss",
    "coherent",
    "null_low",
    "null_high",
    "p_value",
    "q_value",
]
LAYER_NAMES = [
    "hook_name",
    "layer",
    "separation",
    "projection",
    "projection_std",
    "agreement",
    "explained_variance",
    "resid_norm",
    "logprob_nats",
    "coherence_penalty",
    "loss",
    "boundary_pos",
    "boundary_neg",
    "predicted_boundary_pos",
    "predicted_boundary_neg",
    "projection_at_boundary",
]
SCHEMAS = [(SWEEP_COLUMNS, SWEEP_NAMES), (LAYER_COLUMNS, LAYER_NAMES)]
WHOLE_NUMBERS = {"layer", "n_pairs"}
TEXTS = {"hook_name", "readout_hook"}
FLAGS = {"coherent"}
ATTRS = {"settings": {"coefficients": [-2.0, 0.1], "seed": 3}, "method": "pca", "name": "é"}


def full_row(seed: int) -> dict[str, Any]:
    """A row with a value in every column; the floats have no short decimal form."""
    generator = np.random.default_rng(seed)
    row: dict[str, Any] = {name: float(generator.normal() / 3) for name in SWEEP_NAMES}
    row |= {"hook_name": f"blocks.{seed}.hook_resid_post", "readout_hook": "blocks.9.x"}
    return row | {"layer": seed, "n_pairs": 8, "coherent": seed % 2 == 0}


@pytest.fixture
def frame() -> pd.DataFrame:
    """Three rows: whole, with a value missing, with an infinite one."""
    rows = [full_row(0), full_row(1), full_row(2) | {"projection": math.inf}]
    del rows[1]["loss"]
    return to_frame(rows, SWEEP_COLUMNS, ATTRS)


@pytest.mark.parametrize(("columns", "names"), SCHEMAS)
def test_columns_are_those_of_the_design(columns: Any, names: list[str]) -> None:
    assert [column.name for column in columns][: len(names)] == names


@pytest.mark.parametrize(("columns", "names"), SCHEMAS)
def test_every_column_has_a_meaning_and_says_its_unit(columns: Any, names: list[str]) -> None:
    for column in columns:
        assert column.meaning.strip(), column.name
        assert isinstance(column.unit, str), column.name
        # A name that ends in its unit must not contradict it.
        assert not column.name.endswith("_nats") or "nats" in column.unit, column.name


def test_a_frame_has_the_declared_types_and_order(frame: pd.DataFrame) -> None:
    assert list(frame.columns) == SWEEP_NAMES
    for name in SWEEP_NAMES:
        is_type = {
            name in TEXTS: pd.api.types.is_string_dtype,
            name in WHOLE_NUMBERS: pd.api.types.is_int64_dtype,
            name in FLAGS: pd.api.types.is_bool_dtype,
        }.get(True, lambda dtype: dtype == np.float64)
        assert is_type(frame[name].dtype), (name, frame[name].dtype)


def test_the_order_of_a_rows_keys_does_not_matter(frame: pd.DataFrame) -> None:
    row = full_row(0)
    turned = to_frame([dict(reversed(row.items()))], SWEEP_COLUMNS, ATTRS)
    pd.testing.assert_frame_equal(turned, to_frame([row], SWEEP_COLUMNS, ATTRS))


def test_no_rows_give_an_empty_frame_with_all_columns() -> None:
    empty = to_frame([], SWEEP_COLUMNS, {})
    assert (list(empty.columns), len(empty)) == (SWEEP_NAMES, 0)
    assert empty.projection.dtype == np.float64


def test_a_missing_number_is_nan(frame: pd.DataFrame) -> None:
    assert math.isnan(frame.loss[1])
    assert frame.loss[0] == full_row(0)["loss"]


@pytest.mark.parametrize("name", ["layer", "n_pairs", "coherent"])
def test_a_missing_value_that_cannot_be_nan_is_refused(name: str) -> None:
    """Whole numbers and flags have no NaN: a gap must not turn into 0 or True."""
    row = full_row(0)
    assert to_frame([row], SWEEP_COLUMNS, {})[name].item() == row[name]
    del row[name]
    with pytest.raises((KeyError, ValueError)):
        to_frame([row], SWEEP_COLUMNS, {})


def test_an_unknown_key_is_refused() -> None:
    to_frame([full_row(0)], SWEEP_COLUMNS, {})
    with pytest.raises(KeyError, match="projektion"):
        to_frame([full_row(0), full_row(1) | {"projektion": 1.0}], SWEEP_COLUMNS, {})


def test_attrs_are_copied_and_must_be_json() -> None:
    attrs = {"settings": {"coefficients": (1.0, 2.0)}}
    frame = to_frame([full_row(0)], SWEEP_COLUMNS, attrs)
    assert frame.attrs == {"settings": {"coefficients": [1.0, 2.0]}}
    frame.attrs["settings"]["coefficients"].append(3.0)
    assert attrs == {"settings": {"coefficients": (1.0, 2.0)}}
    with pytest.raises(TypeError):
        to_frame([full_row(0)], SWEEP_COLUMNS, {"model": object()})


def test_parquet_keeps_values_types_and_attrs(frame: pd.DataFrame, tmp_path: Path) -> None:
    write_parquet(frame, tmp_path / "sweep.parquet")
    read = pd.read_parquet(tmp_path / "sweep.parquet")
    pd.testing.assert_frame_equal(read, frame, check_exact=True)
    assert read.attrs == json.loads(json.dumps(ATTRS))


def test_csv_keeps_every_digit(frame: pd.DataFrame, tmp_path: Path) -> None:
    write_csv(frame, tmp_path / "sweep.csv")
    read = pd.read_csv(tmp_path / "sweep.csv", float_precision="round_trip")
    pd.testing.assert_frame_equal(read, frame, check_exact=True)


def test_csv_is_the_same_bytes_each_time(frame: pd.DataFrame, tmp_path: Path) -> None:
    paths = [tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "c.csv"]
    for path, table in zip(paths, [frame, frame, frame[:2]], strict=True):
        write_csv(table, path)
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second != other
    assert b"\r" not in first
    header, *lines = first.decode().splitlines()
    assert header.split(",") == SWEEP_NAMES
    # NaN is an empty field, in the row where the loss is missing and only there.
    assert [",," in line for line in lines] == [False, True, False]


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
