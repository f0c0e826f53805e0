"""Contrastive steering on TransformerLens, with the coherence boundary measured.

The usual path: `load_model`, `ContrastivePairs.load`, `fit`, then a `Study`: its `layers`, `sweep`,
`boundary` and `plane`; `compare` for which method, `SteeringVector` for what to take elsewhere.
More is in the rooms `circuits`, `export`, `loss` and `plots`.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from steerlens import _renamed

if TYPE_CHECKING:
    from steerlens import circuits, loss, plots
    from steerlens.data import (
        ContrastivePair,
        ContrastivePairs,
        Message,
        PreferenceItem,
        PreferenceItems,
    )
    from steerlens.directions import (
        METHODS,
        Directions,
        collect_differences,
        fit,
        fit_directions,
        loss_gradients,
    )
    from steerlens.errors import SteerlensError
    from steerlens.measure import (
        Study,
        behaviour,
        compare,
        cosine_table,
        find_boundary,
        loss_geometry,
        recommend,
        sweep,
        token_damage,
        vocabulary,
    )
    from steerlens.models import check_model, load_model, resolve_hooks
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

__version__ = "0.2.0"

__all__ = [
    "METHODS",
    "Ablate",
    "Add",
    "Clamp",
    "Condition",
    "ContrastivePair",
    "ContrastivePairs",
    "Directions",
    "Message",
    "PreferenceItem",
    "PreferenceItems",
    "Rotate",
    "SteeringVector",
    "SteerlensError",
    "Study",
    "behaviour",
    "check_model",
    "circuits",
    "collect_differences",
    "compare",
    "cosine_table",
    "export",
    "find_boundary",
    "fit",
    "fit_directions",
    "generate",
    "load_model",
    "loss",
    "loss_geometry",
    "loss_gradients",
    "plots",
    "read_run",
    "recommend",
    "report",
    "resolve_hooks",
    "show_progress",
    "steer",
    "sweep",
    "token_damage",
    "vocabulary",
]

_ROOMS = ("errors", "progress", "data", "models", "directions", "steering", "measure", "runs")
"""Where the names of `__all__` are found. PyTorch is imported with the first of them."""


def __getattr__(name: str) -> Any:
    if name == "export":
        return importlib.import_module("steerlens.steering.export")
    for room in _ROOMS if name in __all__ else ():
        face = importlib.import_module(f"steerlens.{room}")
        if name in getattr(face, "__all__", vars(face)):
            return globals().setdefault(name, getattr(face, name))
    if name not in _renamed.MODULES and importlib.util.find_spec(f"steerlens.{name}"):
        return importlib.import_module(f"steerlens.{name}")
    return _renamed.renamed(name)


def __dir__() -> list[str]:
    return __all__
