"""Contrastive steering on TransformerLens, with the coherence boundary measured.

The usual path: `load_model`, `ContrastivePairs.load`, `collect_differences`, `fit_directions`,
`sweep`.
"""

from steerlens.activations import Differences, collect_activations, collect_differences
from steerlens.boundary import BoundaryResult, find_boundary, predict_boundary
from steerlens.data import (
    ContrastivePair,
    ContrastivePairs,
    Message,
    dataset_names,
    neutral_texts,
)
from steerlens.directions import Directions
from steerlens.errors import SteerlensError
from steerlens.hooks import readout_hook, resolve_hooks
from steerlens.loss import (
    SteeringLoss,
    contrastive_steering_loss,
    contrastive_steering_loss_noref,
    label_logprob,
)
from steerlens.methods import METHODS, fit_directions
from steerlens.models import load_model, provenance
from steerlens.shape import BoundaryShape, boundary_shape
from steerlens.steering import generate, steer
from steerlens.sweep import SweepResult, measure_layers, sweep
from steerlens.tokens import tokenize_pairs, tokenize_prompt

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "BoundaryResult",
    "BoundaryShape",
    "ContrastivePair",
    "ContrastivePairs",
    "Differences",
    "Directions",
    "Message",
    "SteeringLoss",
    "SteerlensError",
    "SweepResult",
    "boundary_shape",
    "collect_activations",
    "collect_differences",
    "contrastive_steering_loss",
    "contrastive_steering_loss_noref",
    "dataset_names",
    "find_boundary",
    "fit_directions",
    "generate",
    "label_logprob",
    "load_model",
    "measure_layers",
    "neutral_texts",
    "predict_boundary",
    "provenance",
    "readout_hook",
    "resolve_hooks",
    "steer",
    "sweep",
    "tokenize_pairs",
    "tokenize_prompt",
]
