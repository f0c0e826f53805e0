"""Answers to choose from, of which some are right or better: in one cell, or in a column each."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from steerlens.data.labels import FALSE, TRUE, negated, spelled, two_labels
from steerlens.errors import InputError, told

_TEXTS = (
    *("choices", "text", "sentence", "answer", "response", "completion", "output", "content"),
    *("option", "ending", "generation", "summary", "value"),
)
_LABELS = ("gold_label", "labels", "is_correct", "correct")
_NAMES = ("label", "name", "key", "letter", "id")
_STEMS = frozenset(
    ("", "ans", "answer", "option", "op", "choice", "sol", "solution", "ending", "response")
    + ("completion", "conversation", "ref", "output", "summary", "body")
)
"""The last word of what columns of choices are called, beside their number or letter."""
_SCORES = frozenset(("score", "scores", "rating", "ratings", "reward", "rewards", "votes"))
_RANKS = frozenset(("rank", "ranks", "ranking"))
_ONE_OF = re.compile(r"(?P<stem>|.*?[a-z]_?|.*?_)(?P<of>\d|[a-h]$|(?<![^_])[a-h])(?P<rest>|_.+)")
"""A column that is one of several: it has a number, or a letter at the end or by itself."""
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


class Choices(NamedTuple):
    """The choices of a row; what each is called; the label of each, where there are labels.

    `by` is what ranks them, where that gave the labels; `are_named` whether the names were given.
    """

    texts: list[Any]
    names: Sequence[Any]
    labels: list[Any] | None = None
    by: str = ""
    are_named: bool = False


def families(keys: Iterable[str]) -> dict[tuple[str, ...], dict[str, str]]:
    """Columns that differ in a number or letter alone: shared words -> number or letter -> column.

    Examples:
        >>> from steerlens.data.choices import families
        >>> families(["post", "ref_A", "ref_B", "score_A", "score_B"])
        {('ref',): {'a': 'ref_A', 'b': 'ref_B'}, ('score',): {'a': 'score_A', 'b': 'score_B'}}
    """
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for key in keys:
        plainly = re.sub(r"[ -]", "_", key.strip().lower())
        match = _ONE_OF.fullmatch(plainly)
        if match is not None:
            words = tuple(f"{match['stem']}_{match['rest']}".replace("_", " ").split())
            found.setdefault(words, {})[match["of"]] = key
    wholes = {}
    for words, columns in found.items():
        places = sorted(map(ord, columns))
        is_whole = places == list(range(places[0], places[0] + len(places)))
        if len(columns) > 1 and is_whole and min(columns) in "01a":
            wholes[words] = columns
    return wholes


def columns_of_choices(keys: Iterable[str]) -> dict[str, str]:
    """The number or letter of each column of choices -> that column; none where there are none.

    Examples:
        >>> from steerlens.data.choices import columns_of_choices
        >>> columns_of_choices(["question", "ans0", "ans1", "label"])
        {'0': 'ans0', '1': 'ans1'}
    """
    for words, columns in families(keys).items():
        if " ".join(words[-1:]) in _STEMS and not {*words} & (TRUE | FALSE):
            return columns
    return {}


def columns_of_values(
    keys: Iterable[str], each: Mapping[str, str], named: str | None
) -> dict[str, dict[str, str]]:
    """What scores or ranks the choices -> a column each: all such, or those of the one `named`."""

    def scores(words: Sequence[str], columns: Mapping[str, str]) -> bool:
        if named is not None:
            return named in columns.values()
        return bool({*words} & (_SCORES | _RANKS | {"winner"}))

    return {
        name if ranks(name) else f"{name} (score)": columns
        for words, columns in families(keys).items()
        for name in ["_".join(words)]
        if columns.keys() == each.keys() and scores(words, columns)
    }


def ranks(column: str) -> bool:
    """Whether a column is called so that it scores or ranks."""
    return bool(_words(column) & (_SCORES | _RANKS))


def ranked(values: Sequence[Any], by: str, *, where: str) -> list[bool | None]:
    """True for the best values, False for the worst, None for others; None for all that are alike.

    The highest is the best; of ranks the lowest. Yes is higher than no. An absent value is None.
    Raises `InputError` where a value is neither a number nor yes or no.

    Examples:
        >>> from steerlens.data.choices import ranked
        >>> ranked([2, 3, 1], "rank", where="row"), ranked(["2", "3"], "score", where="row")
        ([None, False, True], [False, True])
    """
    try:
        numbers = [math.nan if value is None else _number(value) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: {by}: expected numbers, got {told(list(values))}") from error
    known = [number for number in numbers if math.isfinite(number)]
    best, worst = (max(known), min(known)) if known else (0.0, 0.0)
    if best == worst:
        return [None] * len(numbers)
    if _words(by) & _RANKS and not _words(by) & _SCORES:
        best, worst = worst, best
    return [number == best if number in (best, worst) else None for number in numbers]


def _number(value: Any) -> float:
    said = spelled(value)
    is_word = said in TRUE | FALSE and not _NUMBER.fullmatch(said)
    return float(said in TRUE) if is_word else float(value)


def _words(column: str) -> set[str]:
    return {*re.split(r"[\W_]+", str(column).lower())}


def choices_of(cell: Any, answer: Any, *, where: str, by: str = "label") -> Choices:
    """The choices that a cell holds, or `InputError`.

    A list of texts; an object of lists, or a list of objects, with a text and a label, name, score
    or rank each; an object of names and texts; without an answer, one of texts and labels. `by` is
    the column of the answer, which may be a list with a label or score for each.
    """
    if isinstance(cell, list) and cell and all(isinstance(choice, Mapping) for choice in cell):
        cell = {key: [choice.get(key) for choice in cell] for key in cell[0]}
    names, labels, ranking = None, None, ""
    if isinstance(answer, list):
        ranking = by if ranks(by) or not {*map(spelled, answer)} <= TRUE | FALSE else ""
        labels = ranked(answer, by, where=where) if ranking else answer
    if isinstance(cell, Mapping):
        lists = {key: value for key, value in cell.items() if isinstance(value, list)}
        texts = next((lists[key] for key in _TEXTS if key in lists), None)
        if texts is None:
            # A table has every choice in every row, empty where it is not one.
            kept = {key: value for key, value in cell.items() if value is not None}
            keys, values = list(kept), list(kept.values())
            cell, labels = (keys, values) if answer is None else (values, labels)
            names = None if answer is None else keys
        elif answer is not None and not {*_LABELS} & lists.keys():
            cell, names = texts, next((lists[key] for key in _NAMES if key in lists), None)
        else:
            cell = texts
            labels, ranking = _labels_in(lists, by if answer is None else "label", where)
    is_list = isinstance(cell, list)
    if not is_list or any(of is not None and len(of) != len(cell) for of in (names, labels)):
        raise InputError(
            f"{where}: expected choices as a list and a label for each, or the number, letter or "
            f"text of the right one, got {told(cell)} and {told(labels or answer)}"
        )
    letters = [chr(ord("a") + i) for i in range(len(cell))]
    return Choices(cell, letters if names is None else names, labels, ranking, names is not None)


def _labels_in(
    lists: Mapping[str, list[Any]], named: str, where: str
) -> tuple[list[Any] | None, str]:
    """The labels of each choice, and what ranks the choices where that gave them."""
    plain = [lists[key] for key in _LABELS if key in lists]
    scores = [key for key in lists if ranks(key)]
    if named in lists and named not in (*_LABELS, "label"):
        plain, scores = [], [named]
    if not plain and len(scores) > 1:
        raise InputError(
            f"{where}: choices may be ranked by {' or '.join(scores)}; name one: --columns "
            f"label={scores[0]}"
        )
    if plain or not scores:
        return next(iter([*plain, *([lists["label"]] if "label" in lists else [])]), None), ""
    return ranked(lists[scores[0]], scores[0], where=where), scores[0]


def right_and_wrong(
    rows: Sequence[Choices], answers: Sequence[Any], *, column: str, first: str = ""
) -> tuple[list[tuple[list[Any], list[Any]]], str]:
    """The right and the wrong choices of each row, and what tells them.

    A label for each; else of all rows' answers that which names one choice in most rows: its name,
    its number from 0 or from 1, or its text. Of two choices `first` may be the answer that names
    the first one. Raises `InputError` where numbers may mean either of two.
    """
    labels = {spelled(label) for row in rows for label in row.labels or ()}
    of_two = negated(sorted(labels))  # of more than two labels the one that another negates
    sides: tuple[Collection[str], Collection[str]] = two_labels(labels) or (
        (TRUE, FALSE) if of_two is None else ({of_two[0]}, {of_two[1]})
    )
    way, named = _way(rows, answers, column, first)
    found = []
    for row, is_right in zip(rows, named, strict=True):
        if row.labels is None:
            of_sides = [is_right, [any(is_right) and not right for right in is_right]]
        else:
            of_sides = [[spelled(label) in side for label in row.labels] for side in sides]
        right, wrong = (
            [text for text, is_in in zip(row.texts, of_side, strict=True) if is_in]
            for of_side in of_sides
        )
        found.append((right, wrong))
    if by := next((row.by for row in rows if row.by), ""):
        return found, f"the best choice and the worst by {by}"
    how = "the first right choice and the first wrong one"
    return found, how if labels else f"{how}; the right choice by its {way}"


def _way(
    rows: Sequence[Choices], answers: Sequence[Any], column: str, first: str
) -> tuple[str, list[list[bool]]]:
    """What the answers are, and which choice of each row they name."""
    said = {_spelled_whole(answer) for answer in answers if answer is not None}
    are_two = all(len(row.texts) == 2 and row.labels is None for row in rows)
    if first:
        others = said - {spelled(first)}
        if not are_two or spelled(first) not in said or len(others) > 1:
            raise InputError(
                f"the form choices: --columns label={column}={first} names the first of two "
                f"choices, by one of two values; got {', '.join(sorted(said)[:5]) or 'none'}"
            )
        named = [_spelled_whole(answer) for answer in answers]
        found = [[name == spelled(first), name in others] for name in named]
        return f"label, of which {first} is the first choice", found
    numbers = {text for text in said if _NUMBER.fullmatch(text)}
    are_letters = any(row.are_named and str([*row.names, ""][0]).isalpha() for row in rows)
    is_range = numbers <= {"0", "1"} or numbers <= {"1", "2"}
    if are_two and numbers and (not is_range or (are_letters and "2" not in numbers)):
        raise InputError(
            f"the form choices: of two choices {column} is {', '.join(sorted(numbers)[:5])}, which "
            "may mean either; name the value that means the first choice: --columns "
            f"label={column}={max(numbers)}"
        )
    ways = {
        way: [_chosen(row, answer, of) for row, answer in zip(rows, answers, strict=True)]
        for way, of in _WAYS.items()
    }
    way = max(ways, key=lambda way: sum(map(any, ways[way])))
    return way, ways[way]


def _spelled_whole(answer: Any) -> str:
    whole = isinstance(answer, float) and answer.is_integer()
    return spelled(int(answer) if whole else answer)


def _chosen(row: Choices, answer: Any, named: Callable[[Choices], Iterable[Any]]) -> list[bool]:
    """Which choice the answer names, where it names one."""
    said = _spelled_whole(answer)
    found = [said == spelled(name) or said.endswith(f"_{spelled(name)}") for name in named(row)]
    return found if sum(found) == 1 else [False] * len(found)


_WAYS: dict[str, Callable[[Choices], Iterable[Any]]] = {
    "name": lambda row: row.names,
    "number from 0": lambda row: range(len(row.texts)),
    "number from 1": lambda row: range(1, len(row.texts) + 1),
    "text": lambda row: row.texts,
}
