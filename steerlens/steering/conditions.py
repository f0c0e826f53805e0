"""Steer only where a condition holds: the projection on a second direction passes a threshold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerlens.activations import by_halves, check_finite
from steerlens.data import ContrastivePairs
from steerlens.errors import SteeringError
from steerlens.hooks import HookFunction, hooked
from steerlens.models import HookedModel, inference
from steerlens.steering.positions import Pass
from steerlens.tokens import Batch, TokenizedPrompt, make_batches, pair_order, tokenize_pairs

Scope = Literal["prompt", "token"]

_UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Condition:
    """Steer where `h . direction >= threshold` at `hook_name` (`<` when `above` is False).

    With scope "prompt" a whole prompt is steered or not, its generated tokens included: what is
    compared is the mean projection over its tokens, in residual units. With "token" each token
    decides for itself. `hook_name` must run before the steered hooks, or be the same one: the
    condition is read before the vector acts. The idea is conditional activation steering (Lee et
    al. 2024, arXiv:2409.05907); that work compares cosines, this one projections. Raises
    `SteeringError` when the direction does not have norm 1 or the scope is unknown.
    """

    hook_name: str
    direction: Float[Tensor, " d_model"]
    threshold: float
    above: bool = True
    scope: Scope = "prompt"

    def __post_init__(self) -> None:
        if not abs(float(self.direction.norm()) - 1) < _UNIT_TOLERANCE:
            raise SteeringError(
                f"the condition's direction has norm {float(self.direction.norm()):.6g}; expected 1"
            )
        if self.scope not in get_args(Scope):
            raise SteeringError(f"a condition's scope is prompt or token, not {self.scope!r}")
        if not np.isfinite(self.threshold):
            raise SteeringError(f"expected a finite threshold, got {self.threshold}")

    def __repr__(self) -> str:
        sign = ">=" if self.above else "<"
        return f"Condition({self.scope} {sign} {self.threshold:.4g} at {self.hook_name})"

    def holds(self, projection: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Whether each projection passes the threshold."""
        return projection >= self.threshold if self.above else projection < self.threshold


@dataclass
class Gate:
    """A condition while it is read: which rows or tokens of the current pass may be steered."""

    condition: Condition
    waiting: frozenset[str]
    decided: Bool[Tensor, "prompt gate"] | None = None
    left: set[str] = field(default_factory=set)

    def read(self, activation: Float[Tensor, "prompt token d_model"], now: Pass | None) -> None:
        """Decide for this pass; with scope "prompt", a pass on top of a KV cache keeps the last."""
        condition = self.condition
        wide = torch.promote_types(activation.dtype, torch.float32)
        projection = activation.to(wide) @ condition.direction.to(activation.device, wide)
        self.left = set(self.waiting)
        if condition.scope == "token" or now is None:
            self.decided = condition.holds(projection)
            return
        if now.n_before:
            if self.decided is None or len(self.decided) != len(projection):
                raise SteeringError(
                    "the condition was not read on these prompts: a KV cache of other prompts is "
                    "in use; run the whole prompts inside the block"
                )
            return
        of = now.prompt_tokens().to(projection.device)
        mean = (projection * of).sum(dim=1) / of.sum(dim=1).clamp(min=1)
        self.decided = condition.holds(mean)[:, None]

    def take(self, hook_name: str) -> Bool[Tensor, "prompt gate"]:
        """The decision for a steered hook. Raises `SteeringError` when it is not made yet."""
        if self.decided is None or hook_name not in self.left:
            raise SteeringError(
                f"the condition at {self.condition.hook_name} is read after {hook_name} is "
                "steered; read it at an earlier hook"
            )
        self.left.discard(hook_name)
        return self.decided


def fit_condition(
    model: HookedModel,
    pairs: ContrastivePairs,
    directions: Mapping[str, Tensor],
    *,
    hook_name: str | None = None,
    batch_size: int | None = None,
) -> Condition:
    """The threshold that best tells positive prompts (to be steered) from negative ones.

    For each hook of `directions`, or `hook_name` alone, prompts are projected (the mean over their
    tokens, residual units); the threshold lies half way between the two neighbouring projections
    where balanced accuracy, the mean of the shares of positives at or above and of negatives
    below, is largest; of several hooks the best one is taken, the earliest of equals. Test it on
    other pairs with `condition_accuracy`. Raises `SteeringError` when `hook_name` has no direction.
    """
    names = [hook_name] if hook_name is not None else list(directions)
    missing = [name for name in names if name not in directions]
    if missing or not names:
        raise SteeringError(f"no direction at {', '.join(missing)}; it has {', '.join(directions)}")
    units = {name: torch.nn.functional.normalize(directions[name], dim=0) for name in names}
    positive, negative = prompt_projections(model, pairs, units, batch_size=batch_size)
    best: tuple[float, Condition] | None = None
    for row, name in enumerate(names):
        accuracy, threshold = _best_threshold(positive[row], negative[row])
        if best is None or accuracy > best[0]:
            best = accuracy, Condition(name, units[name], threshold)
    assert best is not None
    return best[1]


def condition_accuracy(
    model: HookedModel,
    pairs: ContrastivePairs,
    condition: Condition,
    *,
    batch_size: int | None = None,
) -> float:
    """Balanced accuracy of a condition on pairs: positives should pass, negatives should not.

    0.5 is chance. For scope "prompt"; with scope "token" the prompts' means are judged all the
    same.
    """
    at = {condition.hook_name: condition.direction}
    positive, negative = prompt_projections(model, pairs, at, batch_size=batch_size)
    passes = condition.holds(positive).double().mean() + (
        (~condition.holds(negative)).double().mean()
    )
    return float(passes / 2)


def prompt_projections(
    model: HookedModel,
    pairs: ContrastivePairs,
    directions: Mapping[str, Tensor],
    *,
    batch_size: int | None = None,
) -> tuple[Float[Tensor, "hook pair"], Float[Tensor, "hook pair"]]:
    """Mean projection over each prompt's tokens on unit directions, positives and negatives.

    Residual units; continuations are not part of it. Raises as `tokenize_pairs`.
    """
    tokenized = tokenize_pairs(model, pairs)
    sides = []
    for prompts in (tokenized.positive, tokenized.negative):
        bare = [TokenizedPrompt(p.prompt, (), p.where) for p in prompts]
        batches = make_batches(model, bare, batch_size)
        with inference(model):
            found = by_halves(
                [(batch,) for batch in batches],
                lambda batch: _mean_projection(model, batch, directions),
            )
        order = pair_order([batch for (batch,), _ in found])
        sides.append(torch.cat([part for _, part in found], dim=1)[:, order])
    check_finite(torch.stack(sides, dim=-1), list(directions))
    return sides[0], sides[1]


def _mean_projection(
    model: HookedModel, batch: Batch, directions: Mapping[str, Tensor]
) -> Float[Tensor, "hook prompt"]:
    found: dict[str, Tensor] = {}
    of = batch.steered_mask("prompt")

    def reading(name: str) -> tuple[str, HookFunction]:
        def read(activation: Tensor, hook: Any) -> None:  # noqa: ARG001
            wide = torch.promote_types(activation.dtype, torch.float32)
            projection = activation.to(wide) @ directions[name].to(activation.device, wide)
            kept = of.to(activation.device)
            found[name] = ((projection * kept).sum(dim=1) / kept.sum(dim=1)).cpu()

        return name, read

    with hooked(model, [reading(name) for name in directions]):
        model(batch.tokens, return_type=None, **batch.forward_kwargs)
    return torch.stack([found[name] for name in directions])


def _best_threshold(
    positive: Float[Tensor, " pair"], negative: Float[Tensor, " pair"]
) -> tuple[float, float]:
    """The largest balanced accuracy, and the threshold between projections where it is reached."""
    from sklearn.metrics import roc_curve

    scores = torch.cat([positive, negative]).double().numpy()
    labels = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))])
    false, true, thresholds = roc_curve(labels, scores, drop_intermediate=False)
    best = int(np.argmax(true - false))
    cut = thresholds[best] if np.isfinite(thresholds[best]) else scores.max()
    below: Sequence[float] = scores[scores < cut]
    middle = (cut + max(below)) / 2 if len(below) else cut
    return float((true[best] + 1 - false[best]) / 2), float(middle)
