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

Activation = Float[Tensor, "prompt token d_model"]


@dataclass(frozen=True)
class Add:
    """`h + amount * d`: `amount` in residual units.

    Examples:
        >>> h, d = torch.tensor([[[3.0, 4.0]]]), torch.tensor([1.0, 0.0])
        >>> sl.Add()(h, d, -2)
        tensor([[[1., 4.]]])
    """

    name: ClassVar[str] = "add"

    def __call__(
        self, activation: Activation, direction: Float[Tensor, " d_model"], amount: float | int
    ) -> Activation:
        """The activation moved along the unit `direction`, in its own dtype, out of place."""
        return activation + (amount * _wide(direction, activation)).to(activation)

    def check(self, amount: float | int) -> None:
        """Raise `InputError` unless `amount` is finite."""
        _check(is_finite(amount), f"expected a finite coefficient, got {told(amount)}")


@dataclass(frozen=True)
class Ablate:
    """`h - amount * (h . d) d`: at amount 1 nothing is left along `d`.

    Examples:
        >>> h, d = torch.tensor([[[3.0, 4.0]]]), torch.tensor([1.0, 0.0])
        >>> sl.Ablate()(h, d, 1), sl.Ablate()(h, d, 0.5)
        (tensor([[[0., 4.]]]), tensor([[[1.5, 4.0]]]))
    """

    name: ClassVar[str] = "ablate"

    def __call__(
        self, activation: Activation, direction: Float[Tensor, " d_model"], amount: float | int
    ) -> Activation:
        """The activation with a share of its component along the unit `direction` removed."""
        wide, unit = _wide(activation, direction), _wide(direction, activation)
        return (wide - amount * (wide @ unit)[..., None] * unit).to(activation)

    def check(self, amount: float | int) -> None:
        """Raise `InputError` unless `amount` is from 0 to 1."""
        _check_share(self.name, amount)


@dataclass(frozen=True)
class Clamp:
    """`h + amount * (value - h . d) d`: at amount 1 the component is `value`, in residual units.

    Raises `InputError` when `value` is not finite.

    Examples:
        >>> h, d = torch.tensor([[[3.0, 4.0]]]), torch.tensor([1.0, 0.0])
        >>> sl.Clamp(-1)(h, d, 1)
        tensor([[[-1., 4.]]])
    """

    value: float | int
    name: ClassVar[str] = "clamp"

    def __post_init__(self) -> None:
        _check(
            is_finite(self.value), f"expected a finite value to clamp to, got {told(self.value)}"
        )

    def __call__(
        self, activation: Activation, direction: Float[Tensor, " d_model"], amount: float | int
    ) -> Activation:
        """The activation with its component moved towards `value`; the rest stays."""
        wide, unit = _wide(activation, direction), _wide(direction, activation)
        step = amount * (self.value - wide @ unit)
        return (wide + step[..., None] * unit).to(activation)

    def check(self, amount: float | int) -> None:
        """Raise `InputError` unless `amount` is from 0 to 1."""
        _check_share(self.name, amount)


@dataclass(frozen=True)
class Rotate:
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

    def __call__(
        self, activation: Activation, direction: Float[Tensor, " d_model"], amount: float | int
    ) -> Activation:
        """The activation, turned in the plane that it spans with the unit `direction`."""
        wide, unit = _wide(activation, direction), _wide(direction, activation)
        along = wide @ unit
        across = wide - along[..., None] * unit
        norm, width = wide.norm(dim=-1), across.norm(dim=-1)
        angle = (torch.atan2(width, along) - math.radians(amount)).clamp(0, math.pi)
        # Below rounding error what is left across is noise, not a direction to turn in.
        has_plane = width > torch.finfo(wide.dtype).eps * norm
        sideways = across / torch.where(has_plane, width, 1.0)[..., None]
        turned = norm[..., None] * (
            angle.cos()[..., None] * unit + angle.sin()[..., None] * sideways
        )
        return torch.where(has_plane[..., None], turned, wide).to(activation)

    def check(self, amount: float | int) -> None:
        """Raise `InputError` unless `amount` is an angle from -180 to 180 degrees."""
        _check(
            -180 <= amount <= 180,
            f"rotate takes degrees from -180 to 180 as coefficient, got {amount}",
        )


Operator = Add | Ablate | Clamp | Rotate
"""`operator(activation, direction, amount)`, the new activation; `operator.check(amount)`."""

OPERATORS: Mapping[str, Callable[..., Operator]] = {
    kind.name: kind for kind in (Add, Ablate, Clamp, Rotate)
}


def operator_of(name: str, *, value: float | int | None = None) -> Operator:
    """The operator called `name`, "add", "ablate", "clamp" (to `value`) or "rotate".

    Raises `InputError` on another name, and when `value` is missing or has no use.
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


def _wide(tensor: Tensor, other: Tensor) -> Tensor:
    """Both tensors' dtype, at least float32, on the device of the activation among the two."""
    device = max((tensor, other), key=lambda t: t.ndim).device
    dtype = torch.promote_types(torch.promote_types(tensor.dtype, other.dtype), torch.float32)
    return tensor.to(device=device, dtype=dtype)


def _check(is_right: bool, message: str) -> None:
    if not is_right:
        raise InputError(message)


def _check_share(name: str, amount: float | int) -> None:
    _check(0 <= amount <= 1, f"{name} takes a strength from 0 to 1 as coefficient, got {amount}")
