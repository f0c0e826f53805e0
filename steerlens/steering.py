"""The intervention: add `coefficient * direction` to the residual stream, inside a block only."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerlens.errors import SweepError
from steerlens.hooks import HookFunction, hooked
from steerlens.models import HookedModel, inference
from steerlens.tokens import TokenizedPrompt


def addition(
    direction: Float[Tensor, " d_model"],
    coefficient: float | int,
    *,
    mask: Bool[Tensor, "prompt token"] | None = None,
) -> HookFunction:
    """A forward hook that returns `activation + coefficient * direction`, out of place.

    `coefficient` is in residual units (the direction has norm 1). `mask` keeps the positions to
    steer; without it, all are. The result has the activation's dtype and device. Raises
    `SweepError` when the coefficient is not finite.
    """
    if not math.isfinite(coefficient):
        raise SweepError(f"expected a finite coefficient, got {coefficient}")

    def add(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 (TransformerLens's signature)
        wide = torch.promote_types(direction.dtype, torch.float32)
        step = (coefficient * direction.to(wide)).to(activation)
        if mask is None:
            return activation + step
        return activation + mask.to(activation)[..., None] * step

    return add


def steering_hooks(
    directions: Mapping[str, Tensor],
    coefficient: float | int,
    *,
    mask: Bool[Tensor, "prompt token"] | None = None,
) -> list[tuple[str, HookFunction]]:
    """`(hook name, addition)` for every direction; none at coefficient 0, the identity."""
    if coefficient == 0:
        return []
    return [(name, addition(vector, coefficient, mask=mask)) for name, vector in directions.items()]


@contextmanager
def steer(
    model: HookedModel, directions: Mapping[str, Tensor], coefficient: float | int
) -> Iterator[None]:
    """Steer every position inside the block, prompt and generated tokens alike.

    Each hook of `directions` adds its `coefficient * direction`: pass one hook to steer one layer.
    As every position is steered, it does not matter whether tokens come with a KV cache or
    without. The hooks are gone after the block, also after an exception. Raises `SweepError` when
    the coefficient is not finite, `HookError` when a hook did not fire.
    """
    with hooked(model, steering_hooks(directions, coefficient)):
        yield


def generate(
    model: HookedModel,
    prompt: TokenizedPrompt,
    directions: Mapping[str, Tensor],
    coefficient: float | int,
    *,
    max_new_tokens: int,
) -> str:
    """The greedy continuation of `prompt` under `steer`, as text without special tokens.

    Ends at the end-of-text token or after `max_new_tokens`. Raises as `steer`.
    """
    (generated,) = generate_tokens(
        model, [prompt], directions, coefficient, max_new_tokens=max_new_tokens
    )
    return str(model.tokenizer.decode(list(generated), skip_special_tokens=True))


def generate_tokens(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    directions: Mapping[str, Tensor],
    coefficient: float | int,
    *,
    max_new_tokens: int,
) -> list[tuple[int, ...]]:
    """The token ids that `generate` adds to each of some prompts of one length, run together.

    Each ends before the end-of-text token. Raises `SweepError` when the lengths differ.
    """
    if len({len(prompt.prompt) for prompt in prompts}) != 1:
        raise SweepError("prompts that are continued together must have the same number of tokens")
    tokens = torch.tensor([prompt.prompt for prompt in prompts], device=model.cfg.device)
    with inference(model), steer(model, directions, coefficient):
        generated = model.generate(
            tokens,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_type="tokens",
            verbose=False,
        )
    return [_before_end(row, model) for row in generated[:, tokens.shape[1] :].tolist()]


def _before_end(ids: list[int], model: HookedModel) -> tuple[int, ...]:
    end = getattr(model.tokenizer, "eos_token_id", None)
    return tuple(ids[: ids.index(end)] if end in ids else ids)
