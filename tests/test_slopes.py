"""Slopes and curvature at coefficient 0, against finite differences in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import bridge, build_gpt2, build_llama

import steerlens as sl
from steerlens.directions.gradients import loss_gradients
from steerlens.engine import resume as passes
from steerlens.engine import slopes as slopes_room
from steerlens.engine.engine import Engine
from steerlens.engine.plain_loop import plain_cells
from steerlens.engine.slopes import Slopes, label_slopes
from steerlens.engine.tokenization import SteeredPositions, tokenize_pairs
from steerlens.engine.workload import CellOutput, Cost, Job, Workload
from steerlens.errors import InputError, ModelError
from steerlens.models.hooks import resid_post

HOOKS = (resid_post(0), "blocks.1.hook_mlp_out", resid_post(2))


@pytest.fixture(scope="module")
def double() -> Any:
    # GPT-2, as the Llama of transformers norms in float32 whatever its weights are.
    return bridge(build_gpt2().double(), dtype=torch.float64)


@pytest.fixture(scope="module")
def continued(pairs: sl.ContrastivePairs) -> sl.ContrastivePairs:
    after = ["warm and good", "so cold", "very bad soup", "rain", "a good day", "so", "kind", "by"]
    return sl.ContrastivePairs.from_lists(
        [p.positive for p in pairs], [p.negative for p in pairs], after
    )


def along(seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(seed)
    return [
        (name, torch.nn.functional.normalize(torch.randn(32, dtype=torch.float64), dim=0))
        for name in HOOKS
    ]


def workload_of(model: Any, pairs: sl.ContrastivePairs, positions: SteeredPositions) -> Workload:
    tokens = tokenize_pairs(model, pairs)
    workload = Engine(model, 3).workload(tokens, position=-1, steered_positions=positions)
    return replace(workload, negative=(), with_kl=True)


def slopes(model: Any, workload: Workload, seed: int = 0, cost: Cost | None = None) -> Slopes:
    return label_slopes(
        model,
        workload.positive,
        along(),
        steered_positions=workload.steered_positions,
        seed=seed,
        cost=cost or Cost(),
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
    for i in range(len(HOOKS)):
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
    draws = torch.stack([slopes(double, workload, seed).curvature for seed in range(200)])
    for i in range(len(HOOKS)):
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


def test_weights_are_as_before_and_get_no_gradient(
    pairs: sl.ContrastivePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_model = build_llama()
    frozen = next(hf_model.parameters())
    frozen.requires_grad_(False)
    model = bridge(hf_model)
    before = [p.requires_grad for p in hf_model.parameters()]
    assert len(set(before)) == 2
    workload = workload_of(model, pairs, "all")
    found = slopes(model, workload)
    assert [p.requires_grad for p in hf_model.parameters()] == before
    assert all(p.grad is None for p in hf_model.parameters())
    assert not found.logprob.requires_grad
    monkeypatch.setattr(passes, "_blocks_skipped", _failing)
    with pytest.raises(RuntimeError, match="shapes"):
        slopes(model, workload)
    assert [p.requires_grad for p in hf_model.parameters()] == before


def _failing(*args: Any) -> Any:
    raise RuntimeError("shapes do not fit")


def test_the_cost_is_a_forward_and_two_backward_passes(
    double: Any, pairs: sl.ContrastivePairs
) -> None:
    workload, cost = workload_of(double, pairs, "all"), Cost()
    slopes(double, workload, cost=cost)
    check = 2 * 3 * workload.positive[0].tokens.shape[1]
    every = sum(batch.tokens.numel() for batch in workload.positive)
    assert cost.blocks == 5 * 3 * every + check


def test_out_of_memory_runs_halves(
    double: Any, pairs: sl.ContrastivePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The label slopes are the same; the sampled labels of the curvature are drawn anew."""
    workload = workload_of(double, pairs, "all")
    expected = slopes(double, workload).logprob
    real, sizes = slopes_room.run_from, []

    def too_large(model: Any, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        sizes.append(len(tokens))
        if len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(model, tokens, *args, **kwargs)

    monkeypatch.setattr(slopes_room, "run_from", too_large)
    with pytest.warns(RuntimeWarning, match="going on with 1 prompts"):
        torch.testing.assert_close(slopes(double, workload).logprob, expected)
    assert max(sizes) == 3
    monkeypatch.setattr(slopes_room, "run_from", lambda *a, **k: too_large(a[0], torch.zeros(9, 1)))
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(RuntimeWarning, match="1 prompts"):
        slopes(double, workload)


def test_inference_mode_is_refused(double: Any, pairs: sl.ContrastivePairs) -> None:
    workload = workload_of(double, pairs, "all")
    with torch.inference_mode(), pytest.raises(InputError, match="outside of it"):
        slopes(double, workload)
    with torch.inference_mode(), pytest.raises(InputError, match="outside of it"):
        loss_gradients(double, pairs, layers=[1])
    slopes(double, workload)


def test_a_model_whose_label_rows_are_not_alone_is_refused(
    pairs: sl.ContrastivePairs,
) -> None:
    """A hook that mixes positions after the last block: gradients of label rows would be wrong."""
    model = bridge(build_llama())
    workload = workload_of(model, pairs, "all")
    slopes(model, workload)

    def mixing(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return activation + activation.mean(dim=1, keepdim=True)

    for name in ("ln_final.hook_in", "unembed.hook_in"):
        with (
            model.hooks(fwd_hooks=[(name, mixing)]),
            pytest.raises(ModelError, match="gradients cannot be taken"),
        ):
            slopes(model, workload)
        with (
            model.hooks(fwd_hooks=[(name, mixing)]),
            pytest.raises(ModelError, match="gradients cannot be taken"),
        ):
            loss_gradients(model, pairs, layers=[1])
    loss_gradients(model, pairs, layers=[1])
