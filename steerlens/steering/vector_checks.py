"""What has to hold of a steering vector: its parts, with another one, with a model."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.directions.directions import UNIT_TOLERANCE
from steerlens.errors import HookError, InputError
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import (
    check_one_width,
    has_hook,
    hook_layer,
    hook_width,
    width_name,
)
from steerlens.models.identity import provenance
from steerlens.models.weight_processing import check_processing, check_same
from steerlens.steering.operators import Add


def check_parts(vector: Any) -> None:
    """Raise `InputError` where hooks, directions, scales, calibration, condition do not agree."""
    sizes = {len(vector.hook_names), len(vector.directions), len(vector.scale)}
    if (
        len(sizes) > 1
        or not vector.hook_names
        or len(set(vector.hook_names)) < len(vector.hook_names)
    ):
        raise InputError(
            f"expected one direction and scale for each of some different hooks, got "
            f"{len(vector.hook_names)} names, {len(vector.directions)} directions and "
            f"{len(vector.scale)} scales"
        )
    for name, norm in zip(vector.hook_names, vector.directions.norm(dim=-1).tolist(), strict=True):
        if not abs(norm - 1) < UNIT_TOLERANCE:
            raise InputError(f"the direction at {name} has norm {norm:.6g}; expected 1")
        try:
            hook_layer(name)
        except HookError as error:
            raise InputError(f"a vector acts inside blocks: {error}") from error
    if not bool((vector.scale.isfinite() & (vector.scale > 0)).all()):
        raise InputError(f"scales must be finite and above 0, got {vector.scale.tolist()}")
    if {len(vector.hook_names)} != vector.calibration.lengths:
        raise InputError(
            f"expected a calibration of {len(vector.hook_names)} hooks, got one of "
            f"{sorted(vector.calibration.lengths)}"
        )
    check_one_width(vector.hook_names)
    if (
        vector.condition is not None
        and width_name([vector.condition.hook_name]) == width_name(vector.hook_names)
        and len(vector.condition.direction) != vector.d_model
    ):
        raise InputError(
            f"the condition's direction has {len(vector.condition.direction)} numbers, the "
            f"vector's {vector.d_model}"
        )


def unit_rows(
    hook_names: Sequence[str], rows: Float[Tensor, "hook d_model"]
) -> tuple[Float[Tensor, "hook d_model"], Float[Tensor, " hook"]]:
    """The rows at norm 1, and their norms. Raises `InputError` where one is 0 or not finite."""
    norms = rows.double().norm(dim=-1)
    for name, norm in zip(hook_names, norms.tolist(), strict=True):
        if not (math.isfinite(norm) and norm > 0):
            raise InputError(f"the vector at {name} has norm {norm:.6g}, so it has no direction")
    return (rows.double() / norms[:, None]).float(), norms.float()


def rest_of(
    rows: Float[Tensor, "hook d_model"], others: Float[Tensor, "hook d_model"]
) -> Float[Tensor, "hook d_model"]:
    """The rows without their components along the others; 0 where only rounding errors are left."""
    units = others / others.norm(dim=-1, keepdim=True)
    rest = rows - (rows * units).sum(dim=-1, keepdim=True) * units
    is_noise = rest.norm(dim=-1) <= 1e-6 * rows.norm(dim=-1)
    return torch.where(is_noise[:, None], 0.0, rest)


def check_alike(vector: Any, other: Any) -> None:
    """Raise `InputError` where two vectors cannot be combined."""
    if vector.hook_names != other.hook_names:
        mine, theirs = set(vector.hook_names), set(other.hook_names)
        if mine == theirs:
            raise InputError("the vectors have the same hooks in another order: use .at(...)")
        raise InputError(
            "the vectors have other hooks: only the first has "
            f"{', '.join(sorted(mine - theirs)) or 'none'}, only the second "
            f"{', '.join(sorted(theirs - mine)) or 'none'}; take the same part of both with "
            ".at(...), in the same order"
        )
    check_added("combining", vector, other)
    if vector.d_model != other.d_model:
        raise InputError(f"the vectors have d_model {vector.d_model} and {other.d_model}")
    check_same(
        "the first vector was fitted on a model",
        vector.weight_processing,
        "that of the second",
        other.weight_processing,
    )
    differences = vector.origin.differences(other.origin)
    if differences:
        raise InputError(f"the vectors are of different models: other {'; '.join(differences)}")
    if vector.condition != other.condition:
        raise InputError(
            f"the vectors have other conditions: {vector.condition} and {other.condition}"
        )


def check_added(doing: str, *vectors: Any) -> None:
    """Raise `InputError` where one of the vectors has another operator than `Add`."""
    names = {vector.operator.name for vector in vectors}
    if names != {Add.name}:
        raise InputError(
            f"{doing} is for vectors that are added, not for {', '.join(sorted(names))}"
        )


def check_fits(vector: Any, model: HookedModel) -> None:
    """`SteeringVector.check_model`."""
    width, name = hook_width(model, vector.hook_names[0]), width_name(vector.hook_names)
    if width != vector.d_model:
        raise InputError(
            f"the vector has {name} {vector.d_model}, the model {width}; it was made on "
            f"{vector.origin.model!r}"
        )
    missing = [name for name in vector.touched if not has_hook(model, name)]
    if missing:
        raise InputError(
            f"the model has no hook {', '.join(missing)} (it has {model.cfg.n_layers} layers of "
            f"{model.cfg.n_heads} heads); the vector was made on {vector.origin.model!r}"
        )
    check_processing(model, vector)
    here = provenance(model, fingerprints=True)
    for difference in vector.origin.provenance.differences(here):
        warnings.warn(
            f"the vector was made elsewhere: other {difference}; its effect may be another",
            UserWarning,
            stacklevel=3,
        )
