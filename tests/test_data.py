"""Pairs: what loads, what is refused and where, how they split, and how they become text."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlens.data import (
    ContrastivePair,
    ContrastivePairs,
    Message,
    PreferenceItem,
    PreferenceItems,
)
from steerlens.errors import InputError

GOOD = '{"positive": "you are kind", "negative": "you are rude"}'


def write(folder: Path, *lines: str | bytes, end: bytes = b"\n") -> Path:
    path = folder / "pairs.jsonl"
    raw = [line.encode() if isinstance(line, str) else line for line in lines]
    path.write_bytes(b"".join(line + end for line in raw))
    return path


def record(**changes: Any) -> str:
    return json.dumps({"positive": "you are kind", "negative": "you are rude"} | changes)


def numbered(n: int) -> ContrastivePairs:
    return ContrastivePairs.from_lists(
        [f"good {i}" for i in range(n)], [f"bad {i}" for i in range(n)]
    )


# Loading


def test_jsonl_holds_text_chat_continuation_and_id(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "kind"}, {"role": "user", "content": "how"}]
    path = write(
        tmp_path,
        record(id="first", continuation=" and so on", source="a key of the user's own"),
        record(positive=chat),
    )
    first, second = ContrastivePairs.load(path)
    assert first == ContrastivePair("you are kind", "you are rude", " and so on", "first")
    assert second.positive == (Message("system", "kind"), Message("user", "how"))
    assert second.continuation is None


@pytest.mark.parametrize("blank", ["", "   ", "\t"])
def test_default_ids_are_line_numbers_and_blank_lines_are_counted(
    tmp_path: Path, blank: str
) -> None:
    path = write(tmp_path, GOOD, blank, GOOD, record(id="named"), blank, GOOD)
    assert [pair.id for pair in ContrastivePairs.load(path)] == ["1", "3", "named", "6"]


@pytest.mark.parametrize("key", ["id", "continuation"])
def test_null_stands_for_an_absent_optional_key(tmp_path: Path, key: str) -> None:
    absent = ContrastivePairs.load(write(tmp_path, GOOD, GOOD))
    given_ = ContrastivePairs.load(write(tmp_path, record(**{key: "x"}), GOOD))
    null = ContrastivePairs.load(write(tmp_path, record(**{key: None}), GOOD))
    assert null.pairs == absent.pairs != given_.pairs


LONE, EMOJI = "\ud800", "\ud83d\ude00"  # half of an emoji, and both halves


def user(content: Any, role: str = "user") -> list[Any]:
    return [{"role": role, "content": content}]


# What is wrong: (changes of a good line, or the bad line), the same repaired, and a part of the
# message. The corpus of test_hostile.py has more, of items too.
BAD_LINES: dict[str, tuple[Any, Any, str]] = {
    "no positive": ('{"negative": "a"}', {}, "missing key 'positive'"),
    "empty after": ({"continuation": ""}, {"continuation": " "}, "continuation: expected text"),
    "half a token": ({"position": 1.5}, {"position": 1.0}, "position must be a whole number"),
    "no token": ({"position": True}, {"position": "-2"}, "position must be a whole number"),
    "list after": ({"continuation": ["c"]}, {"continuation": "c"}, "continuation: expected text"),
    "message without content": (
        {"positive": [{"role": "user"}]},
        {"positive": user("x")},
        "positive, message 1: expected an object with the keys role and content",
    ),
    "message with null": (
        {"negative": user(None)},
        {"negative": user("x")},
        "negative, message 1: role and content must be text",
    ),
    "surrogate after": ({"continuation": LONE}, {"continuation": EMOJI}, "lone surrogate"),
    "surrogate in id": ({"id": LONE}, {"id": EMOJI}, "lone surrogate"),
    "surrogate in message": ({"positive": user(LONE)}, {"positive": user(EMOJI)}, "surrogate"),
    "surrogate in role": (
        {"positive": user("x", LONE)},
        {"positive": user("x", EMOJI)},
        "lone surrogate",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_refused_by_file_and_line(tmp_path: Path, name: str) -> None:
    bad, repaired, reason = BAD_LINES[name]
    bad = record(**bad) if isinstance(bad, dict) else bad
    path = write(tmp_path, GOOD, "", bad, GOOD)
    with pytest.raises(InputError) as caught:
        ContrastivePairs.load(path)
    assert f"{path}:3: " in str(caught.value)
    assert reason in str(caught.value)
    loaded = ContrastivePairs.load(write(tmp_path, GOOD, "", record(**repaired), GOOD))
    assert len(loaded) == 3
    assert loaded.fingerprint


@pytest.mark.parametrize("lines", [(), ("", " "), (GOOD,), ("", GOOD)])
def test_fewer_than_two_pairs_are_refused(tmp_path: Path, lines: tuple[str, ...]) -> None:
    n_pairs = lines.count(GOOD)
    with pytest.raises(InputError, match=f"at least 2 pairs, got {n_pairs}"):
        ContrastivePairs.load(write(tmp_path, *lines))
    assert len(ContrastivePairs.load(write(tmp_path, *lines, GOOD, GOOD))) == n_pairs + 2


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(InputError, match="cannot be read") as caught:
            ContrastivePairs.load(path)
        assert str(path) in str(caught.value)
    assert len(ContrastivePairs.load(str(write(tmp_path, GOOD, GOOD)))) == 2


# Lists and datasets


def test_from_lists_of_text_and_of_messages() -> None:
    chat = [{"role": "user", "content": "how"}]
    made = ContrastivePairs.from_lists(["a", chat], ["b", "c"], ["d", "e"], name="made")
    assert made.name == "made"
    assert made.pairs == (
        ContrastivePair("a", "b", "d", "1"),
        ContrastivePair((Message("user", "how"),), "c", "e", "2"),
    )
    assert ContrastivePairs.from_lists(["a", "b"], ["c", "d"])[0].continuation is None


@pytest.mark.parametrize(
    "columns",
    [(["a", "b"], ["c"]), (["a", "b"], ["c", "d"], ["e"]), (["a", "b"], ["c", "d"], [])],
)
def test_from_lists_of_different_lengths_is_refused(columns: tuple[list[str], ...]) -> None:
    with pytest.raises(InputError, match="lists of one length"):
        ContrastivePairs.from_lists(*columns)
    full = [[*column, "x", "y"][:2] for column in columns]
    assert len(ContrastivePairs.from_lists(*full)) == 2


def test_from_lists_names_the_bad_item() -> None:
    with pytest.raises(InputError, match="mine: record 2: negative: expected text"):
        ContrastivePairs.from_lists(["a", "b"], ["c", ""], name="mine")
    with pytest.raises(InputError, match=r"mine: record 2: .* equal"):
        ContrastivePairs.from_lists(["a", "b"], ["c", "b"], name="mine")
    assert len(ContrastivePairs.from_lists(["a", "b"], ["c", "d"], name="mine")) == 2


def test_pairs_made_by_hand_are_checked_too() -> None:
    good = ContrastivePair("a", "b", id="1")
    for pair, reason in (
        (ContrastivePair("a", "a", id="2"), "pair '2': .* are equal"),
        (ContrastivePair("a", "b", id="1"), "id '1' occurs twice"),
    ):
        with pytest.raises(InputError, match=reason):
            ContrastivePairs((good, pair))
    assert len(ContrastivePairs((good, ContrastivePair("a", "b", id="2")))) == 2


# Slices, fingerprint, split


def test_pairs_are_a_sequence() -> None:
    made = numbered(5)
    assert made[-1] == made.pairs[4]
    assert made[1:4].pairs == made.pairs[1:4]
    assert made[::-1].pairs == made.pairs[::-1]
    assert made[1:4].name == made.name
    assert list(made) == list(made.pairs)
    assert made.pairs[2] in made
    with pytest.raises(IndexError):
        made[5]
    with pytest.raises(InputError, match="at least 2"):
        made[:1]


def test_repr_tells_name_size_and_content() -> None:
    made = numbered(3)
    assert repr(made) == f"ContrastivePairs('pairs', 3 pairs, {made.fingerprint[:12]})"


@pytest.mark.parametrize(
    "change",
    [
        lambda pair: replace(pair, positive="other"),
        lambda pair: replace(pair, negative="other"),
        lambda pair: replace(pair, continuation="other"),
        lambda pair: replace(pair, position=0),
        lambda pair: replace(pair, id="other"),
        lambda pair: replace(pair, positive=pair.negative, negative=pair.positive),
        lambda pair: replace(pair, positive=(Message("user", pair.positive),)),
    ],
)
def test_fingerprint_changes_with_content(
    change: Callable[[ContrastivePair], ContrastivePair],
) -> None:
    made = numbered(3)
    changed = ContrastivePairs((made[0], change(made[1]), made[2]))
    assert changed.fingerprint != made.fingerprint


def test_fingerprint_changes_with_order_and_not_with_the_name() -> None:
    made = numbered(3)
    assert made[::-1].fingerprint != made.fingerprint
    assert made[:2].fingerprint != made.fingerprint
    assert ContrastivePairs(made.pairs, "other").fingerprint == made.fingerprint
    assert numbered(3).fingerprint == made.fingerprint
    assert len(made.fingerprint) == 64


@settings(max_examples=40, deadline=None)
@given(sizes=st.tuples(st.integers(2, 30), st.integers(2, 30)), seed=st.integers(0, 2**32))
def test_split_is_a_partition_that_keeps_order(sizes: tuple[int, int], seed: int) -> None:
    n_train, n_test = sizes
    made = numbered(n_train + n_test)
    train, test = made.split(n_test / len(made), seed)
    assert (len(train), len(test)) == sizes
    train_ids, test_ids = ([int(pair.id) for pair in part] for part in (train, test))
    assert sorted(train_ids + test_ids) == list(range(1, len(made) + 1))
    assert train_ids == sorted(train_ids)
    assert test_ids == sorted(test_ids)
    assert made.split(n_test / len(made), seed) == (train, test)


def test_split_depends_on_the_seed() -> None:
    made = numbered(40)
    parts = {made.split(0.5, seed)[1].fingerprint for seed in range(5)}
    assert len(parts) == 5
    assert made.split(0.5)[1].fingerprint in parts
    assert [part.name for part in made.split(0.5)] == ["pairs[train]", "pairs[test]"]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5, 0.1, 0.9])
def test_a_split_part_of_fewer_than_two_pairs_is_refused(fraction: float) -> None:
    made = numbered(8)
    with pytest.raises(InputError, match=f"test_fraction={fraction} of 8 groups"):
        made.split(fraction)
    assert [len(part) for part in made.split(0.25)] == [6, 2]


# Preference items

ITEM = {"prompt": "The film was", "positive": " great.", "negative": " dull."}


def write_items(folder: Path, *records: object) -> Path:
    return write(folder, *map(json.dumps, records))


def test_items_from_jsonl(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hello"}]
    file = write_items(tmp_path, ITEM, {**ITEM, "prompt": chat, "id": "two"})
    first, second = PreferenceItems.load(file)
    assert first == PreferenceItem("The film was", " great.", " dull.", "1")
    assert second.prompt == (Message("user", "Hello"),)
    assert second.id == "two"


def test_a_split_of_items_parts_no_group() -> None:
    items = PreferenceItems.load("sentiment")
    train, test = items.split(0.7, seed=1)
    assert {i.id for i in train} | {i.id for i in test} == {i.id for i in items}
    groups = [{item.group for item in part} for part in (train, test)]
    assert not groups[0] & groups[1]
    assert len(groups[1]) == round(0.7 * len(set(items.groups)))
    assert items.split(0.7, seed=1)[1].fingerprint == test.fingerprint
    assert items.split(0.7, seed=2)[1].fingerprint != test.fingerprint
    with pytest.raises(InputError, match="at least 2 items"):
        items[:4].split(0.2)


def test_the_fingerprint_is_that_of_the_content() -> None:
    items = PreferenceItems.load("formality")
    assert PreferenceItems(items.items, "other").fingerprint == items.fingerprint
    assert items[:50].fingerprint != items.fingerprint
    assert repr(items[:50]).startswith("PreferenceItems('formality/items_test', 50 items")
