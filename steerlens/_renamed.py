"""Names of version 0.1.0 that moved: they work until 0.3, with a warning."""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NAMES = {
    "measure": """BoundaryResult BoundaryShape Comparison LossGeometry SweepResult
        generation_table reliability""",
    "directions": """Differences LossGradients Trained gradient_terms null_directions
        train_directions""",
    "runs": "Run",
    "loss": """SteeringLoss coherence_hinge contrastive_steering_loss
        contrastive_steering_loss_noref label_logprob ordering_penalty total_variation_barrier""",
    "steering.export": """bake from_gguf from_repeng from_steering_vectors to_gguf to_repeng
        to_steering_vectors""",
    "Study.boundary_shape": "boundary_shape",
    "engine": "collect_activations tokenize_pairs tokenize_prompt",
    "steering": "condition_accuracy fit_condition",
    "data": "dataset_names neutral_texts",
    "Study.layers": "measure_layers",
    "Study.predicted_boundary": "predict_boundary",
    "models": "provenance readout_hook",
}
NAMES = {name: room for room, names in _NAMES.items() for name in names.split()}
"""Once at the top of the package -> the room that has it now, or what of a study it is."""

MODULES = {
    "activations": ("engine.capture", "directions.differences"),
    "arguments": ("errors",),
    "bare": ("engine.backend",),
    "boundary": ("measure.boundary", "measure.study", "measure.texts", "measure.settings"),
    "cells": ("engine.cells", "engine.workload"),
    "checkpoints": ("models.packaged",),
    "coherence": ("measure.coherence",),
    "compiled": ("engine.compiled",),
    "damage": ("measure.tokens",),
    "display": ("tables",),
    "evaluate": ("measure",),
    "fidelity": ("models.verification",),
    "generations": ("measure.tokens",),
    "geometry": ("measure.plane", "measure.study"),
    "gradients": ("directions.gradients", "directions.gradient_rows"),
    "hooked_transformer": ("models.hooked_transformer",),
    "hooks": ("models.hooks",),
    "inputs": ("files",),
    "items": ("data.items",),
    "measures": ("measure.rows", "measure.settings"),
    "memory": ("engine.memory",),
    "methods": ("directions",),
    "parts": ("engine.prefixes",),
    "passes": ("engine.resume",),
    "plain": ("engine.plain_loop", "engine.workload"),
    "processing": ("models.weight_processing",),
    "pushes": ("measure.boundary_search", "measure.prediction"),
    "search": ("measure.search",),
    "shape": ("measure.plane", "measure.study"),
    "slopes": ("engine.slopes",),
    "tokens": ("engine.tokenization", "engine.batches"),
    "transfers": ("engine.transfer",),
    "uncertainty": ("stats",),
    "workers": ("engine.workers",),
}
"""A module of before -> those that hold what was in it."""


def renamed(name: str) -> Any:
    """What `steerlens.NAME` was. Raises `AttributeError` for a name that never was."""
    if name not in NAMES:
        raise AttributeError(f"module 'steerlens' has no attribute {name!r}")
    room = f"steerlens.{NAMES[name]}"
    if name in OF_STUDIES:
        _warn(f"steerlens.{name}", room)
        return OF_STUDIES[name]
    _warn(f"steerlens.{name}", f"{room}.{name}")
    return getattr(importlib.import_module(room), name)


def boundary_shape(*given: Any, layer: Any, **settings: Any) -> Any:
    """`Study(*given, layers=layer, **settings).boundary_shape(layer, ...)`."""
    asked = {name: settings.pop(name) for name in _OF_SHAPES if name in settings}
    return _study(*given, layers=layer, **settings).boundary_shape(layer, **asked)


def measure_layers(*given: Any, **settings: Any) -> Any:
    """`Study(*given, **settings).layers`."""
    return _study(*given, **settings).layers


def predict_boundary(*given: Any, on: Any = "positive", **settings: Any) -> Any:
    """`Study(*given, **settings).predicted_boundary(on=on)`."""
    return _study(*given, **settings).predicted_boundary(on=on)


def _study(*given: Any, **settings: Any) -> Any:
    from steerlens.measure.study import Study

    return Study(*given, **settings)


_OF_SHAPES = ("n_angles", "on", "search_range")
OF_STUDIES = {f.__name__: f for f in (boundary_shape, measure_layers, predict_boundary)}


class RenamedModules(MetaPathFinder, Loader):
    """Finds `steerlens.NAME` of before as a module whose names are those of its successors."""

    def find_spec(
        self,
        fullname: str,
        path: Any = None,  # noqa: ARG002 (the package's own kind of path)
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """A spec for the modules of `MODULES` alone."""
        package, _, name = fullname.rpartition(".")
        if package != "steerlens" or name not in MODULES:
            return None
        return ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        """Let the module look its names up where they are now."""
        places = [f"steerlens.{place}" for place in MODULES[module.__name__.rpartition(".")[2]]]
        _warn(module.__name__, " and ".join(places))

        def look_up(name: str) -> Any:
            if name in OF_STUDIES:
                return OF_STUDIES[name]
            for place in places:
                found = importlib.import_module(place)
                if hasattr(found, name):
                    return getattr(found, name)
            raise AttributeError(f"{' and '.join(places)} have no {name!r}")

        module.__dict__["__getattr__"] = look_up


def _warn(before: str, now: str) -> None:
    warnings.warn(f"{before} is now {now}, and goes with 0.3", DeprecationWarning, stacklevel=3)


sys.meta_path.append(RenamedModules())
