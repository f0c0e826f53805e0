"""What is measured on a model along directions: sweep, boundary, plane, comparison, tokens."""

from steerlens.measure import scorers
from steerlens.measure.behaviours import BehaviourResult, behaviour
from steerlens.measure.boundary import BoundaryResult
from steerlens.measure.comparison import Comparison, compare
from steerlens.measure.cosines import cosine_table
from steerlens.measure.lenses import readings, vocabulary
from steerlens.measure.plane import BoundaryShape, LossGeometry
from steerlens.measure.recommendation import Recommendation, recommend
from steerlens.measure.settings import (
    BoundarySettings,
    PlaneSettings,
    StudySettings,
    SweepSettings,
)
from steerlens.measure.split_half import reliability
from steerlens.measure.study import Study, find_boundary, loss_geometry, sweep
from steerlens.measure.sweeps import SweepResult
from steerlens.measure.texts import On
from steerlens.measure.tokens import generation_table, token_damage

__all__ = [
    "BehaviourResult",
    "BoundaryResult",
    "BoundarySettings",
    "BoundaryShape",
    "Comparison",
    "LossGeometry",
    "On",
    "PlaneSettings",
    "Recommendation",
    "Study",
    "StudySettings",
    "SweepResult",
    "SweepSettings",
    "behaviour",
    "compare",
    "cosine_table",
    "find_boundary",
    "generation_table",
    "loss_geometry",
    "readings",
    "recommend",
    "reliability",
    "scorers",
    "sweep",
    "token_damage",
    "vocabulary",
]
