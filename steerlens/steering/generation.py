"""Texts written under steering: one prompt, or prompts x coefficients x samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from torch import Tensor

from steerlens.data.prompts import Prompt
from steerlens.engine.batches import rows_per_pass
from steerlens.engine.continuations import check_room, continue_prompts, end_tokens, until_end
from steerlens.engine.memory import in_slices
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_prompt
from steerlens.errors import InputError
from steerlens.models.hooked_model import HookedModel, is_on_one_side
from steerlens.models.loading import inference
from steerlens.models.weight_processing import check_processing
from steerlens.progress import Progress, by_default, silent
from steerlens.steering.apply import Steerable, steer, steps
from steerlens.steering.cache_positions import Positions, check_positions
from steerlens.steering.coefficients import Coefficient
from steerlens.steering.decoding import (
    Job,
    Row,
    batches_of,
    can_decode,
    decode,
    drawing,
    is_proved,
    rows_at_once,
)
from steerlens.validation import Count, Whole, checked


@dataclass(frozen=True)
class Generated:
    """What was written after a prompt (its place in the list) under a coefficient.

    `seed` is that of the row's own generator, None where it is greedy. `ids` ends before the token
    that ends a text; `ended` says whether one came, `overflowed` whether the logits that they were
    chosen by were not finite, None where these were not seen.
    """

    prompt: int
    coefficient: Coefficient
    sample: int
    seed: int | None
    ids: tuple[int, ...]
    ended: bool
    overflowed: bool | None = field(default=None, compare=False)


@checked
def generate(
    model: HookedModel,
    prompt: Prompt | TokenizedPrompt,
    vector: Steerable | Mapping[str, Tensor],
    coefficient: Coefficient,
    *,
    max_new_tokens: Whole = 40,
    positions: Positions = "all",
    progress: Progress | None = None,
) -> str:
    """The greedy continuation of `prompt` under `steer`, as text without special tokens.

    Args:
        model: any `HookedModel`.
        prompt: text, chat messages, or as from `tokenize_prompt`.
        vector: a `SteeringVector`, or plain directions by hook name, to be added.
        coefficient: how strongly, as in `Coefficient`; 0 is the model as it is.
        max_new_tokens: where it ends, unless the end-of-text token comes first.
        positions: which tokens are steered (see `Positions`), by default all.
        progress: told of the tokens; by default a bar in a terminal or a notebook.

    Raises:
        InputError, HookError: as `generate_tokens`.

    Examples:
        >>> text = sl.generate(model, "the river was", vector, 4, max_new_tokens=5)
        >>> len(text.split()) <= 5
        True
    """
    if not isinstance(prompt, TokenizedPrompt):
        prompt = tokenize_prompt(model, prompt)
    (generated,) = generate_tokens(
        *(model, [prompt], vector, coefficient),
        max_new_tokens=max_new_tokens,
        positions=positions,
        progress=by_default(progress),
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
    progress: Progress = silent,
) -> list[tuple[int, ...]]:
    """The token ids that `generate` adds to each of some prompts, run together.

    Shorter prompts are padded on the left. Each continuation ends before the end-of-text token.

    Args:
        prompts: as from `tokenize_prompt`; the others as in `generate`.
        progress: told of the tokens; by default nobody.

    Raises:
        InputError: there are no prompts, no tokens are asked for, the longest prompt with them
            would not fit the model's context; and as `steer`.
        HookError: as `steer`.
    """
    texts = generate_texts(
        *(model, prompts, vector, [coefficient]),
        max_new_tokens=max_new_tokens,
        positions=positions,
        batch_size=max(1, len(prompts)),
        progress=progress,
    )
    return [text.ids for text in texts]


@checked
def generate_texts(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    vector: Steerable | Mapping[str, Tensor],
    coefficients: Sequence[Coefficient],
    *,
    max_new_tokens: Whole,
    samples: Count = 1,
    seed: Whole | None = None,
    positions: Positions = "all",
    batch_size: Count | None = None,
    progress: Progress | None = None,
) -> list[Generated]:
    """What the model writes after each prompt, steered by each coefficient.

    Args:
        model: any `HookedModel`.
        prompts: as from `tokenize_prompt`; what is continued is the prompt, not a continuation.
        vector: a `SteeringVector`, or plain directions by hook name, to be added.
        coefficients: how strongly, each as in `Coefficient`; 0 is the model as it is.
        max_new_tokens: where a text ends, unless an end-of-text token comes first.
        samples: texts of each prompt and coefficient; more than 1 need a `seed`.
        seed: draws from the model's own distribution. A row's generator is seeded from it, the
            prompt's place and the sample, so that all coefficients share their random numbers and
            neither other rows nor the batch size matter. None, the default, is greedy.
        positions: which tokens are steered (see `Positions`), by default all.
        batch_size: rows that run together; by default as many as keep the model's device busy.
        progress: told of the tokens, after every pass. Default: bars in a terminal or a notebook.

    Returns:
        One `Generated` a text: by prompt, then by coefficient, then by sample.

    Raises:
        InputError: there are no prompts, coefficients or tokens asked for, several samples have no
            seed, the longest prompt with the new tokens would not fit the model's context; and as
            `steer`.
        HookError: as `steer`.

    All rows run together, with one cache of keys and values, where the model is a Bridge without
    hooks of others. One coefficient after another runs under `steer`, to the same texts, where that
    is not so: on a `HookedTransformer`; where the vector has a condition, or thinking decides what
    is steered; where a model keeps more than keys and values of what it has read (Mamba, linear
    attention), or rotates short and long texts differently and these are both.
    """
    if not coefficients:
        raise InputError("expected coefficients, got none; [0] is the model as it is")
    steered = [(vector, coefficient) for coefficient in coefficients]
    return texts_of_each(
        *(model, prompts, steered),
        max_new_tokens=max_new_tokens,
        samples=samples,
        seed=seed,
        positions=positions,
        batch_size=batch_size,
        progress=progress,
    )


def texts_of_each(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    steered: Sequence[tuple[Steerable | Mapping[str, Tensor], Coefficient]],
    *,
    max_new_tokens: Whole,
    samples: Count = 1,
    seed: Whole | None = None,
    positions: Positions = "all",
    batch_size: Count | None = None,
    progress: Progress | None = None,
) -> list[Generated]:
    """`generate_texts` under each of several vectors at a coefficient of its own, all together.

    By prompt, then vector, then sample.
    """
    check_room(model, prompts, max_new_tokens)
    if samples > 1 and seed is None:
        raise InputError(
            f"{samples} samples without a seed would be the same greedy text; give a seed"
        )
    check_positions(positions)
    for vector, _ in steered:
        check_processing(model, vector)
    width = max(len(prompt.prompt) for prompt in prompts)
    expected = (len(prompts), width)
    if isinstance(positions, Tensor) and tuple(positions.shape) != expected:
        raise InputError(
            f"the mask has shape {tuple(positions.shape)}, but the prompts are {expected} "
            "(prompts, tokens), padded on the left"
        )
    pushes = [steps(vector, coefficient) for vector, coefficient in steered]
    job = Job([prompt.prompt for prompt in prompts], pushes, positions, max_new_tokens)
    places = list(product(range(len(prompts)), range(len(pushes)), range(samples)))
    rows = [
        Row(prompt, push, None if seed is None else row_seed(seed, prompt, sample))
        for prompt, push, sample in places
    ]
    tell, total, done = by_default(progress), len(rows) * max_new_tokens, 0

    def told(n_tokens: int) -> None:
        nonlocal done
        before, done = done, min(done + n_tokens, total - 1)
        if done > before:
            tell("tokens", done, total)

    tell("tokens", 0, total)
    written: Mapping[int, Sequence[int]] = {}
    overflowed: dict[int, bool] = {}
    is_conditional = any(
        getattr(vector, "condition", None) and push
        for (vector, _), push in zip(steered, pushes, strict=True)
    )
    if not is_conditional and can_decode(model, job):
        written, overflowed = _together(model, job, rows, batch_size, told)
    if not written:
        written = _apart(model, prompts, steered, job, rows, batch_size, told)
    tell("tokens", total, total)
    ends = end_tokens(model)
    return [
        Generated(
            prompt=prompt,
            coefficient=steered[push][1],
            sample=sample,
            seed=row.seed,
            ids=tuple(token for token in written[i] if token not in ends),
            ended=written[i][-1] in ends,
            overflowed=overflowed.get(i),
        )
        for i, ((prompt, push, sample), row) in enumerate(zip(places, rows, strict=True))
    ]


def _together(
    model: HookedModel, job: Job, rows: Sequence[Row], size: int | None, told: Callable[[int], None]
) -> tuple[dict[int, list[int]], dict[int, bool]]:
    """The ids of every row, by its place, and whether its logits overflowed.

    Both are empty where they would not be the model's own.
    """
    written: dict[int, list[int]] = {}
    overflowed: dict[int, bool] = {}
    for places in batches_of(job, rows, size or rows_at_once(model, job)):
        batch = [rows[place] for place in places]

        def run(part: slice, batch: Sequence[Row] = batch) -> list[tuple[list[int], bool]]:
            return decode(model, job, batch[part], told)

        texts = [text for part in in_slices(len(batch), len(batch), run) for text in part]
        if not is_proved(model, job, batch, [ids for ids, _ in texts]):
            return {}, {}
        written.update(zip(places, (ids for ids, _ in texts), strict=True))
        overflowed.update(zip(places, (of for _, of in texts), strict=True))
    return written, overflowed


def _apart(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    steered: Sequence[tuple[Steerable | Mapping[str, Tensor], Coefficient]],
    job: Job,
    rows: Sequence[Row],
    size: int | None,
    told: Callable[[int], None],
) -> dict[int, tuple[int, ...]]:
    """The same by `steer` and the model's own `generate`, one coefficient after another."""
    lengths = [len(prompt.prompt) for prompt in prompts]
    size = size or rows_per_pass(model, max(lengths) + job.max_new_tokens)
    if not is_on_one_side(model, *job.ends):  # each has to cross at its own length
        size = 1
    written: dict[int, tuple[int, ...]] = {}
    for push, (vector, coefficient) in enumerate(steered):
        of_push = [place for place, row in enumerate(rows) if row.push == push]
        for first in range(0, len(of_push), size):
            places = of_push[first : first + size]
            batch = [rows[place] for place in places]
            positions = job.positions
            if isinstance(positions, Tensor):
                width = max(lengths[row.prompt] for row in batch)
                positions = positions[[row.prompt for row in batch], -width:]
            with (
                inference(model),  # which may look at the model: before anything is changed
                steer(model, vector, coefficient, positions=positions),
                drawing(model, [row.seed for row in batch]),
            ):
                texts = continue_prompts(
                    model,
                    [prompts[row.prompt] for row in batch],
                    max_new_tokens=job.max_new_tokens,
                )
            told(len(places) * job.max_new_tokens)
            ended = (until_end(ids, model, with_end=True) for ids in texts)
            written.update(zip(places, ended, strict=True))
    return written


def row_seed(seed: int, prompt: int, sample: int) -> int:
    """The seed of a row's own generator: the same for all coefficients."""
    return int(np.random.SeedSequence((seed, prompt, sample)).generate_state(1)[0])
