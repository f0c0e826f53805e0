"""Contrastive steering on TransformerLens, with the coherence boundary measured.

The usual path: `load_model`, `ContrastivePairs.load`, `fit`, then a `Study`: its `layers`, `sweep`,
`boundary` and `plane`; `compare` for which method, `SteeringVector` for what to take elsewhere.
More is in the rooms `circuits`, `export`, `loss` and `plots`.
"""

from typing import Any

from steerlens import _renamed, circuits, loss, plots
from steerlens.data import (
    ContrastivePair,
    ContrastivePairs,
    Message,
    PreferenceItem,
    PreferenceItems,
)
from steerlens.directions import (
    METHODS,
    Differences,
    Directions,
    collect_differences,
    fit,
    fit_directions,
    loss_gradients,
    null_directions,
)
from steerlens.errors import SteerlensError
from steerlens.measure import (
    Study,
    compare,
    find_boundary,
    loss_geometry,
    reliability,
    sweep,
    token_damage,
)
from steerlens.models import check_model, load_model, provenance, resolve_hooks
from steerlens.progress import show_progress
from steerlens.runs import read_run, report
from steerlens.steering import (
    Ablate,
    Add,
    Clamp,
    Condition,
    Rotate,
    SteeringVector,
    export,
    generate,
    steer,
)

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Ablate",
    "Add",
    "Clamp",
    "Condition",
    "ContrastivePair",
    "ContrastivePairs",
    "Differences",
    "Directions",
    "Message",
    "PreferenceItem",
    "PreferenceItems",
    "Rotate",
    "SteeringVector",
    "SteerlensError",
    "Study",
    "check_model",
    "circuits",
    "collect_differences",
    "compare",
    "export",
    "find_boundary",
    "fit",
    "fit_directions",
    "generate",
    "load_model",
    "loss",
    "loss_geometry",
    "loss_gradients",
    "null_directions",
    "plots",
    "provenance",
    "read_run",
    "reliability",
    "report",
    "resolve_hooks",
    "show_progress",
    "steer",
    "sweep",
    "token_damage",
]


def __getattr__(name: str) -> Any:
    return _renamed.renamed(name)
