"""A study: what its measurements share is run once, and each says what it ran itself."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commands import HELD_OUT, OPENINGS, write_pairs

import steerlens as sl
from steerlens import plots
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


MOODS = [(f"you are kind {text}", f"you are rude {text}") for text in (*OPENINGS, *HELD_OUT)]
FORMS: dict[str, Callable[[Path], Any]] = {
    "tuples": lambda _: MOODS,
    "dicts": lambda _: [{"positive": good, "negative": bad} for good, bad in MOODS],
    "a frame": lambda _: pd.DataFrame(MOODS, columns=["positive", "negative"]),
    "a file": lambda folder: write_pairs(folder / "moods.jsonl", [*OPENINGS, *HELD_OUT]),
}


@pytest.mark.parametrize("form", FORMS)
def test_pairs_may_be_given_as_they_are(form: str, llama: Any, tmp_path: Path) -> None:
    """What `ContrastivePairs.load` reads, wherever pairs are asked for."""
    given = FORMS[form](tmp_path)
    read = sl.ContrastivePairs.load(given)
    fitted = sl.fit(llama, given, layers=[1])
    assert fitted.fingerprint == read.fingerprint == sl.ContrastivePairs.load(given).fingerprint
    assert sl.collect_differences(llama, given, layers=[1]).fingerprint == read.fingerprint
    assert sl.Study(llama, given, fitted).pairs.fingerprint == read.fingerprint
    table = sl.sweep(llama, given, fitted, coefficients=[0], n_bootstrap=2).table
    assert table.attrs["measured_on"] == read.fingerprint
    for wrong in (3, None, ["a good day", "a bad day"], {}, "no such file", llama):
        with pytest.raises(InputError, match=r"pairs|no such file"):
            sl.Study(llama, wrong, fitted)


def test_a_name_is_fitted_on_one_part_and_measured_on_the_other(llama: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = sl.Study(llama, "formality", sl.fit(llama, MOODS, layers=[1]))
    assert study.pairs.name == "formality/test"


def test_results_draw_themselves(
    llama: Any, many: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    study = sl.Study(llama, many, directions, **SETTINGS)
    swept, found = study.sweep([-1, 0, 1]), study.boundary()
    for figure, of_tables in (
        (swept.plot(), plots.tradeoff(swept.table)),
        (plots.tradeoff(swept, found), plots.tradeoff(swept.table, found.layers)),
        (found.plot(), plots.boundary(found.layers)),
        (plots.layer_profile(study), plots.layer_profile(study.layers)),
        (plots.differences(swept), plots.differences(swept.points)),
    ):
        assert figure.to_html() == of_tables.to_html()


def test_coefficients_in_norms_and_boundaries(
    llama: Any, many: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    """They are what they are shares of, hook by hook, and then as any other coefficient."""
    study = sl.Study(llama, many, directions, **SETTINGS)
    found = study.boundary().layers.set_index("hook_name")
    table = study.sweep(["0.1 norm", "-50%", 0, "0%", "2"]).table
    assert table.asked.tolist() == ["0.1 norm", "-50%", "0", "2"] * 2
    for name, cells in table.groupby("hook_name", sort=False):
        expected = [0.1 * found.resid_norm[name], 0.5 * found.boundary_neg[name], 0.0, 2.0]
        assert cells.coefficient.tolist() == pytest.approx(expected)
        plain = study.sweep(cells.coefficient.tolist()).table
        of_hook = plain[plain.hook_name == name].drop(columns="asked")
        pd.testing.assert_frame_equal(
            of_hook.reset_index(drop=True), cells.drop(columns="asked").reset_index(drop=True)
        )


def test_coefficients_that_are_shares_of_nothing(
    llama: Any, many: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    both = sl.SteeringVector.from_directions(llama, directions, layers=[1, 2])
    study = sl.Study(llama, many, both, n_bootstrap=2)
    with pytest.raises(InputError, match=r"norms are those of one hook .*'80%'"):
        study.sweep(["0.1 norm"])
    assert study.sweep(["50%"]).table.coefficient.notna().all()
    far = sl.Study(llama, many, directions, budget="nats=50", **SETTINGS)
    with pytest.raises(InputError, match=r"cannot push .* by '80%': the search found no boundary"):
        far.sweep(["80%"])
