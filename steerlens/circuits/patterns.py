"""Where heads look and what every token projects to, on one prompt, unsteered and steered."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.circuits.components import Component
from steerlens.circuits.interventions import UNSTEERED, Intervention, capture
from steerlens.circuits.prompts import Prompts
from steerlens.directions.directions import Directions
from steerlens.engine.tokenization import token_texts
from steerlens.errors import InputError, told
from steerlens.models import HookedModel, hook_layer
from steerlens.models.identity import check_fitted_on
from steerlens.validation import checked


@dataclass(frozen=True, eq=False)
class Patterns:
    """Attention patterns of some heads on one text: each row the shares that a token (query)
    takes from those up to it (key)."""

    tokens: tuple[str, ...]
    heads: tuple[str, ...]
    unsteered: Float[Tensor, "head query key"]
    steered: Float[Tensor, "head query key"]


@dataclass(frozen=True, eq=False)
class Projections:
    """Every token of one text on the direction of each layer, in residual units."""

    tokens: tuple[str, ...]
    layers: tuple[str, ...]
    unsteered: Float[Tensor, "layer token"]
    steered: Float[Tensor, "layer token"]


@checked
def attention_patterns(
    model: HookedModel,
    prompts: Prompts,
    intervention: Intervention,
    heads: Sequence[Component],
    *,
    prompt: int = 0,
) -> Patterns:
    """Attention patterns of some heads on one prompt, unsteered and under the intervention.

    Args:
        model: The model, unsteered.
        prompts: As `make_prompts` makes them.
        intervention: What it is steered by.
        heads: One or more.
        prompt: Which of the prompts, from 0.

    Raises:
        InputError: There are no heads, no such head, or no such prompt.

    Examples:
        >>> from steerlens.circuits import Component, Intervention
        >>> from steerlens.circuits import attention_patterns, make_prompts
        >>> prompts = make_prompts(model, sl.engine.tokenize_pairs(model, pairs).positive)
        >>> heads = [Component(3, head=0), Component(4, head=1)]
        >>> patterns = attention_patterns(model, prompts, Intervention(vector, 4), heads)
        >>> patterns.steered.shape  # each row of it sums to 1
        torch.Size([2, 7, 7])
    """
    n_heads = int(model.cfg.n_heads)
    bad = [str(head) for head in heads if not 0 <= head.head < n_heads]
    if bad or not heads:
        raise InputError(
            f"expected attention heads, 0 to {n_heads - 1} of a layer, got "
            f"{', '.join(bad) or 'none'}"
        )
    hooks = [f"blocks.{head.layer}.attn.hook_pattern" for head in heads]
    words, runs = _read(model, prompts, prompt, hooks, intervention)
    unsteered, steered = (
        torch.stack([run[hook][head.head] for hook, head in zip(hooks, heads, strict=True)])
        for run in runs
    )
    return Patterns(words, tuple(map(str, heads)), unsteered, steered)


@checked
def token_projections(
    model: HookedModel,
    prompts: Prompts,
    directions: Directions,
    intervention: Intervention,
    *,
    prompt: int = 0,
) -> Projections:
    """One prompt's tokens on each layer's direction, unsteered and under the intervention.

    Args:
        model: The model, unsteered.
        prompts: As `make_prompts` makes them.
        directions: Fitted on a model with the same weight processing.
        intervention: What it is steered by.
        prompt: Which of the prompts, from 0.

    Raises:
        InputError: The weight processing is another one, or there is no such prompt.

    Examples:
        >>> from steerlens.circuits import Intervention, make_prompts, token_projections
        >>> prompts = make_prompts(model, sl.engine.tokenize_pairs(model, pairs).positive)
        >>> projections = token_projections(model, prompts, directions, Intervention(vector, 4))
        >>> projections.steered.shape
        torch.Size([5, 7])
    """
    check_fitted_on(model, directions)
    words, runs = _read(model, prompts, prompt, list(directions), intervention)
    unsteered, steered = (
        torch.stack([run[name] @ directions[name].float().cpu() for name in directions])
        for run in runs
    )
    layers = tuple(f"layer {hook_layer(name)}" for name in directions)
    return Projections(words, layers, unsteered, steered)


def _read(
    model: HookedModel,
    prompts: Prompts,
    prompt: int,
    hook_names: Sequence[str],
    intervention: Intervention,
) -> tuple[tuple[str, ...], list[dict[str, Tensor]]]:
    """One prompt's tokens, and what is at the hooks, unsteered and steered, in float32."""
    if not -len(prompts) <= prompt < len(prompts):
        raise InputError(f"there is no prompt {told(prompt)}; there are {len(prompts)}, from 0")
    tokens, names = prompts.tokens[prompt, : int(prompts.last[prompt]) + 1], sorted(set(hook_names))
    runs = [
        capture(model, tokens[None], names, steered, read=lambda values: values[0].float().cpu())
        for steered in (UNSTEERED, intervention)
    ]
    return tuple(token_texts(model, tokens.tolist())), runs
