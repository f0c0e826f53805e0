"""Models: loaded, proved to be the ones that were meant, their hooks named."""

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
