"""Collect what methods are fitted from, once for all of them, and fit."""

from collections.abc import Sequence
from dataclasses import dataclass

from steerlens.activations import Differences, collect_differences
from steerlens.data import ContrastivePairs
from steerlens.directions import Directions
from steerlens.gradients import LossGradients, Weight, loss_gradients
from steerlens.hooks import Layers
from steerlens.loss import WEIGHT
from steerlens.methods.registry import fit_directions, method_of
from steerlens.models import HookedModel

N_SCORES = 4
"""Label sequences drawn for each positive prompt where a method needs scores."""


@dataclass(frozen=True)
class Evidence:
    """What a set of methods is fitted from: differences always, gradients where one needs them."""

    differences: Differences
    gradients: LossGradients | None


def fit(
    model: HookedModel,
    pairs: ContrastivePairs,
    *,
    method: str = "mean_diff",
    layers: Layers = "all",
    position: int | None = None,
    weight: Weight = WEIGHT,
    seed: int = 0,
    batch_size: int | None = None,
) -> Directions:
    """A unit direction at every hook, by any method: collects what it is fitted from.

    `collect_differences` or `loss_gradients`, then `fit_directions`. `position` is -1 by default,
    and for methods fitted from gradients -2 where some pair has no continuation, as a label must
    come after it. `weight` is that of the coherence term in the gradients. Raises as those do.
    """
    evidence = collect_evidence(
        model,
        pairs,
        [method],
        layers=layers,
        position=position,
        weight=weight,
        seed=seed,
        batch_size=batch_size,
    )
    return fit_from(evidence, method, seed=seed)


def collect_evidence(
    model: HookedModel,
    pairs: ContrastivePairs,
    methods: Sequence[str],
    *,
    layers: Layers,
    position: int | None,
    weight: Weight = WEIGHT,
    seed: int,
    batch_size: int | None,
) -> Evidence:
    """One pass for the differences, and one for the gradients if a method needs them.

    Positions as in `fit`. Raises as `collect_differences` and `loss_gradients`.
    """
    chosen = [method_of(name) for name in methods]
    gradients = None
    by_gradients = [method.name for method in chosen if method.source == "gradients"]
    if by_gradients:
        gradients = loss_gradients(
            model,
            pairs,
            layers=layers,
            position=default_position(by_gradients[0], pairs) if position is None else position,
            weight=weight,
            n_scores=N_SCORES if any(method.needs_scores for method in chosen) else 0,
            seed=seed,
            batch_size=batch_size,
        )
    differences = collect_differences(
        model,
        pairs,
        layers=layers,
        position=-1 if position is None else position,
        batch_size=batch_size,
    )
    return Evidence(differences, gradients)


def default_position(method: str, pairs: ContrastivePairs) -> int:
    """-1; or -2 for methods fitted from gradients where some pair has no continuation.

    A gradient of the coherence term needs a label after it.
    """
    is_early = method_of(method).source == "gradients" and not all(p.continuation for p in pairs)
    return -2 if is_early else -1


def fit_from(evidence: Evidence, method: str, *, seed: int) -> Directions:
    """`fit_directions` from the part of the evidence that the method is fitted from."""
    if method_of(method).source == "gradients" and evidence.gradients is not None:
        return fit_directions(evidence.gradients, method=method, seed=seed)
    return fit_directions(evidence.differences, method=method, seed=seed)
