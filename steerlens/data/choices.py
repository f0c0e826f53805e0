"""Answers to choose from, of which some are right: in one cell, or in a column each."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from steerlens.data.labels import FALSE, TRUE, negated, spelled, two_labels
from steerlens.errors import InputError, told

_TEXTS = ("choices", "text", "sentence", "answer")
_LABELS = ("gold_label", "labels", "label")
_STEMS = frozenset(
    ("", "ans", "answer", "option", "op", "choice", "sol", "solution", "ending", "response")
    + ("completion", "conversation")
)
"""What columns of choices are called before their number or letter."""


class Choices(NamedTuple):
    """The choices of a row; what each is called; the label of each, where there are labels."""

    texts: list[Any]
    names: Sequence[Any]
    labels: list[Any] | None = None


def columns_of_choices(keys: Iterable[str]) -> dict[str, str]:
    """The number or letter of each column of choices -> that column; none where there are none.

    Examples:
        >>> from steerlens.data.choices import columns_of_choices
        >>> columns_of_choices(["question", "ans0", "ans1", "label"])
        {'0': 'ans0', '1': 'ans1'}
    """
    by_stem: dict[str, dict[str, str]] = {}
    for key in keys:
        match = re.fullmatch(r"(|.*?[a-z]_?|.*?_)(\d|[a-h])", key.strip().lower())
        if match is not None and match[1].rstrip("_") in _STEMS:
            by_stem.setdefault(match[1], {})[match[2]] = key
    for columns in by_stem.values():
        places = sorted(map(ord, columns))
        is_whole = places == list(range(places[0], places[0] + len(places)))
        if len(columns) > 1 and is_whole and min(columns) in "01a":
            return columns
    return {}


def choices_of(cell: Any, answer: Any, *, where: str) -> Choices:
    """The choices that a cell holds, or `InputError`.

    A list of texts; an object of lists, or a list of objects, with a text and a label or name each;
    an object of names and texts; without an answer, one of texts and labels.
    """
    if isinstance(cell, list) and cell and all(isinstance(choice, Mapping) for choice in cell):
        cell = {key: [choice.get(key) for choice in cell] for key in cell[0]}
    names: Any = None
    labels = answer if isinstance(answer, list) else None
    if isinstance(cell, Mapping):
        texts = next((cell[key] for key in _TEXTS if isinstance(cell.get(key), list)), None)
        of_each = next((cell[key] for key in _LABELS if isinstance(cell.get(key), list)), None)
        if texts is not None and (answer is None or "labels" in cell):
            cell, labels = texts, of_each
        elif texts is not None:
            cell, names = texts, of_each
        else:
            # A table has every choice in every row, empty where it is not one.
            kept = {key: value for key, value in cell.items() if value is not None}
            keys, values = list(kept), list(kept.values())
            cell, labels = (keys, values) if answer is None else (values, labels)
            names = None if answer is None else keys
    is_list = isinstance(cell, list)
    if not is_list or any(of is not None and len(of) != len(cell) for of in (names, labels)):
        raise InputError(
            f"{where}: expected choices as a list and a label for each, or the number, letter or "
            f"text of the right one, got {told(cell)} and {told(labels or answer)}"
        )
    letters = [chr(ord("a") + i) for i in range(len(cell))]
    return Choices(cell, letters if names is None else names, labels)


def right_and_wrong(
    rows: Sequence[Choices], answers: Sequence[Any]
) -> tuple[list[tuple[list[Any], list[Any]]], str]:
    """The right and the wrong choices of each row, and what tells them.

    A label for each; else of all rows' answers that which names one choice in most rows: its name,
    its number from 0 or from 1, or its text.
    """
    labels = {spelled(label) for row in rows for label in row.labels or ()}
    sides: tuple[Collection[str], Collection[str]] = two_labels(labels) or _as_sides(labels)
    ways = {
        way: [_chosen(row, answer, named) for row, answer in zip(rows, answers, strict=True)]
        for way, named in _WAYS.items()
    }
    way = max(ways, key=lambda way: sum(map(any, ways[way])))
    found = []
    for row, is_right in zip(rows, ways[way], strict=True):
        if row.labels is None:
            of_sides = [is_right, [any(is_right) and not right for right in is_right]]
        else:
            of_sides = [[spelled(label) in side for label in row.labels] for side in sides]
        right, wrong = (
            [text for text, is_in in zip(row.texts, of_side, strict=True) if is_in]
            for of_side in of_sides
        )
        found.append((right, wrong))
    return found, "" if labels else f"; the right choice by its {way}"


def _as_sides(labels: Iterable[str]) -> tuple[Collection[str], Collection[str]]:
    """Of more than two labels the one that another negates."""
    of_two = negated(sorted(labels))
    return (TRUE, FALSE) if of_two is None else ({of_two[0]}, {of_two[1]})


def _chosen(row: Choices, answer: Any, named: Callable[[Choices], Iterable[Any]]) -> list[bool]:
    """Which choice the answer names, where it names one."""
    whole = isinstance(answer, float) and answer.is_integer()
    said = spelled(int(answer) if whole else answer)
    found = [said == spelled(name) or said.endswith(f"_{spelled(name)}") for name in named(row)]
    return found if sum(found) == 1 else [False] * len(found)


_WAYS: dict[str, Callable[[Choices], Iterable[Any]]] = {
    "name": lambda row: row.names,
    "number from 0": lambda row: range(len(row.texts)),
    "number from 1": lambda row: range(1, len(row.texts) + 1),
    "text": lambda row: row.texts,
}
