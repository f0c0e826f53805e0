"""A study: what its measurements share is run once, and each says what it ran itself."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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


# Pairs that were fitted on


def in_sample(measure: Callable[[], pd.DataFrame]) -> tuple[int | None, list[str]]:
    """What the table's attrs say, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        n = measure().attrs["n_pairs_fitted_on"]
    return n, [str(w.message) for w in caught if "fitted on" in str(w.message)]


@pytest.mark.parametrize("method", ["mean_diff", "gradient_mean", "optimised"])
def test_measured_pairs_that_were_fitted_on_are_told_with_their_counts(
    llama: Any, pairs: sl.ContrastivePairs, many: sl.ContrastivePairs, method: str, tmp_path: Path
) -> None:
    """By their prompts, whatever their ids, groups and sides; of a vector's file too."""
    fitted = sl.fit(llama, pairs, method=method, layers=[1])
    sl.SteeringVector.from_directions(llama, fitted).save(tmp_path / "v.safetensors")
    vector = sl.SteeringVector.load(tmp_path / "v.safetensors")
    turned = replace(pairs[0], positive=pairs[0].negative, negative=pairs[0].positive)
    again = [replace(pair, id=f"again {pair.id}", group="g") for pair in (turned, *pairs[1:3])]
    for measured, n in ((again, 3), ([*again, *many[:4]], 3), (many, 0)):
        of = sl.ContrastivePairs(tuple(measured), "mine")
        by_study = in_sample(lambda of=of: sl.Study(llama, of, fitted, layers=[1]).layers)
        along = in_sample(lambda of=of: sl.token_damage(llama, of, vector, coefficients=[1]))
        assert by_study == along
        assert by_study[0] == n
        assert len(by_study[1]) == (n > 0)
        for text in by_study[1]:
            assert text.startswith(f"mine: {n} of {len(of)} measured pairs were fitted on")


def test_directions_that_do_not_say_what_they_were_fitted_on_warn_of_nothing(
    llama: Any, many: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    for hashes, n in ((directions.pair_hashes, 20), ((), None)):
        fitted = replace(directions, pair_hashes=hashes)
        found, texts = in_sample(lambda on=fitted: sl.Study(llama, many, on, layers=[1]).layers)
        assert (found, len(texts)) == (n, bool(n))


# Labels of two kinds


def test_labels_of_two_kinds_are_refused_where_they_would_be_averaged(
    llama: Any, many: sl.ContrastivePairs
) -> None:
    def with_continuations(n: int) -> sl.ContrastivePairs:
        continued = [replace(pair, continuation=" so warm") for pair in many[:n]] if n else []
        return sl.ContrastivePairs((*continued, *many.pairs[n:8]), "mixed")

    def compare_on_positive(pairs: sl.ContrastivePairs) -> Any:
        items = sl.PreferenceItems(
            tuple(sl.PreferenceItem(f"the {w} was", " warm", " cold", w) for w in ("sun", "day"))
        )
        given: dict[str, Any] = {"methods": "mean_diff", "layers": [1], "on": "positive"}
        return sl.compare(llama, pairs, items, n_null=2, n_bootstrap=2, **given)

    fitted = sl.fit(llama, with_continuations(3), layers=[1])  # which has no labels
    measures: list[Callable[[sl.ContrastivePairs], Any]] = [
        lambda pairs: sl.Study(llama, pairs, fitted).layers,
        lambda pairs: sl.fit(llama, pairs, method="gradient_mean", layers=[1], position=-2),
        lambda pairs: sl.fit(llama, pairs, method="optimised", layers=[1]),
        compare_on_positive,
    ]
    for measure in measures:
        for n in (0, 8):
            measure(with_continuations(n))
        with pytest.raises(InputError, match="3 of the kind 'continuation', 5 of the kind 'all'"):
            measure(with_continuations(3))
