"""Scorers that ask the unsteered model: how likely it finds a text, alone or in a context."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from steerlens.data.pairs import ContrastivePairs
from steerlens.data.prompts import Message, Prompt
from steerlens.data.sequence import one_of_each_in_turn
from steerlens.engine.engine import Engine
from steerlens.engine.logprobs import continuation_logprobs
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_prompt
from steerlens.errors import InputError
from steerlens.measure.scorers.written import Written
from steerlens.models.hooked_model import HookedModel, context_length
from steerlens.validation import Count, checked

N_PAIRS, N_TURNS = 2, 16
"""Pairs after whose prompts `Concept` puts a text, and at most how many take turns."""


def mean_logprobs(
    model: HookedModel, prompts: Sequence[TokenizedPrompt], batch_size: int | None = None
) -> Float[np.ndarray, " prompt"]:
    """Mean log-probability of each prompt's continuation, nats per token; NaN where it is empty.

    Raises `InputError` where both are longer than the model's context, `ModelError` where the
    model rules a continuation out.
    """
    values = np.full(len(prompts), np.nan)
    rows = [row for row, prompt in enumerate(prompts) if prompt.continuation]
    if not rows:
        return values
    asked = [prompts[row] for row in rows]
    n_ctx, longest = context_length(model), max(asked, key=len)
    if n_ctx is not None and len(longest) > n_ctx:
        raise InputError(
            f"the {longest.where} has {len(longest)} tokens with the text after it, but the "
            f"model's context is {n_ctx}; score shorter texts"
        )
    values[rows] = continuation_logprobs(Engine(model, batch_size), asked).double().numpy()
    return values


@checked
@dataclass(frozen=True, eq=False)
class Logprob:
    """How likely the unsteered model finds a text after its prompt, nats per token, below 0.

    Of coherence by comparison with unsteered samples alone: what is lower than theirs is unusual,
    be it broken or new. Blind to loops: repeated text is likely. NaN where a text is empty.

    Args:
        model: Unsteered; call it outside `steer`.
        batch_size: Prompts in a pass; by default what the device can use.

    Examples:
        >>> from steerlens.measure.scorers import Logprob, Written
        >>> [value] = Logprob(model)([Written("the", "a river", (1, 4), (5, 6), ended=True)])
        >>> value < 0
        True
    """

    model: HookedModel
    batch_size: Count | None = None
    name: ClassVar[str] = "logprob"
    decided: ClassVar[tuple[str, ...]] = ()

    def __call__(self, texts: Sequence[Written]) -> list[float]:
        prompts = [text.tokenized() for text in texts]
        return [float(value) for value in mean_logprobs(self.model, prompts, self.batch_size)]


@checked
@dataclass(frozen=True, eq=False)
class Concept:
    """How much likelier a text is after the pairs' positive prompts than after their negative ones.

    `mean_i logprob(text | positive_i) - logprob(text | negative_i)`, nats per token, of the
    unsteered model. Of a chat the last turn is left out where the assistant has it, so that the
    text takes its place. Blind to whether the text answers its own prompt or is fluent, and to
    what the pairs' prompts do not bring about in the model; it is asked of the very model that was
    steered. NaN where a text is empty.

    All texts after one prompt are asked with the same pairs, most other prompts with others, so
    that a mean over prompts is about one over pairs too, and its interval holds what pairs differ
    by. A text alone is better scored with more pairs.

    Args:
        pairs: Better others than those the direction was fitted on.
        n_pairs: How many of the pairs a text is asked with (2): neighbours among 16, or `n_pairs`
            if that is more, one of each group in turn. The sum of the prompt's token ids says
            which. `model` and `batch_size` are as of `Logprob`.

    Raises:
        InputError: The two prompts of every pair are the same once the assistant's last turn is
            left out; as `tokenize_prompt`; when called, where prompt and text do not fit the
            model's context.

    Examples:
        >>> from steerlens.measure.scorers import Concept, Written
        >>> texts = [Written("the", "warm soup", (1, 4), (27, 25), ended=True)]
        >>> len(Concept(model, pairs, n_pairs=2)(texts))
        1
    """

    model: HookedModel
    pairs: ContrastivePairs
    n_pairs: Count = N_PAIRS
    batch_size: Count | None = None
    name: ClassVar[str] = "concept"

    @property
    def decided(self) -> tuple[str | int, ...]:
        """What decides its numbers besides texts and model."""
        return self.pairs.fingerprint, self.n_pairs, N_TURNS

    def __post_init__(self) -> None:
        _ = self._sides  # what cannot be used is refused now

    @cached_property
    def _sides(self) -> list[list[TokenizedPrompt]]:
        """Positive and negative prompts that a text is put after."""
        both = [(_without_answer(p.positive), _without_answer(p.negative)) for p in self.pairs]
        rows = [row for row, (positive, negative) in enumerate(both) if positive != negative]
        if not rows:
            raise InputError(
                f"the two prompts of every pair of {self.pairs.name} are the same but for what the "
                "assistant says last, so a text cannot be put in its place; take pairs that "
                "differ in what is said before"
            )
        groups = [self.pairs.groups[row] for row in rows]
        chosen = one_of_each_in_turn(groups, max(self.n_pairs, N_TURNS))
        return [
            [
                tokenize_prompt(self.model, prompt, where=f"{side} prompt of pair {pair.id!r}")
                for pair, prompt in ((self.pairs[rows[i]], both[rows[i]][k]) for i in chosen)
            ]
            for k, side in enumerate(("positive", "negative"))
        ]

    def __call__(self, texts: Sequence[Written]) -> list[float]:
        n_turns = len(self._sides[0])
        n_pairs = min(self.n_pairs, n_turns)
        followed = [
            replace(side[(sum(text.prompt_ids) + i) % n_turns], continuation=text.ids)
            for side in self._sides
            for text in texts
            for i in range(n_pairs)
        ]
        values = mean_logprobs(self.model, followed, self.batch_size)
        positive, negative = values.reshape(2, len(texts), n_pairs)
        return [float(value) for value in (positive - negative).mean(axis=1)]


@checked
@dataclass(frozen=True, eq=False)
class Description:
    """Which of two descriptions of a text the unsteered model would rather give.

    `logprob(positive) - logprob(negative)`, nats per token, after a short question that holds the
    text. Which description is likelier of any text is part of it: compare with unsteered samples.
    Blind to what the model cannot put into words; small models hardly read what they are asked of.
    NaN where a text is empty.

    Args:
        positive: What a text with the concept is, such as "cheerful and warm".
        negative: What one with its opposite is; `model` and `batch_size` as of `Logprob`.

    Raises:
        InputError: As `Choice`.

    Examples:
        >>> from steerlens.measure.scorers import Description, Written
        >>> texts = [Written("the", "warm soup", (1, 4), (27, 25), ended=True)]
        >>> len(Description(model, "cheerful", "gloomy")(texts))
        1
    """

    model: HookedModel
    positive: str
    negative: str
    batch_size: Count | None = None
    name: ClassVar[str] = "description"

    @property
    def decided(self) -> tuple[str, str]:
        """What decides its numbers besides texts and model."""
        return self.positive, self.negative

    def __call__(self, texts: Sequence[Written]) -> list[float]:
        answers = (self.positive, self.negative)
        asked = [("Describe its tone in a few words.", answers)]
        return _answered(self.model, asked, texts, self.batch_size)


@checked
@dataclass(frozen=True, eq=False)
class Choice:
    """Which of two answers about a text the unsteered model chooses; the logits' difference, nats.

    The first option's answer minus the second's, the mean over both orders of the options, so that
    a liking for a letter or a place cancels where it is the same for both. Blind to what the model
    cannot judge; small models hardly read what they are asked of. NaN where a text is empty.

    Args:
        question: About the text, such as "Is the text cheerful?".
        options: Two answers, the one for the concept first ("yes", "no").
        letters: The options are listed as A and B and answered by letter; else by themselves, which
            should be a word each.
        name: What tables call it; `model` and `batch_size` as of `Logprob`.

    Raises:
        InputError: When called, where both answers have the same tokens; as `tokenize_prompt`.

    Examples:
        >>> from steerlens.measure.scorers import Choice, Written
        >>> texts = [Written("the", "warm soup", (1, 4), (27, 25), ended=True)]
        >>> len(Choice(model, "how was it ?", ("warm", "cold"))(texts))
        1
    """

    model: HookedModel
    question: str
    options: tuple[str, str] = ("yes", "no")
    letters: bool = False
    name: str = "choice"
    batch_size: Count | None = None

    @property
    def decided(self) -> tuple[str | bool, ...]:
        """What decides its numbers besides texts and model."""
        return self.question, *self.options, self.letters

    def __call__(self, texts: Sequence[Written]) -> list[float]:
        questions = [self._asked(order) for order in ((0, 1), (1, 0))]
        return _answered(self.model, questions, texts, self.batch_size)

    def _asked(self, order: tuple[int, int]) -> tuple[str, tuple[str, str]]:
        """The question with its options in an order, and the answers of the first and second."""
        first, second = (self.options[i] for i in order)
        if not self.letters:
            return f"{self.question} Answer {first} or {second}.", self.options
        asked = f"{self.question}\nA. {first}\nB. {second}\nAnswer A or B."
        return asked, ("AB"[order.index(0)], "AB"[order.index(1)])


def _answered(
    model: HookedModel,
    questions: Sequence[tuple[str, tuple[str, str]]],
    texts: Sequence[Written],
    batch_size: int | None,
) -> list[float]:
    """Logprob of the first of two answers to a question about each text, minus the second's.

    The mean over questions.
    """
    rows = [row for row, text in enumerate(texts) if text.ids]
    prompts = [
        _answer_to(model, f"Here is a text.\n\n{texts[row].text.strip()}\n\n{question}", answer)
        for question, answers in questions
        for answer in answers
        for row in rows
    ]
    for one, other in zip(prompts[:1], prompts[len(rows) :], strict=False):
        if one.continuation == other.continuation:
            raise InputError(
                f"the answers {questions[0][1]} tokenise to the same ids, so that the model cannot "
                "prefer one; give others"
            )
    found = mean_logprobs(model, prompts, batch_size).reshape(len(questions), 2, len(rows))
    values = np.full(len(texts), np.nan)
    values[rows] = (found[:, 0] - found[:, 1]).mean(axis=0)
    by_text: list[float] = values.tolist()
    return by_text


def _answer_to(model: HookedModel, question: str, answer: str) -> TokenizedPrompt:
    """A question and its answer: a turn of a chat each where the model has a template."""
    where = "question about a text"
    if getattr(model.tokenizer, "chat_template", None) is None:
        return tokenize_prompt(model, f"{question}\nAnswer:", f" {answer}", where=where)
    return tokenize_prompt(model, (Message("user", question),), answer, where=where)


def _without_answer(prompt: Prompt) -> Prompt:
    """A chat without the assistant's last turn."""
    is_said = isinstance(prompt, tuple) and len(prompt) > 1 and prompt[-1].role == "assistant"
    return prompt[:-1] if is_said else prompt
