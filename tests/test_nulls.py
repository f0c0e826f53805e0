"""The nulls of a comparison, run and linearised, and refits on resampled groups."""

import math
from dataclasses import replace
from typing import Any

import comparing
import numpy as np
import pytest
import torch
from comparing import HOOK, gap

import steerlens as sl
from steerlens.data.items import PreferenceItems
from steerlens.directions.gradient_rows import LossGradients
from steerlens.directions.methods import null_directions, null_vectors
from steerlens.engine.engine import Engine
from steerlens.engine.tokenization import (
    tokenize_prompt,
)
from steerlens.loss import Budget
from steerlens.measure.nulls import Screen, null_columns
from steerlens.measure.prediction import Linearised, linearise
from steerlens.models.hooks import resid_post

items, neutral = comparing.items, comparing.neutral


@pytest.fixture(scope="module")
def linear(
    double: Any, many: sl.ContrastivePairs, items: PreferenceItems, neutral: list[str]
) -> Linearised:
    texts = [tokenize_prompt(double, text) for text in neutral]
    return linearise(
        Engine(double), items, texts, [HOOK], budget=Budget.parse("kl=1e-8"), allowance=1e-8, seed=0
    )


def test_linearised_effects_are_those_of_small_pushes(
    double: Any, many: sl.ContrastivePairs, items: PreferenceItems, linear: Linearised
) -> None:
    """By bare hooks, at the coefficient that the curvature predicts for a divergence of 1e-8."""
    differences = sl.collect_differences(double, many, layers=[1])
    vectors = null_vectors(differences, n=2, seed=0)["shuffled"][:, 0]
    found = linear.effects(HOOK, vectors)
    curvature = (vectors @ linear.text.scores[0].double().T).square().mean(dim=1)
    for vector, effects, bend in zip(vectors, found, curvature.tolist(), strict=True):
        c = math.sqrt(2e-8 / bend)
        exact = [gap(double, item.prompt, vector, c) - gap(double, item.prompt) for item in items]
        assert effects.tolist() == pytest.approx(exact, rel=1e-2, abs=1e-7)
        assert np.abs(effects).max() > 1e-5


def test_the_first_null_vectors_are_the_null_directions(
    llama: Any, many: sl.ContrastivePairs
) -> None:
    differences = sl.collect_differences(llama, many, layers=[1])
    drawn, vectors = (make(differences, n=3, seed=5) for make in (null_directions, null_vectors))
    for kind, some in drawn.items():
        for one, row in zip(some, vectors[kind][:, 0], strict=True):
            torch.testing.assert_close(one[HOOK].double(), row, atol=1e-6, rtol=1e-5)


def screen(linear: Linearised, many: sl.ContrastivePairs, model: Any, noise: float) -> Screen:
    """Nulls whose exact effects are the linearised ones and some noise."""
    differences = sl.collect_differences(model, many, layers=[1])
    vectors = null_vectors(differences, n=40, seed=0)
    generator = np.random.default_rng(0)
    exact = {}
    for kind, rows in vectors.items():
        effects = linear.effects(HOOK, rows[:20, 0]).mean(axis=1, keepdims=True)
        exact[kind] = effects + noise * effects.std() * generator.standard_normal((20, 1))
    return Screen(linear, exact, vectors)


def test_linearised_nulls_are_used_where_they_are_right_only(
    double: Any, many: sl.ContrastivePairs, linear: Linearised
) -> None:
    direction = sl.fit(double, many, layers=[1])
    for noise, how, n_null in ((0.0, "linearised", 40), (1.0, "exact", 20)):
        found = screen(linear, many, double, noise).columns({HOOK: direction[HOOK]}, {HOOK: 1.0})
        assert (found[HOOK]["null_by"], found[HOOK]["n_null"]) == (how, n_null)
    # 1 nat is beyond all twenty nulls of each kind.
    assert found[HOOK]["p_value"] == found[HOOK]["p_layers"] == pytest.approx(1 / 21)


def test_the_spread_of_refits_is_that_of_resampled_groups(
    double: Any, many: sl.ContrastivePairs, linear: Linearised
) -> None:
    given, differences = (
        screen(linear, many, double, 0.0),
        sl.collect_differences(double, many, layers=[1]),
    )
    of_each = {"groups": differences.pair_groups, "seed": 0}
    spread = given.refits(differences, "mean_diff", **of_each)[HOOK].std(ddof=1)
    assert spread > 0
    # On pairs that are nearly alike PCA is the mean; the groups drawn are the same for both.
    mean = (differences.positive - differences.negative).mean(dim=1, keepdim=True)
    alike = replace(differences, positive=differences.positive + 50 * mean)
    of_mean, of_pca, other = (
        given.refits(alike, method, groups=alike.pair_groups, seed=seed)[HOOK]
        for method, seed in (("mean_diff", 0), ("pca", 0), ("pca", 1))
    )
    assert np.corrcoef(of_mean, of_pca)[0, 1] > 0.9 > np.corrcoef(of_mean, other)[0, 1]
    # One group has nothing to resample, and pairs that come in fours have fewer.
    alone, fours = ((0,) * len(many), tuple(i // 4 for i in range(len(many))))
    assert given.refits(differences, "mean_diff", groups=alone, seed=0) == {}
    in_fours = given.refits(differences, "mean_diff", groups=fours, seed=0)[HOOK].std(ddof=1)
    assert in_fours != pytest.approx(spread, rel=0.01)
    for method, evidence in (("random", differences), ("optimised", None)):
        assert given.refits(evidence, method, **of_each) == {}
    assert screen(linear, many, double, 1.0).refits(differences, "mean_diff", **of_each) == {}


@pytest.mark.parametrize(
    "method", ["gradient_mean", "gradient_fisher+pooled", "fisher_pullback", "gradient_mean+on_pca"]
)
def test_gradients_are_refitted_without_a_pass(
    double: Any, many: sl.ContrastivePairs, linear: Linearised, method: str
) -> None:
    """Their rows are those of the pairs that were drawn; an axis is itself fitted on the pairs."""
    given = screen(linear, many, double, 0.0)
    n, scores = len(many), 2 * (method == "fisher_pullback")
    axis = "pca" if method.endswith("pca") else None

    def gradients(pairs: sl.ContrastivePairs) -> LossGradients:
        return sl.loss_gradients(double, pairs, layers=[1], axis=axis, n_scores=scores)

    groups = tuple(i // 2 for i in range(n))
    evidence = gradients(many)
    found = given.refits(evidence, method, groups=groups, seed=0)
    if axis:
        assert found == {}
        return
    drawn = np.random.default_rng(0).integers(0, n // 2, n // 2).tolist()
    rows = [i for g in drawn for i in (2 * g, 2 * g + 1)]
    again = gradients(
        sl.ContrastivePairs(tuple(replace(many[r], id=str(i)) for i, r in enumerate(rows)))
    )
    if scores:  # drawn once a pair, sample by sample
        both = [evidence.scores[:, sample * n :][:, rows] for sample in range(scores)]
        again = replace(again, scores=torch.cat(both, dim=1))
    expected = given.effects(HOOK, sl.fit_directions(again, method=method)[HOOK][None])[0]
    assert found[HOOK][0] == pytest.approx(expected, rel=1e-6)
    assert found[HOOK].std() > 1e-3 * abs(expected)


def test_nulls_that_are_run_and_linearised_ones_are_one_family() -> None:
    """999 at the first hook, 19 of them at the second: no null there can be below 1 in 20."""
    first, few = np.linspace(-1, 1, 999), np.full(999, math.nan)
    few[:19] = np.linspace(-1, 1, 19)
    draws = {"a": np.stack([first, few], axis=1)}

    def columns(*seen: float) -> list[dict[str, Any]]:
        hows, names = ("linearised", "exact"), (HOOK, resid_post(2))
        return [*null_columns(hows, names, np.array(seen), draws).values()]

    far = columns(2.0, 2.0)
    assert [row["null_by"] for row in far] == ["linearised", "exact"]
    assert [row["n_null"] for row in far] == [999, 19]
    assert [row["p_value"] for row in far] == pytest.approx([1 / 1000, 1 / 20])
    assert [row["p_layers"] for row in far] == pytest.approx([1 / 1000, 1 / 20 + 50 / 1000])
    assert [row["least_p"] for row in far] == [row["p_layers"] for row in far]
    near = columns(0.9, 0.0)[0]
    assert near["p_layers"] == pytest.approx(near["p_value"] + 2 / 20)
    assert near["least_p"] == pytest.approx(1 / 1000)


def test_the_harder_kind_of_null_decides() -> None:
    near, far = np.linspace(-1, 1, 41)[:, None], np.linspace(-3, 3, 41)[:, None]
    row = null_columns(("exact",), (HOOK,), np.array([2.0]), {"a": near, "b": far})[HOOK]
    # Beyond 2 there are 14 of the 41.
    assert row["p_value"] == row["p_layers"] == pytest.approx(15 / 42)
    assert (row["null_low"], row["null_high"]) == pytest.approx((-2.85, 2.85))


def test_a_kind_without_nulls_leaves_the_rank_unknown() -> None:
    """`test_the_harder_kind_of_null_decides` is the control."""
    known, unknown = np.linspace(-1, 1, 21)[:, None], np.full((21, 1), math.nan)
    for draws in ({"a": known, "b": unknown}, {"a": unknown, "b": known}):
        row = null_columns(("exact",), (HOOK,), np.array([2.0]), draws)[HOOK]
        assert row["n_null"] == 0
        for name in ("p_value", "p_layers", "null_low", "null_high"):
            assert math.isnan(row[name]), name
