"""Collect what methods are fitted from, once for all of them, and fit."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from steerlens.data.items import PreferenceItems
from steerlens.data.pairs import ContrastivePairs
from steerlens.directions.differences import Differences, collect_differences
from steerlens.directions.directions import Directions
from steerlens.directions.gradient_rows import LossGradients, Weight, check_weight
from steerlens.directions.gradients import loss_gradients
from steerlens.directions.methods import Method, fit_directions, method_of
from steerlens.directions.training import train_directions
from steerlens.engine.checkpoint import Checkpoint, Kept, digest
from steerlens.engine.labels import OWN, LabelKind
from steerlens.loss import WEIGHT
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import Layers
from steerlens.models.identity import provenance
from steerlens.progress import Progress
from steerlens.validation import Count, Whole, checked

N_SCORES = 4
"""Label sequences drawn for each positive prompt where a method needs scores."""


@checked
def fit(
    model: HookedModel,
    pairs: ContrastivePairs,
    *,
    method: str = "mean_diff",
    layers: Layers = "all",
    position: int | None = None,
    labels: LabelKind | None = None,
    weight: Weight = WEIGHT,
    items: PreferenceItems | None = None,
    differences: Differences | None = None,
    seed: Whole = 0,
    batch_size: Count | None = None,
    progress: Progress | None = None,
) -> Directions:
    """A unit direction at every hook, by any method: collects what it is fitted from, or trains.

    `collect_differences` or `loss_gradients`, then `fit_directions`; or `train_directions`.

    Args:
        method: One of `METHODS`, with its options after plus signs: `gradient_svd+pooled`,
            `gradient_mean+on_pca`.
        layers: As in `resolve_hooks`.
        position: The token of each prompt that is read; by default the last, or the last but one
            for a method fitted from gradients where some pair has no label after it.
        labels: Of methods fitted from gradients or trained: the tokens whose logprob the loss
            keeps, as of `Study`. Default: that of the pairs.
        weight: That of the coherence term in the gradients (`LossGradients.with_weight`).
        items: For the methods trained on continuations.
        differences: Of the pairs at the layers and the position, where they are there already;
            collected by default.
        seed: That of the controls, the scores and the training.
        batch_size: Prompts in a pass; by default what the device can use.
        progress: Told of every stage; nobody by default.

    Raises:
        InputError: As the functions above; so the other errors.

    Examples:
        >>> sl.fit(model, pairs, method="gradient_mean", layers=[1, 2])
        Directions(gradient_mean, 2 hooks, d_model 32, position -2)
    """
    check_weight(weight)
    chosen = method_of(method)
    at = default_position(method, pairs, labels) if position is None else position
    shared: dict[str, Any] = {"layers": layers, "batch_size": batch_size, "progress": progress}
    evidence: Differences | LossGradients
    if chosen.source == "training":
        how: dict[str, Any] = {"items": items, "position": at, "labels": labels, "seed": seed}
        return _train(model, pairs, chosen, **how, **shared)
    if chosen.source == "gradients":
        how = {"position": at, "labels": labels, "seed": seed}
        gradients = _gradients(model, pairs, [chosen], **how, **shared)
        evidence = gradients.with_weight(weight)
    else:
        evidence = differences or collect_differences(model, pairs, position=at, **shared)
    return fit_directions(evidence, method=chosen.name, seed=seed)


def fit_methods(
    model: HookedModel,
    pairs: ContrastivePairs,
    methods: Sequence[str],
    *,
    differences: Differences,
    layers: Layers,
    position: int | None,
    items: PreferenceItems | None = None,
    seed: int,
    batch_size: int | None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Directions]:
    """Method name, as given, -> directions; from one pass for the gradients on each axis.

    The differences are there already. Those that the checkpoint has are not fitted again. Otherwise
    as `fit`.
    """
    chosen = {name: method_of(name) for name in methods}
    shared: dict[str, Any] = {"layers": layers, "batch_size": batch_size, "progress": progress}
    by_gradients = [method for method in chosen.values() if method.source == "gradients"]
    gradients: dict[str | None, LossGradients] = {}
    keys: dict[str, str] = {}
    fitted: dict[str, Directions] = {}
    for name in chosen if checkpoint is not None else ():
        keys[name] = digest(
            *("directions", provenance(model).to_dict(), pairs.fingerprint, name, position, seed),
            *(differences.all_hook_names, differences.positive, differences.negative),
            *(batch_size, None if items is None else items.fingerprint),
        )
        fitted |= _kept(checkpoint, name, keys[name])
    left = {name: method for name, method in chosen.items() if name not in fitted}
    for axis in dict.fromkeys(m.axis for m in left.values() if m.source == "gradients"):
        alike = [method for method in by_gradients if method.axis == axis]
        at = default_position(alike[0].name, pairs) if position is None else position
        gradients[axis] = _gradients(model, pairs, alike, position=at, seed=seed, **shared)
    at = -1 if position is None else position
    for name, method in left.items():
        if method.source == "training":
            how: dict[str, Any] = {"items": items, "position": at, "seed": seed, **shared}
            directions = _train(model, pairs, method, **how)
        else:
            by_gradient = method.source == "gradients"
            evidence = gradients[method.axis] if by_gradient else differences
            directions = fit_directions(evidence, method=method.name, seed=seed)
        fitted[name] = directions
        if checkpoint is not None:
            record = {f.name: getattr(directions, f.name) for f in fields(directions)}
            kept = Kept(tensors={"vectors": record.pop("vectors")}, record=record)
            checkpoint.keep(keys[name], keys[name], kept)
    return {name: fitted[name] for name in chosen}


def _kept(checkpoint: Checkpoint | None, name: str, key: str) -> dict[str, Directions]:
    """The directions under a method's name, if they were kept."""
    kept = None if checkpoint is None else checkpoint.load(key, key)
    if kept is None:
        return {}
    found: dict[str, Any] = {**kept.record, **kept.tensors}
    found |= {
        field: tuple(found[field]) for field in ("hook_names", "readout_names", "pair_hashes")
    }
    return {name: Directions(**found)}


def _gradients(
    model: HookedModel, pairs: ContrastivePairs, methods: Sequence[Method], **settings: Any
) -> LossGradients:
    """One pass for methods of the same axis."""
    n_scores = N_SCORES if any(method.needs_scores for method in methods) else 0
    return loss_gradients(model, pairs, axis=methods[0].axis, n_scores=n_scores, **settings)


def _train(
    model: HookedModel, pairs: ContrastivePairs, method: Method, **settings: Any
) -> Directions:
    trained = train_directions(
        model, pairs, objective=method.objective, axis=method.axis, **settings
    )
    return trained.directions


def default_position(method: str, pairs: ContrastivePairs, labels: LabelKind | None = None) -> int:
    """-1; or -2 for methods fitted from gradients where some pair has no label after it.

    A gradient of the coherence term needs a label after it: of a continuation, or of own text.
    """
    are_after = labels != "assistant" and all(pair.continuation for pair in pairs)
    follow = labels in OWN or are_after
    return -2 if method_of(method).source == "gradients" and not follow else -1
