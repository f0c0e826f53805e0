"""A study: what its measurements share is run once, and each says what it ran itself."""

from typing import Any

import pandas as pd
import pytest

import steerlens as sl
from steerlens.errors import InputError

SETTINGS: dict[str, Any] = {"layers": [1, 3], "n_bootstrap": 2}


def spent(table: pd.DataFrame) -> float:
    return float(table.attrs["forward_equivalents"])


def test_the_second_measurement_does_not_run_the_unsteered_pairs_again(
    llama: Any, many: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    study = sl.Study(llama, many, directions, **SETTINGS)
    swept, bounded = study.sweep([-2, 0, 2]), study.boundary()
    alone = sl.find_boundary(llama, many, directions, **SETTINGS)
    # What a boundary of its own runs besides: the unsteered pairs, and the check of both hooks.
    ready = sl.Study(llama, many, directions, **SETTINGS)
    assert ready.plan.exact == frozenset(ready.hook_names)
    shared = ready.engine.forward_equivalents(ready.workload)
    assert shared > 2  # both sides of the pairs, through all blocks, and more
    assert spent(alone.layers) - spent(bounded.layers) == pytest.approx(shared, abs=2e-3)
    total = study.engine.forward_equivalents(study.workload)
    assert total == pytest.approx(spent(swept.table) + spent(bounded.layers), abs=2e-3)
    # And it gives what it gives alone.
    pd.testing.assert_frame_equal(bounded.layers, alone.layers)
    pd.testing.assert_frame_equal(bounded.curves, alone.curves)
    first = sl.sweep(llama, many, directions, coefficients=[-2, 0, 2], **SETTINGS)
    pd.testing.assert_frame_equal(swept.table, first.table)


def test_the_layers_of_a_study_are_those_of_its_sweep_and_cost_nothing_more(
    llama: Any, many: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    study = sl.Study(llama, many, directions, **SETTINGS)
    before = study.layers
    assert 1.9 < spent(before) < 2.2  # both sides once; padding differs
    pd.testing.assert_frame_equal(study.sweep([0, 1]).layers, before)
    # Under a budget that no sweep can have, too.
    by_kl = sl.Study(llama, many, directions, budget="kl=0.1", **SETTINGS)
    pd.testing.assert_frame_equal(by_kl.layers, before)
    with pytest.raises(InputError, match="a sweep measures logprob"):
        by_kl.sweep([0, 1])


def test_a_plane_is_of_a_hook_of_the_study_with_every_token_pushed(
    llama: Any, pairs: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    study = sl.Study(llama, pairs, directions, **SETTINGS)
    assert study.plane(1, n_angles=3).shape.layer.unique().tolist() == [1]
    for measure in (study.plane, study.boundary_shape):
        with pytest.raises(InputError, match=r"blocks\.2\.hook_resid_post is not among the hooks"):
            measure(2, n_angles=3)
    prompts = sl.Study(llama, pairs, directions, steered_positions="prompt", **SETTINGS)
    with pytest.raises(InputError, match="every token is pushed"):
        prompts.plane(1, n_angles=3)


def test_what_is_printed_is_one_line(
    llama: Any, pairs: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    study = sl.Study(llama, pairs, directions, **SETTINGS)
    assert repr(study) == "Study(2 hooks, 8 pairs, mean_diff)"
    for value in (sl.collect_differences(llama, pairs), directions, pairs):
        assert "\n" not in repr(value)
        assert len(repr(value)) < 120
    with pytest.raises(TypeError, match="coefficient"):
        sl.Study(llama, pairs, directions, coefficient=3)  # type: ignore[call-arg]


def test_a_hook_without_direction_is_refused_by_every_measurement(
    llama: Any, pairs: sl.ContrastivePairs
) -> None:
    fitted = sl.fit_directions(sl.collect_differences(llama, pairs, layers=[3]))
    for measure in (
        lambda: sl.sweep(llama, pairs, fitted, layers=[1], coefficients=[1]),
        lambda: sl.find_boundary(llama, pairs, fitted, layers=[1]),
        lambda: sl.loss_geometry(llama, pairs, fitted, layers=[1]),
    ):
        with pytest.raises(InputError, match=r"no direction was fitted at blocks\.1"):
            measure()
    sl.sweep(llama, pairs, fitted, coefficients=[1])
