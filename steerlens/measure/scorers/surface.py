"""Scorers of the text as it stands, without a model: repetition, length, end, script, words."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from steerlens.data.reading import read_texts
from steerlens.errors import InputError, told
from steerlens.measure.scorers.written import Written
from steerlens.validation import Count, checked

_WORD = re.compile(r"\w+(?:['’-]\w+)*")  # noqa: RUF001 (the apostrophe that is typeset)


def length(texts: Sequence[Written]) -> list[float]:
    """Tokens of each text, without its end token.

    Blind to what they say; cut off at the number of tokens that were allowed (see `ended`).

    Examples:
        >>> from steerlens.measure.scorers import Written, length
        >>> length([Written("the", "a river", (1, 4), (5, 6), ended=True)])
        [2.0]
    """
    return [float(len(text.ids)) for text in texts]


def ended(texts: Sequence[Written]) -> list[float]:
    """1 where a text ended by itself, 0 where it was cut off; the mean is a share.

    Blind to why: a model that stops at once has ended too. Depends on how many tokens were allowed.

    Examples:
        >>> from steerlens.measure.scorers import Written, ended
        >>> ended([Written("the", "a river", (1, 4), (5, 6), ended=False)])
        [0.0]
    """
    return [float(text.ended) for text in texts]


@checked
@dataclass(frozen=True)
class Distinct:
    """The share of distinct n-grams of tokens, from above 0 to 1: low where a text repeats itself.

    Blind to sense: random tokens reach 1. Falls with length, so compare texts of one length. NaN
    where a text has fewer than n tokens.

    Args:
        n: Tokens of an n-gram (2).

    Examples:
        >>> from steerlens.measure.scorers import Distinct, Written
        >>> Distinct(2)([Written("the", "so so so warm", (1, 4), (7, 7, 7, 8), ended=True)])
        [0.67]
    """

    n: Count = 2

    @property
    def name(self) -> str:
        """`distinct_2`."""
        return f"distinct_{self.n}"

    def __call__(self, texts: Sequence[Written]) -> list[float]:
        grams = [_grams(text.ids, self.n) for text in texts]
        return [_share(len(set(of)), len(of)) for of in grams]


@checked
@dataclass(frozen=True)
class Repeated:
    """The share of tokens, 0 to 1, in n-grams that a text has more than once: high in a loop.

    Blind to repetition in other words, and to shorter repeats. NaN where a text has fewer than n
    tokens.

    Args:
        n: Tokens of an n-gram (4).

    Examples:
        >>> from steerlens.measure.scorers import Repeated, Written
        >>> Repeated(2)([Written("the", "a b c a b", (1, 4), (5, 6, 7, 5, 6), ended=True)])
        [0.8]
    """

    n: Count = 4

    @property
    def name(self) -> str:
        """`repeated_4`."""
        return f"repeated_{self.n}"

    def __call__(self, texts: Sequence[Written]) -> list[float]:
        return [self._share(text.ids) for text in texts]

    def _share(self, ids: Sequence[int]) -> float:
        grams = _grams(ids, self.n)
        times = Counter(grams)
        again = {i + k for i, gram in enumerate(grams) if times[gram] > 1 for k in range(self.n)}
        return _share(len(again), len(ids) if grams else 0)


def script(texts: Sequence[Written]) -> list[float]:
    """The share of letters, 0 to 1, in the script that most letters of the prompt are in.

    Blind to the language within a script: French after an English prompt is kept. Chinese and the
    scripts of Japanese count as one. What a chat template writes is part of the prompt, so that a
    very short question in another script may be outweighed. NaN without letters.

    Examples:
        >>> from steerlens.measure.scorers import Written, script
        >>> script([Written("the river", "cold река", (1, 4), (5, 6), ended=True)])
        [0.5]
    """
    shares = []
    for text in texts:
        asked, said = _scripts(text.prompt), _scripts(text.text)
        kept = said[asked.most_common(1)[0][0]] if asked else 0
        shares.append(_share(kept, said.total() if asked else 0))
    return shares


@checked
@dataclass(frozen=True)
class Words:
    """The share of a text's words, 0 to 1, that are in a list, case-folded.

    Blind to negation, irony and every word that is not listed. NaN without words.

    Args:
        words: Each one word, as the text has it: "glad" is not "gladly".
        name: What tables call it.

    Raises:
        InputError: There are no words, or an entry is not one word.

    Examples:
        >>> from steerlens.measure.scorers import Words, Written
        >>> Words(("warm", "kind"))([Written("the", "Warm soup", (1, 4), (5, 6), ended=True)])
        [0.5]
    """

    words: tuple[str, ...]
    name: str = "words"

    def __post_init__(self) -> None:
        odd = [word for word in self.words if not _WORD.fullmatch(word.strip())]
        if odd or not self.words:
            raise InputError(
                f"the list of words {self.name!r} holds {told(odd[0]) if odd else 'nothing'}; give "
                "one word a line, without spaces or punctuation"
            )

    @classmethod
    def read(cls, path: Path) -> "Words":
        """The words of a text file, one a line. Raises `InputError` where it cannot be read."""
        return cls(read_texts(path), f"words_{path.stem}")

    @cached_property
    def _listed(self) -> Collection[str]:
        return {word.strip().casefold() for word in self.words}

    def __call__(self, texts: Sequence[Written]) -> list[float]:
        said = [_WORD.findall(text.text.casefold()) for text in texts]
        return [_share(sum(word in self._listed for word in words), len(words)) for words in said]


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


_JAPANESE = ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")
_NO_SCRIPT = ("MODIFIER", "FEMININE", "MASCULINE")


def _scripts(text: str) -> Counter[str]:
    """How many letters are of each script, by the first word of their Unicode names."""
    letters = (c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c)[0] == "L")
    names = (unicodedata.name(letter, "UNNAMED").split()[0] for letter in letters)
    return Counter("CJK" if name in _JAPANESE else name for name in names if name not in _NO_SCRIPT)
