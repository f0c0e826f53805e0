"""Contrastive pairs: a positive and a negative prompt that differ in one concept."""

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, ClassVar, Literal, TypeAlias

from steerlens.data.entries import Card, pair_records
from steerlens.data.prompts import Prompt, distinctive, texts_of
from steerlens.data.sequence import EntrySequence
from steerlens.data.shipped import dataset_names
from steerlens.errors import InputError
from steerlens.validation import checked


@checked
@dataclass(frozen=True)
class ContrastivePair:
    """A positive and a negative prompt that differ in one concept.

    A prompt is text, or a tuple of chat messages that the model's tokenizer renders. `continuation`
    is text that follows the positive prompt; where it is given, its tokens are the labels whose
    log-probability is measured. `group` names what pairs share that makes them alike beyond the
    concept, a persona wording or a template: pairs of one group are not independent. `position` is
    the token of each prompt that is read where positions are asked for as "pair" (see `Position`).

    Examples:
        >>> pair = sl.ContrastivePair("You are kind.", "You are rude.", continuation="Hello!")
        >>> pair.continuation
        'Hello!'
    """

    positive: Prompt
    negative: Prompt
    continuation: str | None = None
    id: str = ""
    group: str | None = None
    position: int | None = None


@checked
@dataclass(frozen=True, repr=False)
class ContrastivePairs(EntrySequence[ContrastivePair]):
    """An immutable list of at least two contrastive pairs with distinct ids.

    A record has `positive` and `negative` (text, or a list of `{"role", "content"}` messages),
    optionally `prompt` (what stands before both), `continuation` (text), `position` (a whole
    number: the token of each prompt that `position="pair"` reads, negative from its end), `group`
    and `id` (text or a whole number); `load` takes the published forms too.

    Args:
        pairs: The pairs, in order.
        name: What messages and tables call them.
        card: What became of the rows that they were read from; none after split or slicing.
        unpaired: Both lists whole, where what was read had no pairs: the mean difference is that of
            these. All that is measured takes the pairs, made in order.

    Raises:
        InputError: Fewer than two pairs, repeated ids, or a pair of two equal prompts.

    Examples:
        >>> sl.ContrastivePairs.from_lists(
        ...     ["I loved it because", "It was good, as"], ["I hated it because", "It was bad, as"]
        ... )
        ContrastivePairs('pairs', 2 pairs, ...)
        >>> held_out = sl.ContrastivePairs.load("sentiment", split="test")
        >>> len(held_out), len(set(held_out.groups))
        (160, 40)
    """

    pairs: tuple[ContrastivePair, ...]
    name: str = "pairs"
    card: Card | None = field(default=None, compare=False)
    unpaired: tuple[tuple[Prompt, ...], tuple[Prompt, ...]] | None = None

    _split: ClassVar = "train"
    _stem: ClassVar = "{}"
    _noun: ClassVar = "pairs"
    _repeated: ClassVar = "both prompts"
    _entry: ClassVar = ContrastivePair
    _records_of: ClassVar = staticmethod(pair_records)

    @classmethod
    def from_lists(
        cls,
        positive: Sequence[str | Sequence[Mapping[str, str]]],
        negative: Sequence[str | Sequence[Mapping[str, str]]],
        continuation: Sequence[str] | None = None,
        *,
        name: str = "pairs",
        group: Sequence[str | int | None] | Literal["auto"] | None = None,
    ) -> "ContrastivePairs":
        """Pairs from lists of equal length: texts, or lists of `{"role", "content"}` messages.

        Args:
            positive: A prompt a pair.
            negative: A prompt a pair.
            continuation: A text a pair, after the positive prompt; default none.
            name: What messages and tables call them.
            group: The group of each pair, or "auto" (see `load`); default none.

        Raises:
            InputError: The lengths differ, or an item cannot be a prompt.
        """
        columns: dict[str, Sequence[Any]] = {"positive": positive, "negative": negative}
        if continuation is not None:
            columns["continuation"] = continuation
        key = group if isinstance(group, str) else "group"
        if group is not None and not isinstance(group, str):
            columns["group"] = group
        lengths = {key: len(column) for key, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"{name}: expected lists of one length, got {lengths}")
        rows = zip(*columns.values(), strict=True)
        records = (dict(zip(columns, row, strict=True)) for row in rows)
        return cls.load(list(records), name=name, group=key)

    @property
    def prompt_hashes(self) -> tuple[str, ...]:
        """What tells each pair by its two prompts: 16 hex digits of their sha256.

        Its id, group and continuation and which side is which do not matter.

        Examples:
            >>> turned = sl.ContrastivePairs.from_lists(
            ...     [pair.negative for pair in pairs], [pair.positive for pair in pairs]
            ... )
            >>> turned.prompt_hashes == pairs.prompt_hashes
            True
        """
        sides = ([json.dumps(side) for side in (pair.positive, pair.negative)] for pair in self)
        return tuple(
            hashlib.sha256("\n".join(sorted(both)).encode()).hexdigest()[:16] for both in sides
        )

    def check_positions(self) -> None:
        """Raise `InputError` where some pair has no position of its own."""
        without = [pair.id for pair in self if pair.position is None]
        if without:
            raise InputError(
                f"{self.name}: the position 'pair' is each pair's own, and {len(without)} of "
                f"{len(self)} pairs have none, the first {without[0]!r}; give every record a "
                "whole number as position, or one position for all"
            )

    def check_paired(self, what: str) -> None:
        """Raise `InputError` where there are two lists without pairs; `what` is fitted from."""
        if self.unpaired is not None:
            raise InputError(
                f"{what} fitted from pairs, and {self.name} are two lists without any; take "
                "mean_diff, or say what belongs together: a record a pair, or a column (--group)"
            )

    def count_among(self, hashes: Collection[str]) -> int | None:
        """How many of these pairs have the two prompts of some others, given by `prompt_hashes`.

        None where there are none: what `Directions` were fitted on may not be known.
        """
        others = frozenset(hashes)
        return sum(one in others for one in self.prompt_hashes) if others else None

    def warn_of_fitted(self, hashes: Collection[str]) -> int | None:
        """`count_among` the pairs that were fitted on; a warning where any of these was."""
        n = self.count_among(hashes)
        if n:
            warnings.warn(
                f"{self.name}: {n} of {len(self)} measured pairs were fitted on too, so what is "
                "measured is in sample and likely looks better than on new pairs; measure on "
                "others (--test-pairs), or fit on a part of them (pairs.split)",
                UserWarning,
                stacklevel=3,
            )
        return n

    @classmethod
    def _content(cls, entry: ContrastivePair) -> tuple[Any, ...]:
        position = () if entry.position is None else (entry.position,)
        return (entry.positive, entry.negative, entry.continuation, *position)

    @classmethod
    def _alike(cls, entry: ContrastivePair) -> tuple[Prompt, Prompt]:
        return entry.positive, entry.negative

    @property
    def shared_texts(self) -> set[str]:
        """The texts of the prompts, personas too (see `texts_of`), but for those that all have.

        Where they are text, also the words before and those after what the sides differ in.
        """
        return distinctive(
            texts_of(side) | ({*_parts(pair)[1:]} if isinstance(side, str) else set())
            for pair in self
            for side in (pair.positive, pair.negative)
        )

    @classmethod
    def _auto_group(cls, entry: ContrastivePair) -> str:
        return _parts(entry)[0]


AnyPairs: TypeAlias = ContrastivePairs | Any
"""Pairs, or whatever `ContrastivePairs.load` reads: tuples, dicts, a frame, a file, a name."""


def as_pairs(source: AnyPairs, *, split: str = "train") -> ContrastivePairs:
    """The pairs, read if they are not there yet; of a shipped dataset that part."""
    if isinstance(source, ContrastivePairs):
        return source
    is_shipped = isinstance(source, str) and source in dataset_names()
    return ContrastivePairs.load(source, split=split if is_shipped else None)


def _parts(pair: ContrastivePair) -> tuple[str, str, str]:
    """What the two sides do not share, of messages or words, and both ends that they do."""
    positive, negative = pair.positive, pair.negative
    if isinstance(positive, str) or isinstance(negative, str):
        sides = [str(positive).split(), str(negative).split()]
    else:
        sides = [[f"{m.role}: {m.content}" for m in side] for side in (positive, negative)]
    ends = []
    for turn in (1, -1):  # turned round after each: both ends are cut, the order kept
        shared = takewhile(lambda words: words[0] == words[1], zip(*sides, strict=False))
        n_shared = len(list(shared))
        ends.append(" ".join(sides[0][:n_shared][::turn]))
        sides = [side[n_shared:][::-1] for side in sides]
    return " | ".join(" ".join(side) for side in sides), ends[0], ends[1]
