"""A dense curve of few cells: interpolated in the coefficient, its error seen by leaving cells out.

A cubic spline through the cells that are run, of every pair's numbers, so that intervals follow.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.errors import InputError
from steerlens.measure.rows import checked_coefficients
from steerlens.steering import parse_coefficient

FEW, MOST = 9, 16
"""Cells that are run at a hook: evenly spaced ones, and up to how many where these do not do."""
TOLERANCE = 0.01
"""Of a cell that is left out, as a share of the curve's range."""
MEANS = [0, 3]
"""The rows of `rows.by_pair` whose means are looked at: projection and logprob."""
Numbers = Mapping[float, Float[Tensor, "4 pair"]]
"""Coefficient -> `rows.by_pair` of the cell."""


def with_dense(coefficients: Sequence[float | str], n: int) -> tuple[float | str, ...]:
    """The coefficients and `n` evenly spaced ones from the lowest to the highest, in order.

    Raises `InputError` where they are not two or more in one unit.

    Examples:
        >>> with_dense([-4.0, "2", 4.0], 3)
        (-4.0, 0.0, 2.0, 4.0)
        >>> with_dense(["-0.1 norm", "0.1 norm"], 3)
        ('-0.1 norm', 0.0, '0.1 norm')
    """
    parsed = [parse_coefficient(coefficient) for coefficient in coefficients]
    units = {of.unit for of in parsed if of.number}
    numbers = sorted({of.number for of in parsed})
    if len(units) != 1 or len(numbers) < 2:
        raise InputError(
            "a dense sweep lies between coefficients of one unit, two at least; got "
            f"{', '.join(map(str, coefficients))}"
        )
    scale, suffix = {"residual": (1, ""), "norm": (1, " norm"), "boundary": (100, "%")}[units.pop()]
    # What lies beside 0, or beside a coefficient asked for, by rounding alone is that one.
    near, even = 1e-5 * (numbers[-1] - numbers[0]), list[float | str]()
    for c in np.linspace(numbers[0], numbers[-1], n).tolist():
        if abs(c) < near:
            even.append(0.0)
        elif min(abs(c - number) for number in numbers) > near:
            even.append(f"{scale * c:.6g}{suffix}")
    every = checked_coefficients([*coefficients, *even])
    return tuple(sorted(every, key=lambda c: parse_coefficient(c).number))


def first_cells(amounts: Sequence[float], asked: Sequence[float]) -> set[float]:
    """What is run first: the amounts asked for, and those nearest to evenly spaced ones."""
    even = np.linspace(min(amounts), max(amounts), FEW)
    return {*asked, *(min(amounts, key=lambda c: abs(c - at)) for at in even.tolist())}


def more_cells(amounts: Sequence[float], numbers: Numbers) -> set[float]:
    """What is run then: the middles of gaps beside cells that leaving out misses, worst first."""
    errors, added = left_out_errors(numbers), set[float]()
    if max(errors.values(), default=0.0) <= TOLERANCE:
        return added
    n_left = MOST - sum(c != 0 for c in numbers)
    gaps = pairwise(sorted(numbers))
    for low, high in sorted(gaps, key=lambda gap: -max(errors.get(c, 0.0) for c in gap)):
        within = [c for c in amounts if low < c < high]
        if within and len(added) < n_left:
            added.add(min(within, key=lambda c: abs(c - (low + high) / 2)))
    return added


def curve(numbers: Numbers) -> Callable[[float], Float[Tensor, "4 pair"]]:
    """Every pair's numbers at any coefficient; NaN beyond the cells that are finite."""
    return _spline({c: of for c, of in numbers.items() if bool(of.isfinite().all())}, numbers)


def left_out_errors(numbers: Numbers) -> dict[float, float]:
    """How far each inner cell lies from the curve through the others, as a share of its range.

    The larger one of mean projection and mean logprob. Undefined cells have none.
    """
    means = {c: of[MEANS].mean(dim=1) for c, of in numbers.items() if bool(of.isfinite().all())}
    if len(means) < 3:
        return {}
    every = torch.stack([*means.values()])
    # What does not move but for rounding has no range.
    floor = 1e-4 * every.abs().amax(dim=0).clamp(min=1e-30)
    scale = torch.maximum(every.amax(dim=0) - every.amin(dim=0), floor)
    inner = sorted(means)[1:-1]
    others = {c: _spline({k: v for k, v in means.items() if k != c}, means)(c) for c in inner}
    return {c: float(((others[c] - means[c]).abs() / scale).max()) for c in inner}


def warn_of_errors(errors: Mapping[str, float]) -> None:
    """Warn of the hooks whose curve misses a cell that is left out by more than `TOLERANCE`."""
    beyond = {name: error for name, error in errors.items() if error > TOLERANCE}
    if beyond:
        worst = max(beyond, key=lambda name: beyond[name])
        warnings.warn(
            f"the dense curves of {len(beyond)} of {len(errors)} hooks miss a cell that is left "
            f"out by more than {TOLERANCE:.0%} of their range, {worst} by {beyond[worst]:.1%} (see "
            "left_out_error); ask for coefficients closer together, or for a shorter range",
            RuntimeWarning,
            stacklevel=4,
        )


def _spline(
    known: Mapping[float, Float[Tensor, "..."]], like: Mapping[float, Float[Tensor, "..."]]
) -> Callable[[float], Float[Tensor, "..."]]:
    """A cubic spline through what is known; of fewer than four the polynomial through them."""
    from scipy.interpolate import make_interp_spline

    places = sorted(known)
    if len(places) < 2:
        return lambda _: torch.full_like(next(iter(like.values())), torch.nan)
    values = torch.stack([known[c] for c in places]).numpy()
    spline = make_interp_spline(places, values, k=min(3, len(places) - 1))
    return lambda c: torch.from_numpy(spline(c, extrapolate=False))
