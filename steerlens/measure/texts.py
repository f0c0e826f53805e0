"""The text that a boundary is measured on: a side of the pairs, shipped lines, a file, a list."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from steerlens.data.reading import read_texts
from steerlens.data.shipped import neutral_texts
from steerlens.engine.positions import steers_late
from steerlens.engine.tokenization import (
    SteeredPositions,
    TokenizedPairs,
    TokenizedPrompt,
    check_steered_positions,
    tokenize_prompt,
)
from steerlens.errors import InputError
from steerlens.models.hooked_model import HookedModel

On = Literal["positive", "negative", "neutral"] | Path | Sequence[str]
"""The text a boundary is measured on: a side of the pairs, the shipped neutral lines, the lines of
a file, or texts of one's own."""


def text_name(on: On) -> str:
    """What the tables call the text."""
    if isinstance(on, Path):
        return str(on)
    return on if isinstance(on, str) else "texts"


def text_prompts(model: HookedModel, on: On, pairs: TokenizedPairs) -> tuple[TokenizedPrompt, ...]:
    """The prompts that `on` names. Raises `InputError` where there is none, or none with labels."""
    if on == "positive":
        return pairs.positive
    if on == "negative":
        prompts = pairs.negative
    else:
        prompts = tuple(
            tokenize_prompt(model, text, where=f"text {i} of {text_name(on)!r}")
            for i, text in enumerate(_texts(on), start=1)
        )
    short = [prompt for prompt in prompts if len(prompt) < 2]
    if short:
        raise InputError(
            f"{len(short)} texts are a single token, so there is no label whose logprob could be "
            "measured; make them longer"
        )
    return prompts


def check_text_positions(
    positions: SteeredPositions, on: On, prompts: Sequence[TokenizedPrompt]
) -> None:
    """Raise `InputError` where steering there cannot reach a label of the text.

    And as `check_steered_positions` on the positive prompts.
    """
    if on != "positive" and steers_late(positions):
        raise InputError(
            f"the text {text_name(on)!r} has no continuations, so steered_positions must be all or "
            f"prompt there, not {positions!r}"
        )
    check_steered_positions(positions, TokenizedPairs(tuple(prompts), ()))


def _texts(on: On) -> Sequence[str]:
    if on == "neutral":
        return neutral_texts()
    if isinstance(on, Path):
        return read_texts(on)
    if isinstance(on, str):
        raise InputError(
            f"on is 'positive', 'negative', 'neutral', a Path or a list of texts, not {on!r}"
        )
    if not on:
        raise InputError("on holds no texts; give some, or 'positive' or 'negative'")
    return on
