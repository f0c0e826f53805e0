"""The other forms of the loss: value unsteered, sign, units and gradient by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import steerlens as sl
from steerlens.errors import InputError
from steerlens.loss import (
    coherence_hinge,
    ordering_penalty,
    preference_loss,
    promotion_loss,
    total_variation_barrier,
)

logprobs = st.lists(st.floats(-20, -0.01), min_size=1, max_size=8)


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def penalty(logp: torch.Tensor, baseline: torch.Tensor, **options: float) -> torch.Tensor:
    nothing = torch.zeros((len(logp), 2), dtype=torch.float64)
    found = sl.contrastive_steering_loss(nothing, nothing, logp, nothing[0], baseline, **options)
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
