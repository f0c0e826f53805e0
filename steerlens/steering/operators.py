"""What a steering vector does to an activation: pure functions of it, a direction and an amount."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.errors import InputError, told
from steerlens.validation import checked

Activation = Float[Tensor, "prompt token d_model"]
Unit = Float[Tensor, " d_model"]


class _AlongDirection:
    """What operators share: they reckon in float32 at least and give a new tensor."""

    name: ClassVar[str]
    most: ClassVar[float]
    """The largest amount that it takes."""
    is_signed: ClassVar[bool]
    """Whether it takes amounts below 0."""

    def __call__(self, activation: Activation, direction: Unit, amount: float | int) -> Activation:
        """The activation, changed along the unit `direction`, in its own dtype, out of place."""
        dtype = torch.promote_types(activation.dtype, direction.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        unit = direction.to(activation.device, wide)
        return self._changed(activation.to(wide), unit, amount).to(activation)

    def _changed(self, h: Activation, unit: Unit, amount: float | int) -> Activation:
        raise NotImplementedError

    def check(self, amount: float | int) -> None:
        """Raise `InputError` unless `amount` is from 0 to 1."""
        if not 0 <= amount <= 1:
            raise InputError(
                f"{self.name} takes a strength from 0 to 1 as coefficient, got {amount}"
            )


@checked
@dataclass(frozen=True)
class Add(_AlongDirection):
    """`h + amount * d`: `amount` in residual units.

    Examples:
        >>> h, d = torch.tensor([[[3.0, 4.0]]]), torch.tensor([1.0, 0.0])
        >>> sl.Add()(h, d, -2)
        tensor([[[1., 4.]]])
    """

    name: ClassVar[str] = "add"
    most: ClassVar[float] = math.inf
    is_signed: ClassVar[bool] = True

    def __call__(self, activation: Activation, direction: Unit, amount: float | int) -> Activation:
        """The activation moved along the unit `direction`, in its own dtype, out of place."""
        dtype = torch.promote_types(activation.dtype, direction.dtype)
        unit = direction.to(activation.device, torch.promote_types(dtype, torch.float32))
        return activation + (amount * unit).to(activation)  # the step alone is rounded

    def check(self, amount: float | int) -> None:
        """Raise `InputError` unless `amount` is finite."""
        if not is_finite(amount):
            raise InputError(f"expected a finite coefficient, got {told(amount)}")


@checked
@dataclass(frozen=True)
class Ablate(_AlongDirection):
    """`h - amount * (h . d) d`: at amount 1 nothing is left along `d`.

    Examples:
        >>> h, d = torch.tensor([[[3.0, 4.0]]]), torch.tensor([1.0, 0.0])
        >>> sl.Ablate()(h, d, 1), sl.Ablate()(h, d, 0.5)
        (tensor([[[0., 4.]]]), tensor([[[1.5, 4.0]]]))
    """

    name: ClassVar[str] = "ablate"
    most: ClassVar[float] = 1.0
    is_signed: ClassVar[bool] = False

    def _changed(self, h: Activation, unit: Unit, amount: float | int) -> Activation:
        return h - amount * (h @ unit)[..., None] * unit


@checked
@dataclass(frozen=True)
class Clamp(_AlongDirection):
    """`h + amount * (value - h . d) d`: at amount 1 the component is `value`.

    Args:
        value: in residual units.

    Raises:
        InputError: `value` is not finite.

    Examples:
        >>> h, d = torch.tensor([[[3.0, 4.0]]]), torch.tensor([1.0, 0.0])
        >>> sl.Clamp(-1)(h, d, 1)
        tensor([[[-1., 4.]]])
    """

    value: float | int
    name: ClassVar[str] = "clamp"
    most: ClassVar[float] = 1.0
    is_signed: ClassVar[bool] = False

    def _changed(self, h: Activation, unit: Unit, amount: float | int) -> Activation:
        return h + (amount * (self.value - h @ unit))[..., None] * unit


@checked
@dataclass(frozen=True)
class Rotate(_AlongDirection):
    """`h` turned by `amount` degrees towards `d` in their common plane; its norm stays.

    Away from `d` for a negative amount. It stops at `d` (or at `-d`), so the angle to `d` becomes
    `clip(angle - amount, 0, 180)`. An activation along `d` or `-d` has no plane with it, and a zero
    one no direction: both stay as they are.

    Examples:
        >>> h, d = torch.tensor([[[0.0, 5.0]]]), torch.tensor([1.0, 0.0])
        >>> sl.Rotate()(h, d, 30)  # 5 sin 30, 5 cos 30
        tensor([[[2.50, 4.33]]])
        >>> sl.Rotate()(h, d, 120)  # no further than d
        tensor([[[5.00, 0.00]]])
    """

    name: ClassVar[str] = "rotate"
    most: ClassVar[float] = 180.0
    is_signed: ClassVar[bool] = True

    def _changed(self, h: Activation, unit: Unit, amount: float | int) -> Activation:
        along = h @ unit
        across = h - along[..., None] * unit
        norm, width = h.norm(dim=-1), across.norm(dim=-1)
        angle = (torch.atan2(width, along) - math.radians(amount)).clamp(0, math.pi)
        # Below rounding error what is left across is noise, not a direction to turn in.
        has_plane = width > torch.finfo(h.dtype).eps * norm
        sideways = across / torch.where(has_plane, width, 1.0)[..., None]
        turned = norm[..., None] * (
            angle.cos()[..., None] * unit + angle.sin()[..., None] * sideways
        )
        return torch.where(has_plane[..., None], turned, h)

    def check(self, amount: float | int) -> None:
        """Raise `InputError` unless `amount` is an angle from -180 to 180 degrees."""
        if not -180 <= amount <= 180:
            raise InputError(f"rotate takes degrees from -180 to 180 as coefficient, got {amount}")


Operator = Add | Ablate | Clamp | Rotate
"""`operator(activation, direction, amount)`, the new activation; `operator.check(amount)`."""

OPERATORS: Mapping[str, Callable[..., Operator]] = {
    kind.name: kind for kind in (Add, Ablate, Clamp, Rotate)
}


@checked
def operator_of(name: str, *, value: float | int | None = None) -> Operator:
    """The operator of a name.

    Args:
        name: "add", "ablate", "clamp" or "rotate".
        value: what "clamp" sets the component to, in residual units.

    Raises:
        InputError: another name, or `value` is missing or has no use.
    """
    if name not in OPERATORS:
        raise InputError(f"unknown operator {name!r}; expected one of {', '.join(OPERATORS)}")
    if (name == Clamp.name) != (value is not None):
        raise InputError(
            f"clamp needs the value to set the component to, {name!r} got {told(value)}"
        )
    return OPERATORS[name]() if value is None else OPERATORS[name](value)


def operator_record(operator: Operator) -> dict[str, Any]:
    """The operator as plain values, which `operator_of` takes back as keywords."""
    value = {"value": operator.value} if isinstance(operator, Clamp) else {}
    return {"name": operator.name, **value}


def is_finite(value: float | int) -> bool:
    """Whether a number is one as a float: not NaN, inf, or a whole number beyond every float."""
    return -sys.float_info.max <= value <= sys.float_info.max
