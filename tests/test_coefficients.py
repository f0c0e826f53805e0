"""Coefficients in residual units, residual norms and shares of the boundary."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerlens.errors import InputError
from steerlens.steering.coefficients import Calibration, parse_coefficient, step_sizes

HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
SCALE = torch.tensor([1.0, 3.0])
KNOWN = Calibration(
    resid_norm=torch.tensor([50.0, 200.0]),
    boundary_neg=torch.tensor([-4.0, -20.0]),
    boundary_pos=torch.tensor([8.0, 30.0]),
    budget="relative=0.01",
    text="neutral",
)


@pytest.mark.parametrize(
    ("coefficient", "sizes"),
    [
        (2, (2.0, 6.0)),
        (-2.5, (-2.5, -7.5)),
        ("2", (2.0, 6.0)),
        ("1e1", (10.0, 30.0)),
        ("0.1 norm", (5.0, 20.0)),
        ("-0.1norms", (-5.0, -20.0)),
        ("50%", (4.0, 15.0)),
        ("-50 %", (-2.0, -10.0)),
        ("150%", (12.0, 45.0)),
        ("0%", (0.0, 0.0)),
        (0, (0.0, 0.0)),
    ],
)
def test_sizes_by_hand(coefficient: Any, sizes: tuple[float, ...]) -> None:
    assert step_sizes(coefficient, HOOKS, SCALE, KNOWN) == pytest.approx(sizes)


@pytest.mark.parametrize("text", ["", "%", "ten", "5 %%", "5 nats", "0x10", "1,5", "nan", "inf%"])
def test_what_cannot_be_read(text: str) -> None:
    with pytest.raises(InputError, match="cannot read the coefficient"):
        parse_coefficient(text)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, "1e999", "1e999%"])
def test_what_is_not_finite(number: Any) -> None:
    with pytest.raises(InputError, match="finite"):
        parse_coefficient(number)


def test_what_was_not_measured_or_lies_beyond() -> None:
    unknown = Calibration.unknown(2)
    for coefficient in ("80%", "-80%", "1 norm"):
        with pytest.raises(InputError, match=r"at blocks\.1\..*is not known"):
            step_sizes(coefficient, HOOKS, SCALE, unknown)
    far = Calibration(
        KNOWN.resid_norm, KNOWN.boundary_neg, torch.tensor([8.0, math.inf]), "kl=0.1", "neutral"
    )
    with pytest.raises(InputError, match=r"at blocks\.2\..*beyond the searched range"):
        step_sizes("80%", HOOKS, SCALE, far)
    assert step_sizes("-80%", HOOKS, SCALE, far) == pytest.approx((-3.2, -16.0))


@given(st.floats(-100, 100).filter(lambda x: x == 0 or abs(x) > 1e-6))
def test_a_number_and_its_text_are_the_same(number: float) -> None:
    assert parse_coefficient(repr(number)) == parse_coefficient(number)
    assert parse_coefficient(f"{number!r}%").number == pytest.approx(number / 100)


def test_of_opposite_directions() -> None:
    flipped = KNOWN.flipped()
    assert flipped.boundary_pos.tolist() == [4.0, 20.0]
    assert flipped.boundary_neg.tolist() == [-8.0, -30.0]
