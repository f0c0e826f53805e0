"""Steering vectors of other tools, as objects: `steering-vectors` and `repeng`, both ways."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from steerlens.errors import InputError
from steerlens.models.hooks import hook_layer, resid_post
from steerlens.steering import Add, Origin, SteeringVector
from steerlens.steering.export.gguf_file import block_rows
from steerlens.steering.vector_file import write_named
from steerlens.validation import checked

_LAYER_TYPES = {
    "decoder_block": ("hook_resid_post",),
    "self_attn": ("hook_attn_out", "attn.hook_out"),
    "mlp": ("hook_mlp_out", "mlp.hook_out"),
}


@runtime_checkable
class SteeringVectorsLike(Protocol):
    """What a `steering_vectors.SteeringVector` is made of."""

    layer_activations: Mapping[int, Tensor]
    layer_type: str


@runtime_checkable
class RepengLike(Protocol):
    """What a `repeng.ControlVector` is made of."""

    model_type: str
    directions: Mapping[int, Any]


@checked
def to_steering_vectors(vector: SteeringVector) -> Any:
    """A `steering_vectors.SteeringVector`: multiplier c there is coefficient c here.

    It holds `scale * direction` by block and the kind of hook; calibration and origin are not part
    of it.

    Args:
        vector: added everywhere, at block outputs, `hook_attn_out` or `hook_mlp_out`.

    Raises:
        InputError: the vector is not added everywhere, has hooks of several or other kinds, or the
            package is not installed.
    """
    return _installed("steering_vectors", "SteeringVector")(**_fields(vector))


@checked
def save_steering_vectors(vector: SteeringVector, path: str | Path) -> None:
    """Write the fields of a `steering_vectors.SteeringVector`, which has no file of its own.

    `SteeringVector(**fields)` makes it there, of what `torch.load` gives: tensors and plain values.
    Multiplier c there is coefficient c here.

    Args:
        vector: as in `to_steering_vectors`; the package need not be installed.
        path: ends in .pt.

    Raises:
        InputError: as `to_steering_vectors`, or the file cannot be written.

    Examples:
        >>> sl.export.save_steering_vectors(vector, folder / "cheerful.pt")
    """
    fields = _fields(vector)
    write_named(path, ".pt", lambda part: torch.save(fields, part))


def _fields(vector: SteeringVector) -> dict[str, Any]:
    """Those of a `steering_vectors.SteeringVector`. Raises `InputError` where it has none."""
    if not isinstance(vector.operator, Add) or vector.condition is not None:
        raise InputError("steering-vectors holds what is added: not an operator, not a condition")
    kinds = {name.partition(f"blocks.{hook_layer(name)}.")[2] for name in vector.hook_names}
    layer_types = [theirs for theirs, ours in _LAYER_TYPES.items() if kinds <= set(ours)]
    if not layer_types:
        raise InputError(
            f"steering-vectors knows one of {', '.join(ours[0] for ours in _LAYER_TYPES.values())} "
            f"for all layers of a vector; this one has {', '.join(sorted(kinds))}"
        )
    rows = {hook_layer(n): r.clone() for n, r in zip(vector.hook_names, vector.rows, strict=True)}
    return {"layer_activations": rows, "layer_type": layer_types[0]}


@checked
def from_steering_vectors(vector: SteeringVectorsLike) -> SteeringVector:
    """Take over a `steering_vectors.SteeringVector`; its origin is unknown.

    Args:
        vector: its layers are block numbers from 0, as here; the norm of each becomes its scale.

    Raises:
        InputError: a kind of layer without a TransformerLens hook, or a vector without direction.

    Examples:
        >>> from types import SimpleNamespace
        >>> theirs = SimpleNamespace(
        ...     layer_type="decoder_block", layer_activations={2: torch.tensor([3.0, 4.0])}
        ... )
        >>> sl.export.from_steering_vectors(theirs).hook_names
        ('blocks.2.hook_resid_post',)
    """
    if vector.layer_type not in _LAYER_TYPES:
        raise InputError(
            f"expected the layer type {', '.join(_LAYER_TYPES)}, got {vector.layer_type!r}"
        )
    hook = _LAYER_TYPES[vector.layer_type][0]
    rows = {f"blocks.{block}.{hook}": row for block, row in vector.layer_activations.items()}
    return SteeringVector.from_vectors(rows)


@checked
def to_repeng(vector: SteeringVector) -> Any:
    """A `repeng.ControlVector`: its coefficient c is c here.

    Args:
        vector: added everywhere, at block outputs, block 0 included.

    Raises:
        InputError: it is not, or repeng is not installed.
    """
    rows = block_rows(vector, "repeng")
    return _installed("repeng", "ControlVector")(
        model_type=vector.origin.architecture,
        directions={block: row.numpy() for block, row in rows.items()},
    )


@checked
def from_repeng(vector: RepengLike) -> SteeringVector:
    """Take over a `repeng.ControlVector`; of its origin only the architecture is known.

    Args:
        vector: its layers are block outputs from 0, as here; the norm of each becomes its scale.

    Raises:
        InputError: a vector without direction.

    Examples:
        >>> from types import SimpleNamespace
        >>> theirs = SimpleNamespace(model_type="llama", directions={2: np.array([3.0, 4.0])})
        >>> sl.export.from_repeng(theirs).scale
        tensor([5.])
    """
    rows = {
        resid_post(block): torch.tensor(row) for block, row in sorted(vector.directions.items())
    }
    return SteeringVector.from_vectors(rows, origin=Origin(architecture=str(vector.model_type)))


def _installed(package: str, name: str) -> Any:
    """A class of a package that steerlens does not depend on."""
    try:
        return getattr(importlib.import_module(package), name)
    except ImportError as error:
        raise InputError(
            f"{package} is not installed: pip install {package.replace('_', '-')}"
        ) from error
