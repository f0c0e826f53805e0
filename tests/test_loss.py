"""The losses against hand-computed numbers, and each statement about their signs."""

import math

import pytest
import torch
from conftest import bridge, build_llama
from hypothesis import given, settings
from hypothesis import strategies as st

import steerlens as sl
from steerlens.engine.batches import make_batches
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.errors import InputError
from steerlens.loss import (
    Budget,
    coherence_hinge,
    coherence_penalty,
    ordering_penalty,
    preference_loss,
    promotion_loss,
    total_variation_barrier,
)

# Differences (3, 4) and (0, 1): norms 5 and 1.
HS_POS = [[3.0, 4.0], [0.0, 0.0]]
HS_NEG = [[0.0, 0.0], [0.0, -1.0]]
LOGP = [-2.0, -4.0]

logprobs = st.lists(st.floats(-20, -0.01), min_size=1, max_size=8)


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_noref_by_hand() -> None:
    hs_pos, hs_neg, logp = tensor(HS_POS), tensor(HS_NEG), tensor(LOGP)
    result = sl.loss.contrastive_steering_loss_noref(hs_pos, hs_neg, logp)
    assert result.separation.item() == pytest.approx(-(5 + 1) / 2)
    assert result.coherence_penalty.item() == pytest.approx((2**2 + 4**2) / 2)
    assert result.loss.item() == pytest.approx(-3 + 10)
    result.loss.backward()
    # Half of each pair's own gradient, as the loss is a mean over two pairs.
    torch.testing.assert_close(logp.grad, torch.tensor([-200.0, -400.0]).double())
    torch.testing.assert_close(hs_pos.grad, torch.tensor([[-0.3, -0.4], [0.0, -0.5]]).double())
    torch.testing.assert_close(hs_neg.grad, -hs_pos.grad)


def test_reference_by_hand() -> None:
    hs_pos, hs_neg, logp = tensor(HS_POS), tensor(HS_NEG), tensor([-2.5, -3.9])
    direction, baseline = tensor([0.6, 0.8]), tensor(LOGP)
    result = sl.loss.contrastive_steering_loss(hs_pos, hs_neg, logp, direction, baseline)
    # Projections 3 * 0.6 + 4 * 0.8 = 5 and 0.8; the second pair is better than 99% of its baseline.
    assert result.separation.item() == pytest.approx(-(5 + 0.8) / 2)
    assert result.coherence_penalty.item() == pytest.approx(1e4 * (2.5 - 1.98) ** 2 / 2)
    assert result.loss.item() == pytest.approx(-2.9 + 1352)
    result.loss.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([-1e4 * 0.52, 0.0]).double())
    torch.testing.assert_close(hs_pos.grad, torch.tensor([[-0.3, -0.4]] * 2).double())
    # The baseline and the direction are frozen.
    assert direction.grad is None
    assert baseline.grad is None


def test_either_form_takes_the_axis_or_the_norm() -> None:
    """Turned from (3, 4) to (0, 6): the norm gains, what lies along (0.6, 0.8) does not."""
    logp, axis, zeros = tensor([-2.0]), tensor([0.6, 0.8]), tensor([[0.0, 0.0]])
    found = {}
    for name, difference in (("as it is", [[3.0, 4.0]]), ("turned", [[0.0, 6.0]])):
        for along in (None, axis):
            noref = sl.loss.contrastive_steering_loss_noref(
                tensor(difference), zeros, logp, direction=along
            )
            against = sl.loss.contrastive_steering_loss(
                tensor(difference), zeros, logp, along, logp
            )
            assert noref.separation.item() == against.separation.item()
            assert noref.coherence_penalty.item() == pytest.approx(4)
            found[name, along is None] = noref.separation.item()
    assert [found["as it is", True], found["turned", True]] == pytest.approx([-5, -6])
    assert [found["as it is", False], found["turned", False]] == pytest.approx([-5, -4.8])
    noref.loss.backward()
    assert axis.grad is None


@given(logprobs)
def test_margin_times_baseline_lies_above_so_the_relu_is_always_active(values: list[float]) -> None:
    logp = tensor(values)
    assert bool((0.99 * logp > logp).all())
    zeros = torch.zeros(len(values), 3, dtype=torch.float64)
    result = sl.loss.contrastive_steering_loss_noref(zeros, zeros, logp, weight=1.0)
    by_hand = (0.01 * logp.detach().abs()).square().mean()
    assert result.coherence_penalty.item() == pytest.approx(float(by_hand), rel=1e-9)
    assert result.coherence_penalty.item() > 0


@given(logprobs)
def test_penalty_of_a_pair_is_its_squared_logprob(values: list[float]) -> None:
    for value in values:
        logp = tensor([value])
        penalty = coherence_penalty(logp, logp.detach()).item()
        assert penalty == pytest.approx(value**2, rel=1e-9)


@given(logprobs)
def test_derivative_of_a_pair_is_200_logprob(values: list[float]) -> None:
    logp = tensor(values)
    coherence_penalty(logp, logp.detach()).backward()
    expected = 200 * logp.detach() / len(values)
    torch.testing.assert_close(logp.grad, expected, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize(("margin", "vanishes"), [(0.99, False), (1.0, True), (1.01, True)])
def test_gradient_vanishes_from_margin_1(margin: float, vanishes: bool) -> None:
    logp = tensor(LOGP)
    coherence_penalty(logp, logp.detach(), margin=margin).backward()
    assert bool((logp.grad == 0).all()) is vanishes


def test_mask_keeps_pairs_of_the_penalty_only() -> None:
    hs_pos, hs_neg, logp = tensor(HS_POS), tensor(HS_NEG), tensor(LOGP)
    masked = sl.loss.contrastive_steering_loss_noref(
        hs_pos, hs_neg, logp, mask=torch.tensor([False, True])
    )
    assert masked.coherence_penalty.item() == pytest.approx(16)
    assert masked.separation.item() == pytest.approx(-3)
    nothing = sl.loss.contrastive_steering_loss_noref(
        hs_pos, hs_neg, logp, mask=torch.tensor([False, False])
    )
    assert math.isnan(nothing.coherence_penalty.item())


def test_float32_agrees_with_float64() -> None:
    wide = sl.loss.contrastive_steering_loss_noref(tensor(HS_POS), tensor(HS_NEG), tensor(LOGP))
    narrow = sl.loss.contrastive_steering_loss_noref(
        tensor(HS_POS).float(), tensor(HS_NEG).float(), tensor(LOGP).float()
    )
    assert narrow.loss.item() == pytest.approx(wide.loss.item(), rel=1e-4)


# The other forms


def penalty(logp: torch.Tensor, baseline: torch.Tensor, **options: float) -> torch.Tensor:
    nothing = torch.zeros((len(logp), 2), dtype=torch.float64)
    found = sl.loss.contrastive_steering_loss(
        nothing, nothing, logp, nothing[0], baseline, **options
    )
    return found.coherence_penalty


@given(logprobs)
def test_the_margin_demands_an_improvement_and_the_tolerance_permits_a_loss(
    values: list[float],
) -> None:
    baseline = tensor(values)
    worse, better = baseline / 0.991, baseline * 0.989
    mean_square = baseline.square().mean().item()
    assert penalty(baseline, baseline).item() == pytest.approx(1e4 * 0.01**2 * mean_square)
    assert penalty(better, baseline).item() == 0
    assert penalty(baseline, baseline, tolerance=0.01).item() == 0
    assert penalty(worse, baseline, tolerance=0.01).item() == 0
    # Control: beyond the tolerance it is positive.
    assert penalty(baseline / 0.98, baseline, tolerance=0.01).item() > 0


def test_tolerance_by_hand() -> None:
    """-2 / 0.8 = -2.5 is permitted; -2.6 lies 0.1 below it."""
    logp = tensor([-2.6])
    found = penalty(logp, tensor([-2.0]), tolerance=0.2)
    assert found.item() == pytest.approx(1e4 * 0.1**2)
    found.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([-2e4 * 0.1]).double())
    for tolerance in (-0.1, 1.0, math.nan):
        with pytest.raises(InputError, match="tolerance"):
            penalty(logp, logp, tolerance=tolerance)


def test_hinge_by_hand() -> None:
    """Degradations 0.3 and 0.1, of which 0.2 are free: 0.1 is left of the first."""
    logp, baseline = tensor([-2.3, -4.1]), tensor([-2.0, -4.0])
    found = coherence_hinge(logp, baseline, threshold=0.2, exponent=3, weight=10)
    assert found.item() == pytest.approx(10 * 0.1**3 / 2)
    found.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([-10 * 3 * 0.1**2 / 2, 0]).double())
    assert baseline.grad is None
    for options in ({"threshold": -0.1}, {"exponent": 0.5}, {"threshold": math.nan}):
        with pytest.raises(InputError, match="threshold"):
            coherence_hinge(logp, baseline, **options)


@given(logprobs, st.floats(0, 1), st.floats(1, 4))
def test_the_hinge_is_zero_and_flat_unsteered(
    values: list[float], threshold: float, exponent: float
) -> None:
    logp = tensor(values)
    found = coherence_hinge(logp, logp, threshold=threshold, exponent=exponent)
    assert found.item() == 0
    found.backward()
    assert not logp.grad.any()


def logits_of(*probabilities: list[float]) -> torch.Tensor:
    """One prompt of two tokens; the second is the label, so the first position predicts it."""
    rows = [torch.tensor([p, p], dtype=torch.float64).log() for p in probabilities]
    return torch.stack(rows)


def test_total_variation_by_hand() -> None:
    """(0.5, 0.5) against (0.7, 0.3): half of 0.2 + 0.2."""
    mask = torch.tensor([[False, True]])
    steered, unsteered = logits_of([0.7, 0.3]).requires_grad_(), logits_of([0.5, 0.5])
    found = total_variation_barrier(steered, unsteered, mask, limit=0.8, weight=3)
    assert found.item() == pytest.approx(-3 * math.log(1 - 0.2 / 0.8))
    found.backward()
    assert steered.grad[0, 0, 0] > 0 > steered.grad[0, 0, 1]
    assert total_variation_barrier(steered, unsteered, mask, limit=0.1).item() == math.inf
    at_zero = total_variation_barrier(unsteered, unsteered, mask)
    assert at_zero.item() == 0
    for limit in (0, -1, 1.5, math.nan):
        with pytest.raises(InputError, match="limit"):
            total_variation_barrier(steered, unsteered, mask, limit=limit)


def test_ordering_by_hand() -> None:
    """Steps up +1 and -2 for the first item, +1 and +1 for the second."""
    down, none, up = tensor([0.0, 0.0]), tensor([1.0, 1.0]), tensor([-1.0, 2.0])
    assert ordering_penalty(down, none, up).item() == pytest.approx((0 + 2) / 2)
    assert ordering_penalty(down, none, up, margin=1.5).item() == pytest.approx(
        (0.5 + 0.5) / 2 + (3.5 + 0.5) / 2
    )
    # Falling: the steps count downwards, +1 lacks 1, -2 lacks nothing.
    assert ordering_penalty(down, none, up, rising=False).item() == pytest.approx(1 + 1 / 2)
    assert ordering_penalty(none, none, none, margin=0.25).item() == pytest.approx(0.5)
    ordering_penalty(down, none, up).backward()
    torch.testing.assert_close(up.grad, torch.tensor([-0.5, 0.0]).double())


def test_promotion_by_hand() -> None:
    promoted, suppressed = tensor([-1.0, -3.0]), tensor([math.log(0.5), math.log(0.25)])
    expected = (1 + math.log(2) + 3 - math.log(0.75)) / 2
    found = promotion_loss(promoted, suppressed)
    assert found.item() == pytest.approx(expected)
    found.backward()
    assert bool((promoted.grad < 0).all())
    assert bool((suppressed.grad > 0).all())
    assert math.isfinite(promotion_loss(promoted, torch.zeros(2).double()).item())


def test_preference_by_hand() -> None:
    none = tensor([0.5])
    assert preference_loss(none, none, none).item() == pytest.approx(2 * math.log(2))
    up, down = tensor([1.5]), tensor([0.0])
    expected = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))
    found = preference_loss(up, none, down, beta=2)
    assert found.item() == pytest.approx(expected)
    found.backward()
    assert up.grad.item() < 0 < down.grad.item()


# Labels and budgets


def test_label_logprob_by_hand() -> None:
    # Two-token vocabulary: logits (0, ln 3) give probabilities 1/4 and 3/4.
    sure, even = [0.0, math.log(3)], [0.0, 0.0]
    logits = torch.tensor([[sure, even, sure], [even, sure, sure]])
    tokens = torch.tensor([[0, 1, 0], [0, 0, 1]])
    labels = torch.tensor([[False, True, True], [False, False, True]])
    found = sl.loss.label_logprob(logits, tokens, labels)
    expected = [(math.log(3 / 4) + math.log(1 / 2)) / 2, math.log(3 / 4)]
    torch.testing.assert_close(found, torch.tensor(expected))
    unlabelled = sl.loss.label_logprob(logits, tokens, torch.zeros_like(labels))
    assert bool(unlabelled.isnan().all())


def test_label_logprob_in_half_precision_is_taken_in_float32() -> None:
    logits = torch.randn(2, 6, 50, dtype=torch.float64) * 10
    tokens = torch.randint(0, 50, (2, 6))
    labels = torch.ones(2, 6, dtype=torch.bool)
    half = sl.loss.label_logprob(logits.to(torch.bfloat16), tokens, labels)
    assert half.dtype == torch.float32
    exact = sl.loss.label_logprob(logits.to(torch.bfloat16).double(), tokens, labels)
    torch.testing.assert_close(half.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("position", "has_gradient"), [(-1, False), (-2, True), (1, True)])
def test_coherence_gradient_needs_a_label_after_the_position(
    pairs: sl.ContrastivePairs, position: int, has_gradient: bool
) -> None:
    model = bridge(build_llama())
    batch = make_batches(model, tokenize_pairs(model, pairs).positive[:1], 1)[0]
    leaf: list[torch.Tensor] = []

    def keep(activation: torch.Tensor, hook: object) -> torch.Tensor:
        leaf.append(activation.detach().requires_grad_())
        return leaf[0]

    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", keep)]):
        logits = model(batch.tokens)
    logp = sl.loss.label_logprob(logits, batch.tokens, batch.label_mask())
    coherence_penalty(logp, logp.detach()).backward()
    assert bool(leaf[0].grad[0, position].any()) is has_gradient


@pytest.mark.parametrize(
    ("text", "baseline", "lowest"),
    [("relative=0.01", -3.0, -3.0 / 0.99), ("relative=0", -3.0, -3.0), ("nats=0.05", -3.0, -3.05)],
)
def test_budget(text: str, baseline: float, lowest: float) -> None:
    assert Budget.parse(text).min_logprob(baseline) == pytest.approx(lowest)


@pytest.mark.parametrize("text", ["relative=1", "relative=-0.1", "nats=-1", "nats=inf", "kl", ""])
def test_budget_without_meaning_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a budget"):
        Budget.parse(text)


@settings(max_examples=50)
@given(st.floats(0, 0.9))
def test_budget_reads_back_what_it_prints(value: float) -> None:
    budget = Budget.parse(f"nats={value:g}")
    assert Budget.parse(str(budget)) == budget
