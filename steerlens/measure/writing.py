"""Texts that a model writes, steered or not, and their scores: kept once they are there."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.engine.checkpoint import Checkpoint, Tensors, once
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.errors import InputError
from steerlens.measure.scorers import Scorer, Written
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import hook_layer
from steerlens.models.identity import provenance
from steerlens.progress import Progress
from steerlens.steering import (
    Coefficient,
    Generated,
    SteeringVector,
    decoded,
    generate_texts,
    parse_coefficient,
    steps,
)
from steerlens.steering.cache_positions import Positions
from steerlens.steering.generation import row_seed


@dataclass(frozen=True, eq=False)
class Subject:
    """What writes: a vector at some strengths, or the model as it is; `kind` names it."""

    kind: str
    hook_name: str = ""
    vector: SteeringVector | Mapping[str, Tensor] = field(default_factory=dict)
    strengths: tuple[Coefficient, ...] = (0,)

    @property
    def place(self) -> dict[str, Any]:
        """The columns that name it."""
        layer = hook_layer(self.hook_name.split(" + ")[0]) if self.hook_name else -1
        return {"subject": self.kind, "hook_name": self.hook_name, "layer": layer}

    @property
    def decided(self) -> list[Any]:
        """What `digest` needs of it."""
        vector: Any = getattr(self.vector, "fingerprint", None)
        if vector is None:
            vector = [[name, row] for name, row in self.vector.items()]
        # A share is of a boundary, which is no part of a vector's fingerprint.
        amounts = [
            [[step.hook_name, step.amount] for step in steps(self.vector, strength)]
            for strength in self.strengths
        ]
        return [vector, amounts]

    def coefficient(self, strength: Coefficient) -> float:
        """What multiplies the vector; NaN where a norm or share is another one at each hook."""
        parsed = parse_coefficient(strength)
        if parsed.unit == "residual" or parsed.number == 0:
            return parsed.number
        acts = steps(self.vector, strength)
        assert isinstance(self.vector, SteeringVector)
        return acts[0].amount / float(self.vector.scale[0]) if len(acts) == 1 else math.nan


TEXT_COLUMNS = (
    *("prompt", "prompt_text", "subject", "hook_name", "layer", "strength", "coefficient"),
    *("sample", "seed", "text", "ids", "end"),
)
"""Columns of a text besides the scorers'."""


@dataclass(frozen=True, eq=False)
class Cell:
    """What one subject wrote at one strength, prompt by prompt, and each scorer's numbers."""

    subject: Subject
    strength: Coefficient
    texts: tuple[Written, ...]
    generated: tuple[Generated, ...]
    scores: Mapping[str, Float[np.ndarray, "prompt sample"]]

    @property
    def place(self) -> dict[str, Any]:
        """The columns that name it."""
        coefficient = self.subject.coefficient(self.strength)
        return {
            **self.subject.place,
            "strength": str(self.strength),
            "coefficient": coefficient,
        }

    def lines(self) -> list[dict[str, Any]]:
        """Its texts, a row each, with their scores by the scorers' names."""
        flat = {name: scores.reshape(-1).tolist() for name, scores in self.scores.items()}
        return [
            {
                "prompt": made.prompt + 1,
                "prompt_text": text.prompt,
                **self.place,
                "sample": made.sample,
                "seed": made.seed,
                "text": text.text,
                "ids": list(text.ids),
                "end": "stop" if made.ended else "length",
                **{name: scores[i] for name, scores in flat.items()},
            }
            for i, (made, text) in enumerate(zip(self.generated, self.texts, strict=True))
        ]


@dataclass(frozen=True, eq=False)
class Writer:
    """A model that writes after some prompts, and those who score it; `seed` None is greedy."""

    model: HookedModel
    prompts: tuple[TokenizedPrompt, ...]
    scorers: Mapping[str, Scorer]
    max_new_tokens: int
    samples: int = 1
    seed: int | None = None
    positions: Positions = "all"
    batch_size: int | None = None
    checkpoint: Checkpoint | None = None

    def cells(
        self,
        subject: Subject,
        progress: Progress,
        *,
        asked: Sequence[TokenizedPrompt] | None = None,
    ) -> list[Cell]:
        """What it writes at each strength, scored as if after the plain prompts.

        `asked` are what it is written after, if not these. Raises `InputError` where a scorer does
        not give a number a text.
        """
        rows = self._generated(subject, self.prompts if asked is None else asked, progress)
        texts = tuple(self._written(row) for row in rows)
        shape = (len(self.prompts), len(subject.strengths), self.samples)
        scores = {
            name: self._scored(name, scorer, texts).reshape(shape)
            for name, scorer in self.scorers.items()
        }
        order = np.arange(len(rows)).reshape(shape)
        return [
            Cell(
                subject,
                strength,
                tuple(texts[k] for k in order[:, i].reshape(-1)),
                tuple(rows[k] for k in order[:, i].reshape(-1)),
                {name: of[:, i] for name, of in scores.items()},
            )
            for i, strength in enumerate(subject.strengths)
        ]

    def _generated(
        self, subject: Subject, asked: Sequence[TokenizedPrompt], progress: Progress
    ) -> list[Generated]:
        # A mask is of the plain prompts; without a vector nothing is steered.
        positions: Positions = self.positions if subject.hook_name else "all"

        def compute() -> Tensors:
            made = generate_texts(
                self.model,
                asked,
                subject.vector,
                subject.strengths,
                max_new_tokens=self.max_new_tokens,
                samples=self.samples,
                seed=self.seed,
                positions=positions,
                batch_size=self.batch_size,
                progress=progress,
            )
            ids = torch.full((len(made), self.max_new_tokens), -1)
            for row, text in zip(ids, made, strict=True):
                row[: len(text.ids)] = torch.tensor(text.ids, dtype=ids.dtype)
            return {"ids": ids, "ended": torch.tensor([text.ended for text in made])}

        settings = [self.samples, self.seed, self.max_new_tokens, positions]
        prompts = [list(prompt.prompt) for prompt in asked]
        decided = ["texts", provenance(self.model).to_dict(), prompts, settings, subject.decided]
        kept = once(self.checkpoint, decided, compute)
        places = product(range(len(asked)), subject.strengths, range(self.samples))
        return [
            Generated(
                prompt=prompt,
                coefficient=strength,
                sample=sample,
                seed=None if self.seed is None else row_seed(self.seed, prompt, sample),
                ids=tuple(ids[ids >= 0].tolist()),
                ended=bool(ended),
            )
            for (prompt, strength, sample), ids, ended in zip(
                places, kept["ids"], kept["ended"], strict=True
            )
        ]

    def _written(self, made: Generated) -> Written:
        prompt = self.prompts[made.prompt].prompt
        return Written(
            prompt=str(self.model.tokenizer.decode(list(prompt))),
            text=decoded(self.model, made.ids),
            prompt_ids=tuple(prompt),
            ids=made.ids,
            ended=made.ended,
        )

    def _scored(
        self, name: str, scorer: Scorer, texts: Sequence[Written]
    ) -> Float[np.ndarray, " text"]:
        def compute() -> Tensors:
            numbers = list(scorer(texts))
            if len(numbers) != len(texts):
                raise InputError(
                    f"the scorer {name} gave {len(numbers)} numbers for {len(texts)} texts; "
                    "expected one each"
                )
            try:
                return {"scores": torch.tensor([float(n) for n in numbers], dtype=torch.float64)}
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"the scorer {name} gave what is no number ({error}); NaN stands for a text "
                    "that has no score"
                ) from error

        decided = getattr(scorer, "decided", None)
        if decided is None:  # what decides its numbers is not known, so they are not kept
            kept = compute()
        else:
            what = [[list(text.prompt_ids), list(text.ids), text.ended] for text in texts]
            model = provenance(self.model).to_dict()
            kept = once(self.checkpoint, ["scores", name, model, list(decided), what], compute)
        numbers: np.ndarray[Any, Any] = kept["scores"].numpy()
        return numbers
