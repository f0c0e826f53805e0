"""What any vector at a hook would do, to first order: effects of thousands, from two passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from steerlens.data.items import PreferenceItems
from steerlens.engine.engine import Engine
from steerlens.engine.slopes import LabelGradients, label_gradients
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.loss import Budget
from steerlens.measure.effects import Sides, both_sides
from steerlens.measure.prediction import bend_of, first_roots, gradient_batches


@dataclass(frozen=True)
class Linearised:
    """Gradients of the items' preference gaps, and of the loss that the budget bounds, at hooks.

    `gaps` are in nats per token and residual unit, item by item; `text` those of the text that the
    budget is spent on, `allowance` what it allows there (nats per token).
    """

    hook_names: tuple[str, ...]
    gaps: Float[Tensor, "hook item d_model"]
    text: LabelGradients
    budget: Budget
    allowance: float

    def effects(
        self, hook_name: str, vectors: Float[Tensor, "vector d_model"]
    ) -> Float[np.ndarray, "vector item"]:
        """The change of every item's gap by unit vectors, each at the coefficient predicted for it.

        `c (v . gradient)`, with `slope c + bend c^2` of the loss at its allowance; NaN where no
        coefficient spends the budget.
        """
        units = vectors.double().cpu()
        gaps = self.gaps[self.hook_names.index(hook_name)].double()
        along: NDArray[np.float64] = (units @ gaps.T).numpy()
        return self.coefficients(hook_name, units)[:, None] * along

    def coefficients(
        self, hook_name: str, vectors: Float[Tensor, "vector d_model"]
    ) -> Float[np.ndarray, " vector"]:
        """The one predicted to spend the budget along each unit vector; NaN where none does."""
        at, units = self.hook_names.index(hook_name), vectors.double().cpu()
        logprob, scores = self.text.logprob[at].double(), self.text.scores[at].double()
        bends = bend_of(self.budget, (units @ scores.T).square().mean(dim=1).numpy())
        slopes = np.zeros(len(units))
        if not self.budget.is_divergence:
            slopes = -(units @ logprob.mean(dim=0)).numpy()
        reached = first_roots(bends, slopes, self.allowance)
        return np.where(np.isfinite(reached), reached, np.nan)


def linearise(
    engine: Engine,
    items: PreferenceItems | Sides,
    text: Sequence[TokenizedPrompt],
    hook_names: Sequence[str],
    *,
    budget: Budget,
    allowance: float,
    seed: int,
) -> Linearised:
    """The gradients at 0 of the items' gaps and of the text's loss, every token steered.

    `allowance` is what the budget allows on the text, nats per token.
    """
    of_text = label_gradients(
        *(engine, gradient_batches(engine, text), hook_names), steered_positions="all", seed=seed
    )
    gaps = gap_gradients(engine, items, hook_names, seed=seed)
    return Linearised(tuple(hook_names), gaps, of_text, budget, allowance)


def gap_gradients(
    engine: Engine, items: PreferenceItems | Sides, hook_names: Sequence[str], *, seed: int
) -> Float[Tensor, "hook item d_model"]:
    """The gradients at 0 of the items' preference gaps, every token steered."""
    batches = gradient_batches(engine, both_sides(engine.model, items))
    how: dict[str, Any] = {"steered_positions": "all", "seed": seed, "with_scores": False}
    up, down = label_gradients(engine, batches, hook_names, **how).logprob.chunk(2, dim=1)
    return up - down
