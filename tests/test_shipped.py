"""The data that ship: no part knows another, their cards tell the truth; prompts of one's own."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from steerlens.data import (
    ContrastivePairs,
    Message,
    PreferenceItems,
    dataset_card,
    dataset_names,
    neutral_texts,
    open_questions,
    read_prompts,
)
from steerlens.errors import InputError


def test_shipped_names() -> None:
    assert dataset_names() == ("formality", "honesty", "sentiment")


@pytest.mark.parametrize("name", dataset_names())
def test_a_shipped_dataset_holds_out_its_test_part(name: str) -> None:
    """Nothing of a pair is in both parts, so a held-out effect is not a remembered line."""
    parts = [ContrastivePairs.load(name, split=split) for split in ("train", "test")]
    assert [part.name for part in parts] == [f"{name}/train", f"{name}/test"]
    seen: dict[str, list[set[Any]]] = {}
    for part in parts:
        assert len(part) == 160
        assert [part.groups.count(group) for group in range(40)] == [4] * 40
        by_group: dict[Any, set[Any]] = {}
        for pair in part:
            assert [m.role for m in pair.positive] == ["system", "user", "assistant"]
            assert pair.positive[1:] == pair.negative[1:]
            assert pair.positive[-1].content == pair.positive[-1].content.strip()
            by_group.setdefault(pair.group, set()).add((pair.positive[0], pair.negative[0]))
        # A group is a persona: two sentences that no other group has.
        personas = [side for sides in by_group.values() for pair_ in sides for side in pair_]
        assert len(personas) == len(set(personas)) == 80
        for kind, values in {
            "id": {pair.id for pair in part},
            "group": set(by_group),
            "persona": set(personas),
            "question": {pair.positive[1] for pair in part},
            "opening": {pair.positive[2] for pair in part},
        }.items():
            seen.setdefault(kind, []).append(values)
    assert {kind: train & test for kind, (train, test) in seen.items()} == {
        kind: set() for kind in seen
    }


@pytest.mark.parametrize("name", dataset_names())
def test_a_card_tells_the_true_counts(name: str) -> None:
    card = dataset_card(name)
    for split in ("train", "test"):
        assert f"{len(ContrastivePairs.load(name, split=split))} pairs" in card


def test_neutral_texts_are_200_distinct_lines() -> None:
    lines = neutral_texts()
    assert len(lines) == len(set(lines)) == 200
    assert all(line == line.strip() and line for line in lines)
    assert "200 distinct lines" in dataset_card("neutral")


def test_open_questions_are_two_halves_without_a_question_of_the_pairs() -> None:
    halves = [open_questions("choice"), open_questions("confirmation")]
    lines = [line for half in halves for line in half]
    assert [len(half) for half in halves] == [30, 30]
    assert len(set(lines)) == 60
    assert all(line == line.strip() and line.endswith("?") for line in lines)
    asked = {
        pair.positive[1].content  # type: ignore[union-attr]
        for name in dataset_names()
        for split in ("train", "test")
        for pair in ContrastivePairs.load(name, split=split)
    }
    assert "What was the staff briefing like?" in asked
    assert asked.isdisjoint(lines)
    assert "30 distinct questions" in dataset_card("questions")
    with pytest.raises(InputError, match="'choice' or 'confirmation'"):
        open_questions("test")  # type: ignore[arg-type]


def test_prompts_are_read_from_lines_and_rows(tmp_path: Path) -> None:
    lines, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("the river\n\n how was it ? \n")
    chat = [{"role": "user", "content": "how was it ?"}]
    records = [{"messages": chat, "group": 3}, {"prompt": "the river"}, {"prompt": chat}]
    rows.write_text("\n".join(map(json.dumps, records)))
    asked = (Message("user", "how was it ?"),)
    assert read_prompts(lines) == (("the river", None), (" how was it ? ", None))
    assert read_prompts(rows) == ((asked, "3"), ("the river", None), (asked, None))
    for record, told in [
        ({"text": "the"}, r"wrong.jsonl:1: expected messages or a prompt.*'text'"),
        ({"prompt": "the", "messages": chat}, "expected messages or a prompt"),
        ({"prompt": ""}, "expected text that is not empty"),
        ({"prompt": "the", "group": [1]}, "a group is text or a whole number"),
    ]:
        wrong = tmp_path / "wrong.jsonl"
        wrong.write_text(json.dumps(record))
        with pytest.raises(InputError, match=told):
            read_prompts(wrong)
    wrong.write_text("")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(wrong)


@pytest.mark.parametrize("name", ["sentimnt", "neutral", "", "../data/honesty"])
def test_what_is_not_shipped_is_refused_with_the_known_names(name: str) -> None:
    for load in (ContrastivePairs.load, PreferenceItems.load, dataset_card):
        if (load, name) != (dataset_card, "neutral"):
            with pytest.raises(InputError, match=r"formality, honesty, sentiment"):
                load(name)
    for kind in (ContrastivePairs, PreferenceItems):
        with pytest.raises(InputError, match="train, test, not 'valid'"):
            kind.load("honesty", split="valid")
    assert ContrastivePairs.load("sentiment") == ContrastivePairs.load("sentiment", split="train")
    assert PreferenceItems.load("sentiment") == PreferenceItems.load("sentiment", split="test")


@pytest.mark.parametrize("name", dataset_names())
def test_shipped_items(name: str) -> None:
    """100 held-out items and 80 to choose by, in groups, and with prompts that no pair has."""
    train, test = (PreferenceItems.load(name, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (80, 100)
    items = (*train, *test)
    assert all(item.group is not None for item in items)
    prompts = {
        pair.positive[1:]
        for split in ("train", "test")
        for pair in ContrastivePairs.load(name, split=split)
    }
    assert not {item.prompt for item in items} & prompts
    for texts in (
        [item.prompt for item in items],
        [text for item in items for text in (item.positive, item.negative)],
    ):
        assert len(set(texts)) == len(texts)
    for item in items:
        assert [m.role for m in item.prompt] == ["user", "assistant"], item.id
        words = [len(text.split()) for text in (item.positive, item.negative)]
        assert abs(words[0] - words[1]) <= 1, item.id
        for text in (item.positive, item.negative):
            assert re.fullmatch(r" [^\s].*[.?!]", text), item.id
            assert text.isascii(), item.id
