"""Directions: fitted from differences of activations, from gradients of the loss, or trained."""

from steerlens.directions.differences import Differences, collect_differences
from steerlens.directions.directions import Directions
from steerlens.directions.fitting import fit
from steerlens.directions.gradient_rows import LossGradients, gradient_terms
from steerlens.directions.gradients import loss_gradients
from steerlens.directions.methods import METHODS, Method, fit_directions, null_directions
from steerlens.directions.training import Schedule, Trained, train_directions

__all__ = [
    "METHODS",
    "Differences",
    "Directions",
    "LossGradients",
    "Method",
    "Schedule",
    "Trained",
    "collect_differences",
    "fit",
    "fit_directions",
    "gradient_terms",
    "loss_gradients",
    "null_directions",
    "train_directions",
]
