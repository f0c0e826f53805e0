"""What a model writes after prompts: token ids, greedy or drawn from its own distribution."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from steerlens.engine.batches import make_batches, mask_kwargs, padded
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.errors import InputError
from steerlens.models.hooked_model import (
    HookedModel,
    context_length,
    padding_id,
    side_of_switches,
    takes_mask,
)
from steerlens.models.loading import inference


def continue_prompts(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    *,
    max_new_tokens: int,
    samples: bool = False,
) -> list[list[int]]:
    """The ids that the model adds to each prompt (not to its continuation), run together.

    Shorter prompts are padded on the left. Rows that have ended go on: see `until_end`. Greedy, or
    drawn from the model's distribution with torch's own generators. Raises `InputError` where there
    are no prompts, no tokens are asked for, or the context has no room for them.
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
    sides = {
        side_of_switches(model, length)
        for length in (min(len(prompt.prompt) for prompt in prompts), width + max_new_tokens)
    }
    if len(sides) > 1 and any(len(prompt.prompt) < width for prompt in prompts):
        # Each of them has to cross at its own length.
        return [
            row
            for prompt in prompts
            for row in continue_prompts(
                model, [prompt], max_new_tokens=max_new_tokens, samples=samples
            )
        ]
    tokens, mask = padded(
        [prompt.prompt for prompt in prompts],
        "left",
        pad_id=padding_id(model),
        device=torch.device(model.cfg.device or "cpu"),
    )
    # A HookedTransformer takes no mask: it reads padding off the tokens, on the tokenizer's side.
    has_mask = takes_mask(model)
    is_read = not has_mask and not bool(mask.all())
    with inference(model), _left_padding(model.tokenizer) if is_read else nullcontext():
        generated = model.generate(
            tokens,
            max_new_tokens=max_new_tokens,
            do_sample=samples,
            return_type="tokens",
            verbose=False,
            **(mask_kwargs(mask) if has_mask else {}),
        )
    rows: list[list[int]] = generated[:, width:].tolist()
    return rows


def own_texts(
    model: HookedModel, prompts: Sequence[TokenizedPrompt], *, n_tokens: int, seed: int | None
) -> list[tuple[int, ...]]:
    """What the model writes after each prompt, up to `n_tokens` ids, an end-of-text token included.

    Greedy without a `seed`; with one each batch of prompts is drawn with it. Batches are those of
    the model's device, whatever batch size a measurement has, so that the texts are the same.
    """
    texts: dict[int, tuple[int, ...]] = {}
    alone = [TokenizedPrompt(prompt.prompt, (), prompt.where) for prompt in prompts]
    for batch in make_batches(model, alone, None):
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            rows = continue_prompts(
                model, batch.prompts, max_new_tokens=n_tokens, samples=seed is not None
            )
        texts |= {
            row: until_end(ids, model, with_end=True)
            for row, ids in zip(batch.rows, rows, strict=True)
        }
    return [texts[row] for row in range(len(alone))]


def until_end(ids: Sequence[int], model: HookedModel, *, with_end: bool = False) -> tuple[int, ...]:
    """The ids before the first token that ends a text, or up to it.

    That is the tokenizer's, or one of those at which the model's own config ends a text.
    """
    stops = getattr(model.cfg, "eos_token_id", None)
    ends = {getattr(model.tokenizer, "eos_token_id", None)}
    ends |= set(stops) if isinstance(stops, (list, tuple)) else {stops}
    first = next((place for place, token in enumerate(ids) if token in ends), None)
    return tuple(ids if first is None else ids[: first + with_end])


@contextmanager
def _left_padding(tokenizer: Any) -> Iterator[None]:
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side
