"""Steer only where a condition holds: the projection on a second direction passes a threshold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerlens.data.pairs import ContrastivePairs
from steerlens.directions.directions import UNIT_TOLERANCE, Frozen
from steerlens.engine.capture import collect_activations
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.errors import InputError
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import Layers, resolve_hooks
from steerlens.progress import silent
from steerlens.steering.cache_positions import Pass
from steerlens.validation import Count, checked

Scope = Literal["prompt", "token"]

_FOLDS = 5


@checked
@dataclass(frozen=True, eq=False)
class Condition(Frozen):
    """Steer where `h . direction >= threshold` at `hook_name`.

    The idea is conditional activation steering (Lee et al. 2024, arXiv:2409.05907); that work
    compares cosines, this one projections.

    Args:
        hook_name: where it is read, before the vector acts: the steered hook or an earlier one.
        direction: of norm 1.
        threshold: in residual units.
        above: False steers where the projection is below the threshold instead.
        scope: "prompt" steers a whole prompt or not, its generated tokens included, by the mean
            projection over the prompt's tokens; with "token" each token decides for itself.

    Raises:
        InputError: the direction does not have norm 1, the threshold is not finite, or the scope is
            unknown.

    Examples:
        >>> condition = sl.Condition("blocks.0.hook_resid_post", torch.eye(32)[0], threshold=1.0)
        >>> condition.holds(torch.tensor([0.5, 1.0]))
        tensor([False,  True])
    """

    hook_name: str
    direction: Float[Tensor, " d_model"]
    threshold: float
    above: bool = True
    scope: Scope = "prompt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not abs(float(self.direction.norm()) - 1) < UNIT_TOLERANCE:
            raise InputError(
                f"the condition's direction has norm {float(self.direction.norm()):.6g}; expected 1"
            )

    def __eq__(self, other: object) -> bool:
        """Whether the other is a condition with the same values."""
        if not isinstance(other, Condition):
            return NotImplemented
        mine, theirs = (
            (c.hook_name, c.threshold, c.above, c.scope, c.direction.tolist())
            for c in (self, other)
        )
        return mine == theirs

    def __hash__(self) -> int:
        return hash((self.hook_name, self.threshold, self.above, self.scope))

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
    steered: frozenset[str]
    decided: Bool[Tensor, "prompt gate"] | None = None
    waiting: set[str] = field(default_factory=set)

    def read(self, activation: Float[Tensor, "prompt token d_model"], now: Pass | None) -> None:
        """Decide for this pass; with scope "prompt", a pass on top of a KV cache keeps the last."""
        condition = self.condition
        if activation.ndim != 3 or activation.shape[-1] != len(condition.direction):
            raise InputError(
                f"the activation at {condition.hook_name} is {tuple(activation.shape)}; a "
                f"condition is read where it is (prompts, tokens, {len(condition.direction)})"
            )
        wide = torch.promote_types(activation.dtype, torch.float32)
        projection = activation.to(wide) @ condition.direction.to(activation.device, wide)
        self.waiting = set(self.steered)
        if condition.scope == "token" or now is None:
            self.decided = condition.holds(projection)
            return
        if now.n_before:
            if "gate" not in now.memory or now.n_before < now.n_prompt:
                raise InputError(
                    "the condition was not read on the whole prompts: they come in chunks, or with "
                    "a KV cache from elsewhere; run each prompt in one pass inside the block"
                )
            self.decided = now.memory["gate"]
            return
        tokens = now.prompt_tokens().to(projection.device)
        mean = (projection * tokens).sum(dim=1) / tokens.sum(dim=1).clamp(min=1)
        self.decided = now.memory["gate"] = condition.holds(mean)[:, None]

    def take(self, hook_name: str) -> Bool[Tensor, "prompt gate"]:
        """The decision for a steered hook. Raises `InputError` when it is not made yet."""
        if self.decided is None or hook_name not in self.waiting:
            raise InputError(
                f"the condition at {self.condition.hook_name} is read after {hook_name} is "
                "steered; read it at an earlier hook"
            )
        self.waiting.discard(hook_name)
        return self.decided


@checked
def fit_condition(
    model: HookedModel,
    pairs: ContrastivePairs,
    *,
    layers: Layers = "all",
    directions: Mapping[str, Tensor] | None = None,
    batch_size: Count | None = None,
) -> Condition:
    """The condition that best tells positive prompts (to be steered) from negative ones.

    What is compared is the mean projection over a prompt's tokens. The threshold lies half way
    between the two neighbouring projections where balanced accuracy (the mean of the shares of
    positives at or above it and of negatives below) is largest. Of several hooks the one is taken
    whose balanced accuracy in five-fold cross-validation over the pairs is largest, the earliest of
    equals. What it is worth on other pairs: `condition_accuracy`.

    Args:
        model: any `HookedModel`.
        pairs: at least two.
        layers: the hooks to choose from, by default every block's output.
        directions: hook name -> direction that points towards the positives (`above` is always
            True); by default the mean difference of the prompts' means.
        batch_size: prompts a pass; by default what keeps the device busy.

    Raises:
        InputError: a hook has no direction or a zero one, or the sides' means do not differ.

    Examples:
        >>> condition = sl.steering.fit_condition(model, pairs, layers=[0, 1])
        >>> condition.hook_name
        'blocks.0.hook_resid_post'
    """
    names = resolve_hooks(model, layers)
    missing = [name for name in names if directions is not None and name not in directions]
    if missing:
        raise InputError(f"no direction at {', '.join(missing)}; fit one, or leave them out")
    positive, negative = prompt_means(model, pairs, names, batch_size=batch_size)
    width = positive.shape[-1]
    chosen = [None if directions is None else directions[name] for name in names]
    for name, direction in zip(names, chosen, strict=True):
        if direction is not None and (
            tuple(direction.shape) != (width,) or not bool(direction.isfinite().all())
        ):
            raise InputError(
                f"expected {width} finite numbers as direction at {name}, got shape "
                f"{tuple(direction.shape)}"
            )
    sides = list(zip(positive, negative, chosen, strict=True))
    row = int(np.argmax([_cross_validated(*side) for side in sides])) if len(names) > 1 else 0
    return Condition(names[row], *_fit(*sides[row]))


@checked
def condition_accuracy(
    model: HookedModel,
    pairs: ContrastivePairs,
    condition: Condition,
    *,
    batch_size: Count | None = None,
) -> float:
    """Balanced accuracy of a condition on pairs: positives should pass, negatives should not.

    Args:
        model: any `HookedModel`.
        pairs: other ones than the condition was fitted on.
        condition: judged by the prompts' means, with scope "token" too.
        batch_size: prompts a pass; by default what keeps the device busy.

    Returns:
        From 0 to 1; 0.5 is chance.

    Examples:
        >>> condition = sl.steering.fit_condition(model, pairs, layers=[0])
        >>> sl.steering.condition_accuracy(model, pairs, condition)
        1.0
    """
    means = prompt_means(model, pairs, [condition.hook_name], batch_size=batch_size)
    positive, negative = (
        condition.holds(side[0] @ condition.direction.float().cpu()) for side in means
    )
    return _balanced_accuracy(positive, negative)


def prompt_means(
    model: HookedModel,
    pairs: ContrastivePairs,
    hook_names: Sequence[str],
    *,
    batch_size: int | None = None,
) -> tuple[Float[Tensor, "hook pair d_model"], Float[Tensor, "hook pair d_model"]]:
    """Mean activation over each prompt's tokens, of positives and of negatives.

    Residual units, float32 on the CPU; continuations are not part of it. Raises as
    `tokenize_pairs` and `collect_activations`.
    """
    tokenized = tokenize_pairs(model, pairs)
    positive, negative = (
        collect_activations(
            *(model, [replace(prompt, continuation=()) for prompt in prompts], hook_names),
            position="0:",
            batch_size=batch_size,
            progress=silent,
        )
        for prompts in (tokenized.positive, tokenized.negative)
    )
    return positive, negative


def _fit(
    positive: Float[Tensor, "pair d_model"],
    negative: Float[Tensor, "pair d_model"],
    direction: Tensor | None,
) -> tuple[Float[Tensor, " d_model"], float]:
    """A unit direction, `direction` or the mean difference, and the threshold along it."""
    raw = (positive - negative).mean(dim=0) if direction is None else direction.float().cpu()
    if not float(raw.norm()) > 0:
        raise InputError(
            "the prompts' means do not differ, so there is nothing to tell apart"
            if direction is None
            else "the direction given for a condition is zero"
        )
    unit = raw / raw.norm()
    return unit, _best_threshold(positive @ unit, negative @ unit)


def _cross_validated(
    positive: Float[Tensor, "pair d_model"],
    negative: Float[Tensor, "pair d_model"],
    direction: Tensor | None,
) -> float:
    """Mean balanced accuracy on pairs that direction and threshold were not fitted on."""
    fold = torch.arange(len(positive)) % min(_FOLDS, len(positive))
    scores = []
    for number in range(int(fold.max()) + 1):
        out = fold == number
        unit, threshold = _fit(positive[~out], negative[~out], direction)
        scores.append(
            _balanced_accuracy(positive[out] @ unit >= threshold, negative[out] @ unit >= threshold)
        )
    return float(np.mean(scores))


def _balanced_accuracy(positive: Bool[Tensor, " pair"], negative: Bool[Tensor, " pair"]) -> float:
    """The mean of the share of positives that pass and of negatives that do not."""
    return float(positive.double().mean() + (~negative).double().mean()) / 2


def _best_threshold(positive: Float[Tensor, " pair"], negative: Float[Tensor, " pair"]) -> float:
    """The threshold between two projections where balanced accuracy is largest."""
    from sklearn.metrics import roc_curve

    scores = torch.cat([positive, negative]).double().numpy()
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    false, true, thresholds = roc_curve(labels, scores, drop_intermediate=False)
    cut = thresholds[int(np.argmax(true - false))]
    if not np.isfinite(cut):  # best that nobody passes
        return float(np.nextafter(scores.max(), np.inf))
    below: Sequence[float] = scores[scores < cut]
    return float((cut + max(below)) / 2 if len(below) else cut)
