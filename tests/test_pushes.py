"""Predicted boundaries, and the losses a budget bounds."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Bounded

import steerlens as sl
from steerlens.directions.directions import Directions
from steerlens.engine.batches import make_batches
from steerlens.engine.engine import Engine
from steerlens.engine.slopes import label_slopes
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.loss import Budget
from steerlens.measure.coherence import allowances, bounded_loss
from steerlens.measure.prediction import first_roots
from steerlens.tables import COLUMNS


def first_root(bend: float, slope: float, allowance: float) -> float:
    return float(first_roots(np.array([bend]), np.array([slope]), allowance)[0])


def test_first_roots_by_hand() -> None:
    """c^2 + c = 2 at 1, c^2 - c = 2 at 2, and 0.5 c = 2 at 4."""
    assert first_root(1.0, 1.0, 2.0) == pytest.approx(1)
    assert first_root(1.0, -1.0, 2.0) == pytest.approx(2)
    assert first_root(0.0, 0.5, 2.0) == 4
    assert first_root(0.0, -0.5, 2.0) == math.inf


def test_predictions_are_of_the_slope_and_the_curvature(
    llama: Any, many: sl.ContrastivePairs, directions: Directions, bounded: Bounded
) -> None:
    prompts = tokenize_pairs(llama, many).positive
    slopes = label_slopes(
        Engine(llama),
        make_batches(llama, prompts, None),
        [((name, directions[name]),) for name in directions.hook_names],
        steered_positions="all",
        seed=0,
    )
    slope, bend = slopes.logprob.mean(dim=1).tolist(), (slopes.curvature.mean(dim=1) / 2).tolist()
    options: dict[str, Any] = {"n_bootstrap": 2, "search_range": 1e-6}
    of_nats = bounded(budget="nats=0.001", **options).layers
    of_kl = bounded(budget="kl=0.1", **options).layers
    of_p95 = bounded(budget="kl_p95=0.1", **options).layers
    for i in range(5):
        for side, sign in (("pos", 1), ("neg", -1)):
            found = sign * of_nats[f"predicted_first_order_{side}"][i]
            assert found == pytest.approx(first_root(0.0, -sign * slope[i], 0.001))
            # Other batches draw other labels for the curvature.
            found = sign * of_nats[f"predicted_boundary_{side}"][i]
            assert found == pytest.approx(first_root(bend[i], -sign * slope[i], 0.001), rel=0.3)
            found = sign * of_kl[f"predicted_boundary_{side}"][i]
            assert found == pytest.approx(math.sqrt(0.1 / bend[i]), rel=0.3)
            percentile = sign * of_p95[f"predicted_boundary_{side}"][i]
            assert percentile == pytest.approx(found / math.sqrt(3.8415), rel=1e-4)
    assert of_kl.predicted_first_order_pos.isna().all()


@pytest.mark.parametrize("on", ["positive", "negative"])
def test_predictions_alone_are_those_of_the_search(
    llama: Any, many: sl.ContrastivePairs, directions: Directions, on: Any, bounded: Bounded
) -> None:
    options: dict[str, Any] = {"budget": "nats=0.1", "layers": [1, 3], "n_bootstrap": 2}
    alone = sl.Study(llama, many, directions, **options).predicted_boundary(on=on)
    found = bounded(on=on, **options).layers
    assert list(alone.columns) == [column.name for column in COLUMNS["layers"]]
    predicted = [name for name in alone.columns if name.startswith("predicted_")]
    assert len(predicted) == 4
    measured = ["separation", "projection", "resid_norm", "logprob_nats", "boundary_on"]
    pd.testing.assert_frame_equal(alone[predicted + measured], found[predicted + measured])
    assert alone.boundary_pos.isna().all()
    assert found.boundary_pos.notna().all()
    assert alone.attrs["forward_equivalents"] < 9 < found.attrs["forward_equivalents"]


def test_a_small_budget_is_reached_where_it_was_predicted(bounded: Bounded) -> None:
    layers = bounded(budget="nats=0.0002", n_bootstrap=2).layers
    for row in layers.to_dict("records"):
        for side in ("pos", "neg"):
            first = row[f"predicted_first_order_{side}"]
            if math.isfinite(first):
                assert row[f"boundary_{side}"] == pytest.approx(first, rel=0.1)
                near = row[f"predicted_boundary_{side}"]
                assert row[f"boundary_{side}"] == pytest.approx(near, rel=0.1)
    is_near = (layers.predicted_boundary_neg / layers.boundary_neg - 1).abs() <= 0.4
    is_near &= (layers.predicted_boundary_pos / layers.boundary_pos - 1).abs() <= 0.4
    assert layers.prediction_trusted.tolist() == is_near.tolist()
    assert layers.prediction_trusted.any()


def test_losses_by_hand() -> None:
    counts = np.array([[1.0, 1.0], [2.0, 0.0]])
    assert bounded_loss(np.array([0.2, 0.6]), counts).tolist() == pytest.approx([0.4, 0.2])
    logprob = np.array([-1.0, -3.0])
    assert allowances(Budget("nats", 0.1), logprob, counts).tolist() == pytest.approx([0.1, 0.1])
    # -2 / 0.99 lies 0.0202 below -2; -1 / 0.99 lies 0.0101 below -1.
    relative = allowances(Budget("relative", 0.01), logprob, counts)
    assert relative.tolist() == pytest.approx([2 / 99, 1 / 99])
    tokens = np.array([[*range(1, 11)], [*range(11, 19), math.nan, math.nan]], dtype=float)
    # Of 18 values the 95th percentile is the 18th (0.95 * 18 = 17.1), of the first ten the 10th.
    assert bounded_loss(tokens, counts).tolist() == [18.0, 10.0]
    assert bounded_loss(np.array([0.2, math.nan]), counts).tolist() == [math.inf, math.inf]
    tokens[0, 0] = math.inf
    assert bounded_loss(tokens, counts).tolist() == [math.inf, math.inf]
