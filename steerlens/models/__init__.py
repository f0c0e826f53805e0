"""Models: loaded, proved to be the ones that were meant, their hooks named."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerlens.models.hooked_model import HookedModel
    from steerlens.models.hooks import (
        Layers,
        hook_layer,
        hooked,
        readout_hook,
        resid_post,
        resolve_hooks,
    )
    from steerlens.models.identity import Provenance, provenance
    from steerlens.models.loading import Quantization, inference, load_model
    from steerlens.models.packaged import DEFAULT_MODEL, PACKAGED_MODELS, cache_folder
    from steerlens.models.verification import check_model

__all__ = [
    "DEFAULT_MODEL",
    "PACKAGED_MODELS",
    "HookedModel",
    "Layers",
    "Provenance",
    "Quantization",
    "cache_folder",
    "check_model",
    "hook_layer",
    "hooked",
    "inference",
    "load_model",
    "provenance",
    "readout_hook",
    "resid_post",
    "resolve_hooks",
]

_MODULES = ("packaged", "hooked_model", "hooks", "identity", "verification", "loading")


def __getattr__(name: str) -> Any:
    """Imported when asked for: what comes packaged is told of without PyTorch."""
    if name in _MODULES:
        return importlib.import_module(f"steerlens.models.{name}")
    for module in _MODULES if name in __all__ else ():
        found = vars(importlib.import_module(f"steerlens.models.{module}"))
        if name in found:
            return globals().setdefault(name, found[name])
    raise AttributeError(f"module 'steerlens.models' has no attribute {name!r}")
