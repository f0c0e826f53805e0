"""Entries of data before they are checked: two sides, and what both share before them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

from steerlens.data.prompts import Message, Prompt

MOST_SHOWN = 200
"""The most characters of a list of column names in a message."""
OPENING = "\n\nAssistant:"
"""Before what the assistant says, in dialogues that are written as one text."""
_LETTER = re.compile(r"\s*\(?([A-Z])[).]?\s*")
_CHOICE = re.compile(
    r"(?:\((?P<a>[A-Z])\)|^[ \t]*(?P<b>[A-Z])[).:])[ \t]*(?P<text>.*?)(?=[ \t]*(?:\([A-Z]\)|$))",
    re.MULTILINE,
)


class Entry(NamedTuple):
    """What a row says: the sides, what both share before them (or None), and other parts."""

    where: str
    id: str
    prompt: Prompt | None
    positive: Prompt
    negative: Prompt
    rest: Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """What was read: its form, and how many rows were used, left out (and why) and repeated.

    `how` says what was decided about them; `not_used` are columns that the form has no use for.

    Examples:
        >>> from steerlens.data import Card
        >>> print(Card("pairs", 6, 6, n_repeated=3, not_used=("idx",)))
        6 rows of the form pairs, 6 used; 3 repeated; columns not used: idx
    """

    form: str
    n_rows: int
    n_used: int
    n_repeated: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    not_used: tuple[str, ...] = ()
    how: str = ""

    def __str__(self) -> str:
        parts = [f"{self.n_rows} rows of the form {self.form}, {self.n_used} used"]
        parts += [self.how] if self.how else []
        parts += [f"{n} left out: {reason}" for reason, n in self.left_out.items()]
        parts += [f"{self.n_repeated} repeated"] if self.n_repeated else []
        parts += [f"columns not used: {in_short(self.not_used)}"] if self.not_used else []
        return "; ".join(parts)


def in_short(columns: Sequence[str]) -> str:
    """Names of columns as a list; of very many, or long ones, the first."""
    text = ", ".join(columns)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}... ({len(columns)} in all)"


def turns(prompt: Prompt | None) -> tuple[Message, ...]:
    """A chat as it is, a text as what the user says."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt or ()


def pair_records(entry: Entry) -> list[dict[str, Any]]:
    """The record of a pair: what both share stands before each side."""
    sides = (entry.positive, entry.negative)
    positive, negative = (joined(entry.prompt, side) for side in sides)
    return [{"id": entry.id, "positive": positive, "negative": negative, **entry.rest}]


def joined(prompt: Prompt | None, side: Prompt) -> Prompt:
    """A side after what stands before it, unless that is part of it."""
    if prompt is None or (isinstance(side, tuple) and side[0].role != "assistant"):
        return side
    if isinstance(side, tuple):
        return (*turns(prompt), *side)
    if isinstance(prompt, str):
        return side if side.startswith(prompt) else prompt + side
    if prompt[-1].role == "assistant":  # its opening
        return (*prompt[:-1], Message("assistant", prompt[-1].content + side))
    return (*prompt, Message("assistant", side))


def item_records(entry: Entry) -> list[dict[str, Any]]:
    """The records of the preference items of an entry: none where it has no answers.

    Where the answers are letters of choices, a second item has the choices exchanged.
    """
    answers = _answers(entry)
    if answers is None:
        return []
    prompt, positive, negative = answers
    sides = {"positive": positive, "negative": negative}
    record = {"id": entry.id, "prompt": prompt, **sides, **entry.rest}
    other = None if isinstance(prompt, str) else _exchanged(prompt, positive, negative)
    if other is None:
        return [record]
    name = str(record["id"])
    record = {"group": f"question {name}", **record}
    exchanged = {"id": f"{name}-exchanged", "prompt": other}
    return [record, {**record, **exchanged, "positive": negative, "negative": positive}]


def _answers(entry: Entry) -> tuple[Prompt, str, str] | None:
    """What both sides share, and the two answers after it."""
    if entry.prompt is not None and isinstance(entry.positive, str):
        if isinstance(entry.negative, str):
            return entry.prompt, entry.positive, entry.negative
        return None
    sides = (joined(entry.prompt, entry.positive), joined(entry.prompt, entry.negative))
    if isinstance(sides[0], tuple) and isinstance(sides[1], tuple):
        lasts = (sides[0][-1], sides[1][-1])
        are_said = all(last.role == "assistant" and last.content for last in lasts)
        if are_said and sides[0][:-1] == sides[1][:-1] and len(sides[0]) > 1:
            return sides[0][:-1], lasts[0].content, lasts[1].content
    elif isinstance(sides[0], str) and isinstance(sides[1], str):
        alike = takewhile(lambda both: both[0] == both[1], zip(*sides, strict=False))
        at = sides[0][: len(list(alike))].rfind(OPENING)
        at += len(OPENING)
        answers = (sides[0][at:], sides[1][at:])
        if at >= len(OPENING) and not any(OPENING in answer for answer in answers):
            return sides[0][:at], *answers
    return None


def _exchanged(
    prompt: tuple[Message, ...], positive: str, negative: str
) -> tuple[Message, ...] | None:
    """The prompt with the choices of the two letters exchanged; None where they are no letters."""
    letters = [found[1] for text in (positive, negative) if (found := _LETTER.fullmatch(text))]
    asked = prompt[-1].content
    choices = {found["a"] or found["b"]: found for found in _CHOICE.finditer(asked)}
    if len({*letters}) != 2 or not {*letters} <= choices.keys():
        return None
    first, second = sorted((choices[letter] for letter in letters), key=re.Match.start)
    text = (
        asked[: first.start("text")]
        + second["text"]
        + asked[first.end("text") : second.start("text")]
        + first["text"]
        + asked[second.end("text") :]
    )
    return (*prompt[:-1], Message(prompt[-1].role, text))
