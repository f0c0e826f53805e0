"""What a model wrote after a prompt, and what gives it a number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.validation import checked


@checked
@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt.

    Args:
        prompt: As the model saw it, rendered.
        text: What was written, without special tokens.
        prompt_ids: The prompt's token ids.
        ids: Those of the text, without the token that ends it.
        ended: Whether it ended by itself, rather than at the number of tokens allowed.

    Examples:
        >>> from steerlens.measure.scorers import Written
        >>> written = Written("the river was", "so cold", (1, 4, 6, 8), (24, 28), ended=True)
        >>> written.tokenized().label_tokens
        (4, 5)
    """

    prompt: str
    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    ended: bool

    def tokenized(self) -> TokenizedPrompt:
        """The prompt with the text as its continuation."""
        return TokenizedPrompt(self.prompt_ids, self.ids, f"prompt {self.prompt[:40]!r}")


@runtime_checkable
class Scorer(Protocol):
    """Texts with their prompts in, a number each out; NaN where it is undefined.

    Any function will do. Its name in tables is its `name`, else its `__name__`. With a list
    `decided`, of all that decides its numbers besides texts and model, they can be kept.
    """

    def __call__(self, texts: Sequence[Written], /) -> Sequence[float]: ...


def scorer_name(scorer: Scorer) -> str:
    """What tables call a scorer.

    Examples:
        >>> from steerlens.measure.scorers import Distinct, length, scorer_name
        >>> scorer_name(length), scorer_name(Distinct(2))
        ('length', 'distinct_2')
    """
    name = getattr(scorer, "name", None) or getattr(scorer, "__name__", None)
    return str(name or type(scorer).__name__)
