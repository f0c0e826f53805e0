"""The components that write into the residual stream: embedding, heads, MLPs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from steerlens.errors import InputError
from steerlens.models import HookedModel, hook_layer, resid_post
from steerlens.models.tolerance import allowed_gap
from steerlens.stats import intervals
from steerlens.tables import Row
from steerlens.validation import checked

EMBED = "blocks.0.hook_resid_pre"
"""What the stream begins with: token embeddings, and positions where the model adds them."""
TOLERANCE = 1e-3
"""Largest part of what was written that the components may leave unexplained."""


def tolerance(dtype: torch.dtype) -> float:
    """`TOLERANCE`, or 4 times the dtype's epsilon where that is more."""
    return allowed_gap(dtype, least=TOLERANCE, roundings=4)


@checked
@dataclass(frozen=True, order=True)
class Component:
    """One writer: the embedding (layer -1), a head, or an MLP (head -1).

    Examples:
        >>> from steerlens.circuits import Component
        >>> [str(part) for part in (Component(-1), Component(3, head=1), Component(3))]
        ['embed', 'L3H1', 'mlp3']
    """

    layer: int
    head: int = -1

    @property
    def kind(self) -> str:
        """Which of embed, head and mlp it is."""
        if self.layer < 0:
            return "embed"
        return "mlp" if self.head < 0 else "head"

    @property
    def hook_name(self) -> str:
        """Where its write is read and patched."""
        if self.layer < 0:
            return EMBED
        return mlp_hook(self.layer) if self.head < 0 else head_hook(self.layer)

    def __str__(self) -> str:
        if self.layer < 0:
            return "embed"
        return f"mlp{self.layer}" if self.head < 0 else f"L{self.layer}H{self.head}"


def components(model: HookedModel, *, n_layers: int | None = None) -> tuple[Component, ...]:
    """The embedding, and heads and MLP of the first `n_layers` blocks (all of them), in order."""
    layers = range(int(model.cfg.n_layers) if n_layers is None else n_layers)
    heads = (*range(int(model.cfg.n_heads)), -1)
    return Component(-1), *(Component(layer, head) for layer in layers for head in heads)


def rows_of(**columns: Any) -> list[Row]:
    """Rows of columns; what is not a list or array is the same in every row."""
    return cast(list[Row], pd.DataFrame(columns).to_dict("records"))


def component_rows(parts: Sequence[Component], **columns: Any) -> list[Row]:
    """Rows that say which component each is about, and what `columns` hold of it."""
    kinds, layers = [part.kind for part in parts], [part.layer for part in parts]
    return rows_of(component=kinds, layer=layers, head=[part.head for part in parts], **columns)


def mean_intervals(
    values: Float[Tensor, "component example"],
    *,
    groups: Sequence[int],
    n_bootstrap: int,
    seed: int,
) -> tuple[Float[np.ndarray, " component"], ...]:
    """The means over examples, and the ends of their 95% intervals, which go by `groups`."""
    values = values.double()
    bounds = intervals(values.numpy(), groups=groups, seed=seed, n_bootstrap=n_bootstrap)
    return values.mean(dim=1).numpy(), *bounds


def head_hook(layer: int) -> str:
    """Where heads are read and patched: their values mixed by attention, before `W_O`."""
    return f"blocks.{layer}.attn.hook_z"


def mlp_hook(layer: int) -> str:
    """Where an MLP's write is read and patched."""
    return f"blocks.{layer}.hook_mlp_out"


def holds_heads(hook_name: str) -> bool:
    """Whether a hook of `writer_hooks` holds the heads of a layer, and not one write."""
    return hook_name.endswith("hook_z")


def writer_hooks(model: HookedModel, *, n_layers: int | None = None) -> tuple[str, ...]:
    """The hooks that hold all writes of the first `n_layers` blocks, in `components`' order."""
    parts = components(model, n_layers=n_layers)
    return tuple(dict.fromkeys(part.hook_name for part in parts))


def by_hook(parts: Iterable[Component]) -> dict[str, list[int] | None]:
    """Hook -> the heads of `parts` that are there; None at an MLP, which is all that is there."""
    places: dict[str, list[int]] = {}
    for part in parts:
        places.setdefault(part.hook_name, []).append(part.head)
    return {name: heads if holds_heads(name) else None for name, heads in places.items()}


def output_weights(model: HookedModel, hook_name: str) -> Float[Tensor, "head d_head d_model"]:
    """`W_O` of the hook's block, head by head, in float32."""
    weights: Float[Tensor, "head d_head d_model"] = model.blocks[hook_layer(hook_name)].attn.W_O
    return weights.detach().float()


def writes(
    model: HookedModel, hook_name: str, activation: Float[Tensor, "prompt token *rest"]
) -> Float[Tensor, "prompt token component d_model"]:
    """What each component at a hook of `writer_hooks` wrote into the stream, in float32."""
    if not holds_heads(hook_name):
        return activation.float()[:, :, None]
    weights = output_weights(model, hook_name).to(activation.device)
    return einsum(activation.float(), weights, "prompt token h k, h k d -> prompt token h d")


def cotangents(
    model: HookedModel,
    direction: Float[Tensor, "#prompt d_model"],
    *,
    n_layers: int | None = None,
) -> dict[str, Tensor]:
    """Hook -> what a write there is multiplied with, to give its projection on `direction`."""
    against: dict[str, Tensor] = {}
    for name in writer_hooks(model, n_layers=n_layers):
        row = direction
        if holds_heads(name):
            weights = output_weights(model, name).to(direction)
            row = einsum(weights, direction, "head k d, prompt d -> prompt head k")
        against[name] = row[:, None]
    return against


def contract(
    written: Mapping[str, Tensor], against: Mapping[str, Tensor]
) -> Float[Tensor, "component prompt token"]:
    """The inner product of every component's write (`components` order) with `against`."""
    rows: list[Tensor] = []
    for name, activation in written.items():
        product = (activation.float() * against[name]).sum(dim=-1)
        rows.extend(product.unbind(dim=-1) if holds_heads(name) else [product])
    return torch.stack(rows)


def check_additive(model: HookedModel) -> None:
    """Raise `InputError` unless every block has heads, an MLP, and the hooks to read them."""
    for layer, block in enumerate(model.blocks):
        names = (head_hook(layer), mlp_hook(layer), resid_post(layer))
        missing = [name for name in names if name not in model.hook_dict]
        if missing or not hasattr(getattr(block, "attn", None), "W_O"):
            raise InputError(
                f"block {layer} of this model has no {', '.join(missing) or 'attn.W_O'}: it cannot "
                "be taken apart into heads and an MLP"
            )


def check_complete(
    explained: float, whole: float, scale: float, name: str, dtype: torch.dtype
) -> None:
    """Raise `InputError` where the components' sum is not the whole, to `tolerance` of `scale`."""
    if not (math.isfinite(explained) and math.isfinite(whole)):
        raise InputError(f"{name} is not finite; try a smaller coefficient or float32")
    if not abs(explained - whole) <= tolerance(dtype) * scale:
        raise InputError(
            f"the components add up to {explained:.6g}, but {name} is {whole:.6g}: on this model "
            "heads and MLPs are normed, scaled or mixed before they are added to the residual "
            f"stream, or the change is lost in {dtype}'s rounding (try float32)"
        )
