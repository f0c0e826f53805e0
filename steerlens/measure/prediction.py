"""What gradients at coefficient 0 predict of any vector at a hook: its boundary, its effects."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from steerlens.data.items import PreferenceItems
from steerlens.engine.batches import Batch, make_batches, rows_per_pass
from steerlens.engine.engine import Engine
from steerlens.engine.slopes import LabelGradients, label_gradients, label_slopes
from steerlens.engine.tokenization import SteeredPositions, TokenizedPrompt
from steerlens.errors import ModelError
from steerlens.loss import Budget
from steerlens.measure.coherence import Push
from steerlens.measure.effects import Sides, both_sides
from steerlens.measure.search import FIRST_STEP


@dataclass(frozen=True)
class Prediction:
    """What gradients at 0 say of one push, outward.

    `drops` are the slopes of each prompt's loss (0 for a divergence, which is flat at 0);
    `boundary` is that of second order, `first_order` that of the slope alone (NaN for a
    divergence).
    """

    drops: Float[np.ndarray, " prompt"]
    boundary: float
    first_order: float

    def start(self, limit: float) -> float:
        """Where a search up to `limit` looks first; not far out where nothing is predicted."""
        return limit / 16 if math.isnan(self.boundary) else min(FIRST_STEP * self.boundary, limit)


def predict(
    engine: Engine,
    prompts: Sequence[TokenizedPrompt],
    pushes: Sequence[Push],
    *,
    budget: Budget,
    allowance: float,
    steered_positions: SteeredPositions,
    seed: int,
) -> list[Prediction]:
    """Slopes and predicted boundary of every push, from one forward and two backward passes.

    Second order: `drop * c + curvature * c^2 / 2` reaches the allowance. For a 95th percentile the
    divergence of a token is taken to be its mean times a chi-square variable with one degree of
    freedom, whose 95th percentile is 3.84. Raises `ModelError` where a gradient is not finite.
    """
    along = {_key(push): push.additions for push in pushes if push.additions}
    if not along:
        # What does not add has no gradient; its slopes are taken to be 0.
        return [Prediction(np.zeros(len(prompts)), math.nan, math.nan)] * len(pushes)
    derivatives = label_slopes(
        engine,
        gradient_batches(engine, prompts),
        [*along.values()],
        steered_positions=steered_positions,
        seed=seed,
    )
    index = {key: i for i, key in enumerate(along)}
    predictions = []
    for push in pushes:
        row = index[_key(push)]
        logprob, curvature = derivatives.logprob[row], derivatives.curvature[row]
        if not bool((logprob + curvature).isfinite().all()):
            raise ModelError(
                f"the gradients at {push.hook_name} are not finite; load the model in float32 or "
                "bfloat16"
            )
        drops = -push.sign * logprob.double().numpy()
        if budget.is_divergence:
            drops = np.zeros(len(drops))
        bend = bend_of(budget, np.array([float(curvature.double().mean())]))
        bends, slopes = np.append(bend, 0.0), np.full(2, drops.mean())
        boundary, first_order = first_roots(bends, slopes, allowance).tolist()
        first_order = math.nan if budget.is_divergence else first_order
        predictions.append(Prediction(drops, boundary, first_order))
    return predictions


def _key(push: Push) -> tuple[str, int]:
    """The same for both signs of a push."""
    return push.hook_name, id(push.direction)


def gradient_batches(engine: Engine, prompts: Sequence[TokenizedPrompt]) -> tuple[Batch, ...]:
    """Half as many prompts as a forward pass takes: a backward pass keeps all activations."""
    width = max(len(prompt) for prompt in prompts)
    size = max(1, (engine.batch_size or rows_per_pass(engine.model, width)) // 2)
    return make_batches(engine.model, prompts, size)


def bend_of(budget: Budget, curvature: Float[np.ndarray, " push"]) -> Float[np.ndarray, " push"]:
    """Half the curvature of the loss that the budget bounds, from that of the mean divergence."""
    if budget.kind not in ("kl_p95", "rollout_kl_p95"):
        return curvature / 2
    from scipy.stats import chi2

    return curvature / 2 * float(chi2.ppf(0.95, 1))


def first_roots(
    bends: Float[np.ndarray, " push"], slopes: Float[np.ndarray, " push"], allowance: float
) -> Float[np.ndarray, " push"]:
    """The smallest c > 0 with `slope * c + bend * c^2 = allowance` (bend >= 0), inf if none.

    Examples:
        >>> first_roots(np.array([0.5, 0.0]), np.array([0.0, -1.0]), allowance=0.08)
        array([0.4, inf])
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        curved = (np.sqrt(slopes**2 + 4 * bends * allowance) - slopes) / (2 * bends)
        straight = np.where(slopes > 0, allowance / slopes, np.inf)
    roots: NDArray[np.float64] = np.where(bends == 0, straight, curved)
    return roots


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
