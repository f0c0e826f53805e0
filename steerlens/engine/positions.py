"""Which tokens are read and which are steered: names of tokens, parsed in one place."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from steerlens.data.prompts import rendering_of
from steerlens.errors import InputError, told

Position: TypeAlias = int | str
"""Where activations are read, in each prompt: the index of a token, negative from the prompt's end;
`last`, its last token; several by commas ("-3,-1") or as a slice ("-4:", "2:-1"); or a span by
name (see `Span`). Of several tokens the mean is taken (":mean"), or with ":last" or ":max" after
them the last one or the largest number of each coordinate: "assistant" is the mean over the
assistant's tokens. "pair" is one token that each pair names itself, its `position`."""

Span = Literal["continuation", "assistant", "own", "think", "answer"]
"""Tokens by name. `continuation`: the text given after a prompt, on both sides. `assistant`: what
the assistant says in a chat. `own`: what the unsteered model writes after each prompt. `think` and
`answer`: what stands between a thinking model's markers, and after them, in the continuation or the
assistant's turns where pairs have them, else in what the model writes."""

Reduction = Literal["mean", "last", "max"]


@dataclass(frozen=True)
class Reading:
    """A parsed position: a span, or tokens of the prompt; and what is made of several."""

    tokens: Span | Literal["pair"] | slice | tuple[int, ...]
    reduction: Reduction

    @property
    def span(self) -> Span | Literal["pair"] | None:
        """The span that is named, if one is."""
        return self.tokens if isinstance(self.tokens, str) else None


@cache
def parse_position(position: Position) -> Reading:
    """What a position names. Raises `InputError` on anything else."""
    if isinstance(position, int):
        return Reading((position,), "last")
    text, _, ending = position.replace(" ", "").rpartition(":")
    is_reduced = bool(text) and ending in get_args(Reduction)
    text = text if is_reduced else position.replace(" ", "")
    reduction: Reduction = ending if is_reduced else "mean"  # type: ignore[assignment]
    if text == "last":
        return Reading((-1,), "last")
    if position == "pair":
        return Reading("pair", "last")
    if text in get_args(Span):
        return Reading(text, reduction)  # type: ignore[arg-type]
    if re.fullmatch(r"(-?\d{1,9})?:(-?\d{1,9})?", text) and text != ":":
        return Reading(slice(*(int(end) if end else None for end in text.split(":"))), reduction)
    if re.fullmatch(r"-?\d{1,9}(,-?\d{1,9})*", text):
        return Reading(tuple(map(int, text.split(","))), reduction)
    raise InputError(
        f"expected a position such as -1, '-4:', '-3,-1', pair or one of last, "
        f"{', '.join(get_args(Span))}, with :last, :mean or :max after it if need be, got "
        f"{told(position)}"
    )


def as_position(given: Position | Sequence[int]) -> Position:
    """A position as it is kept and recorded: an integer where it is one token of the prompt.

    Raises `InputError` as `parse_position`.
    """
    if not isinstance(given, (int, str)):
        given = ",".join(str(int(index)) for index in given)
    reading = parse_position(given)
    if isinstance(reading.tokens, tuple) and len(reading.tokens) == 1:
        return reading.tokens[0]
    if reading.tokens == "pair":
        return "pair"
    if isinstance(reading.tokens, slice):
        ends = (reading.tokens.start, reading.tokens.stop)
        text = ":".join("" if end is None else str(end) for end in ends)
    else:
        text = reading.span or ",".join(map(str, reading.tokens))
    return f"{text}:{reading.reduction}"


def one_token(position: Position, what: str) -> int:
    """The position as an index. Raises `InputError`, saying `what` takes one token, otherwise."""
    kept = as_position(position)
    if isinstance(kept, int):
        return kept
    raise InputError(
        f"{what} are read at one token, such as -1 or 'last', not at {told(position)}; give one as "
        "position="
    )


class Term(NamedTuple):
    """Tokens by name, and of those that are generated or given after a prompt perhaps a part."""

    name: str
    window: slice | None = None


AFTER = ("continuation", "own", "generated")
"""Names of what comes after the prompt."""


@cache
def parse_steered(positions: str, names: tuple[str, ...]) -> tuple[Term, ...]:
    """What "last+generated[0:10]" names, of some names. Raises `InputError` on anything else."""
    terms = []
    for part in positions.replace(" ", "").split("+"):
        found = re.fullmatch(r"([a-z]+)(?:\[(\d{0,9}):(\d{0,9})\])?", part)
        name, *ends = found.groups() if found else ("", None, None)
        is_window = ends != [None, None]
        if name not in names or (is_window and name not in AFTER):
            raise InputError(
                f"positions are {', '.join(names)}, joined by + where they are several, and with "
                f"a window of steps such as {next(n for n in names if n in AFTER)}[0:10], not "
                f"{told(positions)}"
            )
        window = slice(*(int(end) if end else None for end in ends)) if is_window else None
        terms.append(Term(name, window))
    return tuple(terms)


STEERED = ("all", "prompt", "last", *AFTER, "assistant", "think", "answer")
"""Names of tokens that are steered where prompts and their continuations are known."""


def steers_late(positions: str) -> bool:
    """Whether all before the last prompt token is unsteered."""
    return all(term.name in ("last", *AFTER) for term in parse_steered(positions, STEERED))


Markers: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""The token ids with which a model begins to think, and ends."""


def markers_of(tokenizer: Any) -> Markers:
    """The ids of those of `set_rendering`. Raises `InputError` where it cannot write them."""
    names = rendering_of(tokenizer).thinking
    vocabulary = tokenizer.get_vocab()
    begins, ends = (
        (vocabulary[name],)
        if name in vocabulary
        else tuple(tokenizer(name, add_special_tokens=False)["input_ids"])
        for name in names
    )
    if tokenizer.unk_token_id in (*begins, *ends) or not (begins and ends):
        raise InputError(
            f"the tokenizer has no {' and '.join(names)}, between which a model thinks; give its "
            "own with set_rendering(model.tokenizer, thinking=(...))"
        )
    return begins, ends


def phases(
    ids: Int[Tensor, "row column"], markers: Markers, n_prompt: int
) -> dict[str, Bool[Tensor, "row column"]]:
    """Which tokens come inside (`think`) and after (`answer`) a model's thinking.

    The last token of a marker is part of neither; a marker of several tokens is known by that one
    alone, so those before it count as what they follow. In the prompt what comes before its last
    thinking is neither: it is that of earlier turns. After the prompt, what a token is depends on
    those before it alone.
    """
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    completed, last = [], []
    for marker in markers:
        here = torch.ones_like(ids, dtype=torch.bool)
        for back, token in enumerate(reversed(marker)):
            here &= (ids.roll(back, dims=1) == token) & (columns >= back)
        completed.append(here)
        last.append(torch.where(here, columns, -1).cummax(dim=1).values)
    (begins, ends), (begun, ended) = completed, last
    of_prompt = begun[:, :n_prompt].amax(dim=1, keepdim=True) if n_prompt else -1
    is_known = (columns >= n_prompt) | (columns >= of_prompt)
    return {
        "think": (begun > ended) & ~begins & is_known,
        "answer": (ended > begun) & ~ends & is_known,
    }
