"""Everything besides model, pairs and directions that decides a measurement's numbers."""

from dataclasses import dataclass

from steerlens.engine.positions import Position
from steerlens.engine.tokenization import SteeredPositions

SEARCH_RANGE = 4.0
"""How far a boundary is looked for where nobody says, in mean residual norms."""


COEFFICIENTS = ("-0.1 norm", "-0.05 norm", 0, "0.05 norm", "0.1 norm")
"""Of a sweep where nobody says which: up to a tenth of each hook's residual norm, which is about
as far as predictions last at most hooks of the models that we measured."""


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What all measurements of a study share; `margin` and `weight` are those of the loss.

    `own_tokens` is None where the labels are not what the model itself writes.
    """

    hook_names: tuple[str, ...]
    position: Position
    steered_positions: SteeredPositions
    labels: str
    own_tokens: int | None
    budget: str
    margin: float
    weight: float
    n_bootstrap: int
    seed: int
    batch_size: int | None


@dataclass(frozen=True, kw_only=True)
class SweepSettings(StudySettings):
    """Of a sweep also the coefficients: in residual units, or as text in norms or boundaries.

    `dense` is how many evenly spaced ones were asked for, of which most are interpolated.
    """

    coefficients: tuple[float | str, ...]
    dense: int | None = None


@dataclass(frozen=True, kw_only=True)
class TextSettings(StudySettings):
    """Of a predicted boundary also the text."""

    on: str


@dataclass(frozen=True, kw_only=True)
class BoundarySettings(TextSettings):
    """Of a measured boundary also how far to look, in mean residual norms of the hook."""

    search_range: float


@dataclass(frozen=True, kw_only=True)
class PlaneSettings(BoundarySettings):
    """Of a plane also the number of angles."""

    n_angles: int
