"""Each operator against its formula, on hand numbers and as invariants."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from steerlens.errors import InputError
from steerlens.steering import Ablate, Add, Clamp, Rotate, operator_of
from steerlens.steering.apply import Step, step_hooks
from steerlens.steering.operators import operator_record

D = torch.tensor([0.6, 0.8])
# Components along D: 2.2 and 5.
H = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])


@pytest.mark.parametrize(
    ("operator", "amount", "expected"),
    [
        (Add(), -5, [[-2.0, -2.0], [0.0, 0.0]]),
        (Ablate(), 1, [[-0.32, 0.24], [0.0, 0.0]]),
        (Ablate(), 0.5, [[0.34, 1.12], [1.5, 2.0]]),
        # From 2.2 and 5 to 10: steps of 7.8 and 5 along D.
        (Clamp(10), 1, [[5.68, 8.24], [6.0, 8.0]]),
        (Clamp(10), 0.5, [[3.34, 5.12], [4.5, 6.0]]),
    ],
)
def test_by_hand(operator: Any, amount: float, expected: list[list[float]]) -> None:
    torch.testing.assert_close(operator(H, D, amount), torch.tensor([expected]))


def test_rotate_by_hand() -> None:
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    h = torch.tensor([[[0.0, 2.0]]])
    half = math.sqrt(2)
    # It stops at the direction, and at its opposite.
    for degrees, expected in (
        (45, [half, half]),
        (-45, [-half, half]),
        (120, [2.0, 0.0]),
        (-120, [-2.0, 0.0]),
    ):
        torch.testing.assert_close(Rotate()(h, east, degrees), torch.tensor([[expected]]))
    # Along the direction there is no plane to turn in.
    for amount in (30, -30):
        assert torch.equal(Rotate()(h, north, amount), h)
        assert torch.equal(Rotate()(-h, north, amount), -h)
        assert torch.equal(Rotate()(0 * h, north, amount), 0 * h)


vectors = arrays("float64", 6, elements=st.floats(-10, 10))
strengths = st.floats(0, 1)


def unit(values: Any) -> torch.Tensor:
    raw = torch.tensor(values)
    raw = raw if raw.norm() > 1e-3 else torch.ones_like(raw)
    return raw / raw.norm()


@given(vectors, vectors, strengths)
def test_invariants(h: Any, d: Any, strength: float) -> None:
    activation, direction = torch.tensor(h)[None, None], unit(d)
    before = activation.clone()
    at_start = activation @ direction

    ablated = Ablate()(activation, direction, strength)
    torch.testing.assert_close(ablated @ direction, (1 - strength) * at_start)
    clamped = Clamp(7)(activation, direction, strength)
    torch.testing.assert_close(clamped @ direction, at_start + strength * (7 - at_start))
    added = Add()(activation, direction, strength)
    torch.testing.assert_close(added @ direction, at_start + strength)
    rotated = Rotate()(activation, direction, 180 * strength)
    torch.testing.assert_close(rotated.norm(), activation.norm())
    assert bool((rotated @ direction >= at_start - 1e-9).all())
    # What is orthogonal to the direction stays where the component alone is changed.
    for moved in (ablated, clamped, added):
        across = moved - (moved @ direction)[..., None] * direction
        torch.testing.assert_close(across, activation - at_start[..., None] * direction)
    assert torch.equal(activation, before), "out of place"


@pytest.mark.parametrize("operator", [Add(), Ablate(), Clamp(3), Rotate()])
def test_operators_keep_dtype_and_shape(operator: Any) -> None:
    activation = torch.randn(2, 3, 2, dtype=torch.bfloat16)
    out = operator(activation, D, 0.5)
    assert out.dtype == torch.bfloat16
    assert out.shape == activation.shape
    assert not torch.equal(out, activation)
    wide = operator(activation.float(), D, 0.5)
    torch.testing.assert_close(out.float(), wide, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("operator", "amount"),
    [
        (Add(), math.inf),
        (Add(), math.nan),
        (Ablate(), 1.1),
        (Ablate(), -0.1),
        (Ablate(), math.nan),
        (Clamp(1), 2),
        (Rotate(), 181),
        (Rotate(), -181),
        (Rotate(), math.nan),
    ],
)
def test_amounts_out_of_range(operator: Any, amount: float) -> None:
    with pytest.raises(InputError, match=r"finite|from"):
        operator.check(amount)
    for right in (0.5, 1, *((-180, 180) if operator == Rotate() else ())):
        operator.check(right)


def test_what_is_along_the_direction_but_for_rounding_is_not_turned() -> None:
    direction = torch.nn.functional.normalize(torch.arange(1.0, 8.0), dim=0)
    h = (direction * 1e4)[None, None] / 3
    across = h - (h @ direction)[..., None] * direction
    assert bool(across.any()), "rounding leaves something"
    assert torch.equal(Rotate()(h, direction, -90), h)


def test_operators_by_name() -> None:
    for operator in (Add(), Ablate(), Clamp(2.5), Rotate()):
        assert operator_of(**operator_record(operator)) == operator
    with pytest.raises(InputError, match="unknown operator 'shift'"):
        operator_of("shift")
    with pytest.raises(InputError, match="clamp needs the value"):
        operator_of("clamp")
    with pytest.raises(InputError, match="'add' got 3"):
        operator_of("add", value=3)
    with pytest.raises(InputError, match="value: expected a finite number"):
        Clamp(math.nan)


def test_a_mask_keeps_the_other_tokens_to_the_bit() -> None:
    ((_, hook),) = step_hooks([Step("x", Add(), D, 5.0)], mask=torch.tensor([[False, True]]))
    out = hook(H, hook=None)
    assert torch.equal(out[:, 0], H[:, 0])
    torch.testing.assert_close(out[:, 1], torch.tensor([[6.0, 8.0]]))
