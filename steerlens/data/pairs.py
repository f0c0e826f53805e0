"""Contrastive pairs: a positive and a negative prompt that differ in one concept."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from steerlens.data.prompts import (
    Prompt,
    checked_prompt,
    checked_text,
)
from steerlens.data.sequence import EntrySequence
from steerlens.errors import InputError


@dataclass(frozen=True)
class ContrastivePair:
    """A positive and a negative prompt that differ in one concept.

    A prompt is text, or a tuple of chat messages that the model's tokenizer renders. `continuation`
    is text that follows the positive prompt; where it is given, its tokens are the labels whose
    log-probability is measured.

    Examples:
        >>> pair = sl.ContrastivePair("You are kind.", "You are rude.", continuation="Hello!")
        >>> pair.continuation
        'Hello!'
    """

    positive: Prompt
    negative: Prompt
    continuation: str | None = None
    id: str = ""


@dataclass(frozen=True, repr=False)
class ContrastivePairs(EntrySequence[ContrastivePair]):
    """An immutable list of at least two contrastive pairs with distinct ids.

    In a record or a line of JSONL: `positive` and `negative` (text, or a list of `{"role",
    "content"}` messages), optional `continuation` (text) and `id` (text or a whole number). Other
    keys are ignored unless they look misspelt.

    Args:
        pairs: The pairs, in order.
        name: What messages and tables call them.

    Raises:
        InputError: Fewer than two pairs, repeated ids, or a pair of two equal prompts.

    Examples:
        >>> sl.ContrastivePairs.from_lists(
        ...     ["I loved it because", "It was good, as"], ["I hated it because", "It was bad, as"]
        ... )
        ContrastivePairs('pairs', 2 pairs, ...)
        >>> held_out = sl.ContrastivePairs.load("sentiment", split="test")
        >>> len(held_out), len(held_out[:8])
        (100, 8)
    """

    pairs: tuple[ContrastivePair, ...]
    name: str = "pairs"

    _noun: ClassVar = "pairs"
    _entry: ClassVar = ContrastivePair
    _required: ClassVar = {"positive": checked_prompt, "negative": checked_prompt}
    _optional: ClassVar = {"continuation": checked_text}
    _split_by: ClassVar = ("id", "pairs")

    @classmethod
    def from_lists(
        cls,
        positive: Sequence[str | Sequence[Mapping[str, str]]],
        negative: Sequence[str | Sequence[Mapping[str, str]]],
        continuation: Sequence[str] | None = None,
        *,
        name: str = "pairs",
    ) -> "ContrastivePairs":
        """Pairs from lists of equal length: texts, or lists of `{"role", "content"}` messages.

        Args:
            positive: A prompt a pair.
            negative: A prompt a pair.
            continuation: A text a pair, after the positive prompt; default none.
            name: What messages and tables call them.

        Raises:
            InputError: The lengths differ, or an item cannot be a prompt.
        """
        columns = {"positive": positive, "negative": negative}
        if continuation is not None:
            columns["continuation"] = continuation
        lengths = {key: len(column) for key, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"{name}: expected lists of one length, got {lengths}")
        rows = zip(*columns.values(), strict=True)
        return cls.from_records((dict(zip(columns, row, strict=True)) for row in rows), name=name)

    @classmethod
    def from_dataset(
        cls, dataset: Iterable[Mapping[str, Any]], *, name: str = "dataset"
    ) -> "ContrastivePairs":
        """Pairs from a `datasets.Dataset` (or any iterable of rows) with the JSONL keys as columns.

        Args:
            dataset: An optional column may hold None.
            name: What messages and tables call them.

        Raises:
            InputError: As `from_records`.
        """
        return cls.from_records(dataset, name=name)

    @classmethod
    def load(cls, name: str, *, split: str = "train") -> "ContrastivePairs":
        """A dataset shipped with steerlens.

        Args:
            name: One of `dataset_names()`.
            split: "train" or "test", which share neither topic nor wording.

        Raises:
            InputError: The name or split is unknown.
        """
        return cls._load(name, split, split)
