"""Preference items: loading, checking, and the shipped ones."""

import json
import re
from pathlib import Path

import pytest

from steerlens.data.items import PreferenceItem, PreferenceItems
from steerlens.data.pairs import ContrastivePairs, Message, dataset_names
from steerlens.errors import InputError

GOOD = {"prompt": "The film was", "positive": " great.", "negative": " dull."}


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_items_from_jsonl(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hello"}]
    file = write(tmp_path / "items.jsonl", GOOD, {**GOOD, "prompt": chat, "id": "two"})
    first, second = PreferenceItems.from_jsonl(file)
    assert first == PreferenceItem("The film was", " great.", " dull.", "1")
    assert second.prompt == (Message("user", "Hello"),)
    assert second.id == "two"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "positive": "b"}, "keys prompt, positive, negative"),
        (["a"], "keys prompt"),
        ({**GOOD, "negative": " great."}, "positive and negative are equal"),
        ({**GOOD, "positive": ""}, "positive: expected text"),
        ({**GOOD, "prompt": 3}, "prompt: expected text or a list"),
        ({**GOOD, "id": "1"}, "id '1' occurs twice"),
    ],
)
def test_a_bad_item_is_named(tmp_path: Path, record: object, message: str) -> None:
    file = write(tmp_path / "items.jsonl", GOOD, record)
    with pytest.raises(InputError, match=message) as error:
        PreferenceItems.from_jsonl(file)
    assert "items.jsonl" in str(error.value)
    write(file, GOOD, {**GOOD, "positive": " good."})
    assert len(PreferenceItems.from_jsonl(file)) == 2


def test_fewer_than_two_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 2 items, got 1"):
        PreferenceItems.from_jsonl(write(tmp_path / "items.jsonl", GOOD))


def test_a_split_is_a_partition_that_the_seed_decides() -> None:
    items = PreferenceItems.load("sentiment")
    train, test = items.split(0.7, seed=1)
    assert (len(train), len(test)) == (30, 70)
    assert {i.id for i in train} | {i.id for i in test} == {i.id for i in items}
    assert items.split(0.7, seed=1)[1].fingerprint == test.fingerprint
    assert items.split(0.7, seed=2)[1].fingerprint != test.fingerprint
    with pytest.raises(InputError, match="at least 2 items"):
        items[:4].split(0.2)


def test_the_fingerprint_is_that_of_the_content() -> None:
    items = PreferenceItems.load("formality")
    assert PreferenceItems(items.items, "other").fingerprint == items.fingerprint
    assert items[:50].fingerprint != items.fingerprint
    assert repr(items[:50]).startswith("PreferenceItems('formality/items_test', 50 items")


@pytest.mark.parametrize("name", dataset_names())
def test_shipped_items(name: str) -> None:
    """100 held-out items and 40 to choose by; prompts of the pairs, without the persona."""
    train, test = (PreferenceItems.load(name, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (40, 100)
    assert not {item.prompt for item in train} & {item.prompt for item in test}
    texts = [text for item in (*train, *test) for text in (item.positive, item.negative)]
    assert len(set(texts)) == len(texts)
    for split, items in (("train", train), ("test", test)):
        prompts = {pair.positive[1:] for pair in ContrastivePairs.load(name, split=split)}
        for item in items:
            assert item.prompt in prompts, item.id
            words = [len(text.split()) for text in (item.positive, item.negative)]
            assert abs(words[0] - words[1]) <= 1, item.id
            for text in (item.positive, item.negative):
                assert re.fullmatch(r" [^\s].*[.?!]", text), item.id
                assert text.isascii(), item.id


def test_unknown_items_are_refused() -> None:
    with pytest.raises(InputError, match="no dataset 'sentimnt'"):
        PreferenceItems.load("sentimnt")
    with pytest.raises(InputError, match="not 'valid'"):
        PreferenceItems.load("sentiment", split="valid")
