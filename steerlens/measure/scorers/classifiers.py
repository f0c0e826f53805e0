"""Scorers that were fitted beforehand: a probe of the model's own activations, a classifier."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from steerlens.data.pairs import ContrastivePairs
from steerlens.directions.differences import collect_differences
from steerlens.directions.methods import fit_directions
from steerlens.engine.capture import collect_activations
from steerlens.engine.positions import Position
from steerlens.errors import InputError, ModelError, in_one_line, told
from steerlens.measure.scorers.written import Written
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import resid_post
from steerlens.validation import Count, Whole, checked


@checked
@dataclass(frozen=True, eq=False)
class Probe:
    """Where the unsteered model's mean activation over a text lies between the pairs' two sides.

    The projection on a direction fitted on the pairs, at which 1 is the mean of their positive and
    -1 that of their negative side. The text is read after its own prompt, without steering. Blind
    to what is told apart elsewhere in the model; the pairs' prompts stand before what it is fitted
    on and not before the text, so its size is not that of the pairs. NaN where a text is empty.

    Args:
        model: Unsteered; call it outside `steer`.
        pairs: Others than those the direction was fitted on.
        layer: Another one than is steered.
        method: `probe`, a logistic regression, or `mean_diff`.
        position: What is read of the pairs (see `Position`); by default the mean over what the
            model itself writes after each, as it is over the texts. "assistant" and "continuation"
            write nothing, and so are quicker.
        batch_size: Prompts in a pass; by default what the device can use.

    Raises:
        InputError: There is no such layer; as `collect_differences`.

    Examples:
        >>> from steerlens.measure.scorers import Probe, Written
        >>> probe = Probe(model, pairs, layer=2, position=-1)
        >>> len(probe([Written("the", "warm soup", (1, 4), (27, 25), ended=True)]))
        1
    """

    model: HookedModel
    pairs: ContrastivePairs
    layer: Whole
    method: Literal["probe", "mean_diff"] = "probe"
    position: Position = "own"
    batch_size: Count | None = None
    name: ClassVar[str] = "probe"

    def __post_init__(self) -> None:
        _ = self._fitted

    @cached_property
    def _fitted(self) -> tuple[Float[Tensor, " d_model"], float, float]:
        """The unit direction, and the means of the positive and negative side along it."""
        differences = collect_differences(
            self.model,
            self.pairs,
            layers=[self.layer],
            position=self.position,
            batch_size=self.batch_size,
        )
        direction = fit_directions(differences, method=self.method)[resid_post(self.layer)]
        sides = (differences.positive[0], differences.negative[0])
        positive, negative = (float((side @ direction).mean()) for side in sides)
        return direction, positive, negative

    def __call__(self, texts: Sequence[Written]) -> list[float]:
        values = [math.nan] * len(texts)
        rows = [row for row, text in enumerate(texts) if text.ids]
        if rows:
            direction, positive, negative = self._fitted
            [read] = collect_activations(
                self.model,
                [texts[row].tokenized() for row in rows],
                [resid_post(self.layer)],
                position="continuation",
                batch_size=self.batch_size,
            )
            middle, half = (positive + negative) / 2, (positive - negative) / 2
            for row, value in zip(rows, (read @ direction).tolist(), strict=True):
                values[row] = (value - middle) / half
        return values


@checked
@dataclass(frozen=True, eq=False)
class Classifier:
    """The score that a text classifier gives one of its labels, 0 to 1 where they are softmaxed.

    Blind to the prompt, to what its training data lack (broken text gets a score too) and to what
    comes after the tokens that it can take. NaN where a text is empty.

    Args:
        pipeline: A text-classification pipeline of transformers, or what is called and answers as
            one: texts to a list of `{"label", "score"}` each.
        label: Whose score is taken.
        name: What tables call it.

    Raises:
        InputError: When called, where it has no such label, or answers otherwise.

    Examples:
        >>> from steerlens.measure.scorers import Classifier, Written
        >>> def of_warmth(texts, **options):
        ...     return [[{"label": "WARM", "score": float("warm" in text)}] for text in texts]
        >>> texts = [Written("the", "warm soup", (1, 4), (27, 25), ended=True)]
        >>> Classifier(of_warmth, "WARM")(texts)
        [1.0]
    """

    pipeline: Callable[..., Any]
    label: str
    name: str = "classifier"

    @classmethod
    def load(cls, model: str, label: str) -> "Classifier":
        """One of the Hub or of a folder. Raises `ModelError` where transformers cannot load it."""
        import transformers

        try:
            pipeline = transformers.pipeline("text-classification", model=model)
        except Exception as error:  # it raises what its many loaders do
            raise ModelError(
                f"the classifier {model!r} cannot be loaded: {in_one_line(error)[:300]}; give a "
                "folder or a name of the Hub with a text-classification model"
            ) from error
        return cls(pipeline, label)

    def __call__(self, texts: Sequence[Written]) -> list[float]:
        values = [math.nan] * len(texts)
        rows = [row for row, text in enumerate(texts) if text.text.strip()]
        if rows:
            given = [texts[row].text for row in rows]
            answers = self.pipeline(given, top_k=None, truncation=True)
            for row, answer in zip(rows, answers, strict=True):
                values[row] = self._score(answer)
        return values

    def _score(self, answer: Any) -> float:
        try:
            scores: Mapping[str, float] = {of["label"]: float(of["score"]) for of in answer}
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(
                'expected a classifier that gives each text a list of {"label", "score"}, as a '
                f"text-classification pipeline with top_k=None does, got {told(answer)}"
            ) from error
        if self.label not in scores:
            raise InputError(
                f"the classifier has no label {self.label!r}; it has {', '.join(map(str, scores))}"
            )
        return scores[self.label]
