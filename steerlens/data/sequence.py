"""What pairs and items share: a frozen list of entries with ids, read from records, and split."""

import hashlib
import json
import os
import re
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import numpy as np
import pandas as pd

from steerlens.data.entries import Card
from steerlens.data.forms import ALONE, Made
from steerlens.data.prompts import checked_prompt, checked_text, unicode_text
from steerlens.data.reading import is_table, read_rows
from steerlens.data.recognition import make, make_lists
from steerlens.data.shipped import SPLITS, dataset_names, shipped_file
from steerlens.errors import InputError, told
from steerlens.stats import UNEVEN, effective_groups
from steerlens.validation import Whole, checked

MIN_ENTRIES = 2
FEW_GROUPS = 10
"""Below so many, intervals and p-values are rough."""


def checked_index(value: Any, *, where: str) -> int:
    """A whole number, as a file may write it."""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?\d{1,9}", text):
        raise InputError(f"{where} must be a whole number (a token's index), got {told(value)}")
    return int(text)


def _checked_id(value: Any, *, where: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # it went through a column of floats
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise InputError(f"{where} must be text or a whole number, got {type(value).__name__}")
    return unicode_text(str(value), where=where)


_CHECKS: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(("prompt", "positive", "negative"), checked_prompt),
    **{"continuation": checked_text, "position": checked_index},
    **{"id": _checked_id, "group": _checked_id},
}
"""Part of an entry -> `(value, where=...) -> checked value`, or an `InputError` with `where`."""


Entry = TypeVar("Entry")
Self = TypeVar("Self", bound="EntrySequence[Any]")


@checked
class EntrySequence(Sequence[Entry]):
    """An immutable list of at least two entries with distinct ids, each of two sides that differ.

    A subclass is a frozen dataclass of the entries and `name`. Raises `InputError` on fewer
    entries, repeated ids, or an entry whose two sides are equal.
    """

    name: str
    card: Card | None
    """What became of the rows that were read, where these are all of them."""
    unpaired: Any = None
    """Both lists whole, where what was read had no pairs."""
    _split: ClassVar[str]
    """The part of a dataset that is taken where none is named."""
    _stem: ClassVar[str]
    """The file of a shipped dataset that has them, with {} for the part."""
    _repeated: ClassVar[str]
    """What an entry shares with those that are its group where none is given."""
    _noun: ClassVar[str]
    """What the entries are called, and the field that holds them."""
    _entry: ClassVar[type[Any]]
    _records_of: ClassVar[Any]
    """What makes records of what a row says, with the fields of an entry as keys."""

    if TYPE_CHECKING:

        def __init__(self, entries: tuple[Entry, ...], name: str = ..., **more: Any) -> None: ...

    @property
    def _entries(self) -> tuple[Any, ...]:
        return tuple(getattr(self, self._noun))

    def __post_init__(self) -> None:
        if len(self) < MIN_ENTRIES:
            raise InputError(
                f"{self.name}: expected at least {MIN_ENTRIES} {self._noun}, got {len(self)}; "
                "an uncertainty needs more than one"
            )
        seen: set[str] = set()
        for entry in self._entries:
            self._check_sides(entry, where=f"{self.name}: {self._noun[:-1]} {entry.id!r}")
            if entry.id in seen:
                raise InputError(
                    f"{self.name}: id {entry.id!r} occurs twice; ids must be distinct; "
                    "if it is of a group: --columns group=id"
                )
            seen.add(entry.id)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self: Self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self._part(self._entries[index], self.name)
        return self._entries[index]

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"{kind}({self.name!r}, {len(self)} {self._noun}, {self.fingerprint[:12]})"

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the content in order; the name is not part of it."""
        content: list[Any] = [
            [entry.id, *self._content(entry), *([] if entry.group is None else [entry.group])]
            for entry in self._entries
        ]
        content += [list(self.unpaired)] if self.unpaired is not None else []
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()

    @property
    def groups(self) -> tuple[int, ...]:
        """The number of each entry's group, in the order in which groups are met.

        An entry without a group is one of its own, with those that repeat it. One that repeats all
        of an earlier entry but its id is of that one's group, whatever group it is given.

        Examples:
            >>> pairs.groups
            (0, 1, 2, 3, 4, 5, 6, 7)
        """
        first: dict[Any, tuple[str, Any]] = {}
        keys = [
            first.setdefault(
                self._content(entry),
                ("alike", self._alike(entry)) if entry.group is None else ("group", entry.group),
            )
            for entry in self._entries
        ]
        numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        return tuple(numbers[key] for key in keys)

    def warn_of_groups(self) -> None:
        """Warn of repeats, of likeness that no group tells, of fewer or worse than 10 groups."""
        n, noun = len(self), self._noun
        n_groups, effective = len(set(self.groups)), effective_groups(self.groups)
        n_repeats = n - len({self._alike(entry) for entry in self._entries})
        has_groups = any(entry.group is not None for entry in self._entries)
        n_texts = len({self._auto_group(entry) for entry in self._entries})
        notes = []
        if n_repeats:
            notes.append(
                f"{n_repeats} of {n} {noun} repeat {self._repeated} of others; where no group is "
                "given they are of one group, so that they make no interval narrower"
            )
        if not has_groups and n_texts < n - n_repeats:
            notes.append(
                f"{n} {noun} without groups differ in {n_texts} texts only, so that some are "
                'alike; intervals and nulls go by these texts with group="auto" (--group auto)'
            )
        if self.unpaired is not None:
            notes.append(
                "two lists without pairs, taken in order: separation, agreement, explained "
                "variance and the intervals of projections depend on that order; mean projections, "
                "logprobs and boundaries do not, but leave out texts without a partner"
            )
        is_uneven = effective < min(FEW_GROUPS, UNEVEN * n_groups)
        if n_groups < FEW_GROUPS or is_uneven:
            as_good = f", so uneven that they are as good as {effective:.1f}," if is_uneven else ""
            notes.append(
                f"{n_groups} independent groups{as_good} of {noun}; intervals and p-values from "
                f"fewer than {FEW_GROUPS} are rough"
            )
        for text in notes:
            warnings.warn(f"{self.name}: {text}", UserWarning, stacklevel=3)

    @classmethod
    def load(
        cls: type[Self],
        source: Any,
        *,
        split: str | None = None,
        group: str = "group",
        columns: Mapping[str, str] | None = None,
        form: str | None = None,
        name: str | None = None,
    ) -> Self:
        """Entries from whatever they are in: a shipped dataset, a file, a frame, a dataset, a list.

        A file is JSONL, JSON, CSV, TSV, Parquet or text; a folder, or `OWNER/NAME`, a Hugging Face
        dataset; a list has dicts, or tuples of two prompts. Two lists or files in a tuple, or two
        files joined by a comma, are the two sides without pairs. `card` says what became of
        the rows.

        Args:
            source: One of `dataset_names()`, or one of the above.
            split: The part of a dataset that has parts. Default: `train` for pairs, `test` for
                items; those of a shipped one share neither topic nor wording.
            group: The column that holds the group, or "auto": pairs whose sides differ in the same
                text are one group, and so are items of one prompt.
            columns: What columns are for, where their names do not tell:
                `{"positive": "chosen", "negative": "rejected"}`.
            form: One of `FORMS`. Default: recognised by the columns.
            name: What messages and tables call them. Default: the file, or "pairs" or "items".

        Raises:
            InputError: Says which row cannot be used and why, or which columns came; a source that
                cannot be read, a part or a form that is not there.

        Examples:
            >>> films = [
            ...     {"positive": "A good film, as", "negative": "A bad film, as", "by": "Ann"},
            ...     {"positive": "A good meal, as", "negative": "A bad meal, as", "by": "Bob"},
            ... ]
            >>> sl.ContrastivePairs.load(films, group="by").groups
            (0, 1)
            >>> sl.ContrastivePairs.load(films, group="auto").groups
            (0, 0)
            >>> facts = [{"statement": "Ice is cold.", "label": 1, "topic": "ice"},
            ...          {"statement": "Ice is warm.", "label": 0, "topic": "ice"},
            ...          {"statement": "Fire is cold.", "label": 0, "topic": "fire"},
            ...          {"statement": "Fire is warm.", "label": 1, "topic": "fire"}]
            >>> print(sl.ContrastivePairs.load(facts).card)
            4 rows of the form labelled, 4 used; paired by topic
        """
        if group in {field.name for field in fields(cls._entry)} - {"group"}:
            raise InputError(f"{group!r} is another part of {cls._noun}, not their group")
        split, columns, called = split or cls._split, columns or {}, name or cls._noun
        is_shipped = isinstance(source, str) and source in dataset_names()
        if is_shipped:
            stem = cls._stem.format(split)
            source, called = shipped_file(source, stem, split), name or f"{source}/{stem}"
        if isinstance(source, str) and source.count(",") == 1 and not os.path.exists(source):
            source, called = tuple(source.split(",")), name or source
        sides = source if isinstance(source, tuple) and len(source) == 2 else ()
        if sides and all(map(_is_list, sides)):
            if form is not None or group not in ("group", "auto") or not {*columns} <= {"text"}:
                raise InputError(
                    f"{called}: two lists without pairs have texts alone, so leave out form and "
                    "group; columns may name the text: --columns text=COLUMN"
                )
            both = [read_rows(side, split=split, name=called) for side in sides]
            made = make_lists(both, columns)
        else:
            rows = read_rows(source, split=split, name=called)
            called = called if is_shipped or name else rows.name
            made = make(rows, form=form, columns=columns, group=group, needed=cls._needed())
        return cls._of_entries(made, called, group)

    @classmethod
    def _of_entries(cls: type[Self], made: Made, name: str, group: str) -> Self:
        """The entries that were made of rows, with the card; a warning where rows are left out."""
        left_out = Counter(made.left_out)
        found = []
        for entry in made.entries:
            records = cls._records_of(entry)
            if not records and made.form == "pairs":
                raise InputError(
                    f"{entry.where}: the form pairs without a prompt that both sides share; "
                    f"expected {', '.join(cls._needed())}; name the prompt: --columns prompt=COLUMN"
                )
            left_out["no answers after a prompt that both sides share"] += not records
            found += [cls._from_record(record, where=entry.where) for record in records]
        left_out = +left_out
        if made.entries and not found:
            raise InputError(
                f"{name}: the form {made.form} has no answers after a prompt that both sides "
                f"share, as {cls._noun} need; give {', '.join(cls._needed())}"
            )
        if group == "auto":
            found = [replace(entry, group=cls._auto_group(entry)) for entry in found]
        card = Card(
            *(made.form, made.n_rows, max(made.n_rows - left_out.total(), 0)),
            n_repeated=len(found) - len({cls._content(entry) for entry in found}),
            left_out=dict(left_out),
            not_used=made.not_used,
            how=made.how,
        )
        if {*left_out} - {ALONE}:
            warnings.warn(f"{name}: {card}", UserWarning, stacklevel=4)
        # Items are answers of one prompt, whatever order they were met in.
        has_lists = "unpaired" in getattr(cls, "__dataclass_fields__", {})
        more = {"unpaired": made.unpaired} if has_lists and made.unpaired is not None else {}
        return cls(tuple(found), name, card=card, **more)

    @classmethod
    def from_records(
        cls: type[Self],
        records: Iterable[Mapping[str, Any]],
        *,
        name: str | None = None,
        group: str = "group",
    ) -> Self:
        """`load` of records; goes with 0.3."""
        _warn_of_former("from_records")
        return cls.load(list(records), name=name, group=group)

    @classmethod
    def from_dataset(
        cls: type[Self], dataset: Any, *, name: str = "dataset", group: str = "group"
    ) -> Self:
        """`load` of a dataset; goes with 0.3."""
        _warn_of_former("from_dataset")
        return cls.load(dataset, name=name, group=group)

    @classmethod
    def from_jsonl(cls: type[Self], path: str | Path, *, group: str = "group") -> Self:
        """`load` of a file; goes with 0.3."""
        _warn_of_former("from_jsonl")
        return cls.load(Path(path), group=group)

    def split(self: Self, test_fraction: float | int, seed: Whole = 0) -> tuple[Self, Self]:
        """A random (train, test) partition, the same for the same seed; order is kept in each.

        A group stays together.

        Args:
            test_fraction: Of n groups, `round(test_fraction * n)` are in the test part.
            seed: A whole number from 0 on.

        Raises:
            InputError: A part would have fewer than two entries, or the seed is no whole number.

        Examples:
            >>> train, test = pairs.split(0.25)
            >>> len(train), len(test)
            (6, 2)
        """
        groups = self.groups
        n_groups = len(set(groups))
        n_test = round(test_fraction * n_groups) if 0 < test_fraction < 1 else 0
        order = np.random.default_rng(seed).permutation(n_groups)
        chosen = set(order[:n_test].tolist())
        parts = [
            tuple(
                entry
                for entry, group in zip(self._entries, groups, strict=True)
                if (group in chosen) == is_test
            )
            for is_test in (False, True)
        ]
        if min(map(len, parts)) < MIN_ENTRIES:
            raise InputError(
                f"{self.name}: test_fraction={test_fraction} of {n_groups} groups must leave at "
                f"least {MIN_ENTRIES} {self._noun} in each part"
            )
        train, test = (
            self._part(part, f"{self.name}[{split}]")
            for part, split in zip(parts, SPLITS, strict=True)
        )
        return train, test

    def _part(self: Self, entries: tuple[Any, ...], name: str) -> Self:
        """Some of the entries; what has no pairs has none in a part either."""
        sides = [tuple(getattr(e, side) for e in entries) for side in ("positive", "negative")]
        more = {} if self.unpaired is None else {"unpaired": tuple(sides)}
        return type(self)(entries, name, **more)

    @classmethod
    def _content(cls, entry: Any) -> tuple[Any, ...]:
        """All of an entry but its id and group."""
        names = [field.name for field in fields(cls._entry)]
        return tuple(getattr(entry, name) for name in names if name not in ("id", "group"))

    @classmethod
    @abstractmethod
    def _alike(cls, entry: Any) -> Any:
        """What makes two entries without a group one group."""

    @classmethod
    def _auto_group(cls, entry: Any) -> str:
        """The group that an entry is given by `group="auto"`."""
        return repr(cls._alike(entry))

    @staticmethod
    def _check_sides(entry: Any, *, where: str) -> None:
        if entry.positive == entry.negative:
            raise InputError(f"{where}: positive and negative are equal; they must differ")

    @classmethod
    def _needed(cls) -> tuple[str, ...]:
        """The parts that an entry has to have."""
        return tuple(field.name for field in fields(cls._entry) if field.default is MISSING)

    @classmethod
    def _from_record(cls, record: Mapping[str, Any], *, where: str) -> Entry:
        names = [field.name for field in fields(cls._entry) if field.name in record]
        checked_parts = {n: _CHECKS[n](record[n], where=f"{where}: {n}") for n in names}
        entry: Entry = cls._entry(**checked_parts)
        cls._check_sides(entry, where=where)
        return entry


def _is_list(source: Any) -> bool:
    """Whether it may be one side of two lists without pairs."""
    is_column = hasattr(source, "to_list") or is_table(source)
    return is_column or isinstance(source, str | os.PathLike | list)


def one_of_each_in_turn(groups: Sequence[int], most: int) -> list[int]:
    """At most so many rows, in their order: the first of each group, then the second, and so on.

    Examples:
        >>> one_of_each_in_turn([0, 0, 0, 1, 1, 2], 4)
        [0, 1, 3, 5]
    """
    turns = pd.Series(groups).groupby(list(groups)).cumcount().tolist()
    in_turn = sorted(range(len(groups)), key=lambda row: (turns[row], groups[row]))
    return sorted(in_turn[:most])


def _warn_of_former(name: str) -> None:
    text = f"{name} is now load, and goes with 0.3"
    warnings.warn(text, DeprecationWarning, stacklevel=4)
