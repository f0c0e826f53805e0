"""Preference items: a prompt with two continuations, one for each side of a concept."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar

from steerlens.data.entries import Card, item_records
from steerlens.data.prompts import Prompt, distinctive, texts_of
from steerlens.data.sequence import EntrySequence
from steerlens.validation import checked


@checked
@dataclass(frozen=True)
class PreferenceItem:
    """A prompt without a persona, and the continuations that the positive and negative side prefer.

    Steering towards the positive side should raise logprob(positive) - logprob(negative). `group`
    names what items share that makes them alike, a subject or a template.

    Examples:
        >>> item = sl.PreferenceItem("The film was", positive=" a joy.", negative=" a bore.")
        >>> item.positive
        ' a joy.'
    """

    prompt: Prompt
    positive: str
    negative: str
    id: str = ""
    group: str | None = None


@checked
@dataclass(frozen=True, repr=False)
class PreferenceItems(EntrySequence[PreferenceItem]):
    """An immutable list of at least two items with distinct ids.

    A record has `prompt` (text, or a list of `{"role", "content"}` messages), `positive` and
    `negative` (the two continuations, text), optionally `group` and `id` (text or a whole number);
    `load` takes the published forms that have answers too, and where these are letters of choices,
    each question a second time with its choices exchanged (`ID-exchanged`, of one group). Items of
    one prompt are one group where none is given.

    Args:
        items: The items, in order.
        name: What messages and tables call them.
        card: What became of the rows that they were read from; none after split or slicing.

    Raises:
        InputError: Fewer than two items, repeated ids, or two equal continuations.

    Examples:
        >>> sl.PreferenceItems.load("sentiment", split="train")
        PreferenceItems('sentiment/items_train', 80 items, ...)
        >>> train, test = items.split(0.5)
        >>> len(train), len(test)
        (3, 3)
    """

    items: tuple[PreferenceItem, ...]
    name: str = "items"
    card: Card | None = field(default=None, compare=False)

    _split: ClassVar = "test"
    _stem: ClassVar = "items_{}"
    _noun: ClassVar = "items"
    _repeated: ClassVar = "the prompt"
    _entry: ClassVar = PreferenceItem
    _records_of: ClassVar = staticmethod(item_records)

    def count_sharing(self, texts: Collection[str]) -> int:
        """How many of these items have one of the texts in their prompt (see `texts_of`)."""
        return sum(not texts_of(item.prompt).isdisjoint(texts) for item in self)

    @property
    def shared_texts(self) -> set[str]:
        """The texts of the prompts (see `texts_of`), but for those that all have."""
        return distinctive(texts_of(item.prompt) for item in self)

    @classmethod
    def _alike(cls, entry: PreferenceItem) -> Prompt:
        return entry.prompt
