"""The components that write into the residual stream: embedding, heads, MLPs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.errors import InputError
from steerlens.models.hooks import hook_layer, resid_post
from steerlens.models.loading import HookedModel

TOLERANCE = 1e-3
"""Largest part of what was written that the components may leave unexplained."""


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

    def __str__(self) -> str:
        if self.layer < 0:
            return "embed"
        return f"mlp{self.layer}" if self.head < 0 else f"L{self.layer}H{self.head}"


@dataclass(frozen=True)
class Prompts:
    """Prompts padded on the right, which causal attention needs no mask for; `last` is each one's
    last real column."""

    tokens: Int[Tensor, "prompt token"]
    last: Int[Tensor, " prompt"]

    def __len__(self) -> int:
        return len(self.last)

    def part(self, rows: slice) -> "Prompts":
        """Some of the prompts, as padded as they are."""
        return Prompts(self.tokens[rows], self.last[rows])

    @property
    def real(self) -> Float[Tensor, "prompt token"]:
        """1 at real tokens, 0 at padding."""
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (columns <= self.last[:, None]).float()


def make_prompts(model: HookedModel, prompts: list[TokenizedPrompt]) -> Prompts:
    """The prompts' own tokens, without continuations, on the model's device.

    Raises `InputError` when there are none.

    Examples:
        >>> from steerlens.circuits import make_prompts
        >>> prompts = make_prompts(model, list(sl.tokenize_pairs(model, pairs).positive))
        >>> len(prompts)
        8
    """
    if not prompts:
        raise InputError("expected one or more prompts, got none")
    width = max(len(prompt.prompt) for prompt in prompts)
    pad = getattr(model.tokenizer, "pad_token_id", None)
    tokens = torch.full((len(prompts), width), 0 if pad is None else pad)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.prompt)] = torch.tensor(prompt.prompt)
    last = torch.tensor([len(prompt.prompt) - 1 for prompt in prompts])
    return Prompts(tokens.to(model.cfg.device), last.to(model.cfg.device))


def components(model: HookedModel, *, n_layers: int | None = None) -> tuple[Component, ...]:
    """The embedding, and heads and MLP of the first `n_layers` blocks (all of them), in order."""
    layers = range(int(model.cfg.n_layers) if n_layers is None else n_layers)
    heads = range(int(model.cfg.n_heads))
    return (
        Component(-1),
        *(
            component
            for layer in layers
            for component in (*(Component(layer, head) for head in heads), Component(layer))
        ),
    )


def head_hook(layer: int) -> str:
    """Where heads are read and patched: their values mixed by attention, before `W_O`."""
    return f"blocks.{layer}.attn.hook_z"


def mlp_hook(layer: int) -> str:
    """Where an MLP's write is read and patched."""
    return f"blocks.{layer}.hook_mlp_out"


def hook_of(component: Component) -> str:
    """Where a component's write is read and patched."""
    if component.kind == "embed":
        return EMBED
    return head_hook(component.layer) if component.kind == "head" else mlp_hook(component.layer)


EMBED = "blocks.0.hook_resid_pre"
"""What the stream begins with: token embeddings, and positions where the model adds them."""


def writer_hooks(model: HookedModel, *, n_layers: int | None = None) -> tuple[str, ...]:
    """The hooks that hold all writes of the first `n_layers` blocks (all of them)."""
    layers = range(int(model.cfg.n_layers) if n_layers is None else n_layers)
    names = (name for layer in layers for name in (head_hook(layer), mlp_hook(layer)))
    return (EMBED, *names)


def output_weights(model: HookedModel, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """`W_O` of a block, head by head."""
    weights: Float[Tensor, "head d_head d_model"] = model.blocks[layer].attn.W_O.detach()
    return weights


def cotangents(
    model: HookedModel,
    direction: Float[Tensor, "#prompt d_model"],
    *,
    n_layers: int | None = None,
) -> dict[str, Tensor]:
    """Hook -> what a write there is multiplied with, to give its projection on `direction`.

    `direction` is one row, or one a prompt; at `hook_z` it is carried through `W_O`.
    """
    found: dict[str, Tensor] = {}
    for name in writer_hooks(model, n_layers=n_layers):
        if name.endswith("hook_z"):
            weights = output_weights(model, hook_layer(name)).to(direction)
            through = einsum(
                weights, direction, "head d_head d_model, prompt d_model -> prompt head d_head"
            )
            found[name] = through[:, None]
        else:
            found[name] = direction[:, None]
    return found


def contract(
    written: Mapping[str, Tensor], against: Mapping[str, Tensor]
) -> Float[Tensor, "component prompt token"]:
    """The inner product of every component's write with `against`, at each token.

    In the order of `components`; `written` is in that of `writer_hooks`.
    """
    rows: list[Tensor] = []
    for name, activation in written.items():
        product = (activation.float() * against[name]).sum(dim=-1)
        rows.extend(product.unbind(dim=-1) if name.endswith("hook_z") else [product])
    return torch.stack(rows)


def check_additive(model: HookedModel) -> None:
    """Raise `InputError` unless every block has heads, an MLP, and the hooks to read them.

    Whether they add up is seen from the numbers: `check_complete`, `graphs.check_sum`.
    """
    for layer, block in enumerate(model.blocks):
        names = (head_hook(layer), mlp_hook(layer), resid_post(layer))
        missing = [name for name in names if name not in model.hook_dict]
        if missing or not hasattr(getattr(block, "attn", None), "W_O"):
            raise InputError(
                f"block {layer} of this model has no {', '.join(missing) or 'attn.W_O'}: it cannot "
                "be taken apart into heads and an MLP"
            )


def check_complete(
    explained: float, whole: float, scale: float, what: str, dtype: torch.dtype
) -> None:
    """Raise `InputError` when the components' sum is not the whole.

    To 1e-3 of `scale`, or 4 times the epsilon of the model's dtype where that is more.
    """
    if not (math.isfinite(explained) and math.isfinite(whole)):
        raise InputError(f"{what} is not finite; try a smaller coefficient or float32")
    if not abs(explained - whole) <= max(TOLERANCE, 4 * torch.finfo(dtype).eps) * scale:
        raise InputError(
            f"the components add up to {explained:.6g}, but {what} is {whole:.6g}: on this model "
            "heads and MLPs are normed, scaled or mixed before they are added to the residual "
            f"stream, or the change is lost in {dtype}'s rounding (try float32)"
        )
