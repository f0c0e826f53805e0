"""The plane of a direction: the boundary's shape in it, and the loss where pairs are pushed."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Studies
from hypothesis import given, settings
from hypothesis import strategies as st

import steerlens as sl
from steerlens.directions.directions import Directions
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_pairs
from steerlens.errors import InputError
from steerlens.loss import contrastive_steering_loss, label_logprob
from steerlens.measure.plane import SHARES, radius_ratio
from steerlens.measure.rows import main_orthogonal
from steerlens.measure.study import loss_geometry
from steerlens.tables import COLUMNS

LAYERS = [1, 4]
OPTIONS: dict[str, Any] = {"budget": "nats=0.1", "n_bootstrap": 20}


@pytest.fixture(scope="module")
def geometry(
    llama: Any, many: sl.ContrastivePairs, directions: Directions
) -> sl.measure.LossGeometry:
    return loss_geometry(llama, many, directions, layers=LAYERS, n_angles=6, **OPTIONS)


def logprob(
    model: Any, prompt: TokenizedPrompt, hook_name: str, push: torch.Tensor
) -> torch.Tensor:
    """Of one prompt, by a bare hook that adds the push at every token."""
    tokens = torch.tensor([prompt.prompt])
    labels = torch.ones_like(tokens, dtype=torch.bool)
    labels[:, 0] = False
    logits = model.run_with_hooks(tokens, fwd_hooks=[(hook_name, lambda x, hook: x + push)])
    return label_logprob(logits, tokens, labels)[0]


def states(model: Any, prompt: TokenizedPrompt, hook_name: str) -> torch.Tensor:
    _, cache = model.run_with_cache(torch.tensor([prompt.prompt]), names_filter=[hook_name])
    return cache[hook_name][0, -1]


def test_the_tables_have_their_columns_and_rows(
    geometry: sl.measure.LossGeometry, many: sl.ContrastivePairs
) -> None:
    for table, columns in (
        (geometry.points, COLUMNS["geometry"]),
        (geometry.contours, COLUMNS["contours"]),
        (geometry.shape, COLUMNS["shape"]),
    ):
        assert list(table.columns) == [column.name for column in columns]
        assert sorted(set(table.layer)) == LAYERS
        assert table.attrs["forward_equivalents"] > 10
    assert len(geometry.points) == 2 * len(many)
    assert len(geometry.shape) == 2 * 6
    assert len(geometry.contours) == 2 * 6 * (1 + len(SHARES))
    assert repr(geometry) == "LossGeometry(2 hooks, 84 pushes)"


def test_the_shape_says_how_far_each_hook_was_searched(
    geometry: sl.measure.LossGeometry, study: Studies
) -> None:
    plane = study(**OPTIONS).boundary_shape(4, n_angles=3)
    searched = geometry.shape.attrs["searched"]
    assert list(searched) == ["blocks.1.hook_resid_post", "blocks.4.hook_resid_post"]
    assert searched["blocks.4.hook_resid_post"] == plane.table.attrs["searched"]


def test_the_loss_of_a_push_is_that_of_bare_hooks(
    llama: Any,
    many: sl.ContrastivePairs,
    directions: Directions,
    geometry: sl.measure.LossGeometry,
    study: Studies,
) -> None:
    name = "blocks.1.hook_resid_post"
    plane = study(**OPTIONS).boundary_shape(1, n_angles=6)
    rows = geometry.contours[(geometry.contours.hook_name == name)]
    row = rows[(rows.angle == 60.0) & (rows.coefficient > 0)].iloc[2]
    push = float(row.coefficient) * plane.at(60.0)
    tokenized = tokenize_pairs(llama, many)
    with torch.no_grad():
        baseline = torch.stack([logprob(llama, p, name, 0 * push) for p in tokenized.positive])
        pushed = torch.stack([logprob(llama, p, name, push) for p in tokenized.positive])
        positive = torch.stack([states(llama, p, name) for p in tokenized.positive]) + push
        negative = torch.stack([states(llama, p, name) for p in tokenized.negative]) - push
    loss = contrastive_steering_loss(positive, negative, pushed, directions[name], baseline)
    assert row.degradation_nats == pytest.approx(float((baseline - pushed).mean()), abs=1e-5)
    assert row.loss == pytest.approx(float(loss.loss), rel=1e-4)
    assert row.coherence_penalty == pytest.approx(float(loss.coherence_penalty), rel=1e-4)
    # The push moves both sides, so the difference moves by twice as much, also across.
    difference = (positive - negative).mean(dim=0)
    assert row.along == pytest.approx(float(difference @ plane.direction), rel=1e-4)
    assert row.across == pytest.approx(float(difference @ plane.orthogonal), rel=1e-4)


def test_unpushed_the_loss_is_that_of_the_pairs(geometry: sl.measure.LossGeometry) -> None:
    for layer, points in geometry.points.groupby("layer"):
        rows = geometry.contours[(geometry.contours.layer == layer)]
        still = rows[rows.coefficient == 0]
        assert (still.degradation_nats == 0).all()
        assert still.along.to_numpy() == pytest.approx(points.along.mean(), rel=1e-6)
        assert still.across.to_numpy() == pytest.approx(points.across.mean(), rel=1e-6, abs=1e-6)
        pushed = rows[rows.coefficient > 0]
        assert (pushed.degradation_nats != 0).all()


def test_the_boundary_lies_where_the_degradation_spends_the_budget(
    geometry: sl.measure.LossGeometry,
) -> None:
    rows = geometry.contours
    at = rows[np.isclose(rows.coefficient, rows.boundary)]
    assert len(at) == 12
    assert at.degradation_nats.to_numpy() == pytest.approx(0.1, rel=0.1)


def test_arrows_are_finite_differences_of_the_loss(
    llama: Any, many: sl.ContrastivePairs, geometry: sl.measure.LossGeometry, study: Studies
) -> None:
    """Minus d(penalty)/d(difference): a push p moves the difference by 2 p, hence the half."""
    name = "blocks.1.hook_resid_post"
    plane = study(**OPTIONS).boundary_shape(1, n_angles=6)
    points = geometry.points[geometry.points.hook_name == name]
    prompt = tokenize_pairs(llama, many).positive[3]
    step = 2e-2
    for axis, column in zip(plane.axes, ("along", "across"), strict=True):
        with torch.no_grad():
            baseline, up, down = (
                logprob(llama, prompt, name, c * axis).double() for c in (0, step, -step)
            )
        penalty = [1e4 * torch.relu(0.99 * baseline - moved) ** 2 for moved in (up, down)]
        slope = float((penalty[0] - penalty[1]) / (2 * step))
        assert points[f"coherence_{column}"].iloc[3] == pytest.approx(-slope / 2, rel=0.03)
    unit = points.along / points.separation
    assert points.separation_along.to_numpy() == pytest.approx(unit.to_numpy(), rel=1e-6)
    assert (points.separation_along**2 + points.separation_across**2 <= 1 + 1e-9).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_angles": 2}, "n_angles"),
        ({"weight": float("nan")}, "weight"),
        ({"weight": -1}, "weight: expected a finite number of 0 or more"),
    ],
)
def test_a_geometry_without_meaning_is_refused(
    llama: Any,
    many: sl.ContrastivePairs,
    directions: Directions,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        loss_geometry(llama, many, directions, layers=[1], **options)


# The shape


def test_the_shape_has_the_two_boundaries_of_the_direction(
    llama: Any, many: sl.ContrastivePairs, directions: Directions, study: Studies
) -> None:
    options: dict[str, Any] = {"budget": "nats=0.1", "n_bootstrap": 50}
    shape = study(**options).boundary_shape(2, n_angles=8)
    table = shape.table
    assert list(table.columns) == [column.name for column in COLUMNS["shape"]]
    assert table.angle.tolist() == [45.0 * i for i in range(8)]
    row = sl.find_boundary(llama, many, directions, layers=[2], **options).layers.iloc[0]
    assert table.boundary[0] == pytest.approx(row.boundary_pos, rel=0.03)
    assert table.boundary[4] == pytest.approx(-row.boundary_neg, rel=0.03)
    np.testing.assert_allclose(np.hypot(table.x, table.y), table.boundary)
    assert table.y[2] == pytest.approx(table.boundary[2])
    ratio = table.radius_ratio[0]
    assert ratio == pytest.approx(table.boundary.max() / table.boundary.min())
    assert 1 <= table.radius_ratio_ci_low[0] <= table.radius_ratio_ci_high[0]
    assert 1 < table.radius_ratio_if_round[0] < ratio + 1
    assert ratio > 1.05
    assert float(shape.direction @ shape.orthogonal) == pytest.approx(0, abs=1e-6)
    turned = replace(
        directions,
        vectors=torch.stack(
            [
                shape.orthogonal if name == "blocks.2.hook_resid_post" else directions[name]
                for name in directions.hook_names
            ]
        ),
    )
    across = sl.find_boundary(llama, many, turned, layers=[2], **options).layers.iloc[0]
    assert table.boundary[2] == pytest.approx(across.boundary_pos, rel=0.03)


def test_the_radius_ratio_by_hand() -> None:
    """Radii 2 and 4; resamples of 2 e^n and 4 e^m, whose ratios are 2 e^(m - n)."""
    noise = np.array([[0.1, 0.0], [0.0, 0.1], [-0.1, 0.1], [0.0, 0.0]])
    found = radius_ratio(np.array([2.0, 4.0]), np.array([2.0, 4.0]) * np.exp(noise))
    assert found["radius_ratio"] == 2
    # Ranges of the noise: 0.1, 0.1, 0.2, 0.
    assert found["radius_ratio_if_round"] == pytest.approx(math.exp(0.1))
    # Of a shape s times as far from a circle the log ratios are s log 2 and -0.1, 0.1, 0.2, 0.
    low, high = np.quantile([-0.1, 0.1, 0.2, 0.0], [0.025, 0.975])
    step = 2 ** (1 / 40)
    assert found["radius_ratio_ci_low"] == pytest.approx(2 * math.exp(-high), rel=step - 1)
    assert found["radius_ratio_ci_high"] == pytest.approx(2 * math.exp(-low), rel=step - 1)
    beyond = radius_ratio(np.array([2.0, math.inf]), np.array([[2.0, math.inf]]))
    assert beyond == {"radius_ratio": math.inf}
    assert radius_ratio(np.array([math.inf] * 2), np.full((1, 2), math.inf)) == {}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 100))
def test_without_noise_the_ratio_is_exact_and_has_no_unit(seed: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    radii, noise = generator.uniform(1, 3, 6), generator.normal(0, 0.1, (50, 6))
    exact = radius_ratio(radii, np.repeat(radii[None], 50, axis=0))
    assert exact["radius_ratio_if_round"] == pytest.approx(1)
    for end in ("low", "high"):
        assert exact[f"radius_ratio_ci_{end}"] == pytest.approx(exact["radius_ratio"])
    noisy = radius_ratio(radii, radii * np.exp(noise))
    assert noisy["radius_ratio_if_round"] > 1
    assert radius_ratio(scale * radii, scale * radii * np.exp(noise)) == pytest.approx(noisy)


@pytest.mark.parametrize("stretched", [1.0, 1.5])
def test_a_circle_has_the_ratio_that_it_is_said_to_have(stretched: float) -> None:
    """Forty prompts pull at eight radii; resampled, they say what a circle of theirs looks like."""
    generator = np.random.default_rng(0)
    truth = np.log([stretched, *[1.0] * 7])
    rows = []
    for _ in range(200):
        pulls = generator.normal(0, 0.5, (40, 8))
        counts = generator.multinomial(40, [1 / 40] * 40, size=300) / 40
        radii, resampled = np.exp(truth + pulls.mean(axis=0)), np.exp(truth + counts @ pulls)
        rows.append(radius_ratio(radii, resampled))
    found = pd.DataFrame(rows)
    is_above = (found.radius_ratio > found.radius_ratio_if_round).mean()
    covers = (found.radius_ratio_ci_low <= stretched) & (stretched <= found.radius_ratio_ci_high)
    # As often above as below where it is round; nearly always above where it is not.
    assert 0.4 < is_above < 0.6 if stretched == 1 else is_above > 0.95
    assert covers.mean() > 0.9
    assert found.radius_ratio.median() > stretched + 0.03


def test_the_main_orthogonal_direction_by_hand() -> None:
    """Without their first component the differences are (0, 1, 0), (0, 2, 0) and (0, 0, 1)."""
    differences = torch.tensor([[5.0, 1, 0], [7, 2, 0], [3, 0, 1]], dtype=torch.float64)
    direction = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    found = main_orthogonal(differences, direction)
    torch.testing.assert_close(found, torch.tensor([0.0, 1, 0], dtype=torch.float64))
    with pytest.raises(InputError, match="no plane is left"):
        main_orthogonal(torch.outer(torch.tensor([1.0, 2.0]).double(), direction), direction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "0,1"}, "one hook"),
        ({"layer": 2, "n_angles": 2}, "n_angles"),
        ({"layer": 2, "search_range": -1}, "search_range"),
    ],
)
def test_a_shape_without_meaning_is_refused(
    options: dict[str, Any], message: str, study: Studies
) -> None:
    with pytest.raises(InputError, match=message):
        study().boundary_shape(**options)
