"""Greedy continuations under steering, one prompt or a batch."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from steerlens.engine.continuations import continue_prompts, until_end
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.models.hooked_model import HookedModel
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
    with steer(model, vector, coefficient, positions=positions):
        rows = continue_prompts(model, prompts, max_new_tokens=max_new_tokens)
    return [until_end(row, model) for row in rows]
