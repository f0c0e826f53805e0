"""Greedy continuations under steering, one prompt or a batch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.errors import InputError
from steerlens.models.loading import HookedModel, inference
from steerlens.steering.apply import Steerable, steer
from steerlens.steering.cache_positions import Positions
from steerlens.steering.coefficients import Coefficient


def generate(
    model: HookedModel,
    prompt: TokenizedPrompt,
    vector: Steerable | Mapping[str, Tensor],
    coefficient: Coefficient,
    *,
    max_new_tokens: int,
    positions: Positions = "all",
) -> str:
    """The greedy continuation of `prompt` under `steer`, as text without special tokens.

    Ends at the end-of-text token or after `max_new_tokens`. Raises as `steer`.

    Examples:
        >>> prompt = sl.tokenize_prompt(model, "the river was")
        >>> text = sl.generate(model, prompt, vector, 4, max_new_tokens=5)
        >>> len(text.split()) <= 5
        True
    """
    (generated,) = generate_tokens(
        model,
        [prompt],
        vector,
        coefficient,
        max_new_tokens=max_new_tokens,
        positions=positions,
    )
    return decoded(model, generated)


def decoded(model: HookedModel, ids: Sequence[int]) -> str:
    """Generated tokens as text, without special tokens."""
    return str(model.tokenizer.decode(list(ids), skip_special_tokens=True))


def generate_tokens(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    vector: Steerable | Mapping[str, Tensor],
    coefficient: Coefficient,
    *,
    max_new_tokens: int,
    positions: Positions = "all",
) -> list[tuple[int, ...]]:
    """The token ids that `generate` adds to each of some prompts, run together.

    Shorter prompts are padded on the left. Each continuation ends before the end-of-text token.
    Raises `InputError` when there are no prompts, no tokens are asked for, or the longest prompt
    with them would not fit the model's context; and as `steer`.
    """
    if not prompts or max_new_tokens < 1:
        raise InputError(
            f"expected prompts and 1 or more new tokens, got {len(prompts)} and {max_new_tokens}"
        )
    width = max(len(prompt.prompt) for prompt in prompts)
    n_ctx = getattr(model.cfg, "n_ctx", None)
    if n_ctx is not None and width + max_new_tokens > n_ctx:
        raise InputError(
            f"{max_new_tokens} new tokens after a prompt of {width} do not fit the model's context "
            f"of {n_ctx}; ask for fewer"
        )
    tokens = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    pad = getattr(model.tokenizer, "pad_token_id", None)
    tokens += 0 if pad is None else pad
    for row, prompt in enumerate(prompts):
        start = width - len(prompt.prompt)
        tokens[row, start:] = torch.tensor(prompt.prompt)
        mask[row, start:] = 1
    tokens, mask = tokens.to(model.cfg.device), mask.to(model.cfg.device)
    with (
        inference(model),
        _left_padding(model, is_padded=not bool(mask.all())) as takes_mask,
        steer(model, vector, coefficient, positions=positions),
    ):
        named = {"attention_mask": mask} if takes_mask else {}
        generated = model.generate(
            tokens,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_type="tokens",
            verbose=False,
            **named,
        )
    return [_before_end(row, model) for row in generated[:, width:].tolist()]


@contextmanager
def _left_padding(model: HookedModel, *, is_padded: bool) -> Iterator[bool]:
    """Whether generation takes a mask; where it reads padding off the tokens, on their left side.

    `HookedTransformer` does the latter, by the tokenizer's padding side.
    """
    if not is_padded:
        yield False
        return
    if hasattr(model, "original_model"):
        yield True
        return
    tokenizer: Any = model.tokenizer
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        yield False
    finally:
        tokenizer.padding_side = side


def _before_end(ids: list[int], model: HookedModel) -> tuple[int, ...]:
    end = getattr(model.tokenizer, "eos_token_id", None)
    return tuple(ids[: ids.index(end)] if end in ids else ids)
