"""Contrastive steering on TransformerLens, with the coherence boundary measured.

The usual path: `load_model`, `ContrastivePairs.load`, `collect_differences`, `fit_directions`,
`sweep`; `find_boundary` for how far, `compare` for which method.
"""

from steerlens import plots
from steerlens.activations import Differences, collect_activations, collect_differences
from steerlens.boundary import BoundaryResult, find_boundary, predict_boundary
from steerlens.damage import token_damage
from steerlens.data import (
    ContrastivePair,
    ContrastivePairs,
    Message,
    dataset_names,
    neutral_texts,
)
from steerlens.directions import Directions
from steerlens.errors import SteerlensError
from steerlens.evaluate import Comparison, compare, cosine_table, reliability
from steerlens.export import (
    bake,
    from_gguf,
    from_repeng,
    from_steering_vectors,
    to_gguf,
    to_repeng,
    to_steering_vectors,
)
from steerlens.fidelity import check_model
from steerlens.generations import generation_table
from steerlens.geometry import LossGeometry, loss_geometry
from steerlens.gradients import LossGradients, gradient_terms, loss_gradients
from steerlens.hooks import readout_hook, resolve_hooks
from steerlens.items import PreferenceItem, PreferenceItems
from steerlens.loss import (
    SteeringLoss,
    coherence_hinge,
    contrastive_steering_loss,
    contrastive_steering_loss_noref,
    label_logprob,
    ordering_penalty,
    total_variation_barrier,
)
from steerlens.methods import (
    METHODS,
    Trained,
    fit,
    fit_directions,
    null_directions,
    train_directions,
)
from steerlens.models import load_model, provenance
from steerlens.progress import show_progress
from steerlens.report import Run, read_run, report
from steerlens.shape import BoundaryShape, boundary_shape
from steerlens.steering import (
    Ablate,
    Add,
    Clamp,
    Condition,
    Rotate,
    SteeringVector,
    condition_accuracy,
    fit_condition,
    generate,
    steer,
)
from steerlens.sweep import SweepResult, measure_layers, sweep
from steerlens.tokens import tokenize_pairs, tokenize_prompt

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Ablate",
    "Add",
    "BoundaryResult",
    "BoundaryShape",
    "Clamp",
    "Comparison",
    "Condition",
    "ContrastivePair",
    "ContrastivePairs",
    "Differences",
    "Directions",
    "LossGeometry",
    "LossGradients",
    "Message",
    "PreferenceItem",
    "PreferenceItems",
    "Rotate",
    "Run",
    "SteeringLoss",
    "SteeringVector",
    "SteerlensError",
    "SweepResult",
    "Trained",
    "bake",
    "boundary_shape",
    "check_model",
    "coherence_hinge",
    "collect_activations",
    "collect_differences",
    "compare",
    "condition_accuracy",
    "contrastive_steering_loss",
    "contrastive_steering_loss_noref",
    "cosine_table",
    "dataset_names",
    "find_boundary",
    "fit",
    "fit_condition",
    "fit_directions",
    "from_gguf",
    "from_repeng",
    "from_steering_vectors",
    "generate",
    "generation_table",
    "gradient_terms",
    "label_logprob",
    "load_model",
    "loss_geometry",
    "loss_gradients",
    "measure_layers",
    "neutral_texts",
    "null_directions",
    "ordering_penalty",
    "plots",
    "predict_boundary",
    "provenance",
    "read_run",
    "readout_hook",
    "reliability",
    "report",
    "resolve_hooks",
    "show_progress",
    "steer",
    "sweep",
    "to_gguf",
    "to_repeng",
    "to_steering_vectors",
    "token_damage",
    "tokenize_pairs",
    "tokenize_prompt",
    "total_variation_barrier",
    "train_directions",
]
