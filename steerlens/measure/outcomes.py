"""What steering is to change: a preference for some continuations, or what the model writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from steerlens.data.items import PreferenceItems
from steerlens.data.pairs import ContrastivePairs
from steerlens.data.sequence import one_of_each_in_turn
from steerlens.engine.checkpoint import Tensors, once
from steerlens.engine.continuations import own_texts, until_end
from steerlens.engine.engine import Engine
from steerlens.engine.tokenization import (
    TokenizedPrompt,
    fingerprint,
    tokenize_items,
    tokenize_pairs,
)
from steerlens.engine.workload import Job
from steerlens.errors import InputError
from steerlens.measure.effects import Sides, preference_gaps
from steerlens.measure.scorers import Concept, Written
from steerlens.models.identity import provenance
from steerlens.progress import silent
from steerlens.steering.generation import decoded, generate_texts

N_ITEMS = 32
"""Most items of a part, one of each group in turn."""
N_SCORED_PAIRS = 2
"""Pairs after whose prompts a text is scored."""


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
        *,
        n_tokens: int,
    ) -> "Preference":
        """What the model writes after pairs' positive and negative prompts, after other prompts.

        Raises `InputError` where it writes the same after both.
        """
        rows = one_of_each_in_turn(pairs.groups, N_ITEMS // 2)
        written: dict[str, Any] = {"n_tokens": n_tokens, "seed": None}
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
    n_tokens: int
    unit: str = "prompts"

    @classmethod
    def of_pairs(
        cls,
        engine: Engine,
        pairs: ContrastivePairs,
        prompts: Sequence[TokenizedPrompt],
        *,
        n_tokens: int,
    ) -> "Behaviour":
        """What is written after the prompts, scored by the pairs."""
        scorer = Concept(engine.model, pairs, N_SCORED_PAIRS, engine.batch_size)
        return cls(prompts, scorer, n_tokens)

    @property
    def groups(self) -> tuple[int, ...]:
        """Each prompt is one of its own."""
        return tuple(range(len(self.prompts)))

    def changes(
        self, engine: Engine, jobs: Sequence[Job]
    ) -> tuple[Float[np.ndarray, " unit"], list[Float[np.ndarray, "coefficient unit"]]]:
        """The scores of greedy texts unsteered, and the change of each by every job."""
        unsteered = self._scores(engine, jobs[0].hook_name, jobs[0].direction, 0.0)
        cells = [(job, coefficient) for job in jobs for coefficient in job.coefficients]
        rows: list[NDArray[np.float64]] = []
        engine.progress("texts", 0, len(cells))
        for job, coefficient in cells:
            scores = self._scores(engine, job.hook_name, job.direction, coefficient)
            rows.append(scores - unsteered)
            engine.progress("texts", len(rows), len(cells))
        ends = np.cumsum([len(job.coefficients) for job in jobs])[:-1]
        return unsteered, np.split(np.stack(rows), ends)

    def _scores(
        self, engine: Engine, hook_name: str, direction: Tensor, coefficient: float
    ) -> NDArray[np.float64]:
        model = engine.model

        def measure() -> Tensors:
            texts = generate_texts(
                model,
                self.prompts,
                {hook_name: direction},
                [coefficient],
                max_new_tokens=self.n_tokens,
                batch_size=engine.batch_size,
                progress=silent,
            )
            written = [
                Written(
                    prompt.where,
                    decoded(model, text.ids),
                    tuple(prompt.prompt),
                    text.ids,
                    text.ended,
                )
                for prompt, text in zip(self.prompts, texts, strict=True)
            ]
            return {"scores": torch.tensor(self.scorer(written), dtype=torch.float64)}

        decided = ("behaviour", provenance(model).to_dict(), fingerprint(self.prompts))
        of_scorer = (self.scorer.pairs.fingerprint, self.scorer.n_pairs, self.n_tokens)
        at = () if coefficient == 0 else (hook_name, direction)
        kept = once(engine.checkpoint, (*decided, *of_scorer, *at, coefficient), measure)
        scores: NDArray[np.float64] = kept["scores"].numpy()
        return scores
