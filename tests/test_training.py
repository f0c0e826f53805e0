"""Training a vector: its gradient against finite differences, and that it does what it is for."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from comparing import gap
from conftest import bridge, build_llama, build_tokenizer

import steerlens as sl
from steerlens.data.items import PreferenceItem, PreferenceItems
from steerlens.directions.fitting import fit
from steerlens.directions.training import Schedule, train_directions
from steerlens.directions.training_step import (
    Push,
    Pushed,
    Side,
    make_side,
    objective_of,
    push_sides,
)
from steerlens.engine.batches import Batch, make_pair_batches
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.errors import HookError, InputError
from steerlens.loss import label_logprob
from steerlens.models.hooks import resid_post
from steerlens.models.loading import inference
from steerlens.tables import COLUMNS

HOOK = resid_post(1)


@pytest.fixture(scope="module")
def items() -> PreferenceItems:
    words = "walk sun rain soup bread night day river it you".split()
    return PreferenceItems(
        tuple(
            PreferenceItem(f"you said the {word} was", " warm and good", " so cold", word)
            for word in words
        )
    )


def everything(positive: Pushed, negative: Pushed) -> torch.Tensor:
    """An objective in which every output of every sign and row has a weight of its own."""
    parts = (positive.readout, negative.readout, positive.logprob, negative.logprob)
    total = torch.zeros((), dtype=torch.float64)
    for i, part in enumerate(parts):
        weights = torch.linspace(0.1 + i, 1 + i, part.numel(), dtype=torch.float64)
        total = total + (part.flatten() * weights).sum()
    return total


def sides_of(
    model: Any, both: tuple[Batch, Batch], hook: str = HOOK, *, sign: int = -1, **options: Any
) -> tuple[Side, Side]:
    return (
        make_side(model, both[0], hook, sign=1),
        make_side(model, both[1], hook, sign=sign, **options),
    )


@pytest.fixture(scope="module")
def both(double: Any, pairs: sl.ContrastivePairs) -> tuple[Batch, Batch]:
    return make_pair_batches(double, tokenize_pairs(double, pairs[:4]), 4)[0]


@pytest.mark.parametrize("hook", ["blocks.0.hook_mlp_out", HOOK])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_gradient_is_that_of_finite_differences(
    double: Any, both: tuple[Batch, Batch], hook: str, sign: int
) -> None:
    sides = sides_of(double, both, hook, sign=sign)
    generator = torch.Generator().manual_seed(0)
    at, along = torch.randn((2, 32), generator=generator, dtype=torch.float64)
    options: dict[str, Any] = {"hook_name": hook, "readout": resid_post(2), "position": -2}

    def push(vector: torch.Tensor) -> Push:
        vector = vector.clone().requires_grad_()
        return push_sides(double, sides, vector, everything, **options)

    epsilon = 1e-5
    slope = (push(at + epsilon * along).loss - push(at - epsilon * along).loss) / (2 * epsilon)
    assert float(push(at).gradient @ along) == pytest.approx(slope, rel=1e-6)


def test_a_step_reads_what_hooks_read(double: Any, both: tuple[Batch, Batch]) -> None:
    seen: list[Pushed] = []

    def keep(positive: Pushed, negative: Pushed) -> torch.Tensor:
        seen.extend((positive, negative))
        return positive.logprob.sum()

    vector = torch.linspace(-1, 1, 32, dtype=torch.float64).requires_grad_()
    options: dict[str, Any] = {"hook_name": HOOK, "readout": resid_post(2), "position": -2}
    push_sides(double, sides_of(double, both), vector, keep, **options)

    def logprob(batch: Batch, coefficient: int) -> torch.Tensor:
        with inference(double), sl.steer(double, {HOOK: vector.detach()}, coefficient):
            logits = double(batch.tokens, return_type="logits", **batch.forward_kwargs)
        return label_logprob(logits, batch.tokens, batch.label_mask())

    for c, sign in enumerate((1, -1)):
        torch.testing.assert_close(seen[0].logprob[c], logprob(both[0], sign))
        torch.testing.assert_close(seen[1].logprob[c], logprob(both[1], -sign))
    torch.testing.assert_close(seen[0].unsteered, logprob(both[0], 0))


def test_a_side_without_labels_is_run_to_the_readout_alone(
    double: Any, both: tuple[Batch, Batch]
) -> None:
    """The same reading and gradient, no logprob; and the loss alone without a gradient."""
    vector = torch.linspace(-1, 1, 32, dtype=torch.float64)
    results, negatives = [], []

    def objective(positive: Pushed, negative: Pushed) -> torch.Tensor:
        negatives.append(negative)
        return (positive.readout - negative.readout).square().sum() + positive.logprob.sum()

    options: dict[str, Any] = {"hook_name": HOOK, "readout": resid_post(1), "position": -2}
    for with_labels in (True, False):
        sides = sides_of(double, both, with_labels=with_labels)
        push = partial(push_sides, double, sides, objective=objective, **options)
        pushed = push(vector.clone().requires_grad_())
        alone = push(vector, with_gradient=False)
        assert alone.loss == pytest.approx(pushed.loss)
        assert not alone.gradient.any()
        assert bool(negatives[-1].logprob.isnan().all()) != with_labels
        results.append(pushed)
    assert results[0].loss == pytest.approx(results[1].loss)
    torch.testing.assert_close(results[0].gradient, results[1].gradient)
    assert bool(results[0].gradient.any())


def held_out(trained: sl.directions.Trained) -> pd.DataFrame:
    history = trained.history
    return history[history.part == "held_out"]


@pytest.mark.parametrize("objective", ["promotion", "preference"])
def test_training_on_continuations_moves_the_preference_both_ways(
    llama: Any, pairs: sl.ContrastivePairs, items: PreferenceItems, objective: str
) -> None:
    trained = train_directions(
        *(llama, pairs),
        layers=[1],
        objective=objective,
        items=items[:8],
        schedule=Schedule(examples_per_step=2, step_size=0.05),
    )
    vector = trained.directions[HOOK] * trained.norms[HOOK]
    none, up, down = (
        np.mean([gap(llama, item.prompt, vector, sign) for item in items[8:]])
        for sign in (0, 1, -1)
    )
    assert up - none > 0.05
    assert none - down > 0.05
    assert trained.directions.method == f"optimised_{objective}"
    losses = held_out(trained).loss
    assert losses.min() < losses.iloc[0]
    # There are no pairs, so no difference either.
    assert bool(trained.history[["separation", "projection", "angle_deg"]].isna().all(axis=None))
    assert bool(trained.history.degradation_nats.notna().all())


def test_the_reference_loss_separates_the_pairs_within_the_boundary(
    llama: Any, many: sl.ContrastivePairs
) -> None:
    options: dict[str, Any] = {
        "layers": [1],
        "schedule": Schedule(examples_per_step=4, step_size=0.02),
    }
    trained = train_directions(llama, many, **options)
    directions, norm = trained.directions, trained.norms[HOOK]
    assert directions.method == "optimised"
    table = sl.sweep(llama, many, directions, coefficients=[-norm, 0, norm], n_bootstrap=50).table
    projections = table.projection.tolist()
    assert projections[0] < projections[1] < projections[2]
    # The penalty is steep: what it costs stays near the 1% of the baseline that is permitted.
    baseline = table.baseline_logprob_nats[0]
    assert table.degradation_nats.abs().max() < 0.05 * abs(baseline)
    again = train_directions(llama, many, **options)
    torch.testing.assert_close(again.directions[HOOK], directions[HOOK])
    other = train_directions(llama, many, seed=1, **options)
    assert not torch.allclose(other.directions[HOOK], directions[HOOK])
    # The readout keeps the axis that was frozen.
    frozen = sl.fit_directions(sl.collect_differences(llama, many, layers=[1]), method="pca")
    torch.testing.assert_close(directions[resid_post(2)], frozen[resid_post(2)])


# The axis


AXIS, ACROSS = torch.eye(16)[:2]
FIRST = resid_post(0)


@pytest.fixture(scope="module")
def planted() -> tuple[Any, sl.ContrastivePairs]:
    """Blocks that add nothing, and logits to which dimension 1 does a fifth of what 0 does.

    The last words' differences are 2 in dimension 0, and 0.6 or -0.3 in dimension 1, where they
    sum to 0: dimension 0 is the PCA axis.
    """
    model = build_llama(n_layers=3, hidden_size=16)
    tokenizer = build_tokenizer()
    words = {"cheerful": 0.6, "kind": -0.3, "good": -0.3}
    others = ("gloomy", "rude", "bad")
    openings = ("the day was", "I felt so", "the river is", "you said it")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(weight.ndim == 1)  # the norms alone are left
        model.model.embed_tokens.weight[:, 2] = 10.0  # so that the norm's divisor hardly changes
        for (word, across), other in zip(words.items(), others, strict=True):
            for text, sign in ((word, 1.0), (other, -1.0)):
                index = tokenizer.convert_tokens_to_ids(text)
                model.model.embed_tokens.weight[index, :2] = sign * torch.tensor([1.0, across / 2])
        # The labels' own logits are 0: what the others gain, whichever sign, the labels lose.
        gain = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat_interleave(20)
        model.lm_head.weight[80:, 0] = gain
        model.lm_head.weight[80:, 1] = 0.2 * gain.roll(20)
    pairs = sl.ContrastivePairs.from_lists(
        [f"{opening} {word}" for opening in openings for word in words],
        [f"{opening} {other}" for opening in openings for other in others],
    )
    return bridge(model, tokenizer), pairs


def loss_at(
    model: Any, pairs: sl.ContrastivePairs, axis: torch.Tensor | None, vector: torch.Tensor
) -> float:
    (both,) = make_pair_batches(model, tokenize_pairs(model, pairs), len(pairs))
    sides = sides_of(model, both, FIRST, with_labels=False)
    objective = objective_of("reference", axis)
    at: dict[str, Any] = {"hook_name": FIRST, "readout": FIRST, "position": -1}
    return push_sides(model, sides, vector, objective, with_gradient=False, **at).loss


def test_a_push_across_the_axis_pays_by_the_norm_and_not_on_the_axis(
    planted: tuple[Any, sl.ContrastivePairs],
) -> None:
    loss = partial(loss_at, *planted)
    # Differences (2, 0.6), (2, -0.3), (2, -0.3); pushed by 3 across, 6 more in dimension 1.
    norms = [(4 + 0.6**2) ** 0.5, 2 * (4 + 0.3**2) ** 0.5]
    turned = [(4 + 6.6**2) ** 0.5, 2 * (4 + 5.7**2) ** 0.5]
    assert loss(None, 0 * ACROSS) == pytest.approx(-sum(norms) / 3)
    assert loss(None, 3 * ACROSS) == pytest.approx(-sum(turned) / 3)
    # Minus the projections at c = +1 and, the other way, at -1: -2 + 2, whatever lies across.
    assert loss(AXIS, 0 * ACROSS) == pytest.approx(0, abs=1e-6)
    assert loss(AXIS, 3 * ACROSS) == pytest.approx(0, abs=1e-6)
    # Control: along the axis it pays, -(2 + 1) + (2 - 1), where nothing is lost yet.
    assert loss(AXIS, 0.5 * AXIS) == pytest.approx(-2)


def test_trained_by_the_norm_a_vector_turns_the_difference_away_and_on_the_axis_it_does_not(
    planted: tuple[Any, sl.ContrastivePairs],
) -> None:
    model, pairs = planted
    schedule = Schedule(max_epochs=60, patience=60, step_size=0.04, examples_per_step=12)
    options: dict[str, Any] = {"layers": [0], "schedule": schedule}
    on_axis = train_directions(model, pairs, **options)
    by_norm = train_directions(model, pairs, axis=None, **options)
    assert (on_axis.directions.method, by_norm.directions.method) == (
        "optimised",
        "optimised+on_norm",
    )
    starts, turned = held_out(by_norm).iloc[0], held_out(by_norm).iloc[-1]
    held = held_out(on_axis).iloc[-1]
    # Both separate further, at about the 1% of the logprob (-log 160) that is permitted.
    assert turned.separation > held.separation + 3 > starts.separation + 5
    assert max(turned.degradation_nats, held.degradation_nats) < 0.015 * math.log(160)
    # But one difference points elsewhere, and the other where it did.
    assert starts.angle_deg < 20
    assert turned.angle_deg > 60
    assert held.angle_deg < starts.angle_deg
    assert held.projection > turned.projection + 1
    assert abs(float(by_norm.directions[FIRST] @ ACROSS)) > 0.9
    assert float(on_axis.directions[FIRST] @ AXIS) > 0.99
    # Each wins on the loss that it was trained by, held against the other.
    away, along = (t.directions[FIRST] * t.norms[FIRST] for t in (by_norm, on_axis))
    assert loss_at(model, pairs, None, away) < loss_at(model, pairs, None, along) - 3
    assert loss_at(model, pairs, AXIS, along) < loss_at(model, pairs, AXIS, away) - 1


def test_the_axis_may_be_directions_or_any_method_of_differences(
    llama: Any, many: sl.ContrastivePairs
) -> None:
    options: dict[str, Any] = {"layers": [1], "schedule": Schedule(max_epochs=1)}
    by_name = train_directions(llama, many, axis="mean_diff", **options)
    frozen = sl.fit(llama, many, layers=[1])
    given = train_directions(llama, many, axis=frozen, **options)
    assert torch.equal(given.directions.vectors, by_name.directions.vectors)
    assert given.directions.method == by_name.directions.method == "optimised+on_mean_diff"
    pd.testing.assert_frame_equal(given.history, by_name.history)
    assert torch.equal(given.directions[resid_post(2)], frozen[resid_post(2)])
    named = sl.fit(llama, many, method="optimised+on_mean_diff", layers=[1])
    assert named.method == "optimised+on_mean_diff"
    with pytest.raises(InputError, match="fitted from gradients; fit it, and give the Directions"):
        train_directions(llama, many, axis="gradient_mean", **options)
    elsewhere = sl.fit(llama, many, layers=[4])
    with pytest.raises(HookError, match=r"no direction at blocks.2.hook_resid_post"):
        train_directions(llama, many, axis=elsewhere, **options)
    narrow = replace(frozen, vectors=torch.eye(2)[:, :2], weights_fingerprint="unknown")
    with pytest.raises(InputError, match="d_model 2 and the model 32"):
        train_directions(llama, many, axis=narrow, **options)


def test_the_history_is_what_a_sweep_measures(llama: Any, many: sl.ContrastivePairs) -> None:
    """Its first row that of the unsteered model, a step's row that of the vector before it."""
    schedule = Schedule(max_epochs=2, examples_per_step=20)
    trained = train_directions(llama, many, layers=[1], schedule=schedule)
    history = trained.history
    assert list(history.columns) == [column.name for column in COLUMNS["training"]]
    steps = int((history.part == "train").sum()) // 2
    assert held_out(trained).step.tolist() == [0, steps, 2 * steps]
    assert history[history.part == "train"].step.tolist() == [*range(2 * steps)]
    assert held_out(trained).n_examples.tolist() == [4, 4, 4]
    last = held_out(trained).loc[lambda rows: rows.loss.idxmin()]
    assert last.vector_norm == pytest.approx(trained.norms[HOOK])
    order = np.random.default_rng(0).permutation(20)
    chosen = [many[int(i)] for i in sorted(order[:4])]
    few = sl.ContrastivePairs(tuple(chosen), "few")
    cells = sl.sweep(
        *(llama, few, trained.directions), coefficients=[0, trained.norms[HOOK]], n_bootstrap=50
    ).table
    first = held_out(trained).iloc[0]
    for row, (_, cell) in zip((first, last), cells.iterrows(), strict=True):
        for name in ("separation", "projection", "degradation_nats"):
            assert row[name] == pytest.approx(cell[name], abs=1e-3)
    # The angles of the unsteered differences, by hand.
    differences = sl.collect_differences(llama, few, layers=[2])[resid_post(2)]
    axis = trained.directions[resid_post(2)]
    cosines = torch.nn.functional.cosine_similarity(differences, axis[None], dim=-1)
    assert first.angle_deg == pytest.approx(float(cosines.acos().rad2deg().mean()), abs=0.1)


def test_no_group_is_trained_on_and_held_out(llama: Any, many: sl.ContrastivePairs) -> None:
    """Groups of 1, 3, 4, 5 and 7 pairs: what is held out is one of them, whole."""
    of = np.repeat(np.arange(5), [1, 3, 4, 5, 7])
    settings: dict[str, Any] = {"layers": [1], "schedule": Schedule(max_epochs=1), "seed": 1}
    sizes = {}
    for n_groups in (5, 4):
        numbers = np.minimum(of, n_groups - 1)
        grouped = tuple(
            replace(pair, group=f"persona {g}") for pair, g in zip(many, numbers, strict=True)
        )
        trained = train_directions(llama, sl.ContrastivePairs(grouped), **settings)
        sizes[n_groups] = set(held_out(trained).n_examples)
    drawn = int(np.random.default_rng(1).permutation(5)[0])
    assert sizes[5] == {[1, 3, 4, 5, 7][drawn]} != {4}
    # Four groups have no fifth: a fifth of the pairs.
    assert sizes[4] == {4}


def test_training_stops_early(llama: Any, many: sl.ContrastivePairs) -> None:
    seen: list[tuple[str, int, int]] = []
    trained = train_directions(
        *(llama, many),
        layers=[1],
        schedule=Schedule(max_epochs=40, patience=1, step_size=0.5),
        progress=lambda *told: seen.append(told),
    )
    losses = held_out(trained).loss.tolist()[1:]
    n_epochs = len(losses)
    assert 2 <= n_epochs < 40
    # One call an epoch; the last says that those to come are spared.
    done = [*range(n_epochs), 40]
    assert [told for told in seen if told[0] == "training: epochs"] == [
        ("training: epochs", i, 40) for i in done
    ]
    assert losses[-1] >= min(losses[:-1])


def test_fit_takes_every_kind_of_method(
    llama: Any, pairs: sl.ContrastivePairs, items: PreferenceItems
) -> None:
    assert fit(llama, pairs, layers=[1]).method == "mean_diff"
    assert fit(llama, pairs, method="gradient_svd", layers=[1]).position == -2
    assert fit(llama, pairs, method="fisher_pullback", layers=[1]).method == "fisher_pullback"
    ended = sl.ContrastivePairs(
        tuple(replace(pair, continuation=" the sun") for pair in pairs), "ended"
    )
    assert fit(llama, ended, method="gradient_svd", layers=[1]).position == -1
    trained = fit(llama, pairs, method="optimised_preference", layers=[1], items=items)
    assert trained.method == "optimised_preference"


def test_what_cannot_be_trained_is_refused(llama: Any, pairs: sl.ContrastivePairs) -> None:
    with pytest.raises(InputError, match="no objective 'loss'"):
        train_directions(llama, pairs, layers=[1], objective="loss")
    with pytest.raises(InputError, match="give items"):
        train_directions(llama, pairs, layers=[1], objective="promotion")
    with pytest.raises(InputError, match="at least 5; got 4"):
        train_directions(llama, pairs[:4], layers=[1])
    for name, bad in (("examples_per_step", 0), ("max_epochs", 0), ("step_size", 0)):
        with pytest.raises(InputError, match=name):
            Schedule(**{name: bad})
    with pytest.raises(InputError, match="fitted from training"):
        sl.fit_directions(sl.collect_differences(llama, pairs, layers=[1]), method="optimised")


def test_old_keywords_are_taken_with_a_warning(llama: Any, pairs: sl.ContrastivePairs) -> None:
    with pytest.warns(DeprecationWarning, match=r"max_epochs=1.*schedule=Schedule\(max_epochs=1\)"):
        old = train_directions(llama, pairs, layers=[1], max_epochs=1)  # type: ignore[call-arg]
    new = train_directions(llama, pairs, layers=[1], schedule=Schedule(max_epochs=1))
    assert torch.equal(old.directions.vectors, new.directions.vectors)
