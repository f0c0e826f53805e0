"""How strong: a coefficient in residual units, in residual norms, or as a share of the boundary."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.directions.directions import Frozen
from steerlens.errors import InputError
from steerlens.models.weight_processing import UNKNOWN
from steerlens.validation import checked

Coefficient: TypeAlias = float | int | str
"""With `Add`, a number or "12.5" (residual units, times the vector's scale), "0.1 norm" (multiples
of the mean residual norm at the hook), or "80%" (a share of the coherence boundary of its sign);
with `Ablate` and `Clamp` a strength from 0 to 1, with `Rotate` degrees."""

MEASURES = ("resid_norm", "boundary_neg", "boundary_pos")
"""What a `Calibration` knows of every hook, as a layer table calls it."""

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_TEXT = re.compile(rf"\s*({_NUMBER})\s*(%|norms?)?\s*", re.IGNORECASE)


def _check_all_steered(settings: Mapping[str, Any]) -> None:
    """Raise `InputError` of a boundary that is no measure of steering at all tokens."""
    positions = settings.get("steered_positions", "all")
    if positions != "all":
        raise InputError(
            f"the boundary was measured with steered_positions={positions!r}, and a vector keeps "
            "that of all tokens; measure it so, or leave the table out"
        )


@checked
@dataclass(frozen=True, eq=False)
class Calibration(Frozen):
    """What gives a coefficient its meaning at each hook; NaN where it was not measured.

    `resid_norm` is the mean norm of both sides' activations at the fitted position, `boundary_neg`
    (below 0) and `boundary_pos` the coherence boundary of each sign: residual units, at all tokens;
    inf or -inf beyond the searched range. Each hook was pushed alone; or all of them at once, where
    `is_joint`. `budget` and `text` are what it was measured with and on.
    """

    resid_norm: Float[Tensor, " hook"]
    boundary_neg: Float[Tensor, " hook"]
    boundary_pos: Float[Tensor, " hook"]
    budget: str
    text: str
    is_joint: bool = False

    @property
    def lengths(self) -> set[int]:
        """How many hooks each measure has."""
        return {len(getattr(self, name)) for name in MEASURES}

    @classmethod
    def unknown(cls, n_hooks: int) -> "Calibration":
        """Nothing measured."""
        nan = torch.full((n_hooks,), math.nan)
        return cls(nan, nan, nan, UNKNOWN, UNKNOWN)

    @classmethod
    def of_table(cls, hook_names: Sequence[str], layer_table: pd.DataFrame | None) -> "Calibration":
        """What a layer table says of these hooks, or nothing.

        Raises `InputError` when a hook has no row, for the table of a vector, and for boundaries of
        other steered positions than all.
        """
        if layer_table is None:
            return cls.unknown(len(hook_names))
        if "vector" in layer_table.attrs:
            raise InputError(
                "the layer table is that of a vector, in its coefficients: give it to "
                "SteeringVector.calibrated"
            )
        rows = layer_table.set_index("hook_name")
        missing = [name for name in hook_names if name not in rows.index]
        if missing:
            raise InputError(
                f"the layer table has no row for {', '.join(missing)}; measure those layers too"
            )
        measures: dict[str, Any] = {
            measure: torch.tensor([float(value) for value in rows.loc[list(hook_names), measure]])
            for measure in MEASURES
        }
        settings = layer_table.attrs.get("settings", {})
        if bool(measures["boundary_pos"].isnan().all()):
            settings = {}
        _check_all_steered(settings)
        budget, text = (str(settings.get(key, UNKNOWN)) for key in ("budget", "on"))
        return cls(**measures, budget=budget, text=text)

    @classmethod
    def of_vector(
        cls, fingerprint: str, scale: Float[Tensor, " hook"], layer_table: pd.DataFrame
    ) -> "Calibration":
        """What the layer table of a vector's own boundary says: of several hooks, pushed at once.

        Raises `InputError` when it is another vector's, holds no measured boundary, or that of
        other steered positions than all.
        """
        measured, row = layer_table.attrs.get("vector", {}), layer_table.iloc[0]
        ends = row[["boundary_neg", "boundary_pos"]].astype(float)
        if measured.get("fingerprint") != fingerprint or ends.isna().all():
            raise InputError(
                "the table is not of this very vector; expected the layers of "
                "Study(model, pairs, vector).boundary()"
            )
        settings = layer_table.attrs["settings"]
        _check_all_steered(settings)
        return cls(
            resid_norm=torch.tensor(measured["resid_norm"]),
            boundary_neg=float(row.boundary_neg) * scale,
            boundary_pos=float(row.boundary_pos) * scale,
            budget=str(settings["budget"]),
            text=str(settings["on"]),
            is_joint=len(scale) > 1,
        )

    def take(self, rows: Sequence[int]) -> "Calibration":
        """Some of its hooks; a boundary of all of them is not theirs."""
        keep = list(rows)
        if self.is_joint and len(keep) < len(self.resid_norm):
            return self.without_boundary().take(keep)
        return replace(self, **{name: getattr(self, name)[keep] for name in MEASURES})

    def flipped(self) -> "Calibration":
        """That of the opposite directions."""
        return replace(self, boundary_neg=-self.boundary_pos, boundary_pos=-self.boundary_neg)

    def without_boundary(self) -> "Calibration":
        """The norms alone: what still holds for other directions at the same hooks."""
        unknown = self.unknown(len(self.resid_norm))
        return replace(unknown, resid_norm=self.resid_norm)


@dataclass(frozen=True)
class Parsed:
    """A coefficient read: the number, and "residual", "norm" or "boundary"."""

    number: float
    unit: str


@checked
def parse_coefficient(coefficient: Coefficient) -> Parsed:
    """Read a coefficient; "80%" comes back as 0.8 of the boundary.

    Raises:
        InputError: it is not a finite number with a known unit.
    """
    if isinstance(coefficient, str):
        match = _TEXT.fullmatch(coefficient)
        if match is None:
            raise InputError(
                f"cannot read the coefficient {coefficient!r}; expected a number in residual "
                'units, a multiple of the mean residual norm ("0.1 norm"), or a share of the '
                'coherence boundary ("80%")'
            )
        unit = (match[2] or "").lower()
        number = float(match[1]) / (100 if unit == "%" else 1)
        parsed = Parsed(number, {"": "residual", "%": "boundary"}.get(unit, "norm"))
    else:
        try:
            parsed = Parsed(float(coefficient), "residual")
        except OverflowError:  # a whole number beyond every float
            parsed = Parsed(math.inf, "residual")
    if not math.isfinite(parsed.number):
        raise InputError(f"expected a finite coefficient, got {parsed.number}")
    return parsed


def step_sizes(
    coefficient: Coefficient,
    hook_names: Sequence[str],
    scale: Float[Tensor, " hook"],
    calibration: Calibration,
) -> tuple[float, ...]:
    """How far `coefficient` moves each hook's activation along its unit direction, residual units.

    A number is multiplied by the hook's `scale`; norms and shares are not. Raises `InputError`
    when what it is measured in is not known at a hook, or inf.
    """
    parsed = parse_coefficient(coefficient)
    if parsed.number == 0:
        return (0.0,) * len(hook_names)
    if parsed.unit == "residual":
        return tuple(parsed.number * s for s in scale.tolist())
    if parsed.unit == "norm":
        unit_sizes, measure = calibration.resid_norm, "mean residual norm"
    elif parsed.number > 0:
        unit_sizes, measure = calibration.boundary_pos, "positive coherence boundary"
    else:
        unit_sizes, measure = -calibration.boundary_neg, "negative coherence boundary"
    for name, size in zip(hook_names, unit_sizes.tolist(), strict=True):
        if not math.isfinite(size):
            reason, cure = "is not known", "measure it with find_boundary"
            if math.isinf(size):
                reason = "lies beyond the searched range"
                cure = "search further (search_range of find_boundary)"
            raise InputError(
                f"cannot take {coefficient!r} at {name}: its {measure} {reason}; {cure} and give "
                "the layer table to SteeringVector.from_directions, or give a coefficient in "
                "residual units"
            )
    return tuple(parsed.number * size for size in unit_sizes.tolist())
