"""What steering is to change: a preference for some continuations, or what the model writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from steerlens.data.items import PreferenceItems
from steerlens.data.pairs import ContrastivePairs
from steerlens.data.sequence import one_of_each_in_turn
from steerlens.engine.continuations import own_texts, until_end
from steerlens.engine.engine import Engine
from steerlens.engine.labels import OWN_TOKENS
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_items, tokenize_pairs
from steerlens.engine.workload import Job
from steerlens.errors import InputError
from steerlens.measure.effects import Sides, preference_gaps
from steerlens.measure.scorers import Concept
from steerlens.measure.writing import Subject, Writer
from steerlens.progress import silent

N_ITEMS = 32
"""Most items of a part, one of each group in turn."""


@dataclass(frozen=True)
class Preference:
    """logprob(positive continuation) - logprob(negative one) after each of some prompts."""

    sides: Sides
    groups: tuple[int, ...]
    unit: str = "items"

    @classmethod
    def of_items(cls, engine: Engine, items: PreferenceItems) -> "Preference":
        """Of items, as many as are measured."""
        positive, negative = tokenize_items(engine.model, items)
        rows = one_of_each_in_turn(items.groups, N_ITEMS)
        return cls((positive, negative), items.groups).at(rows)

    @classmethod
    def of_own(
        cls,
        engine: Engine,
        pairs: ContrastivePairs,
        prompts: Sequence[TokenizedPrompt],
    ) -> "Preference":
        """What the model writes after pairs' positive and negative prompts, after other prompts.

        Raises `InputError` where it writes the same after both.
        """
        rows = one_of_each_in_turn(pairs.groups, N_ITEMS // 2)
        written: dict[str, Any] = {"n_tokens": OWN_TOKENS, "seed": None}
        tokenized = tokenize_pairs(engine.model, pairs)
        sides = [[side[row] for row in rows] for side in (tokenized.positive, tokenized.negative)]
        up, down = (
            [until_end(text, engine.model) for text in own_texts(engine.model, s, **written)]
            for s in sides
        )
        kept = [i for i in range(len(rows)) if up[i] and down[i] and up[i] != down[i]]
        if len(kept) < 2:
            raise InputError(
                f"the model writes the same after the positive and the negative prompts of "
                f"{len(rows) - len(kept)} of {len(rows)} pairs, so that no layer can be chosen by "
                "it; give preference items, or pairs that change what the model writes"
            )
        positive, negative = (
            [
                TokenizedPrompt(prompts[i % len(prompts)].prompt, texts[i], f"own text {i + 1}")
                for i in kept
            ]
            for texts in (up, down)
        )
        return cls((positive, negative), tuple(pairs.groups[rows[i]] for i in kept), "own texts")

    @property
    def prompts(self) -> Sequence[TokenizedPrompt]:
        """With the positive continuations, then with the negative ones."""
        return [*self.sides[0], *self.sides[1]]

    def at(self, rows: Sequence[int]) -> "Preference":
        """Some of them."""
        positive, negative = ([side[row] for row in rows] for side in self.sides)
        groups = tuple(self.groups[row] for row in rows)
        return Preference((positive, negative), groups, self.unit)

    def changes(
        self, engine: Engine, jobs: Sequence[Job]
    ) -> tuple[Float[np.ndarray, " unit"], list[Float[np.ndarray, "coefficient unit"]]]:
        """The gaps unsteered, and the change of each by every job, nats per token."""
        unsteered, gaps = preference_gaps(engine, self.sides, jobs)
        return unsteered, [of_job - unsteered for of_job in gaps]


@dataclass(frozen=True)
class Behaviour:
    """How much likelier what is written after each of some prompts is under pairs' positive prompts
    than under their negative ones, to the unsteered model (`scorers.Concept`).

    NaN where nothing is written.
    """

    prompts: Sequence[TokenizedPrompt]
    scorer: Concept
    unit: str = "prompts"

    @property
    def groups(self) -> tuple[int, ...]:
        """Each prompt is one of its own."""
        return tuple(range(len(self.prompts)))

    def changes(
        self, engine: Engine, jobs: Sequence[Job]
    ) -> tuple[Float[np.ndarray, " unit"], list[Float[np.ndarray, "coefficient unit"]]]:
        """The scores of greedy texts unsteered, and the change of each by every job."""
        writer = Writer(
            model=engine.model,
            prompts=tuple(self.prompts),
            scorers={self.scorer.name: self.scorer},
            max_new_tokens=OWN_TOKENS,
            batch_size=engine.batch_size,
            checkpoint=engine.checkpoint,
        )

        def scores(subject: Subject) -> Float[np.ndarray, "strength unit"]:
            cells = writer.cells(subject, silent)
            return np.stack([cell.scores[self.scorer.name][:, 0] for cell in cells])

        [unsteered] = scores(Subject("unsteered"))
        changes: list[NDArray[np.float64]] = []
        engine.progress("texts", 0, len(jobs))
        for job in jobs:
            vector = {job.hook_name: job.direction}
            steered = scores(Subject("steered", job.hook_name, vector, job.coefficients))
            changes.append(steered - unsteered)
            engine.progress("texts", len(changes), len(jobs))
        return unsteered, changes
