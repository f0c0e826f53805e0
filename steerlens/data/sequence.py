"""What pairs and items share: a frozen list of entries with ids, read from records, and split."""

import difflib
import hashlib
import json
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import numpy as np

from steerlens.data.prompts import unicode_text
from steerlens.data.reading import printable, read_jsonl
from steerlens.data.shipped import SPLITS, shipped_file
from steerlens.errors import InputError
from steerlens.validation import Whole, checked

MIN_ENTRIES = 2
FEW_GROUPS = 10
"""Below so many, intervals and p-values are rough."""
_LONGEST_TYPO = 20

Check = Callable[..., Any]
"""`(value, where=...) -> checked value`; raises `InputError` that begins with `where`."""


Entry = TypeVar("Entry")
Self = TypeVar("Self", bound="EntrySequence[Any]")


@checked
class EntrySequence(Sequence[Entry]):
    """An immutable list of at least two entries with distinct ids, each of two sides that differ.

    A subclass is a frozen dataclass of the entries and `name`. Raises `InputError` on fewer
    entries, repeated ids, or an entry whose two sides are equal.
    """

    name: str
    _repeated: ClassVar[str]
    """What an entry shares with those that are its group where none is given."""
    _noun: ClassVar[str]
    """What the entries are called, and the field that holds them."""
    _entry: ClassVar[type[Any]]
    _required: ClassVar[Mapping[str, Check]]
    """The keys of a record, each with its check."""
    _optional: ClassVar[Mapping[str, Check]]

    if TYPE_CHECKING:

        def __init__(self, entries: tuple[Entry, ...], name: str = ...) -> None: ...

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
                raise InputError(f"{self.name}: id {entry.id!r} occurs twice; ids must be distinct")
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
            return type(self)(self._entries[index], self.name)
        return self._entries[index]

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"{kind}({self.name!r}, {len(self)} {self._noun}, {self.fingerprint[:12]})"

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the content in order; the name is not part of it."""
        content = [
            [entry.id, *self._content(entry), *([] if entry.group is None else [entry.group])]
            for entry in self._entries
        ]
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
        """Warn of repeated entries, of likeness that no group tells, of fewer than 10 groups."""
        n, noun = len(self), self._noun
        n_groups = len(set(self.groups))
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
        if n_groups < FEW_GROUPS:
            notes.append(
                f"{n_groups} independent groups of {noun}; intervals and p-values from fewer than "
                f"{FEW_GROUPS} are rough"
            )
        for text in notes:
            warnings.warn(f"{self.name}: {text}", UserWarning, stacklevel=3)

    @classmethod
    def from_records(
        cls: type[Self],
        records: Iterable[Mapping[str, Any]],
        *,
        name: str | None = None,
        group: str = "group",
    ) -> Self:
        """Entries from dicts with the keys of the JSONL format; see the class.

        Args:
            records: One an entry; an optional key may be absent or None.
            name: What messages and tables call them; default "pairs" or "items".
            group: The key that holds the group, or "auto": pairs whose sides differ in the same
                text are one group, and so are items of one prompt.

        Raises:
            InputError: Says which record (counted from 1) cannot be used, and why.

        Examples:
            >>> films = [
            ...     {"positive": "A good film, as", "negative": "A bad film, as", "by": "Ann"},
            ...     {"positive": "A good meal, as", "negative": "A bad meal, as", "by": "Bob"},
            ... ]
            >>> sl.ContrastivePairs.from_records(films, group="by").groups
            (0, 1)
            >>> sl.ContrastivePairs.from_records(films, group="auto").groups
            (0, 0)
        """
        name = cls._noun if name is None else name
        read = ((f"{name}: record {i}", str(i), record) for i, record in enumerate(records, 1))
        return cls._of_records(read, name, group)

    @classmethod
    def _of_records(
        cls: type[Self], records: Iterable[tuple[str, str, Any]], name: str, group: str
    ) -> Self:
        """Entries from records, each with where it is and its default id."""
        if group in (*cls._required, *cls._optional, "id"):
            raise InputError(f"{name}: {group!r} is another part of {cls._noun}, not their group")
        entries = [
            cls._from_record(record, group=group, default_id=default_id, where=where)
            for where, default_id, record in records
        ]
        if group == "auto":
            entries = [replace(entry, group=cls._auto_group(entry)) for entry in entries]
        return cls(tuple(entries), name)

    @classmethod
    def from_jsonl(cls: type[Self], path: str | Path, *, group: str = "group") -> Self:
        """Entries from a UTF-8 JSONL file: one object a line, blank lines skipped.

        Args:
            path: The file, or a pipe; its lines have the keys that the class tells. The default
                id is the line number.
            group: As of `from_records`.

        Raises:
            InputError: Says which line of the file cannot be used, and why.

        Examples:
            >>> lines = [
            ...     '{"positive": "I loved it because", "negative": "I hated it because"}',
            ...     '{"positive": "It was good, as", "negative": "It was bad, as", "id": "good"}',
            ... ]
            >>> size = (folder / "mine.jsonl").write_text("\\n".join(lines))
            >>> [pair.id for pair in sl.ContrastivePairs.from_jsonl(folder / "mine.jsonl")]
            ['1', 'good']
        """
        read = ((where, str(number), record) for number, where, record in read_jsonl(Path(path)))
        return cls._of_records(read, printable(Path(path)), group)

    @classmethod
    def _load(cls: type[Self], name: str, split: str, stem: str, group: str) -> Self:
        entries = cls.from_jsonl(shipped_file(name, stem, split), group=group)
        return cls(tuple(entries), f"{name}/{stem}")

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
            type(self)(part, f"{self.name}[{split}]")
            for part, split in zip(parts, SPLITS, strict=True)
        )
        return train, test

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
    def _from_record(cls, record: Any, *, group: str, default_id: str, where: str) -> Entry:
        keys = f"the keys {', '.join(cls._required)}"
        if not isinstance(record, Mapping):
            raise InputError(f"{where}: expected an object with {keys}")
        optional = {**cls._optional, "id": _checked_id}
        if group != "auto":
            optional[group] = _checked_id
        needed = [*cls._required, *([] if group in ("auto", "group") else [group])]
        for key in needed:
            if key not in record:
                raise InputError(
                    f"{where}: missing key {key!r}; expected {keys} and optionally "
                    f"{', '.join(optional)}; got {', '.join(sorted(map(str, record)))[:200]}"
                )
        checks = {**cls._required, **optional}
        for key in record:
            if key in checks or len(str(key)) > _LONGEST_TYPO:
                continue
            near = difflib.get_close_matches(str(key), checks, n=1, cutoff=0.8)
            if near:
                raise InputError(f"{where}: unknown key {key!r}; did you mean {near[0]!r}?")
        values = {
            key: check(record[key], where=f"{where}: {key}")
            for key, check in checks.items()
            if key in cls._required or record.get(key) is not None
        }
        if group in values:
            values["group"] = values.pop(group)
        entry: Entry = cls._entry(**{"id": default_id, **values})
        cls._check_sides(entry, where=where)
        return entry


def _checked_id(value: Any, *, where: str) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise InputError(f"{where} must be text or a whole number, got {type(value).__name__}")
    return unicode_text(str(value), where=where)
