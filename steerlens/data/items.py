"""Preference items: a prompt with two continuations, one for each side of a concept."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from steerlens.data.pairs import (
    SPLITS,
    Prompt,
    checked_id,
    checked_prompt,
    checked_text,
    dataset_names,
    printable,
    read_jsonl,
    shipped_folder,
)
from steerlens.errors import InputError, whole

KEYS = ("prompt", "positive", "negative")
MIN_ITEMS = 2


@dataclass(frozen=True)
class PreferenceItem:
    """A prompt without a persona, and the continuations that the positive and negative side prefer.

    Steering towards the positive side should raise logprob(positive) - logprob(negative).

    Examples:
        >>> item = sl.PreferenceItem("The film was", positive=" a joy.", negative=" a bore.")
        >>> item.positive
        ' a joy.'
    """

    prompt: Prompt
    positive: str
    negative: str
    id: str = ""


@dataclass(frozen=True)
class PreferenceItems(Sequence[PreferenceItem]):
    """An immutable list of at least two items with distinct ids.

    Raises `InputError` on fewer, repeated ids, or an item whose two continuations are equal.

    Examples:
        >>> sl.PreferenceItems.load("sentiment", split="train")
        PreferenceItems('sentiment/items_train', 40 items, ...)
        >>> train, test = items.split(0.5)
        >>> len(train), len(test)
        (3, 3)
    """

    items: tuple[PreferenceItem, ...]
    name: str = "items"

    def __post_init__(self) -> None:
        if len(self.items) < MIN_ITEMS:
            raise InputError(
                f"{self.name}: expected at least {MIN_ITEMS} items, got {len(self.items)}; an "
                "effect and its uncertainty need more than one"
            )
        seen: set[str] = set()
        for item in self.items:
            if item.positive == item.negative:
                raise InputError(
                    f"{self.name}: item {item.id!r} has equal continuations; they must differ"
                )
            if item.id in seen:
                raise InputError(f"{self.name}: id {item.id!r} occurs twice; ids must be distinct")
            seen.add(item.id)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[PreferenceItem]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> PreferenceItem: ...
    @overload
    def __getitem__(self, index: slice) -> "PreferenceItems": ...
    def __getitem__(self, index: int | slice) -> "PreferenceItem | PreferenceItems":
        if isinstance(index, slice):
            return PreferenceItems(self.items[index], self.name)
        return self.items[index]

    def __repr__(self) -> str:
        return f"PreferenceItems({self.name!r}, {len(self)} items, {self.fingerprint[:12]})"

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the items' content in order; the name is not part of it."""
        content = [[item.id, item.prompt, item.positive, item.negative] for item in self.items]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()

    @classmethod
    def from_jsonl(cls, path: str | Path) -> "PreferenceItems":
        """Items from a UTF-8 JSONL file: one object a line, blank lines skipped.

        Keys: `prompt` (text, or a list of `{"role", "content"}` messages), `positive` and
        `negative` (the two continuations, text), optional `id`. Raises `InputError` with file and
        line.
        """
        items = [
            _item(record, default_id=str(number), where=where)
            for number, where, record in read_jsonl(Path(path))
        ]
        return cls(tuple(items), printable(Path(path)))

    @classmethod
    def load(cls, name: str, *, split: str = "test") -> "PreferenceItems":
        """The items of a shipped dataset; `split` is "train" or "test", which share no prompt.

        Raises `InputError` on an unknown name or split.
        """
        if name not in dataset_names():
            raise InputError(
                f"no dataset {name!r} is shipped; there are {', '.join(dataset_names())}"
            )
        if split not in SPLITS:
            raise InputError(f"dataset {name!r} has the splits {', '.join(SPLITS)}, not {split!r}")
        loaded = cls.from_jsonl(shipped_folder() / name / f"items_{split}.jsonl")
        return cls(loaded.items, f"{name}/items_{split}")

    def split(
        self, test_fraction: float, seed: int = 0
    ) -> tuple["PreferenceItems", "PreferenceItems"]:
        """A random (train, test) partition, the same for the same seed; order is kept in each.

        Items with the same prompt stay together. The test part has `round(test_fraction * n)` of
        the n prompts. Raises `InputError` unless both parts keep at least two items, and
        `InputError` on a seed that is no whole number from 0 on.
        """
        prompts = list(dict.fromkeys(item.prompt for item in self.items))
        n_test = round(test_fraction * len(prompts)) if 0 < test_fraction < 1 else 0
        order = np.random.default_rng(whole("seed", seed, 0)).permutation(len(prompts))
        chosen = {prompts[i] for i in order[:n_test]}
        parts = [
            tuple(item for item in self.items if (item.prompt in chosen) == is_test)
            for is_test in (False, True)
        ]
        if min(map(len, parts)) < MIN_ITEMS:
            raise InputError(
                f"{self.name}: test_fraction={test_fraction} of {len(prompts)} prompts must leave "
                f"at least {MIN_ITEMS} items in each part"
            )
        train, test = (
            PreferenceItems(part, f"{self.name}[{split}]")
            for part, split in zip(parts, SPLITS, strict=True)
        )
        return train, test


def _item(record: Any, *, default_id: str, where: str) -> PreferenceItem:
    if not isinstance(record, dict) or not set(KEYS) <= record.keys():
        raise InputError(f"{where}: expected an object with the keys {', '.join(KEYS)}")
    item = PreferenceItem(
        prompt=checked_prompt(record["prompt"], where=f"{where}: prompt"),
        positive=checked_text(record["positive"], where=f"{where}: positive"),
        negative=checked_text(record["negative"], where=f"{where}: negative"),
        id=checked_id(record.get("id"), default_id, where=where),
    )
    if item.positive == item.negative:
        raise InputError(f"{where}: the two continuations are equal; they must differ")
    return item
