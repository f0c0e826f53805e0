"""Labels as people write them: which of two is the positive one."""

import re
from collections.abc import Collection, Iterable

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
    affirmed = {re.sub(r"^pro[-_ ]", "", label): label for label in known} | {k: k for k in known}
    for label in known:
        match = _NOT.fullmatch(label)
        if match is not None and match[1] in affirmed:
            return known[affirmed[match[1]]], known[label]
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
