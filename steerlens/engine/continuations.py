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
    is_on_one_side,
    padding_id,
    takes_mask,
)
from steerlens.models.loading import inference


def continue_prompts(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    *,
    max_new_tokens: int,
    do_sample: bool = False,
) -> list[list[int]]:
    """The ids that the model adds to each prompt (not to its continuation), run together.

    Shorter prompts are padded on the left. Rows that have ended go on: see `until_end`. Greedy, or
    drawn from the model's distribution with torch's own generators. Raises `InputError` as
    `check_room`.
    """
    check_room(model, prompts, max_new_tokens)
    width = max(len(prompt.prompt) for prompt in prompts)
    lengths = {len(prompt.prompt) for prompt in prompts}
    if len(lengths) > 1 and not is_on_one_side(model, min(lengths), width + max_new_tokens):
        # Each of them has to cross at its own length.
        return [
            row
            for prompt in prompts
            for row in continue_prompts(
                model, [prompt], max_new_tokens=max_new_tokens, do_sample=do_sample
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
    left = _left_padding(model.tokenizer) if is_read else nullcontext()
    with inference(model), left:
        generated = model.generate(
            tokens,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            return_type="tokens",
            verbose=False,
            **(mask_kwargs(mask) if has_mask else {}),
        )
    rows: list[list[int]] = generated[:, width:].tolist()
    return rows


def check_room(model: HookedModel, prompts: Sequence[TokenizedPrompt], max_new_tokens: int) -> None:
    """Raise `InputError` where there is nothing to write, or no room for it in the context."""
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
                model, batch.prompts, max_new_tokens=n_tokens, do_sample=seed is not None
            )
        texts |= {
            row: until_end(ids, model, with_end=True)
            for row, ids in zip(batch.rows, rows, strict=True)
        }
    return [texts[row] for row in range(len(alone))]


def end_tokens(model: HookedModel) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's, and those that the model's own config names."""
    stops = getattr(model.cfg, "eos_token_id", None)
    ends = stops if isinstance(stops, (list, tuple)) else [stops]
    of_tokenizer = getattr(model.tokenizer, "eos_token_id", None)
    return frozenset(int(token) for token in (of_tokenizer, *ends) if token is not None)


def until_end(ids: Sequence[int], model: HookedModel, *, with_end: bool = False) -> tuple[int, ...]:
    """The ids before the first of `end_tokens`, or up to it."""
    ends = end_tokens(model)
    first = next((place for place, token in enumerate(ids) if token in ends), None)
    return tuple(ids if first is None else ids[: first + with_end])


@contextmanager
def _left_padding(tokenizer: Any) -> Iterator[None]:
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side
