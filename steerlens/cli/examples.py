"""What a sweep shows of a few prompts: generations and damaged tokens."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.text import Text

from steerlens.cli.printing import notes, progress_of
from steerlens.cli.warned import warn
from steerlens.data.pairs import ContrastivePairs
from steerlens.directions.directions import Directions
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.measure.tokens import generation_table, token_damage
from steerlens.models.loading import HookedModel

NEW_TOKENS = 40


def example_tables(
    model: HookedModel,
    pairs: ContrastivePairs,
    directions: Directions,
    *,
    hook_name: str,
    coefficients: Sequence[float],
    n_prompts: int,
    batch_size: int | None,
    quiet: bool,
) -> dict[str, pd.DataFrame]:
    """Of the first positive prompts, steered at one hook: the tables of a run that illustrate it.

    `generations` at every coefficient, `tokens` at the smallest and the largest. Notes, kept in the
    record, say which texts are short because the context is full.
    """
    ids = [pair.id for pair in pairs][:n_prompts]
    prompts = tokenize_pairs(model, pairs).positive[:n_prompts]
    if not quiet:
        notes.print(Text(f"Examples: {len(ids)} prompts at {hook_name}"))
    with progress_of(quiet=quiet) as progress:
        shared: dict[str, Any] = {"layer": hook_name, "ids": ids, "progress": progress}
        generations = generation_table(
            *(model, prompts, directions),
            coefficients=coefficients,
            max_new_tokens=NEW_TOKENS,
            **shared,
        )
        tokens = token_damage(
            *(model, prompts, directions),
            coefficients=[min(coefficients), max(coefficients)],
            batch_size=batch_size,
            **shared,
        )
    short = generations[generations.end == "context"]
    for prompt in dict.fromkeys(short.prompt):
        n_tokens = int(short[short.prompt == prompt].n_tokens.max())
        warn(
            f"note: {n_tokens} of {NEW_TOKENS} new tokens fit the model's context after prompt "
            f"{prompt!r}",
            quiet=quiet,
        )
    return {"generations": generations, "tokens": tokens}
