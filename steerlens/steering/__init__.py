"""Steering vectors: what they do to activations, where, how strongly, and how they are kept."""

from steerlens.steering.apply import Steerable, steer, steps
from steerlens.steering.cache_positions import Positions
from steerlens.steering.coefficients import Calibration, Coefficient, parse_coefficient
from steerlens.steering.conditions import Condition, condition_accuracy, fit_condition
from steerlens.steering.generation import (
    Generated,
    decoded,
    generate,
    generate_texts,
    generate_tokens,
)
from steerlens.steering.operators import (
    OPERATORS,
    Ablate,
    Add,
    Clamp,
    Operator,
    Rotate,
    operator_of,
)
from steerlens.steering.origin import Origin
from steerlens.steering.vector import SteeringVector

__all__ = [
    "OPERATORS",
    "Ablate",
    "Add",
    "Calibration",
    "Clamp",
    "Coefficient",
    "Condition",
    "Generated",
    "Operator",
    "Origin",
    "Positions",
    "Rotate",
    "Steerable",
    "SteeringVector",
    "condition_accuracy",
    "decoded",
    "fit_condition",
    "generate",
    "generate_texts",
    "generate_tokens",
    "operator_of",
    "parse_coefficient",
    "steer",
    "steps",
]
