"""How far a direction can be trusted before anything is steered."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import steerlens as sl
from steerlens.errors import InputError
from steerlens.measure.split_half import cosine, d_prime, reliability
from steerlens.models.hooks import resid_post
from steerlens.tables import COLUMNS


def test_reliability_of_a_planted_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    base, noise = torch.randn((2, 2, 60, 32), generator=generator)
    strength = torch.tensor([4.0, 0.0])[:, None, None]
    given = sl.directions.Differences(
        (resid_post(0), resid_post(1)), (), base + strength * planted + noise, base, -1, "f"
    )
    table = reliability(given, n_splits=20)
    assert list(table.columns) == [column.name for column in COLUMNS["reliability"]]
    found, nothing = table.iloc[0], table.iloc[1]
    assert found.split_half_cosine > 0.9 > 0.3 > abs(nothing.split_half_cosine)
    assert found.class_separation > 1 > abs(nothing.class_separation)
    assert found.cosine_half > found.cosine_quarter > 0.8
    assert found.pca_cosine > 0.95 > nothing.pca_cosine
    assert found.agreement > 0.4 > 0.3 > nothing.agreement
    assert reliability(given, n_splits=20).equals(table)
    with_readout = replace(given, hook_names=(resid_post(0),), readout_names=(resid_post(1),))
    assert reliability(with_readout, n_splits=20).equals(table[:1])
    with pytest.raises(InputError, match="at least 8 pairs"):
        reliability(replace(given, positive=given.positive[:, :5], negative=given.negative[:, :5]))


def test_d_prime_and_cosine_by_hand() -> None:
    """Means 3 and 0, variances 2 and 2: 3 / sqrt(2)."""
    assert d_prime(np.array([2.0, 4.0]), np.array([-1.0, 1.0])) == pytest.approx(3 / 2**0.5)
    assert math.isnan(d_prime(np.ones(3), np.zeros(3)))
    assert cosine(np.array([3.0, 4.0]), np.array([1.0, 0.0])) == pytest.approx(0.6)
    assert math.isnan(cosine(np.zeros(2), np.ones(2)))
