"""Rows of the tables of a sweep, by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch


def test_layer_table_by_hand() -> None:
    """Differences (3, 4) and (0, 1) against the direction (0.6, 0.8): projections 5 and 0.8."""
    from steerlens.engine.workload import Baseline
    from steerlens.measure.rows import layer_row
    from steerlens.measure.settings import StudySettings

    name = "blocks.0.hook_resid_post"
    settings = StudySettings(
        hook_names=(name,),
        position=-1,
        steered_positions="all",
        labels="all",
        own_tokens=None,
        budget="relative=0.01",
        margin=0.99,
        weight=10000.0,
        n_bootstrap=500,
        seed=0,
        batch_size=None,
    )
    baseline = Baseline(
        (name,),
        torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]),
        torch.tensor([[[0.0, 0.0], [0.0, 0.0]]]),
        torch.tensor([-2.0, -4.0]),
    )
    row = layer_row(name, baseline, torch.tensor([0.6, 0.8]), settings, (0, 1))
    expected = {
        "separation": 3.0,
        "projection": 2.9,
        "projection_std": 4.2 / 2**0.5,
        "agreement": (1 + 0.8) / 2,
        "explained_variance": (25 + 0.64) / 26,
        "resid_norm": (5 + 1) / 4,
        "logprob_nats": -3.0,
        "coherence_penalty": 10.0,
        "loss": 7.0,
    }
    for column, value in expected.items():
        assert row[column] == pytest.approx(value, rel=1e-6), column
    # Of two values their mean, and 12.71 (Student's t) times half of their distance. Of the ratio
    # the rests are r = 0.36 * 25 / 26, and sqrt(r^2 / (1 - 25/26) + r^2 / (1 - 1/26)) / 26 = r / 5.
    ends = {
        "separation": (3, 2),
        "projection": (2.9, 2.1),
        "agreement": (0.9, 0.1),
        "explained_variance": (25.64 / 26, 0.36 * 25 / 26 / 5),
        "resid_norm": (1.5, 1.0),
    }
    for column, (mean, error) in ends.items():
        found = row[f"{column}_ci_low"], row[f"{column}_ci_high"]
        expected_ends = (mean - 12.7062 * error, mean + 12.7062 * error)
        assert found == pytest.approx(expected_ends, rel=1e-5), column


def test_points_by_hand() -> None:
    """Differences (3, 4) and (0, 1) on the direction (1, 0) and what is orthogonal to it."""
    from steerlens.engine.workload import Baseline
    from steerlens.measure.rows import point_rows

    name = "blocks.2.hook_resid_post"
    states = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    baseline = Baseline((name,), states, torch.zeros_like(states), torch.zeros(2))
    rows = point_rows(name, baseline, torch.tensor([1.0, 0.0]), ["a", "b"])
    assert [(row["pair"], row["layer"]) for row in rows] == [("a", 2), ("b", 2)]
    found = [[row[column] for column in ("along", "across", "separation")] for row in rows]
    assert np.array(found) == pytest.approx(np.array([[3.0, 4.0, 5.0], [0.0, 1.0, 1.0]]))
    # Along the direction alone nothing is left for a second axis.
    flat = replace(baseline, positive=states * torch.tensor([1.0, 0.0]))
    rows = point_rows(name, flat, torch.tensor([1.0, 0.0]), ["a", "b"])
    assert [math.isnan(row["across"]) for row in rows] == [True, True]
