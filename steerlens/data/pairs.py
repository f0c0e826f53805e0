"""Contrastive pairs: load, validate, split, and render with the chat template."""

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, overload, runtime_checkable

import numpy as np

from steerlens.errors import InputError, whole
from steerlens.files import read_whole, strict_json

REQUIRED_KEYS = ("positive", "negative")
OPTIONAL_KEYS = ("continuation", "id")
SPLITS = ("train", "test")
_LONGEST_TYPO = 20
MIN_PAIRS = 2


class Message(NamedTuple):
    """One turn of a chat.

    Examples:
        >>> sl.Message("user", "How was your day?").role
        'user'
    """

    role: str
    content: str


Prompt: TypeAlias = str | tuple[Message, ...]


@runtime_checkable
class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rendering needs."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


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


@dataclass(frozen=True)
class ContrastivePairs(Sequence[ContrastivePair]):
    """An immutable list of at least two contrastive pairs with distinct ids.

    Raises `InputError` on fewer than two pairs, repeated ids, or a pair of two equal prompts.

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

    def __post_init__(self) -> None:
        if len(self.pairs) < MIN_PAIRS:
            raise InputError(
                f"{self.name}: expected at least {MIN_PAIRS} contrastive pairs, got "
                f"{len(self.pairs)}; a direction and its uncertainty need more than one"
            )
        seen: set[str] = set()
        for pair in self.pairs:
            if pair.positive == pair.negative:
                raise InputError(
                    f"{self.name}: pair {pair.id!r} has equal positive and negative prompts; "
                    "their difference is zero, so remove it or make them differ"
                )
            if pair.id in seen:
                raise InputError(f"{self.name}: id {pair.id!r} occurs twice; ids must be distinct")
            seen.add(pair.id)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[ContrastivePair]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, index: int) -> ContrastivePair: ...
    @overload
    def __getitem__(self, index: slice) -> "ContrastivePairs": ...
    def __getitem__(self, index: int | slice) -> "ContrastivePair | ContrastivePairs":
        if isinstance(index, slice):
            return ContrastivePairs(self.pairs[index], self.name)
        return self.pairs[index]

    def __repr__(self) -> str:
        return f"ContrastivePairs({self.name!r}, {len(self)} pairs, {self.fingerprint[:12]})"

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the pairs' content in order; the name is not part of it."""
        return hashlib.sha256(
            json.dumps([_as_record(pair) for pair in self.pairs], ensure_ascii=False).encode()
        ).hexdigest()

    @classmethod
    def from_records(
        cls, records: Iterable[Mapping[str, Any]], *, name: str = "pairs"
    ) -> "ContrastivePairs":
        """Pairs from dicts with the keys of the JSONL format; see `from_jsonl`.

        Raises `InputError` that names the record (counted from 1) and what is wrong with it.
        """
        pairs = (
            _pair_from_record(record, default_id=str(i), where=f"{name}: record {i}")
            for i, record in enumerate(records, start=1)
        )
        return cls(tuple(pairs), name)

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

        Raises `InputError` when the lengths differ or an item cannot be a prompt.
        """
        columns = {"positive": positive, "negative": negative}
        if continuation is not None:
            columns["continuation"] = continuation
        lengths = {key: len(column) for key, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"{name}: expected lists of one length, got {lengths}")
        rows = zip(*columns.values(), strict=True)
        records = (dict(zip(columns, row, strict=True)) for row in rows)
        return cls.from_records(records, name=name)

    @classmethod
    def from_dataset(
        cls, dataset: Iterable[Mapping[str, Any]], *, name: str = "dataset"
    ) -> "ContrastivePairs":
        """Pairs from a `datasets.Dataset` (or any iterable of rows) with the JSONL keys as columns.

        An optional column may hold None. Raises `InputError` as `from_records` does.
        """
        return cls.from_records(
            (
                {k: v for k, v in row.items() if not (k in OPTIONAL_KEYS and v is None)}
                for row in dataset
            ),
            name=name,
        )

    @classmethod
    def from_jsonl(cls, path: str | Path) -> "ContrastivePairs":
        """Pairs from a UTF-8 JSONL file: one object a line, blank lines skipped.

        Keys: `positive` and `negative` (text, or a list of `{"role", "content"}` messages),
        optional `continuation` (text) and `id` (text or a whole number; default the line number).
        Other keys are ignored unless they look misspelt. Raises `InputError` with file and line.

        Examples:
            >>> lines = [
            ...     '{"positive": "I loved it because", "negative": "I hated it because"}',
            ...     '{"positive": "It was good, as", "negative": "It was bad, as", "id": "good"}',
            ... ]
            >>> size = (folder / "mine.jsonl").write_text("\\n".join(lines))
            >>> [pair.id for pair in sl.ContrastivePairs.from_jsonl(folder / "mine.jsonl")]
            ['1', 'good']
        """
        pairs = [
            _pair_from_record(record, default_id=str(number), where=where)
            for number, where, record in read_jsonl(Path(path))
        ]
        return cls(tuple(pairs), printable(Path(path)))

    @classmethod
    def load(cls, name: str, *, split: str = "train") -> "ContrastivePairs":
        """A dataset shipped with steerlens (`dataset_names()`); `split` is "train" or "test".

        Raises `InputError` on an unknown name or split.
        """
        if name not in dataset_names():
            raise InputError(_no_dataset(name))
        if split not in SPLITS:
            raise InputError(f"dataset {name!r} has the splits {', '.join(SPLITS)}, not {split!r}")
        loaded = cls.from_jsonl(shipped_folder() / name / f"{split}.jsonl")
        return cls(loaded.pairs, f"{name}/{split}")

    def split(
        self, test_fraction: float, seed: int = 0
    ) -> tuple["ContrastivePairs", "ContrastivePairs"]:
        """A random (train, test) partition, the same for the same seed; order is kept in each.

        The test part has `round(test_fraction * n)` pairs. Raises `InputError` unless both parts
        keep at least two pairs, and `InputError` on a seed that is no whole number from 0 on.

        Examples:
            >>> train, test = pairs.split(0.25)
            >>> len(train), len(test)
            (6, 2)
        """
        n_test = round(test_fraction * len(self)) if 0 < test_fraction < 1 else 0
        if min(n_test, len(self) - n_test) < MIN_PAIRS:
            raise InputError(
                f"{self.name}: test_fraction={test_fraction} of {len(self)} pairs must leave at "
                f"least {MIN_PAIRS} pairs in each part"
            )
        order = np.random.default_rng(whole("seed", seed, 0)).permutation(len(self))
        chosen = set(order[:n_test].tolist())
        train = tuple(pair for i, pair in enumerate(self.pairs) if i not in chosen)
        test = tuple(pair for i, pair in enumerate(self.pairs) if i in chosen)
        return ContrastivePairs(train, f"{self.name}[train]"), ContrastivePairs(
            test, f"{self.name}[test]"
        )


def read_jsonl(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Line number, where it is, and the object of every line of a UTF-8 JSONL file but blank ones.

    Raises `InputError` with file and line.
    """
    raw = read_whole(path, InputError, pipes=True)
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        where = f"{path}:{number}"
        if line.strip():
            yield number, where, _parse(line, where)


def _parse(line: bytes, where: str) -> Any:
    try:
        return strict_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text ({error.reason})") from error
    except ValueError as error:
        raise InputError(f"{where}: not a JSON object on one line ({error})") from error


def printable(path: Path) -> str:
    """A file's name as text: it may hold bytes that are none."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shipped_folder() -> Path:
    """The folder of shipped datasets: inside the installed package, or `data/` of a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "shipped"
    return installed if installed.is_dir() else package.parent / "data"


def dataset_names() -> tuple[str, ...]:
    """Names of the shipped pair datasets, sorted.

    Examples:
        >>> sl.dataset_names()
        ('formality', 'honesty', 'sentiment')
    """
    return tuple(sorted(path.parent.name for path in shipped_folder().glob("*/train.jsonl")))


def dataset_card(name: str) -> str:
    """The shipped dataset's card (Markdown). Raises `InputError` on an unknown name."""
    path = shipped_folder() / name / "card.md"
    if name not in (*dataset_names(), "neutral") or not path.is_file():
        raise InputError(_no_dataset(name))
    return path.read_text(encoding="utf-8")


def neutral_texts() -> tuple[str, ...]:
    """The shipped lines of neutral text, for measuring the side effects of steering.

    Examples:
        >>> len(sl.neutral_texts())
        200
    """
    text = (shipped_folder() / "neutral" / "neutral.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line.strip())


def read_texts(path: Path) -> tuple[str, ...]:
    """The lines of a text file, without empty ones.

    Raises `InputError` when the file cannot be read as UTF-8 text, or holds no text.
    """
    try:
        # Cut at line ends alone: splitlines knows others, which a line of text may hold.
        text = read_whole(path, InputError, pipes=True).decode("utf-8-sig")
        lines = text.replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read texts from {str(path)!r}: {error}") from error
    texts = tuple(line for line in lines if line.strip())
    if not texts:
        raise InputError(f"{str(path)!r} holds no text; give one text a line")
    return texts


def render(prompt: Prompt, tokenizer: ChatTokenizer) -> str:
    """The text of a prompt: as it is, or its messages through the tokenizer's chat template.

    A last assistant message is left open, to be continued; otherwise the template's assistant
    prefix is added. Raises `InputError` when messages meet a tokenizer without a chat template, or
    when the template rejects them.
    """
    if isinstance(prompt, str):
        return prompt
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            "the prompt is a list of chat messages but this model's tokenizer has no chat "
            "template; give plain text, or set tokenizer.chat_template"
        )
    is_open = prompt[-1].role == "assistant"
    try:
        return str(
            tokenizer.apply_chat_template(
                [message._asdict() for message in prompt],
                tokenize=False,
                continue_final_message=is_open,
                add_generation_prompt=not is_open,
            )
        )
    except Exception as error:  # jinja2 and transformers raise many types here
        roles = [message.role for message in prompt]
        hint = ""
        if "system" in roles:
            hint = "; if it takes no system turn, write that text into the user's turn"
        raise InputError(
            f"the chat template rejects the messages with roles {roles}: {error}{hint}"
        ) from error


def _no_dataset(name: str) -> str:
    return f"no dataset {name!r} is shipped; there are {', '.join(dataset_names())}"


def _as_record(pair: ContrastivePair) -> list[Any]:
    return [pair.id, pair.positive, pair.negative, pair.continuation]


def _pair_from_record(record: Any, *, default_id: str, where: str) -> ContrastivePair:
    if not isinstance(record, Mapping):
        raise InputError(f"{where}: expected an object with the keys positive and negative")
    for key in REQUIRED_KEYS:
        if key not in record:
            raise InputError(
                f"{where}: missing key {key!r}; expected positive, negative and optionally "
                f"continuation, id; got {', '.join(sorted(map(str, record)))[:200]}"
            )
    known = (*REQUIRED_KEYS, *OPTIONAL_KEYS)
    for key in record:
        if key in known or len(str(key)) > _LONGEST_TYPO:
            continue
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.8)
        if near:
            raise InputError(f"{where}: unknown key {key!r}; did you mean {near[0]!r}?")
    pair = ContrastivePair(
        positive=checked_prompt(record["positive"], where=f"{where}: positive"),
        negative=checked_prompt(record["negative"], where=f"{where}: negative"),
        continuation=_continuation(record.get("continuation"), where=where),
        id=checked_id(record.get("id"), default_id, where=where),
    )
    if pair.positive == pair.negative:
        raise InputError(f"{where}: positive and negative prompts are equal; they must differ")
    return pair


def _continuation(value: Any, *, where: str) -> str | None:
    if value is None:
        return None
    return checked_text(value, where=f"{where}: continuation")


def checked_id(value: Any, default: str, *, where: str) -> str:
    """An id as text, `default` for None. Raises `InputError` unless text or a whole number."""
    if value is None:
        return default
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise InputError(f"{where}: id must be text or a whole number, got {type(value).__name__}")
    return unicode_text(str(value), where=f"{where}: id")


def checked_prompt(value: Any, *, where: str) -> Prompt:
    """Text, or a list of messages, as a prompt. Raises `InputError` on anything else."""
    if isinstance(value, str):
        return checked_text(value, where=where)
    if isinstance(value, Sequence) and not isinstance(value, bytes) and value:
        return tuple(
            _message(message, where=f"{where}, message {i}") for i, message in enumerate(value, 1)
        )
    raise InputError(
        f'{where}: expected text or a list of {{"role", "content"}} messages, '
        f"got {type(value).__name__}{' (empty)' if value in ([], ()) else ''}"
    )


def _message(value: Any, *, where: str) -> Message:
    if isinstance(value, Message):
        return value
    if not isinstance(value, Mapping) or not {"role", "content"} <= value.keys():
        raise InputError(f"{where}: expected an object with the keys role and content")
    role, content = value["role"], value["content"]
    if not isinstance(role, str) or not isinstance(content, str):
        raise InputError(f"{where}: role and content must be text")
    return Message(unicode_text(role, where=where), unicode_text(content, where=where))


def checked_text(value: Any, *, where: str) -> str:
    """Text that is not empty and is UTF-8. Raises `InputError` on anything else."""
    if not isinstance(value, str) or not value:
        got = "empty text" if value == "" else type(value).__name__
        raise InputError(f"{where}: expected text that is not empty, got {got}")
    return unicode_text(value, where=where)


def unicode_text(value: str, *, where: str) -> str:
    """The text. Raises `InputError` on half a surrogate pair, which is no character."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds a lone surrogate, which no tokenizer can read") from error
    return value
