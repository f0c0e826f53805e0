"""Greedy continuations under steering, one prompt or a batch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from steerlens.engine.batches import _padded as padded
from steerlens.engine.batches import mask_kwargs
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.errors import InputError
from steerlens.models.hooked_model import HookedModel, context_length, padding_id, takes_mask
from steerlens.models.loading import inference
from steerlens.steering.apply import Steerable, steer
from steerlens.steering.cache_positions import Positions
from steerlens.steering.coefficients import Coefficient
from steerlens.validation import Whole, checked


@checked
def generate(
    model: HookedModel,
    prompt: TokenizedPrompt,
    vector: Steerable | Mapping[str, Tensor],
    coefficient: Coefficient,
    *,
    max_new_tokens: Whole,
    positions: Positions = "all",
) -> str:
    """The greedy continuation of `prompt` under `steer`, as text without special tokens.

    Args:
        model: any `HookedModel`.
        prompt: as from `tokenize_prompt`.
        vector: a `SteeringVector`, or plain directions by hook name, to be added.
        coefficient: how strongly, as in `Coefficient`; 0 is the model as it is.
        max_new_tokens: where it ends, unless the end-of-text token comes first.
        positions: which tokens are steered (see `Positions`), by default all.

    Raises:
        InputError, HookError: as `generate_tokens`.

    Examples:
        >>> prompt = sl.engine.tokenize_prompt(model, "the river was")
        >>> text = sl.generate(model, prompt, vector, 4, max_new_tokens=5)
        >>> len(text.split()) <= 5
        True
    """
    (generated,) = generate_tokens(
        model, [prompt], vector, coefficient, max_new_tokens=max_new_tokens, positions=positions
    )
    return decoded(model, generated)


@checked
def decoded(model: HookedModel, ids: Sequence[int]) -> str:
    """Generated tokens as text, without special tokens."""
    return str(model.tokenizer.decode(list(ids), skip_special_tokens=True))


@checked
def generate_tokens(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    vector: Steerable | Mapping[str, Tensor],
    coefficient: Coefficient,
    *,
    max_new_tokens: Whole,
    positions: Positions = "all",
) -> list[tuple[int, ...]]:
    """The token ids that `generate` adds to each of some prompts, run together.

    Shorter prompts are padded on the left. Each continuation ends before the end-of-text token.

    Args:
        prompts: as from `tokenize_prompt`; the others as in `generate`.

    Raises:
        InputError: there are no prompts, no tokens are asked for, the longest prompt with them
            would not fit the model's context; and as `steer`.
        HookError: as `steer`.
    """
    if not prompts or max_new_tokens < 1:
        raise InputError(
            f"expected prompts and 1 or more new tokens, got {len(prompts)} and {max_new_tokens}"
        )
    width = max(len(prompt.prompt) for prompt in prompts)
    n_ctx = context_length(model)
    if n_ctx is not None and width + max_new_tokens > n_ctx:
        raise InputError(
            f"{max_new_tokens} new tokens after a prompt of {width} do not fit the model's context "
            f"of {n_ctx}; ask for fewer"
        )
    tokens, mask = padded(
        [prompt.prompt for prompt in prompts],
        "left",
        pad_id=padding_id(model),
        device=torch.device(model.cfg.device or "cpu"),
    )
    # A HookedTransformer takes no mask: it reads padding off the tokens, on the tokenizer's side.
    has_mask = takes_mask(model)
    is_read = not has_mask and not bool(mask.all())
    with (
        inference(model),
        _left_padding(model.tokenizer) if is_read else nullcontext(),
        steer(model, vector, coefficient, positions=positions),
    ):
        generated = model.generate(
            tokens,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_type="tokens",
            verbose=False,
            **(mask_kwargs(mask) if has_mask else {}),
        )
    return [_before_end(row, model) for row in generated[:, width:].tolist()]


@contextmanager
def _left_padding(tokenizer: Any) -> Iterator[None]:
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def _before_end(ids: list[int], model: HookedModel) -> tuple[int, ...]:
    end = getattr(model.tokenizer, "eos_token_id", None)
    return tuple(ids[: ids.index(end)] if end in ids else ids)
