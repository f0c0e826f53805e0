"""Gradients of the loss and slopes at coefficient 0, against finite differences in float64."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import bridge, build_llama

import steerlens as sl
from steerlens.directions.gradient_rows import gradient_terms
from steerlens.directions.gradients import loss_gradients
from steerlens.engine.batches import make_batches
from steerlens.engine.engine import Engine
from steerlens.engine.plain_loop import plain_cells
from steerlens.engine.slopes import Slopes, label_slopes
from steerlens.engine.tokenization import SteeredPositions, TokenizedPrompt, tokenize_pairs
from steerlens.engine.workload import CellOutput, Cost, Job, Workload
from steerlens.errors import HookError, InputError, ModelError
from steerlens.loss import label_logprob
from steerlens.models.hooks import resid_post
from steerlens.models.loading import inference
from steerlens.tables import COLUMNS

HOOKS = ("blocks.0.hook_mlp_out", resid_post(0), resid_post(1))
SLOPE_HOOKS = (resid_post(0), "blocks.1.hook_mlp_out", resid_post(2))


def states(
    model: Any, prompt: TokenizedPrompt, *, hook: str, step: torch.Tensor, read: str, position: int
) -> tuple[torch.Tensor, float]:
    """The state at `read` and the labels' logprob when `step` is added at `hook`, by bare hooks."""
    (batch,) = make_batches(model, [prompt], 1)
    index = int(batch.places(position)[0])
    found: dict[str, torch.Tensor] = {}

    def add(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        activation = activation.clone()
        activation[0, index] += step
        return activation

    def keep(activation: torch.Tensor, hook: Any) -> None:
        found["state"] = activation[0, index]

    with inference(model), model.hooks(fwd_hooks=[(hook, add), (read, keep)]):
        logits = model(batch.tokens, return_type="logits")
    return found["state"], float(label_logprob(logits, batch.tokens, batch.label_mask())[0])


def loss_of(
    model: Any,
    pair: tuple[TokenizedPrompt, TokenizedPrompt],
    baseline: float,
    *,
    steps: list[torch.Tensor],
    weight: float,
    axis: torch.Tensor | None = None,
    **at: Any,
) -> float:
    """The noref loss of one pair, its baseline held fixed as the stopped gradient has it."""
    hs_pos, logprob = states(model, pair[0], step=steps[0], **at)
    hs_neg, _ = states(model, pair[1], step=steps[1], **at)
    difference = hs_pos - hs_neg
    separation = difference.norm() if axis is None else difference @ axis
    return float(-separation + weight * max(0.0, 0.99 * baseline - logprob) ** 2)


@pytest.mark.parametrize("loss_hook", [None, "blocks.1.hook_resid_post", "own"])
@pytest.mark.parametrize(("with_continuation", "axis"), [(True, None), (False, "pca")])
def test_rows_are_finite_differences_of_the_loss(
    double: Any,
    pairs: sl.ContrastivePairs,
    continued: sl.ContrastivePairs,
    loss_hook: str | None,
    with_continuation: bool,
    axis: str | None,
) -> None:
    given, position = (continued, -1) if with_continuation else (pairs, -2)
    weight, epsilon = 50.0, 1e-5
    options: dict[str, Any] = {"loss_hook": loss_hook, "axis": axis, "batch_size": 3}
    found = loss_gradients(double, given, layers=HOOKS, position=position, **options)
    found = found.with_weight(weight)
    assert found.axis == axis
    frozen = sl.fit(double, given, method="pca", layers=found.loss_hooks, position=position)
    tokenized = tokenize_pairs(double, given)
    generator = torch.Generator().manual_seed(0)
    zero = torch.zeros(32, dtype=torch.float64)
    assert found.all_hook_names[: len(HOOKS)] == HOOKS
    assert not found.positive.requires_grad
    for i in (0, 5):
        pair = tokenized.positive[i], tokenized.negative[i]
        for h, hook in enumerate(HOOKS):
            along = torch.randn(32, dtype=torch.float64, generator=generator)
            at: dict[str, Any] = {"hook": hook, "read": found.loss_hooks[h], "position": position}
            baseline = states(double, pair[0], step=zero, **at)[1]
            at["axis"] = None if axis is None else frozen[found.loss_hooks[h]]
            assert float(found.logprob[i]) == pytest.approx(baseline)
            for rows, side in ((found.positive, 0), (found.negative, 1)):
                losses = []
                for sign in (1, -1):
                    steps = [zero, zero]
                    steps[side] = sign * epsilon * along
                    losses.append(loss_of(double, pair, baseline, steps=steps, weight=weight, **at))
                slope = (losses[0] - losses[1]) / (2 * epsilon)
                assert float(rows[h, i] @ along) == pytest.approx(slope, rel=1e-5, abs=1e-7)
    # Control: the coherence part is there, so the agreement is not that of the separation alone.
    assert bool((found.coherence.norm(dim=-1) > 1e-3).any())


def test_penalty_and_its_slope_at_each_pair(double: Any, continued: sl.ContrastivePairs) -> None:
    """With margin 0.99 the coherence row is 1e-4 * 2 logp * dlogp: twice that for half the gap."""
    found = loss_gradients(double, continued, layers=[0], position=-1)
    twice = loss_gradients(double, continued, layers=[0], position=-1, margin=0.98)
    torch.testing.assert_close(twice.coherence, 2 * found.coherence)
    flat = loss_gradients(double, continued, layers=[0], position=-1, margin=1.0)
    assert not flat.coherence.any()
    assert bool(found.coherence.any())
    with pytest.raises(InputError, match="no weight balances"):
        flat.with_weight("balanced")


def test_a_position_without_a_later_label_is_refused(
    double: Any, pairs: sl.ContrastivePairs, continued: sl.ContrastivePairs
) -> None:
    with pytest.raises(InputError, match="no label comes after position -1"):
        loss_gradients(double, pairs, position=-1)
    with pytest.raises(InputError, match="no label comes after position -1"):
        loss_gradients(double, pairs, position=-1, axis="pca")
    for axis in (None, "pca"):
        last_but_one = loss_gradients(double, pairs, position=-2, axis=axis)
        assert bool((last_but_one.coherence.norm(dim=-1) > 0).all())
    assert bool((loss_gradients(double, continued, position=-1).coherence.norm(dim=-1) > 0).all())


def test_on_an_axis_the_rows_are_that_axis_and_the_penalty_is_the_same(
    double: Any, continued: sl.ContrastivePairs
) -> None:
    """At the loss hook itself: -u of the positive prompt, +u of the negative one, of every pair."""
    options: dict[str, Any] = {"layers": [1], "position": -1, "loss_hook": "own"}
    norm = loss_gradients(double, continued, **options)
    frozen = sl.fit(double, continued, method="lda", layers=[1])
    found = loss_gradients(double, continued, axis=frozen, **options)
    for i, hook in enumerate(found.all_hook_names):
        expected = frozen[hook].expand(8, -1)
        torch.testing.assert_close(found.separation_positive[i], -expected)
        torch.testing.assert_close(found.separation_negative[i], expected)
    torch.testing.assert_close(found.coherence, norm.coherence)
    assert bool(found.coherence.any())
    # By the norm a pair's row is its own difference at length 1.
    difference = sl.collect_differences(double, continued, layers=[1])[resid_post(1)]
    unit = torch.nn.functional.normalize(difference, dim=-1)
    torch.testing.assert_close(norm.separation_negative[0], unit)
    # Signed to the positive side: downhill the positive prompts project further.
    assert float((difference @ frozen[resid_post(1)]).mean()) > 0
    # Without the penalty the mean of r = g_neg - g_pos = 2 u is the axis, and its name is told.
    fitted = sl.fit_directions(found.with_weight(0), method="gradient_mean")
    torch.testing.assert_close(fitted[resid_post(1)], frozen[resid_post(1)])
    assert fitted.method == "gradient_mean+on_lda"
    assert found.forward_equivalents == norm.forward_equivalents
    assert gradient_terms(found).attrs["axis"] == "lda"


def test_an_axis_that_cannot_be_used_is_refused(
    double: Any, continued: sl.ContrastivePairs
) -> None:
    options: dict[str, Any] = {"layers": [0], "position": -1}
    with pytest.raises(InputError, match="fitted from gradients; fit it, and give the Directions"):
        loss_gradients(double, continued, axis="gradient_mean", **options)
    with pytest.raises(InputError, match="no method 'norm'"):
        loss_gradients(double, continued, axis="norm", **options)
    frozen = sl.fit(double, continued, layers=[0])
    with pytest.raises(HookError, match=f"no direction at {resid_post(1)}"):
        loss_gradients(double, continued, axis=frozen, loss_hook=resid_post(1), **options)
    assert loss_gradients(double, continued, axis=frozen, **options).axis == "mean_diff"


def test_the_terms_are_norms_and_cosines(double: Any, continued: sl.ContrastivePairs) -> None:
    found = loss_gradients(double, continued, position=-1).with_weight(3)
    table = gradient_terms(found)
    assert list(table.columns) == [column.name for column in COLUMNS["gradients"]]
    row = table.iloc[1]
    separation, coherence = found.separation_positive[1], found.coherence[1]
    assert row.separation_norm == pytest.approx(float(separation.norm(dim=-1).mean()))
    assert row.coherence_norm == pytest.approx(float(3 * coherence.norm(dim=-1).mean()))
    assert row.coherence_share == pytest.approx(
        row.coherence_norm / (row.coherence_norm + row.separation_norm)
    )
    cosines = torch.nn.functional.cosine_similarity(separation, coherence, dim=-1)
    assert row.cosine == pytest.approx(float(cosines.mean()))
    balanced = gradient_terms(found.with_weight("balanced"))
    assert balanced.coherence_share.tolist() == pytest.approx([0.5] * len(balanced))
    assert balanced.weight.tolist() == pytest.approx(table.balanced_weight.tolist())
    assert balanced.weight.iloc[0] != pytest.approx(balanced.weight.iloc[1])


def test_scores_estimate_the_fisher_information(
    double: Any, continued: sl.ContrastivePairs
) -> None:
    """Along a direction, their mean square is the curvature of the mean KL per token."""
    few = continued[:2]
    found = loss_gradients(double, few, layers=[1], position=-1, n_scores=800, batch_size=8)
    assert found.scores.shape == (1, 1600, 32)
    torch.manual_seed(3)
    along = torch.nn.functional.normalize(torch.randn(32, dtype=torch.float64), dim=0)
    epsilon, curvatures = 1e-2, []
    for prompt in tokenize_pairs(double, few).positive:
        (batch,) = make_batches(double, [prompt], 1)
        index, start = len(prompt.prompt) - 1, len(prompt.prompt)

        def add(activation: torch.Tensor, hook: Any, index: int = index) -> torch.Tensor:
            activation = activation.clone()
            activation[0, index] += epsilon * along
            return activation

        with inference(double):
            plain = double(batch.tokens)[0, start - 1 : -1].log_softmax(-1)
            with double.hooks(fwd_hooks=[(resid_post(1), add)]):
                steered = double(batch.tokens)[0, start - 1 : -1].log_softmax(-1)
        kl = (plain.exp() * (plain - steered)).sum(-1).mean()
        curvatures.append(float(2 * kl / epsilon**2))
    estimate = (found.scores[0] @ along).square().mean()
    assert float(estimate) == pytest.approx(sum(curvatures) / 2, rel=0.1)


def test_an_early_loss_hook_leaves_the_readout_to_itself(pairs: sl.ContrastivePairs) -> None:
    """In a model of five blocks the readout, block 2, comes after a loss hook in block 1."""
    model = bridge(build_llama())
    found = loss_gradients(model, pairs, layers=[0], loss_hook=resid_post(1))
    assert found.all_hook_names == (resid_post(0), resid_post(2))
    assert found.loss_hooks == (resid_post(1), resid_post(2))


def test_the_cost_is_reported(double: Any, continued: sl.ContrastivePairs) -> None:
    """Three blocks: forward 3 + 1, backward 2 * (3 from the labels, 1 + 1 from the loss hook)."""
    hooks = ["blocks.0.hook_mlp_out", resid_post(0)]
    found = loss_gradients(
        double, continued, layers=hooks, loss_hook=resid_post(0), position=-1, batch_size=1
    )
    tokenized = tokenize_pairs(double, continued)
    positive = sum(map(len, tokenized.positive))
    negative = sum(map(len, tokenized.negative))
    check = 2 * 3 * min(map(len, tokenized.positive))
    passes = positive * (3 + 2 * (3 + 1)) + negative * (1 + 2 * 1)
    expected = (passes + check) / (3 * positive)
    assert found.forward_equivalents == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("weight", [-1, math.nan])
def test_a_weight_that_is_none_is_refused(
    double: Any, continued: sl.ContrastivePairs, weight: float
) -> None:
    with pytest.raises(InputError, match="weight"):
        loss_gradients(double, continued, layers=[0], position=-1).with_weight(weight)
    with pytest.raises(InputError, match="weight"):
        sl.fit(double, continued, method="gradient_mean", layers=[0], weight=weight)


def test_old_keywords_are_taken_with_a_warning(double: Any, continued: sl.ContrastivePairs) -> None:
    new = loss_gradients(double, continued, loss_hook="own", position=-1).with_weight(3)
    with pytest.warns(DeprecationWarning, match="with_weight|loss_hook"):
        old = loss_gradients(double, continued, per_layer=True, weight=3, position=-1)  # type: ignore[call-arg]
    assert torch.equal(old.positive, new.positive)
    assert old.loss_hooks == new.loss_hooks


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_hook": "blocks.0.hook_mlp_out"}, HookError, "a block's output"),
        ({"loss_hook": resid_post(0), "layers": [1]}, HookError, "comes before blocks.1"),
        ({"layers": ["blocks.0.hook_mlp_out", "blocks.0.mlp.hook_pre"]}, InputError, "widths"),
        ({"loss_hook": "all"}, HookError, "names 3"),
        ({"margin": math.inf}, InputError, "margin"),
        ({"n_scores": -1}, InputError, "n_scores"),
        ({"position": 40}, InputError, "position 40"),
        ({"layers": "blocks.0.attn.hook_pattern"}, InputError, "residual stream"),
    ],
)
def test_what_has_no_meaning_is_refused(
    double: Any,
    continued: sl.ContrastivePairs,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        loss_gradients(double, continued, **{"position": -1, "layers": [0], **options})


def test_equal_prompts_have_no_separation(llama: Any) -> None:
    """Up to position 4 both prompts are the same tokens: what differs is rounding."""
    words = "walk sun rain soup bread night day kind".split()
    given = sl.ContrastivePairs.from_lists(
        [f"the river was {word} good and so" for word in words],
        [f"the river was {word} bad" for word in words],
    )
    found = loss_gradients(llama, given, layers=[1], position=3)
    assert not found.separation_positive.any()
    assert not found.negative.any()
    with pytest.raises(InputError, match="no weight balances"):
        found.with_weight("balanced")
    with pytest.raises(InputError, match="nothing separates them there"):
        sl.fit_directions(found, method="gradient_mean")
    later = loss_gradients(llama, given, layers=[1], position=5)
    assert bool(later.separation_positive.any())


# Slopes at coefficient 0, along directions


def along(seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(seed)
    return [
        (name, torch.nn.functional.normalize(torch.randn(32, dtype=torch.float64), dim=0))
        for name in SLOPE_HOOKS
    ]


def workload_of(model: Any, pairs: sl.ContrastivePairs, positions: SteeredPositions) -> Workload:
    tokens = tokenize_pairs(model, pairs)
    workload = Engine(model, 3).workload(tokens, position=-1, steered_positions=positions)
    return replace(workload, negative=(), with_kl=True)


def slopes(model: Any, workload: Workload, seed: int = 0, cost: Cost | None = None) -> Slopes:
    return label_slopes(
        Engine(model, cost=cost or Cost()),
        workload.positive,
        [(added,) for added in along()],
        steered_positions=workload.steered_positions,
        seed=seed,
    )


def cell(model: Any, workload: Workload, index: int, coefficient: float) -> CellOutput:
    name, direction = along()[index]
    job = Job(name, direction, (coefficient,), resid_post(2))
    (found,) = plain_cells(Engine(model), workload, job)
    return found


@pytest.mark.parametrize("positions", ["all", "prompt", "continuation", "last"])
def test_slopes_equal_finite_differences(
    double: Any, continued: sl.ContrastivePairs, positions: SteeredPositions
) -> None:
    workload, step = workload_of(double, continued, positions), 1e-4
    found = slopes(double, workload).logprob
    assert not found.requires_grad
    for i in range(len(SLOPE_HOOKS)):
        up, down = (cell(double, workload, i, c).logprob for c in (step, -step))
        expected = (up - down) / (2 * step)
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-7)
        assert expected.abs().max() > 1e-3
    # Control: another direction has another slope.
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_the_curvature_is_that_of_the_mean_divergence(
    double: Any, continued: sl.ContrastivePairs
) -> None:
    """Averaged over many draws of labels, the estimate is the second derivative of the KL."""
    workload, step = workload_of(double, continued, "all"), 1e-3
    # Every pair 20 times in 10 passes: labels are drawn for each of them.
    repeated = sl.ContrastivePairs(
        tuple(replace(pair, id=f"{i} {pair.id}") for i in range(20) for pair in continued)
    )
    often = workload_of(double, repeated, "all")
    draws = torch.cat(
        [slopes(double, often, seed).curvature.unflatten(1, (20, -1)) for seed in range(10)], dim=1
    ).transpose(0, 1)
    for i in range(len(SLOPE_HOOKS)):
        kl = cell(double, workload, i, step).kl
        assert kl is not None
        expected = 2 * kl.nanmean(dim=1) / step**2
        error = draws[:, i].std(dim=0) / len(draws) ** 0.5
        found = draws[:, i].mean(dim=0)
        assert ((found - expected).abs() < 4.5 * error).all()
        # Over all prompts and draws it is known to a few percent.
        assert float(found.mean()) == pytest.approx(float(expected.mean()), rel=0.15)


def test_the_same_seed_draws_the_same_labels(double: Any, continued: sl.ContrastivePairs) -> None:
    workload = workload_of(double, continued, "all")
    first, again, other = (slopes(double, workload, seed) for seed in (1, 1, 2))
    assert torch.equal(first.curvature, again.curvature)
    assert not torch.allclose(first.curvature, other.curvature)
    torch.testing.assert_close(first.logprob, other.logprob)


def test_the_cost_is_a_forward_and_two_backward_passes(
    double: Any, pairs: sl.ContrastivePairs
) -> None:
    workload, cost = workload_of(double, pairs, "all"), Cost()
    slopes(double, workload, cost=cost)
    check = 2 * 3 * workload.positive[0].tokens.shape[1]
    every = sum(batch.tokens.numel() for batch in workload.positive)
    assert cost.blocks == 5 * 3 * every + check


def test_inference_mode_is_refused(double: Any, pairs: sl.ContrastivePairs) -> None:
    workload = workload_of(double, pairs, "all")
    with torch.inference_mode(), pytest.raises(InputError, match="outside of it"):
        slopes(double, workload)
    with torch.inference_mode(), pytest.raises(InputError, match="outside of it"):
        loss_gradients(double, pairs, layers=[1])
    slopes(double, workload)


def test_a_model_whose_label_rows_are_not_alone_is_refused(pairs: sl.ContrastivePairs) -> None:
    """A hook that mixes positions after the last block: gradients of label rows would be wrong."""
    model = bridge(build_llama())
    workload = workload_of(model, pairs, "all")
    slopes(model, workload)

    def mixing(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return activation + activation.mean(dim=1, keepdim=True)

    for name in ("ln_final.hook_in", "unembed.hook_in"):
        with model.hooks(fwd_hooks=[(name, mixing)]):
            with pytest.raises(ModelError, match="gradients cannot be taken"):
                slopes(model, workload)
            with pytest.raises(ModelError, match="gradients cannot be taken"):
                loss_gradients(model, pairs, layers=[1])
    loss_gradients(model, pairs, layers=[1])
