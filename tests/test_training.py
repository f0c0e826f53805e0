"""Training a vector: its gradient against finite differences, and that it does what it is for."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import steerlens as sl
from steerlens.data.items import PreferenceItem, PreferenceItems
from steerlens.directions.fitting import fit
from steerlens.directions.training import (
    Pushed,
    Schedule,
    Side,
    make_side,
    push_sides,
    train_directions,
)
from steerlens.engine.batches import Batch, make_pair_batches
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.errors import InputError
from steerlens.loss import label_logprob
from steerlens.models.hooks import resid_post
from steerlens.models.loading import inference

HOOK = resid_post(1)


@pytest.fixture(scope="module")
def items() -> PreferenceItems:
    words = "walk sun rain soup bread night day river it you".split()
    return PreferenceItems(
        tuple(
            PreferenceItem(f"you said the {word} was", "warm and good", "so cold", word)
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

    def loss(vector: torch.Tensor) -> tuple[float, torch.Tensor]:
        vector = vector.clone().requires_grad_()
        return push_sides(double, sides, vector, everything, **options)

    epsilon = 1e-5
    slope = (loss(at + epsilon * along)[0] - loss(at - epsilon * along)[0]) / (2 * epsilon)
    assert float(loss(at)[1] @ along) == pytest.approx(slope, rel=1e-6)


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
        loss, gradient = push(vector.clone().requires_grad_())
        alone, none = push(vector, with_gradient=False)
        assert alone == pytest.approx(loss)
        assert not none.any()
        assert bool(negatives[-1].logprob.isnan().all()) != with_labels
        results.append((loss, gradient))
    assert results[0][0] == pytest.approx(results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert bool(results[0][1].any())


def gaps(model: Any, items: PreferenceItems, vector: torch.Tensor, sign: float) -> torch.Tensor:
    found = []
    for text in ("positive", "negative"):
        values = []
        for item in items:
            prompt = sl.engine.tokenize_prompt(model, item.prompt, getattr(item, text))
            ids = torch.tensor([prompt.prompt + prompt.continuation])
            mask = torch.zeros_like(ids, dtype=torch.bool)
            mask[:, len(prompt.prompt) :] = True
            with inference(model), sl.steer(model, {HOOK: vector}, sign):
                logits = model(ids, return_type="logits")
            values.append(label_logprob(logits, ids, mask))
        found.append(torch.cat(values))
    return found[0] - found[1]


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
    none, up, down = (gaps(llama, items[8:], vector, sign).mean() for sign in (0, 1, -1))
    assert float(up - none) > 0.05
    assert float(none - down) > 0.05
    assert trained.directions.method == f"optimised_{objective}"
    history = trained.history
    assert history.validation_loss.min() < history.validation_loss.iloc[0] or len(history) == 3


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
    # The readout keeps the direction that was frozen.
    frozen = sl.fit_directions(sl.collect_differences(llama, many, layers=[1]))
    torch.testing.assert_close(directions[resid_post(2)], frozen[resid_post(2)])


def test_training_stops_early(llama: Any, many: sl.ContrastivePairs) -> None:
    seen: list[tuple[str, int, int]] = []
    trained = train_directions(
        *(llama, many),
        layers=[1],
        schedule=Schedule(max_epochs=40, patience=1, step_size=0.5),
        progress=lambda *told: seen.append(told),
    )
    n_epochs = len(trained.history)
    assert 2 <= n_epochs < 40
    # One call an epoch; the last says that those to come are spared.
    done = [*range(n_epochs), 40]
    assert [told for told in seen if told[0] == "training: epochs"] == [
        ("training: epochs", i, 40) for i in done
    ]
    losses = trained.history.validation_loss.tolist()
    assert losses[-1] >= min(losses[:-1])


def test_fit_takes_every_kind_of_method(
    llama: Any, pairs: sl.ContrastivePairs, items: PreferenceItems
) -> None:
    assert fit(llama, pairs, layers=[1]).method == "mean_diff"
    assert fit(llama, pairs, method="gradient_svd", layers=[1]).position == -2
    assert fit(llama, pairs, method="fisher_pullback", layers=[1]).method == "fisher_pullback"
    ended = sl.ContrastivePairs(
        tuple(replace(pair, continuation="the sun") for pair in pairs), "ended"
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
