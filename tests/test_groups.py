"""Groups of pairs and items: where they come from, and what goes by them."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlens.data import ContrastivePair, ContrastivePairs, PreferenceItems
from steerlens.errors import InputError

ITEM = {"prompt": "The film was", "positive": " great.", "negative": " dull."}


def user(content: Any, role: str = "user") -> list[Any]:
    return [{"role": role, "content": content}]


def grouped(*groups: str | None) -> ContrastivePairs:
    return ContrastivePairs(
        tuple(
            ContrastivePair(f"good {i}", f"bad {i}", id=str(i), group=group)
            for i, group in enumerate(groups)
        )
    )


@pytest.mark.parametrize(
    ("key", "values"), [("group", ["b", "a", "b", None]), ("persona", [7, "a", 7, None])]
)
def test_a_group_comes_from_its_key_however_pairs_are_read(
    tmp_path: Path, key: str, values: list[Any]
) -> None:
    rows = [
        {"positive": f"good {i}", "negative": f"bad {i}", key: value}
        for i, value in enumerate(values)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    read = [
        ContrastivePairs.load(rows, group=key),
        ContrastivePairs.load(file, group=key),
        ContrastivePairs.load(rows, group=key),
        ContrastivePairs.from_lists(
            *([row[side] for row in rows] for side in ("positive", "negative")), group=values
        ),
    ]
    names = [None if value is None else str(value) for value in values]
    for made in read:
        assert [pair.group for pair in made] == names
        assert made.groups == (0, 1, 0, 2)
        assert made[::-1].groups == (0, 1, 2, 1)
        assert made.fingerprint == read[0].fingerprint
    if key != "group":
        assert ContrastivePairs.load(rows).groups == (0, 1, 2, 3)
        with pytest.raises(InputError, match=f"record 2: missing key '{key}'"):
            ContrastivePairs.load([rows[0], {"positive": "a", "negative": "b"}], group=key)


@pytest.mark.parametrize("key", ["positive", "negative", "continuation", "id", "auto "])
def test_a_group_cannot_be_another_part_of_a_pair(key: str) -> None:
    rows = [{"positive": f"good {i}", "negative": f"bad {i}"} for i in range(2)]
    with pytest.raises(InputError, match=f"'{key}'"):
        ContrastivePairs.load(rows, group=key)
    with pytest.raises(InputError, match=f"'{key}'"):
        ContrastivePairs.from_lists(["a", "b"], ["c", "d"], group=key)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sides", "groups"),
    [
        # The same words at the same place; another word; the same words in another order.
        ([("I love it", "I hate it"), ("we love her", "we hate her")], (0, 0)),
        ([("I love it", "I hate it"), ("I like it", "I hate it")], (0, 1)),
        ([("a b c", "a c"), ("d b e", "d e"), ("b b", "b"), ("a c", "a b c")], (0, 0, 0, 1)),
    ],
)
def test_pairs_that_differ_in_one_text_are_a_group_of_auto(
    sides: list[tuple[str, str]], groups: tuple[int, ...]
) -> None:
    positive, negative = zip(*sides, strict=True)
    assert ContrastivePairs.from_lists(positive, negative, group="auto").groups == groups
    chats = [
        [user(text, "system") + user(f"question {i}") for text in pair]
        for i, pair in enumerate(sides)
    ]
    made = ContrastivePairs.from_lists(*zip(*chats, strict=True), group="auto")
    # Of chats whole messages are compared.
    assert made.groups == tuple(range(len(sides)))
    again = ContrastivePairs.from_lists(*zip(*chats, *chats, strict=True), group="auto")
    assert again.groups == 2 * tuple(range(len(sides)))


def test_repeats_are_one_group_whatever_group_they_are_given() -> None:
    sides = (["a", "b", "a", "a"], ["c", "c", "c", "d"])
    for group in (None, ["1", "2", "3", "4"], [None, "2", "3", "4"]):
        assert ContrastivePairs.from_lists(*sides, group=group).groups == (0, 1, 0, 2)
    rows = [{"positive": "a", "negative": "b", "continuation": word} for word in ("c", "d")]
    assert ContrastivePairs.load(rows).groups == (0, 0)
    apart = [{**row, "group": i} for i, row in enumerate(rows)]
    assert ContrastivePairs.load(apart).groups == (0, 1)
    # One of them stands for all: others of its group are not drawn along.
    assert ContrastivePairs.from_lists(*sides, group=["1", "2", "2", "2"]).groups == (0, 1, 0, 1)
    # A prompt alone makes items alike only where they have no group.
    rows = [{**ITEM, "positive": word, "group": word} for word in (" good.", " great.")]
    items = PreferenceItems.load([*rows, {**rows[0], "group": "other"}])
    assert items.groups == (0, 1, 0)
    items = PreferenceItems.load([ITEM, {**ITEM, "positive": " good."}] * 2)
    assert items.groups == (0, 0, 0, 0)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(2, 5), min_size=2, max_size=12), seed=st.integers(0, 2**32))
def test_a_split_parts_no_group(sizes: list[int], seed: int) -> None:
    made = grouped(*(str(i) for i, size in enumerate(sizes) for _ in range(size)))
    train, test = made.split(0.5, seed)
    kinds = [{pair.group for pair in part} for part in (train, test)]
    assert not kinds[0] & kinds[1]
    assert len(kinds[1]) == round(0.5 * len(sizes))
    assert len(train) + len(test) == len(made)


def test_a_group_is_part_of_the_fingerprint() -> None:
    prints = [grouped(*groups).fingerprint for groups in (("a", "b"), ("a", "a"), (None, None))]
    assert len(set(prints)) == 3
    assert (
        prints[2]
        == ContrastivePairs.load(
            {"positive": f"good {i}", "negative": f"bad {i}", "id": i} for i in range(2)
        ).fingerprint
    )


VERBS, NOUNS = ("adored", "loathed"), ("soup", "film", "walk", "book", "city", "song")
ALIKE = "10 pairs without groups differ in 1 texts only"
FEW = "independent groups of pairs; intervals and p-values from fewer than 10 are rough"


@pytest.mark.parametrize(
    ("made", "texts"),
    [
        (grouped(*"abcdefghij"), []),
        (grouped(*"abcdefghi", "a"), [f"9 {FEW}"]),
        (grouped(*"abcdefghijk", *"aaaaaaaaaa"), ["11 independent groups, so uneven that they"]),
        (grouped(*"abcdefghijk", *"bcd"), []),
        (
            ContrastivePairs.from_lists([*"abcdefghijk", "a"], ["-"] * 12),
            ["1 of 12 pairs repeat both prompts of others"],
        ),
        (
            ContrastivePairs.from_lists(*([f"{w} {i}" for i in range(10)] for w in ("hi", "oh"))),
            [ALIKE],
        ),
        (
            ContrastivePairs.from_lists(
                *([f"I {verb} the {noun} because" for noun in 2 * NOUNS] for verb in VERBS)
            ),
            ["6 of 12 pairs repeat both prompts of others", "differ in 1 texts only", f"6 {FEW}"],
        ),
    ],
    ids=["none", "few", "uneven", "even", "repeats", "alike", "dup"],
)
def test_what_is_wrong_with_groups_is_told_with_its_counts(
    made: ContrastivePairs, texts: list[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.warn_of_groups()
    told = [str(warning.message) for warning in caught]
    assert len(told) == len(texts)
    for message, text in zip(told, texts, strict=True):
        assert text in message
        assert message.startswith(f"{made.name}: ")


def test_items_of_one_prompt_are_told_and_are_one_group() -> None:
    rows = [
        {"prompt": prompt, "positive": word, "negative": "bad"}
        for prompt in ("the sun was", "the day was")
        for word in ("good", "kind")
    ]
    items = PreferenceItems.load(rows)
    assert items.groups == (0, 0, 1, 1)
    with pytest.warns(UserWarning, match="2 of 4 items repeat the prompt of others"):
        items.warn_of_groups()


# What items share with pairs

HELPFUL, KIND, RUDE = (user(text, "system") for text in ("Be helpful.", "Be kind.", "Be rude."))
SOUP, FILM = user("How was the soup?"), user("How was the film?")
OPENED = user("It was", "assistant")
LETTERS = [user(f"({letter})", "assistant") for letter in "AB"]


@pytest.mark.parametrize(
    ("sides", "prompts", "n"),
    [
        # A question, with a persona or another opening; a persona; an opening alone.
        ([[KIND + SOUP, RUDE + SOUP], [KIND + FILM, RUDE + FILM]], [SOUP + OPENED], 1),
        ([[KIND + SOUP, RUDE + SOUP], [KIND + FILM, RUDE + FILM]], [KIND + user("Hello")], 1),
        ([[KIND + SOUP + OPENED, RUDE + SOUP], [KIND, RUDE]], [user("Hello") + OPENED], 0),
        # What every prompt has tells nothing.
        ([[HELPFUL + KIND + SOUP, HELPFUL + RUDE + SOUP]] * 2, [HELPFUL + SOUP], 0),
        # Letters as the two answers: the question, not the letter.
        ([[SOUP + a, SOUP + b] for a, b in [LETTERS]] + [[FILM, KIND]], [SOUP, KIND + RUDE], 2),
        # Texts: the whole, the words before and after what differs, however they are spaced.
        ([["I love it", "I hate it"], ["We love her", "We hate her"]], ["I love  it"], 1),
        ([["I love it", "I hate it"], ["We love her", "We hate her"]], ["it", "We", "I love"], 2),
        ([["I love it", "I hate it"], ["We love it", "We hate it"]], ["it"], 0),
    ],
)
def test_items_that_share_a_prompt_or_persona_with_pairs_are_counted(
    sides: list[Any], prompts: list[Any], n: int
) -> None:
    """By texts alone: the names of groups are the same everywhere."""
    made = ContrastivePairs.load(
        {"positive": positive, "negative": negative, "group": "1"} for positive, negative in sides
    )
    rows = [
        {"prompt": prompt, "positive": "A", "negative": "B", "group": "1"}
        for prompt in (*prompts, "nothing of that", "nor of that")
    ]
    assert PreferenceItems.load(rows).count_sharing(made.shared_texts) == n
