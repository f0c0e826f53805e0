"""Contrastive steering on TransformerLens, with the coherence boundary measured.

The usual path: `load_model`, `ContrastivePairs.load`, `collect_differences`, `fit_directions`,
`sweep`; `find_boundary` for how far, `compare` for which method.
"""

from steerlens import plots
from steerlens.data.items import PreferenceItem, PreferenceItems
from steerlens.data.pairs import (
    ContrastivePair,
    ContrastivePairs,
    Message,
    dataset_names,
    neutral_texts,
)
from steerlens.directions.differences import Differences, collect_differences
from steerlens.directions.directions import Directions
from steerlens.directions.fitting import fit
from steerlens.directions.gradients import LossGradients, gradient_terms, loss_gradients
from steerlens.directions.methods import METHODS, fit_directions, null_directions
from steerlens.directions.training import Trained, train_directions
from steerlens.engine.capture import collect_activations
from steerlens.engine.tokenization import tokenize_pairs, tokenize_prompt
from steerlens.errors import SteerlensError
from steerlens.loss import (
    SteeringLoss,
    coherence_hinge,
    contrastive_steering_loss,
    contrastive_steering_loss_noref,
    label_logprob,
    ordering_penalty,
    total_variation_barrier,
)
from steerlens.measure.boundary import BoundaryResult
from steerlens.measure.comparison import Comparison, compare
from steerlens.measure.cosines import cosine_table
from steerlens.measure.plane import BoundaryShape, LossGeometry
from steerlens.measure.split_half import reliability
from steerlens.measure.study import (
    Study,
    boundary_shape,
    find_boundary,
    loss_geometry,
    measure_layers,
    predict_boundary,
    sweep,
)
from steerlens.measure.sweeps import SweepResult
from steerlens.measure.tokens import generation_table, token_damage
from steerlens.models.hooks import readout_hook, resolve_hooks
from steerlens.models.loading import load_model, provenance
from steerlens.models.verification import check_model
from steerlens.progress import show_progress
from steerlens.runs.html_report.page import report
from steerlens.runs.reading import Run, read_run
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
from steerlens.steering.export import (
    bake,
    from_gguf,
    from_repeng,
    from_steering_vectors,
    to_gguf,
    to_repeng,
    to_steering_vectors,
)

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
    "Study",
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
