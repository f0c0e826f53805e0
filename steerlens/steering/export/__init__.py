"""Steering vectors in other tools: GGUF, baked checkpoints, adapters, other packages."""

from steerlens.steering.export.adapters import to_easysteer, to_lm_eval, to_peft
from steerlens.steering.export.gguf_file import from_gguf, to_gguf
from steerlens.steering.export.huggingface import CARRIERS, bake
from steerlens.steering.export.other_tools import (
    from_repeng,
    from_steering_vectors,
    save_steering_vectors,
    to_repeng,
    to_steering_vectors,
)
from steerlens.steering.hub import push_checkpoint

__all__ = [
    "CARRIERS",
    "bake",
    "from_gguf",
    "from_repeng",
    "from_steering_vectors",
    "push_checkpoint",
    "save_steering_vectors",
    "to_easysteer",
    "to_gguf",
    "to_lm_eval",
    "to_peft",
    "to_repeng",
    "to_steering_vectors",
]
