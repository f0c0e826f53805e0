"""Everything besides model, pairs and directions that decides a measurement's numbers."""

from dataclasses import dataclass

from steerlens.engine.positions import Position
from steerlens.engine.tokenization import SteeredPositions

N_BOOTSTRAP = 2000
"""Resamples of an interval where nobody says how many."""


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
    """Of a sweep also the coefficients, in residual units."""

    coefficients: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class BoundarySettings(StudySettings):
    """Of a boundary also the text, and how far to look, in mean residual norms of the hook."""

    on: str
    search_range: float


@dataclass(frozen=True, kw_only=True)
class PlaneSettings(BoundarySettings):
    """Of a plane also the number of angles."""

    n_angles: int
