"""Labels as people write them: which of two is the positive one, which choices they name."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from steerlens.errors import InputError, told

TRUE = frozenset(
    ("1", "1.0", "true", "t", "yes", "y", "positive", "pos", "good", "correct", "right")
    + ("chosen", "accepted", "pass", "passed")
)
FALSE = frozenset(
    ("0", "0.0", "-1", "-1.0", "false", "f", "no", "n", "negative", "neg", "bad", "incorrect")
    + ("wrong", "rejected", "fail", "failed")
)
_NOT = re.compile(r"(?:un|in|im|ir|dis|non|not|no|anti)[-_ ]?(.+)")


def spelled(label: object) -> str:
    """A label as it is compared: a word or number without case."""
    return str(label).strip().lower()


def negated(labels: Iterable[str]) -> tuple[str, str] | None:
    """Of some labels the first that another is with a negation before it, and that one.

    Examples:
        >>> from steerlens.data.labels import negated
        >>> negated(["dishonest", "honest"]), negated(["non-toxic", "toxic"])
        (('honest', 'dishonest'), ('toxic', 'non-toxic'))
    """
    known = {spelled(label): label for label in labels}
    for label in known:
        match = _NOT.fullmatch(label)
        if match is not None and match[1] in known:
            return known[match[1]], known[label]
    return None


def two_labels(
    labels: Collection[str], positive: str = ""
) -> tuple[Collection[str], Collection[str]] | None:
    """The positive and the negative ones of some labels, or None where that cannot be told.

    Of two labels the one that is named as `positive`; else words and numbers that say so (`TRUE`,
    `FALSE`); else of two the one that the other negates.
    """
    if positive:
        others = {*labels} - {spelled(positive)}
        is_one_of_two = spelled(positive) in labels and len(others) == 1
        return ({spelled(positive)}, others) if is_one_of_two else None
    if {*labels} & TRUE and {*labels} & FALSE:
        return TRUE, FALSE
    of_two = negated(labels) if len(labels) == 2 else None
    return None if of_two is None else ({of_two[0]}, {of_two[1]})


def right_and_wrong(choices: Any, answer: Any, *, where: str) -> tuple[list[Any], list[Any]]:
    """The choices that are right and those that are not, by how a row says so.

    A label for each, beside them or in one object with them (`choices` and `labels`, `text` and
    `label`, or choice -> label); or the number (from 0) or letter of the right one. Raises
    `InputError` of anything else.
    """
    names: Sequence[Any] = ()
    if isinstance(choices, Mapping):
        if {"choices", "labels"} <= choices.keys():
            choices, answer = choices["choices"], choices["labels"]
        elif {"text", "label"} <= choices.keys():
            choices, names = choices["text"], choices["label"]
        else:
            # A table has every choice in every row, empty where it is not one.
            labels = {text: label for text, label in choices.items() if label is not None}
            choices, answer = list(labels), list(labels.values())
    if isinstance(choices, list) and not isinstance(answer, list):
        letters = names or [chr(ord("A") + i) for i in range(len(choices))]
        is_number = not names and re.fullmatch(r"\d+", str(answer))
        places = range(len(choices)) if is_number else letters
        answer = [spelled(place) == spelled(answer) for place in places]
    if not isinstance(choices, list) or len(choices) != len(answer):
        raise InputError(
            f"{where}: expected choices as a list and a label for each, or the number or letter of "
            f"the right one, got {told(choices)} and {told(answer)}"
        )
    is_right = [spelled(label) in TRUE for label in answer]
    return (
        [choice for choice, right in zip(choices, is_right, strict=True) if right],
        [choice for choice, right in zip(choices, is_right, strict=True) if not right],
    )
