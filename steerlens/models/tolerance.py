"""How far apart two ways to compute the same may be."""

import torch
from jaxtyping import Float
from torch import Tensor


def allowed_gap(dtype: torch.dtype, *, least: float = 1e-4, roundings: int = 8) -> float:
    """How far two ways to compute the same may be apart: `max(least, roundings * eps(dtype))`.

    Relative to their size; `least` decides in float32 and float64, the rounding in 16-bit dtypes.
    Test it as `not gap <= allowed`, which a NaN fails too.

    Examples:
        >>> from steerlens.models.tolerance import allowed_gap
        >>> allowed_gap(torch.float32), allowed_gap(torch.bfloat16)  # 8 / 128
        (0.0001, 0.0625)
    """
    return max(least, roundings * torch.finfo(dtype).eps)


def relative_gap(
    values: Float[Tensor, "*row d"], expected: Float[Tensor, "*row d"], *, floor: float = 1e-30
) -> Float[Tensor, "*row"]:
    """`||values - expected|| / max(||expected||, floor)` of each row, in float64.

    Examples:
        >>> from steerlens.models.tolerance import relative_gap
        >>> relative_gap(torch.tensor([[3.0, 4.5]]), torch.tensor([[3.0, 4.0]]))  # 0.5 / 5
        tensor([0.100], dtype=torch.float64)
    """
    wide = expected.double()
    gaps: Tensor = (values.double() - wide).norm(dim=-1) / wide.norm(dim=-1).clamp(min=floor)
    return gaps
