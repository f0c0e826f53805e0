"""The sweep: cells against bare hooks, coefficient 0, invariance, both tables."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from bare import cell
from conftest import ATTN_OUT, bridge, build_gpt2, build_llama, needs_bridge

import steerlens as sl
from steerlens.directions.differences import Differences
from steerlens.directions.directions import Directions
from steerlens.directions.methods import null_directions
from steerlens.engine.batches import make_batches
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.errors import InputError
from steerlens.stats import false_discovery, null_band
from steerlens.tables import LAYER_COLUMNS, SWEEP_COLUMNS

COEFFICIENTS = (-2.0, 0.0, 0.5, 3.0)

pytestmark = pytest.mark.usefixtures("much_padding")


@pytest.fixture(scope="module")
def directions(llama: Any, pairs: sl.ContrastivePairs) -> Directions:
    return sl.fit_directions(sl.collect_differences(llama, pairs))


def numbers(table: pd.DataFrame) -> pd.DataFrame:
    return table.select_dtypes("number")


@pytest.mark.parametrize(("name", "build"), [("llama", build_llama), ("gpt2", build_gpt2)])
@pytest.mark.parametrize("position", [-1, 3])
def test_cells_equal_bare_hugging_face_hooks(
    request: pytest.FixtureRequest,
    pairs: sl.ContrastivePairs,
    name: str,
    build: Any,
    position: int,
) -> None:
    model, hf_model = request.getfixturevalue(name), build()
    fitted = sl.fit_directions(sl.collect_differences(model, pairs, position=position))
    table = sl.sweep(model, pairs, fitted, coefficients=COEFFICIENTS).table
    tokenized = tokenize_pairs(model, pairs)
    n_layers = model.cfg.n_layers
    by_layer = {i: fitted[f"blocks.{i}.hook_resid_post"] for i in range(n_layers)}
    assert len(table) == n_layers * len(COEFFICIENTS)
    for row in table.to_dict("records"):
        expected = cell(
            hf_model,
            [prompt.prompt for prompt in tokenized.positive],
            [prompt.prompt for prompt in tokenized.negative],
            by_layer,
            layer=row["layer"],
            coefficient=row["coefficient"],
            position=position,
            n_layers=n_layers,
        )
        for column, value in expected.items():
            # The penalty multiplies squared logprobs by 10000, so it is compared relatively.
            is_scaled = column in ("coherence_penalty", "loss")
            tolerance = {"rel": 1e-3, "abs": 0.02} if is_scaled else {"rel": 1e-4, "abs": 1e-4}
            assert row[column] == pytest.approx(value, **tolerance), column


def test_coefficient_0_is_the_unsteered_model_bit_for_bit(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    table = sl.sweep(llama, pairs, directions, coefficients=[0, 1e-3]).table
    zero = table[table.coefficient == 0]
    assert (zero.logprob_nats == zero.baseline_logprob_nats).all()
    assert (zero.degradation_nats == 0).all()
    assert (zero.degradation_ci_low == 0).all()
    assert (zero.degradation_ci_high == 0).all()
    assert (zero.projection_shift == 0).all()
    assert zero.coherent.all()
    tokenized = tokenize_pairs(llama, pairs)
    # The same batches through the bare model, with no hook of ours but the reading of a cache.
    for row in zero.to_dict("records"):
        unit = directions[row["readout_hook"]].double()
        sides = []
        for prompts in (tokenized.positive, tokenized.negative):
            (batch,) = make_batches(llama, prompts, 16)
            with torch.no_grad():
                logits, cache = llama.run_with_cache(batch.tokens, **batch.forward_kwargs)
            last = cache[row["readout_hook"]][torch.arange(8), batch.indices(-1)]
            order = torch.tensor(batch.rows).argsort()
            sides.append(last[order].double())
            if prompts is tokenized.positive:
                logprob = sl.loss.label_logprob(logits, batch.tokens, batch.label_mask())[order]
        assert row["projection"] == ((sides[0] - sides[1]) @ unit).mean().item()
        assert row["logprob_nats"] == logprob.double().mean().item()
    # Control: the smallest step already moves every one of these.
    moved = table[table.coefficient != 0]
    assert (moved.degradation_nats != 0).all()
    assert (moved.projection_shift != 0).all()


def test_baseline_column_is_the_same_for_every_cell(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    table = sl.sweep(llama, pairs, directions, coefficients=[-1, 2]).table
    assert table.baseline_logprob_nats.nunique() == 1


def test_at_the_readout_the_difference_moves_by_twice_the_coefficient(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    """Why the two sides are steered oppositely: the same vector on both would cancel."""
    table = sl.sweep(llama, pairs, directions, layers="2:", coefficients=[0, 1.5]).table
    for _, rows in table.groupby("layer"):
        zero, steered = rows.projection
        assert steered - zero == pytest.approx(2 * 1.5, abs=1e-4)
        assert rows.projection_shift.iloc[1] == pytest.approx(1.5, abs=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_padding_side_and_batch_size_change_nothing(
    tiny: Any, pairs: sl.ContrastivePairs, side: str, batch_size: int
) -> None:
    fitted = sl.fit_directions(sl.collect_differences(tiny, pairs))
    reference = sl.sweep(tiny, pairs, fitted, coefficients=[-1, 2], batch_size=1).table
    before = tiny.tokenizer.padding_side
    tiny.tokenizer.padding_side = side
    try:
        found = sl.sweep(tiny, pairs, fitted, coefficients=[-1, 2], batch_size=batch_size).table
    finally:
        tiny.tokenizer.padding_side = before
    columns = [c for c in numbers(found) if c not in ("coherence_penalty", "loss")]
    np.testing.assert_allclose(found[columns], reference[columns], rtol=1e-4, atol=1e-4)


def test_logits_are_bit_equal_after_a_sweep_and_after_an_exception_inside_one(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    tokens = torch.tensor([[1, 7, 9, 12, 5]])
    with torch.no_grad():
        before = llama(tokens)
    sl.sweep(llama, pairs, directions, coefficients=[-1, 1])

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "cells" and done > 0:
            raise InterruptedError

    def fail_while_steering() -> None:
        with torch.no_grad(), sl.steer(llama, directions, 4.0):
            assert not torch.equal(llama(tokens), before)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sl.sweep(llama, pairs, directions, coefficients=[-1, 1], progress=interrupt)
    with pytest.raises(InterruptedError):
        fail_while_steering()
    with torch.no_grad():
        assert torch.equal(llama(tokens), before)


def test_exception_inside_a_forward_pass_leaves_the_model_as_it_was(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    tokens = torch.tensor([[1, 7, 9, 12, 5]])
    with torch.no_grad():
        before = llama(tokens)

    def fail(activation: torch.Tensor, hook: Any) -> None:
        raise OSError("in the middle of a forward pass")

    llama.add_hook("blocks.3.hook_resid_post", fail)
    try:
        with pytest.raises(OSError, match="in the middle"):
            sl.sweep(llama, pairs, directions, coefficients=[1])
    finally:
        llama.reset_hooks()
    assert not any(point.fwd_hooks for point in llama.hook_dict.values())
    with torch.no_grad():
        assert torch.equal(llama(tokens), before)


def test_continuation_tokens_are_the_labels(llama: Any) -> None:
    prompts = ["you are cheerful the river was", "you are kind it went", "I felt cheerful"]
    against = ["you are gloomy the river was", "you are rude it went", "I felt gloomy"]
    after = ["warm and good", "very good", "so good today"]
    pairs = sl.ContrastivePairs.from_lists(prompts, against, after)
    fitted = sl.fit_directions(sl.collect_differences(llama, pairs))
    table = sl.sweep(llama, pairs, fitted, coefficients=[0, 1]).table
    hf_model, expected = build_llama(), []
    for prompt in tokenize_pairs(llama, pairs).positive:
        ids = torch.tensor([prompt.prompt + prompt.continuation])
        with torch.no_grad():
            logprobs = hf_model(ids).logits[0, :-1].log_softmax(-1)
        taken = logprobs.gather(1, ids[0, 1:, None])[len(prompt.prompt) - 1 :]
        expected.append(taken.mean().item())
    assert table.logprob_nats[0] == pytest.approx(np.mean(expected), abs=1e-4)
    # The direction is read in the prompt: the continuation leaves it alone.
    without = sl.ContrastivePairs.from_lists(prompts, against)
    torch.testing.assert_close(
        sl.collect_differences(llama, without).values,
        sl.collect_differences(llama, pairs).values,
        rtol=1e-4,
        atol=1e-4,
    )


def test_steering_the_continuation_leaves_the_prompt_alone(llama: Any) -> None:
    pairs = sl.ContrastivePairs.from_lists(
        ["you are cheerful it was", "you are kind"],
        ["you are gloomy it was", "you are rude"],
        ["warm and good", "very good"],
    )
    fitted = sl.fit_directions(sl.collect_differences(llama, pairs))
    options: dict[str, Any] = {"layers": [1], "coefficients": [0, 4]}
    only_after = sl.sweep(llama, pairs, fitted, steered_positions="continuation", **options).table
    assert only_after.projection_shift[1] == 0
    assert only_after.degradation_nats[1] != 0
    everywhere = sl.sweep(llama, pairs, fitted, steered_positions="all", **options).table
    assert everywhere.projection_shift[1] != 0
    assert everywhere.degradation_nats[1] != only_after.degradation_nats[1]


@pytest.mark.parametrize("positions", ["last", "continuation"])
def test_steering_that_can_reach_no_label_is_refused(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions, positions: Any
) -> None:
    with pytest.raises(InputError, match="no continuation"):
        sl.sweep(llama, pairs, directions, coefficients=[1], steered_positions=positions)
    sl.sweep(llama, pairs, directions, coefficients=[1], steered_positions="prompt", layers=[0])


@pytest.mark.parametrize("coefficients", [[float("nan")], [1.0, float("inf")], []])
def test_coefficients_without_meaning_are_refused(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions, coefficients: Any
) -> None:
    with pytest.raises(InputError, match=r"finite coefficient|at least one"):
        sl.sweep(llama, pairs, directions, coefficients=coefficients)


@pytest.mark.parametrize(
    "option", [{"seed": -1}, {"n_bootstrap": 1}, {"margin": float("nan")}, {"weight": float("inf")}]
)
def test_settings_without_meaning_are_refused(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions, option: Any
) -> None:
    with pytest.raises(InputError, match=next(iter(option))):
        sl.sweep(llama, pairs, directions, layers=[0], coefficients=[1], **option)


def test_a_prompt_without_any_label_is_refused(llama: Any) -> None:
    """Without BOS a prompt of one word is one token, and nothing predicts it."""
    bos, llama.tokenizer.bos_token = llama.tokenizer.bos_token, None
    try:
        one_word = sl.ContrastivePairs.from_lists(["good", "you are good"], ["bad", "you are bad"])
        with pytest.raises(InputError, match="pair '1' is a single token"):
            sl.engine.tokenize_pairs(llama, one_word)
        longer = sl.ContrastivePairs.from_lists(["so good", "you are good"], ["bad", "you are bad"])
        sl.engine.tokenize_pairs(llama, longer)
    finally:
        llama.tokenizer.bos_token = bos


def test_repeated_and_negative_zero_coefficients_are_one(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    table = sl.sweep(llama, pairs, directions, layers=[0], coefficients=[0, -0.0, 1, 1.0]).table
    assert list(table.coefficient) == [0.0, 1.0]


def test_missing_direction_names_the_hook(llama: Any, pairs: sl.ContrastivePairs) -> None:
    only_3 = sl.fit_directions(sl.collect_differences(llama, pairs, layers=[3]))
    with pytest.raises(InputError, match=r"no direction was fitted at blocks\.1"):
        sl.sweep(llama, pairs, only_3, layers=[1], coefficients=[1])
    sl.sweep(llama, pairs, only_3, coefficients=[1])


def test_directions_of_another_width_are_refused(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    narrow = Directions(
        directions.hook_names,
        (),
        torch.nn.functional.normalize(directions.vectors[:, :16], dim=-1),
        "mean_diff",
        -1,
        0,
        "",
    )
    with pytest.raises(InputError, match="d_model 16"):
        sl.sweep(llama, pairs, narrow, coefficients=[1])


def test_overflowing_cell_is_undefined_and_the_rest_is_kept(pairs: sl.ContrastivePairs) -> None:
    """In float16 a step beyond 65504 is infinite."""
    model = bridge(build_llama(dtype=torch.float16), dtype=torch.float16)
    fitted = sl.fit_directions(sl.collect_differences(model, pairs))
    with pytest.warns(RuntimeWarning, match="NaN or inf at coefficient 1e"):
        table = sl.sweep(model, pairs, fitted, layers=[0], coefficients=[1, 1e6, 0]).table
    bad = table[table.coefficient == 1e6].iloc[0]
    assert np.isnan(bad.projection)
    assert np.isnan(bad.degradation_ci_low)
    assert not bad.coherent
    of_nulls = ["null_low", "null_high", "p_value", "q_value"]
    names = ["hook_name", "readout_hook"]
    good = table[table.coefficient != 1e6].drop(columns=[*names, *of_nulls])
    assert good.notna().all(axis=None)
    nulls = null_directions(sl.collect_differences(model, pairs), n=2, seed=0)
    with pytest.warns(RuntimeWarning, match="NaN or inf at coefficient 1e"):
        table = sl.sweep(model, pairs, fitted, layers=[0], coefficients=[1, 1e6], nulls=nulls).table
    assert table.p_value.notna().tolist() == [True, False]


def test_tables_have_the_declared_columns_and_provenance(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    result = sl.sweep(llama, pairs, directions, coefficients=[0, 1], seed=7)
    assert list(result.table.columns) == [column.name for column in SWEEP_COLUMNS]
    assert list(result.layers.columns) == [column.name for column in LAYER_COLUMNS]
    for frame in (result.table, result.layers):
        assert frame.attrs["settings"]["seed"] == 7
        assert frame.attrs["measured_on"] == pairs.fingerprint
        assert frame.attrs["model"]["transformer_lens"]
    undefined = result.layers.filter(
        regex="^(boundary_pos|boundary_neg|predicted|reentry|projection_at)"
    ).columns
    assert len(undefined) == 13
    assert result.layers[undefined].isna().all(axis=None)


def test_coherent_follows_the_budget(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    options: dict[str, Any] = {"layers": [1], "coefficients": [-4, 0, 4]}
    table = sl.sweep(llama, pairs, directions, **options).table
    relative = table.logprob_nats >= table.baseline_logprob_nats / 0.99
    assert list(table.coherent) == list(relative)
    assert not table.coherent.all()
    wide = sl.sweep(llama, pairs, directions, budget="nats=100", **options).table
    assert wide.coherent.all()


def test_same_seed_gives_the_same_table_and_another_seed_other_intervals(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    options: dict[str, Any] = {"layers": [1], "coefficients": [1, 2]}
    first = sl.sweep(llama, pairs, directions, seed=3, **options).table
    pd.testing.assert_frame_equal(
        first, sl.sweep(llama, pairs, directions, seed=3, **options).table
    )
    other = sl.sweep(llama, pairs, directions, seed=4, **options).table
    assert (other.projection == first.projection).all()
    assert (other.projection_ci_low != first.projection_ci_low).any()
    assert (first.projection_ci_low < first.projection).all()
    assert (first.projection < first.projection_ci_high).all()


def test_layer_table_by_hand(pairs: sl.ContrastivePairs) -> None:
    """Differences (3, 4) and (0, 1) against the direction (0.6, 0.8): projections 5 and 0.8."""
    from steerlens.engine.workload import Baseline
    from steerlens.measure.rows import layer_row
    from steerlens.measure.settings import StudySettings

    name = "blocks.0.hook_resid_post"
    settings = StudySettings(
        hook_names=(name,),
        position=-1,
        steered_positions="all",
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
    row = layer_row(name, baseline, torch.tensor([0.6, 0.8]), settings)
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
    # Of two pairs a resample is one of them twice, or both: intervals run from one to the other.
    ends = {
        "separation": (1, 5),
        "projection": (0.8, 5),
        "agreement": (0.8, 1),
        "explained_variance": (0.64, 1),
        "resid_norm": (0.5, 2.5),
    }
    for column, interval in ends.items():
        found = row[f"{column}_ci_low"], row[f"{column}_ci_high"]
        assert found == pytest.approx(interval, rel=1e-6), column


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


def test_points_are_those_of_the_layer_table(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    result = sl.sweep(llama, pairs, directions, coefficients=[0])
    by_hook = result.points.groupby("hook_name", sort=False)
    assert list(result.points.pair[: len(pairs)]) == [pair.id for pair in pairs]
    for column, mean in (("projection", "along"), ("separation", "separation")):
        assert by_hook[mean].mean().to_numpy() == pytest.approx(result.layers[column].to_numpy())


def test_other_hooks_of_a_block_can_be_swept(llama: Any, pairs: sl.ContrastivePairs) -> None:
    layers = f"blocks.1.hook_mlp_out,blocks.1.hook_resid_mid,blocks.0.{ATTN_OUT}"
    fitted = sl.fit_directions(sl.collect_differences(llama, pairs, layers=layers))
    table = sl.sweep(llama, pairs, fitted, coefficients=[0, 2]).table
    assert set(table.readout_hook) == {"blocks.2.hook_resid_post"}
    assert (table[table.coefficient == 2].projection_shift != 0).all()


def test_progress_counts_every_cell(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    seen: list[tuple[str, int, int]] = []
    sl.sweep(
        llama,
        pairs,
        directions,
        layers="0:3",
        coefficients=[0, 1],
        progress=lambda *told: seen.append(told),
    )
    assert [told for told in seen if told[0] == "cells"] == [("cells", i, 6) for i in range(7)]
    assert list(dict.fromkeys(what for what, _, _ in seen)) == [
        *("unsteered model: prompts", "checks: hooks", "cells")
    ]


def test_progress_counts_the_cells_along_null_vectors(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    """2 hooks, 3 coefficients, 2 x 2 nulls at the two that are not 0: 2 * (3 + 4 * 2) cells."""
    nulls = sl.null_directions(sl.collect_differences(llama, pairs), n=2, seed=0)
    seen: list[tuple[int, int]] = []
    sl.sweep(
        llama,
        pairs,
        directions,
        layers="0:2",
        coefficients=[-1, 0, 1],
        nulls=nulls,
        progress=lambda what, *counts: seen.append(counts) if what == "cells" else None,
    )
    done = [0, 2, 4, 6, 8, 9, 10, 11, 13, 15, 17, 19, 20, 21, 22]
    assert seen == [(i, 22) for i in done]


def test_measure_layers_equals_the_sweeps_layer_table(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    alone = sl.Study(llama, pairs, directions).layers
    swept = sl.sweep(llama, pairs, directions, coefficients=[0, 1]).layers
    pd.testing.assert_frame_equal(alone, swept)


@needs_bridge  # version 3 has no dropout
def test_model_in_training_mode_is_measured_without_dropout(pairs: sl.ContrastivePairs) -> None:
    hf_model = build_gpt2()
    model = bridge(hf_model)
    fitted = sl.fit_directions(sl.collect_differences(model, pairs))
    expected = sl.sweep(model, pairs, fitted, coefficients=[1]).table
    model.train()
    with torch.no_grad():
        tokens = torch.tensor([[1, 7, 9, 12, 5]])
        assert not torch.equal(model(tokens), model(tokens))
    found = sl.sweep(model, pairs, fitted, coefficients=[1]).table
    assert model.training
    pd.testing.assert_frame_equal(found, expected)


def test_differences_print_in_one_line(llama: Any, pairs: sl.ContrastivePairs) -> None:
    differences: Differences = sl.collect_differences(llama, pairs)
    for value in (differences, sl.fit_directions(differences), pairs):
        assert "\n" not in repr(value)
        assert len(repr(value)) < 120


def test_null_bands_are_those_of_sweeps_along_the_null_vectors(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    differences = sl.collect_differences(llama, pairs)
    nulls = null_directions(differences, n=3, seed=5)
    options: dict[str, Any] = {"layers": [1, 3], "coefficients": [0, 2.0], "n_bootstrap": 10}
    plain = sl.sweep(llama, pairs, directions, **options).table
    table = sl.sweep(llama, pairs, directions, nulls=nulls, **options).table
    given = ["null_low", "null_high", "p_value", "q_value"]
    assert plain[given].isna().all(axis=None)
    pd.testing.assert_frame_equal(table.drop(columns=given), plain.drop(columns=given))
    row = table[(table.layer == 1) & (table.coefficient == 2)].iloc[0]
    found = []
    for kind in ("random", "shuffled"):
        projections = []
        for null in nulls[kind]:
            # The readout keeps its own frozen direction.
            swapped = replace(directions, vectors=directions.vectors.clone())
            swapped.vectors[1] = null["blocks.1.hook_resid_post"]
            cells = sl.sweep(llama, pairs, swapped, **options).table
            projections.append(cells[(cells.layer == 1) & (cells.coefficient == 2)].projection)
        found.append(np.array([float(p.iloc[0]) for p in projections]))
    band = null_band(float(row.projection), found)
    assert (row.null_low, row.null_high) == pytest.approx((band.low, band.high), abs=1e-4)
    assert row.p_value == pytest.approx(band.p_value, rel=1e-3)
    steered = table[table.coefficient == 2]
    expected = false_discovery(steered.p_value.to_numpy())
    assert steered.q_value.tolist() == pytest.approx(expected.tolist())
    assert table[table.coefficient == 0][given].isna().all(axis=None)
