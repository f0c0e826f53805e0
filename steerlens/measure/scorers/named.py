"""Scorers by name, as the command line gives them."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from steerlens.data.pairs import ContrastivePairs
from steerlens.errors import InputError, told
from steerlens.measure.scorers.classifiers import Classifier, Probe
from steerlens.measure.scorers.endpoint import Endpoint
from steerlens.measure.scorers.judge import Judge
from steerlens.measure.scorers.likelihood import Choice, Concept, Description, Logprob
from steerlens.measure.scorers.surface import Distinct, Repeated, Words, ended, length, script
from steerlens.measure.scorers.written import Scorer, scorer_name
from steerlens.models.hooked_model import HookedModel
from steerlens.validation import Count, Whole, checked

SCORERS: Mapping[str, str] = {
    "logprob": "how likely the unsteered model finds the text, nats per token",
    "concept": "how much likelier after the pairs' positive prompts than after their negative ones",
    "distinct_N": "share of distinct n-grams of tokens, such as distinct_2",
    "repeated_N": "share of tokens in n-grams that come more than once, such as repeated_4",
    "length": "tokens",
    "ended": "1 where the text ended by itself",
    "script": "share of letters in the prompt's script",
    "probe": "a probe of the unsteered model's activations, fitted on the pairs",
    "description": "which of two descriptions of the text the unsteered model prefers",
    "choice": "which of two answers about the text the unsteered model chooses",
    "words=FILE": "share of words that are in a list, one a line",
    "classifier=ID:LABEL": "a text classifier's score of a label",
    "judge": "a chat model's rating of concept, instruction and fluency, 0 to 2",
}
"""Name -> what it measures. `N` is a whole number of 1 or more."""


_PAIRS = "pairs that differ in the concept"
_DESCRIPTIONS = "descriptions, of a text with the concept and of its opposite"
_QUESTION = "a question about the text, or descriptions"
_NEEDS = {
    **{"concept": _PAIRS, "probe": _PAIRS},
    **{"description": _DESCRIPTIONS, "judge": _DESCRIPTIONS, "choice": _QUESTION},
}
_PLAIN: Mapping[str, Scorer] = {"length": length, "ended": ended, "script": script}
_N_GRAM = re.compile(r"(distinct|repeated)_([1-9]\d{0,2})")


def check_scorers(
    names: Sequence[str],
    pairs: ContrastivePairs | None,
    descriptions: tuple[str, str] | None,
    question: str | None = None,
) -> None:
    """Raise `InputError` where there is no scorer of a name, or what it needs is not given.

    Nothing is loaded; the arguments are as of `scorers_of`.
    """
    given = {_PAIRS: pairs, _DESCRIPTIONS: descriptions, _QUESTION: question or descriptions}
    for name in names:
        kind, _, value = name.partition("=")
        is_of_file = {"words": bool(value), "classifier": all(value.rpartition(":"))}
        is_plain = name in ("logprob", *_NEEDS, *_PLAIN) or _N_GRAM.fullmatch(name)
        if not (is_plain or is_of_file.get(kind)):
            raise InputError(f"there is no scorer {told(name)}; there are {', '.join(SCORERS)}")
        if name in _NEEDS and given[_NEEDS[name]] is None:
            raise InputError(f"the scorer {name} needs {_NEEDS[name]}: give them, or leave it out")


@checked
def scorers_of(
    names: Sequence[str],
    model: HookedModel,
    pairs: ContrastivePairs | None,
    *,
    descriptions: tuple[str, str] | None = None,
    question: str | None = None,
    layer: Whole | None = None,
    endpoint: Endpoint | None = None,
    batch_size: Count | None = None,
) -> tuple[Scorer, ...]:
    """Scorers by their names (see `SCORERS`), in order.

    Args:
        names: Such as `["concept", "distinct_2", "words=glad.txt"]`.
        model: The unsteered model.
        pairs: For `concept` and `probe`; better others than the direction was fitted on. None where
            neither is asked for.
        descriptions: Of a text with the concept and of one with its opposite; `description` and
            `judge` need them, `choice` where there is no question.
        question: About a text, to be answered by yes (the concept) or no, for `choice`. By default
            it is asked which description is the better one, by letters.
        layer: That of `probe`. Default: two thirds of the model's depth.
        endpoint: That of `judge`; by default as the environment says.
        batch_size: Prompts in a pass; by default what the device can use.

    Raises:
        InputError: No such name, or twice the same, or what it needs is not given; and as the
            scorers.
        ModelError: A classifier cannot be loaded.

    Examples:
        >>> from steerlens.measure.scorers import scorer_name, scorers_of
        >>> scorers = scorers_of(["logprob", "distinct_2"], model, pairs)
        >>> [scorer_name(scorer) for scorer in scorers]
        ['logprob', 'distinct_2']
    """

    check_scorers(names, pairs, descriptions, question)

    def choice() -> Choice:
        if question is not None:
            return Choice(model, question, batch_size=batch_size)
        asked, options = "Which of these describes the text better?", descriptions or ("", "")
        return Choice(model, asked, options, letters=True, batch_size=batch_size)

    def scorer(given: str) -> Scorer:
        name, _, value = given.partition("=")
        n_gram = _N_GRAM.fullmatch(given)
        if n_gram:
            return (Distinct if n_gram[1] == "distinct" else Repeated)(int(n_gram[2]))
        if name == "words":
            return Words.read(Path(value))
        if name == "classifier":
            identifier, _, label = value.rpartition(":")
            return Classifier.load(identifier, label)
        if given in _PLAIN:
            return _PLAIN[given]
        if given == "logprob":
            return Logprob(model, batch_size)
        if given == "choice":
            return choice()
        if pairs is not None and given == "concept":
            return Concept(model, pairs, batch_size=batch_size)
        if pairs is not None and given == "probe":
            at = int(model.cfg.n_layers) * 2 // 3 if layer is None else layer
            return Probe(model, pairs, at, batch_size=batch_size)
        assert descriptions is not None
        if given == "description":
            return Description(model, *descriptions, batch_size=batch_size)
        return Judge(descriptions[0], endpoint or Endpoint())

    found = tuple(scorer(given) for given in names)
    repeated = [name for name, n in Counter(map(scorer_name, found)).items() if n > 1]
    if repeated:
        raise InputError(f"two scorers are called {repeated[0]!r}; leave one out, or rename a file")
    return found
