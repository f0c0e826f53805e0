"""Collect what methods are fitted from, once for all of them, and fit."""

from collections.abc import Sequence

from steerlens.data.items import PreferenceItems
from steerlens.data.pairs import ContrastivePairs
from steerlens.directions.differences import Differences, collect_differences
from steerlens.directions.directions import Directions
from steerlens.directions.gradients import LossGradients, Weight, loss_gradients
from steerlens.directions.methods import Source, fit_directions, method_of
from steerlens.directions.training import train_directions
from steerlens.loss import WEIGHT
from steerlens.models.hooks import Layers
from steerlens.models.loading import HookedModel
from steerlens.progress import Progress

N_SCORES = 4
"""Label sequences drawn for each positive prompt where a method needs scores."""


def fit(
    model: HookedModel,
    pairs: ContrastivePairs,
    *,
    method: str = "mean_diff",
    layers: Layers = "all",
    position: int | None = None,
    weight: Weight = WEIGHT,
    items: PreferenceItems | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Directions:
    """A unit direction at every hook, by any method: collects what it is fitted from, or trains.

    `collect_differences` or `loss_gradients`, then `fit_directions`; or `train_directions`, which
    takes `items` for the methods trained on continuations. `position` as in `default_position`
    unless given. `weight` is that of the coherence term in the gradients. Raises as those do.

    Examples:
        >>> sl.fit(model, pairs, method="gradient_mean", layers=[1, 2])
        Directions(gradient_mean, 2 hooks, d_model 32, position -2)
    """
    fitted = fit_methods(
        model,
        pairs,
        [method],
        differences=None,
        layers=layers,
        position=position,
        weight=weight,
        items=items,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return fitted[method]


def fit_methods(
    model: HookedModel,
    pairs: ContrastivePairs,
    methods: Sequence[str],
    *,
    differences: Differences | None,
    layers: Layers,
    position: int | None,
    weight: Weight = WEIGHT,
    items: PreferenceItems | None = None,
    seed: int,
    batch_size: int | None,
    progress: Progress | None = None,
) -> dict[str, Directions]:
    """Method name -> directions, from at most one pass for the differences and for the gradients.

    Differences that are there already may be given. Otherwise as `fit`.
    """
    chosen = [method_of(name) for name in methods]
    evidence: dict[Source, Differences | LossGradients] = {}
    if any(method.source == "differences" for method in chosen):
        evidence["differences"] = differences or collect_differences(
            model,
            pairs,
            layers=layers,
            position=-1 if position is None else position,
            batch_size=batch_size,
            progress=progress,
        )
    by_gradients = [method.name for method in chosen if method.source == "gradients"]
    if by_gradients:
        evidence["gradients"] = loss_gradients(
            model,
            pairs,
            layers=layers,
            position=default_position(by_gradients[0], pairs) if position is None else position,
            weight=weight,
            n_scores=N_SCORES if any(method.needs_scores for method in chosen) else 0,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
    fitted = {}
    for method in chosen:
        if method.source == "training":
            fitted[method.name] = train_directions(
                model,
                pairs,
                layers=layers,
                objective=method.name.removeprefix("optimised").strip("_") or "reference",
                items=items,
                position=-1 if position is None else position,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
            ).directions
        else:
            fitted[method.name] = fit_directions(
                evidence[method.source], method=method.name, seed=seed
            )
    return fitted


def default_position(method: str, pairs: ContrastivePairs) -> int:
    """-1; or -2 for methods fitted from gradients where some pair has no continuation.

    A gradient of the coherence term needs a label after it.
    """
    is_early = method_of(method).source == "gradients" and not all(p.continuation for p in pairs)
    return -2 if is_early else -1
