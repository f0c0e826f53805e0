"""The sweep: cells against bare hooks, coefficient 0, invariance, both tables."""

import math
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from bare import cell
from conftest import ATTN_OUT, Swept, bridge, build_gpt2, build_llama, needs_bridge, padding

import steerlens as sl
from steerlens.directions.directions import Directions
from steerlens.engine.batches import make_batches
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.errors import InputError
from steerlens.stats import interval
from steerlens.tables import COLUMNS

COEFFICIENTS = (-2.0, 0.0, 0.5, 3.0)

pytestmark = pytest.mark.usefixtures("much_padding")


@pytest.fixture(scope="module")
def directions(llama: Any, pairs: sl.ContrastivePairs) -> Directions:
    return sl.fit_directions(sl.collect_differences(llama, pairs))


@pytest.fixture(scope="module")
def swept(llama: Any, pairs: sl.ContrastivePairs, directions: Directions) -> Swept:
    """`sweep` of `directions` on `pairs`."""
    return partial(sl.sweep, llama, pairs, directions)


def numbers(table: pd.DataFrame) -> pd.DataFrame:
    return table.select_dtypes("number")


@pytest.mark.parametrize(("name", "build"), [("llama", build_llama), ("gpt2", build_gpt2)])
@pytest.mark.parametrize("position", [-1, 3])
def test_cells_equal_bare_hugging_face_hooks(
    request: pytest.FixtureRequest, pairs: sl.ContrastivePairs, name: str, build: Any, position: int
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
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions, swept: Swept
) -> None:
    table = swept(coefficients=[0, 1e-3]).table
    zero = table[table.coefficient == 0]
    assert table.baseline_logprob_nats.nunique() == 1
    assert (zero.logprob_nats == zero.baseline_logprob_nats).all()
    nothing = ["degradation_nats", "degradation_ci_low", "degradation_ci_high", "projection_shift"]
    assert (zero[nothing] == 0).all(axis=None)
    assert (zero.coherent == "yes").all()
    tokenized = tokenize_pairs(llama, pairs)
    # The same batches through the bare model, with no hook of ours but the reading of a cache.
    for row in zero.to_dict("records"):
        unit = directions[row["readout_hook"]].double()
        sides = []
        for prompts in (tokenized.positive, tokenized.negative):
            (batch,) = make_batches(llama, prompts, 16)
            with torch.no_grad():
                logits, cache = llama.run_with_cache(batch.tokens, **batch.forward_kwargs)
            last = cache[row["readout_hook"]][torch.arange(8), batch.places(-1)]
            order = torch.tensor(batch.rows).argsort()
            sides.append(last[order].double())
            if prompts is tokenized.positive:
                logprob = sl.loss.label_logprob(logits, batch.tokens, batch.label_mask())[order]
        assert row["projection"] == ((sides[0] - sides[1]) @ unit).mean().item()
        assert row["logprob_nats"] == logprob.double().mean().item()
    # Control: the smallest step already moves every one of these.
    moved = table[table.coefficient != 0]
    assert (moved[["degradation_nats", "projection_shift"]] != 0).all(axis=None)


def test_at_the_readout_the_difference_moves_by_twice_the_coefficient(swept: Swept) -> None:
    """Why the two sides are steered oppositely: the same vector on both would cancel."""
    table = swept(layers="2:", coefficients=[0, 1.5]).table
    for _, rows in table.groupby("layer"):
        zero, steered = rows.projection
        assert steered - zero == pytest.approx(2 * 1.5, abs=1e-4)
        assert rows.projection_shift.iloc[1] == pytest.approx(1.5, abs=1e-4)


def test_padding_side_and_batch_size_change_nothing(tiny: Any, pairs: sl.ContrastivePairs) -> None:
    options: dict[str, Any] = {"coefficients": [-1, 2], "n_bootstrap": 20}
    alone = sl.collect_differences(tiny, pairs, batch_size=1)  # without padding
    fitted = sl.fit_directions(alone)
    expected = sl.sweep(tiny, pairs, fitted, batch_size=1, **options).table
    for side in ("left", "right"):
        with padding(tiny, side):
            together = sl.collect_differences(tiny, pairs, batch_size=7)
            found = sl.sweep(tiny, pairs, fitted, batch_size=7, **options).table
        torch.testing.assert_close(together.positive, alone.positive, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.negative, alone.negative, rtol=1e-4, atol=1e-4)
        columns = [c for c in numbers(found) if c not in ("coherence_penalty", "loss")]
        np.testing.assert_allclose(found[columns], expected[columns], rtol=1e-4, atol=1e-4)


def test_logits_are_bit_equal_after_a_sweep_and_after_an_exception_inside_one(
    llama: Any, directions: Directions, swept: Swept
) -> None:
    tokens = torch.tensor([[1, 7, 9, 12, 5]])

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "cells" and done > 0:
            raise InterruptedError

    def fail(activation: torch.Tensor, hook: Any) -> None:
        raise OSError("in the middle of a forward pass")

    with torch.no_grad():
        before = llama(tokens)
        swept(coefficients=[-1, 1])
        with pytest.raises(InterruptedError):
            swept(coefficients=[-1, 1], progress=interrupt)
        with (
            pytest.raises(OSError, match="in the middle"),
            llama.hooks(fwd_hooks=[("blocks.3.hook_resid_post", fail)]),
        ):
            swept(coefficients=[1])
        assert not any(point.fwd_hooks for point in llama.hook_dict.values())
        with suppress(InterruptedError), sl.steer(llama, directions, 4.0):
            assert not torch.equal(llama(tokens), before)
            raise InterruptedError
        assert torch.equal(llama(tokens), before)


def test_continuation_tokens_are_the_labels(llama: Any) -> None:
    prompts = ["you are cheerful the river was", "you are kind it went", "I felt cheerful"]
    against = ["you are gloomy the river was", "you are rude it went", "I felt gloomy"]
    after = [" warm and good", " very good", " so good today"]
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
        [" warm and good", " very good"],
    )
    fitted = sl.fit_directions(sl.collect_differences(llama, pairs))
    options: dict[str, Any] = {"layers": [1], "coefficients": [0, 4]}
    only_after = sl.sweep(llama, pairs, fitted, steered_positions="continuation", **options).table
    assert only_after.projection_shift[1] == 0
    assert only_after.degradation_nats[1] != 0
    everywhere = sl.sweep(llama, pairs, fitted, steered_positions="all", **options).table
    assert everywhere.projection_shift[1] != 0
    assert everywhere.degradation_nats[1] != only_after.degradation_nats[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steered_positions": "last"}, "no continuation"),
        ({"steered_positions": "continuation"}, "no continuation"),
        ({"coefficients": [math.nan]}, "expected a finite number"),
        ({"coefficients": [1.0, math.inf]}, "expected a finite number"),
        ({"coefficients": []}, "at least one"),
        ({"seed": -1}, "seed"),
        ({"n_bootstrap": 1}, "n_bootstrap"),
        ({"margin": math.nan}, "margin"),
        ({"weight": math.inf}, "weight"),
    ],
)
def test_what_has_no_meaning_is_refused(
    options: dict[str, Any], message: str, swept: Swept
) -> None:
    usual: dict[str, Any] = {"layers": [0], "coefficients": [1], "steered_positions": "prompt"}
    swept(**usual)
    with pytest.raises(InputError, match=message):
        swept(**usual | options)


def test_a_prompt_without_any_label_is_refused(llama: Any) -> None:
    """Without BOS a prompt of one word is one token, and nothing predicts it."""
    bos, llama.tokenizer.bos_token = llama.tokenizer.bos_token, None
    one_word, longer = (
        sl.ContrastivePairs.from_lists([f"{word}good", "you are good"], ["bad", "you are bad"])
        for word in ("", "so ")
    )
    try:
        with pytest.raises(InputError, match="pair '1' is a single token"):
            sl.engine.tokenize_pairs(llama, one_word)
        sl.engine.tokenize_pairs(llama, longer)
    finally:
        llama.tokenizer.bos_token = bos


def test_repeated_and_negative_zero_coefficients_are_one(swept: Swept) -> None:
    table = swept(layers=[0], coefficients=[0, -0.0, 1, 1.0]).table
    assert list(table.coefficient) == [0.0, 1.0]


def test_directions_of_another_width_are_refused(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    vectors = torch.nn.functional.normalize(directions.vectors[:, :16], dim=-1)
    with pytest.raises(InputError, match="d_model 16"):
        sl.sweep(llama, pairs, replace(directions, vectors=vectors), coefficients=[1])


def test_overflowing_cell_is_undefined_and_the_rest_is_kept(pairs: sl.ContrastivePairs) -> None:
    """In float16 a step beyond 65504 is infinite."""
    model = bridge(build_llama(dtype=torch.float16), dtype=torch.float16)
    fitted = sl.fit_directions(sl.collect_differences(model, pairs))
    with pytest.warns(RuntimeWarning, match="NaN or inf at coefficient 1e"):
        table = sl.sweep(model, pairs, fitted, layers=[0], coefficients=[1, 1e6, 0]).table
    bad = table[table.coefficient == 1e6].iloc[0]
    assert bad[["projection", "degradation_ci_low"]].isna().all()
    assert bad.coherent == "no"
    good = table[table.coefficient != 1e6].drop(columns=["readout_hook", "left_out_error"])
    assert good.notna().all(axis=None)


def test_tables_have_the_declared_columns_and_provenance(
    pairs: sl.ContrastivePairs, swept: Swept
) -> None:
    result = swept(coefficients=[0, 1], seed=7)
    assert list(result.table.columns) == [column.name for column in COLUMNS["sweep"]]
    assert list(result.layers.columns) == [column.name for column in COLUMNS["layers"]]
    for frame in (result.table, result.layers):
        assert frame.attrs["settings"]["seed"] == 7
        assert frame.attrs["measured_on"] == pairs.fingerprint
        assert frame.attrs["model"]["transformer_lens"]
    undefined = result.layers.filter(
        regex="^(boundary_pos|boundary_neg|predicted|reentry|projection_at)"
    ).columns
    assert len(undefined) == 13
    assert result.layers[undefined].isna().all(axis=None)


def test_coherent_follows_the_interval_of_the_degradation_and_the_budget(swept: Swept) -> None:
    options: dict[str, Any] = {"layers": [1], "coefficients": [-4, 0, 4]}
    table = swept(**options).table
    allowance = -table.baseline_logprob_nats[0] * (1 / 0.99 - 1)
    by_hand = np.select(
        [table.degradation_ci_high <= allowance, table.degradation_ci_low > allowance],
        ["yes", "no"],
        "undecided",
    )
    assert list(table.coherent) == list(by_hand)
    low, mean, high = table.iloc[2][
        ["degradation_ci_low", "degradation_nats", "degradation_ci_high"]
    ]
    assert 0 < low < mean < high
    for budget, expected in (
        (100, "yes"),
        (1.01 * high, "yes"),
        (mean, "undecided"),
        (low / 2, "no"),
    ):
        found = swept(budget=f"nats={float(budget)}", **options).table
        assert list(found.coherent[1:]) == ["yes", expected]


def test_intervals_are_those_of_each_pairs_values_by_group(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    """Every pair's values come from bare hooks; its layer's from the points."""
    groups = [*"aabbcdef"]
    of_groups = sl.ContrastivePairs(
        tuple(replace(pair, group=group) for pair, group in zip(pairs, groups, strict=True))
    )
    options: dict[str, Any] = {"coefficients": [2], "layers": [0], "n_bootstrap": 500, "seed": 3}
    found, apart = (sl.sweep(llama, some, directions, **options) for some in (of_groups, pairs))
    tokenized, hf_model = tokenize_pairs(llama, pairs), build_llama()
    by_pair = [
        cell(
            hf_model,
            [positive.prompt],
            [negative.prompt],
            {i: directions[f"blocks.{i}.hook_resid_post"] for i in range(llama.cfg.n_layers)},
            layer=0,
            coefficient=2,
            position=-1,
            n_layers=llama.cfg.n_layers,
        )
        for positive, negative in zip(tokenized.positive, tokenized.negative, strict=True)
    ]
    for table, name, of_pairs in (
        (found.table, "projection", [values["projection"] for values in by_pair]),
        (found.table, "degradation", [values["degradation_nats"] for values in by_pair]),
        (found.layers, "projection", found.points.along.to_numpy()),
        (found.layers, "separation", found.points.separation.to_numpy()),
    ):
        ends = table.loc[0, [f"{name}_ci_low", f"{name}_ci_high"]]
        by_hand = interval(of_pairs, groups=groups, seed=3, n_bootstrap=500)
        assert list(ends) == pytest.approx(by_hand, abs=1e-3), name
    assert (found.table.n_groups[0], found.table.n_pairs[0]) == (6, 8)
    # Control: pairs of no group are eight groups, and have other intervals.
    assert apart.table.n_groups[0] == 8
    assert apart.table.projection_ci_low[0] != pytest.approx(found.table.projection_ci_low[0])


@pytest.mark.parametrize("group", [None, range(16)], ids=["no group", "each another"])
def test_repeats_make_no_interval_narrower(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions, swept: Swept, group: Any
) -> None:
    twice = sl.ContrastivePairs.from_lists(
        *([getattr(pair, side) for pair in pairs] * 2 for side in ("positive", "negative")),
        group=group,
    )
    options: dict[str, Any] = {"coefficients": [0, 2]}
    with pytest.warns(UserWarning, match="8 of 16 pairs repeat both prompts of others"):
        found = sl.sweep(llama, twice, directions, **options)
    expected = swept(**options)
    for repeated, distinct in ((found.table, expected.table), (found.layers, expected.layers)):
        columns = [name for name in numbers(distinct) if name.endswith(("_low", "_high"))]
        np.testing.assert_allclose(repeated[columns], distinct[columns], rtol=1e-3, atol=1e-4)
    assert found.table.projection_ci_high[0] > found.table.projection_ci_low[0]
    assert (found.table.n_groups == 8).all()


def test_points_are_those_of_the_layer_table(pairs: sl.ContrastivePairs, swept: Swept) -> None:
    result = swept(coefficients=[0])
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


def test_progress_counts_every_cell(swept: Swept) -> None:
    seen: list[tuple[str, int, int]] = []
    swept(layers="0:3", coefficients=[0, 1], progress=lambda *told: seen.append(told))
    assert [told for told in seen if told[0] == "cells"] == [("cells", i, 6) for i in range(7)]
    assert list(dict.fromkeys(what for what, _, _ in seen)) == [
        *("unsteered model: prompts", "checks: hooks", "cells")
    ]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_push_whose_square_overflows_is_not_coherent(
    pairs: sl.ContrastivePairs, dtype: torch.dtype
) -> None:
    """A norm makes finite logits of it, so the budget alone would take it."""
    huge = [1e20, 1e30, 1e38, 1e300]
    model = bridge(build_llama(n_layers=3, dtype=dtype), dtype=dtype)
    directions = sl.fit_directions(sl.collect_differences(model, pairs[:4]))
    settings = {"layers": [1], "budget": "nats=1000", "n_bootstrap": 20}
    with pytest.warns(RuntimeWarning, match="NaN or inf"):
        table = sl.sweep(
            *(model, pairs[:4], directions),
            coefficients=[1.0, *(-c for c in huge), *huge],
            **settings,
        ).table
    assert table.coherent.tolist() == ["yes", *["no"] * 8]
    assert table.degradation_nats.isna().tolist() == [False, *[True] * 8]
    tokens = sl.token_damage(
        model, ["the river was"], directions, layer=1, coefficients=[1.0, *huge]
    )
    assert tokens.groupby("coefficient").kl_nats.count().tolist() == [3, 0, 0, 0, 0]


def test_autocast_around_a_sweep_changes_nothing(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    def run() -> pd.DataFrame:
        return sl.sweep(llama, pairs, directions, layers=[2], coefficients=COEFFICIENTS).table

    tokens = torch.tensor([[1, 4, 5]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        changed, around = llama(tokens), run()
    pd.testing.assert_frame_equal(around, run())
    assert not torch.equal(changed, llama(tokens))  # it does change the model itself


def test_a_default_device_without_numbers_is_refused(
    llama: Any, pairs: sl.ContrastivePairs, directions: Directions
) -> None:
    with torch.device("meta"), pytest.raises(InputError, match="default device"):
        sl.sweep(llama, pairs, directions, coefficients=[1])


@pytest.mark.parametrize("method", ["gradient_mean", "optimised"])
def test_gradients_inside_inference_mode_are_refused(
    llama: Any, pairs: sl.ContrastivePairs, method: str
) -> None:
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        sl.fit(llama, pairs, method=method, layers=[2])
