"""Collect what methods are fitted from, once for all of them, and fit."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from steerlens.data.items import PreferenceItems
from steerlens.data.pairs import AnyPairs, ContrastivePairs, as_pairs
from steerlens.directions.differences import (
    Differences,
    collect_differences,
)
from steerlens.directions.directions import Directions
from steerlens.directions.gradient_rows import LossGradients, Weight, check_weight
from steerlens.directions.gradients import loss_gradients
from steerlens.directions.methods import Evidence, Method, fit_directions, method_of
from steerlens.directions.training import train_directions
from steerlens.engine.checkpoint import Checkpoint, Kept, once_kept
from steerlens.engine.labels import OWN, OWN_TOKENS, LabelKind
from steerlens.engine.positions import Position, as_position
from steerlens.loss import WEIGHT
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import Layers, is_head, readout_hook
from steerlens.models.identity import provenance
from steerlens.progress import Progress
from steerlens.validation import Count, Whole, checked

Found = TypeVar("Found", Directions, LossGradients)

N_SCORES = 4
"""Label sequences drawn for each positive prompt where a method needs scores."""


@checked
def fit(
    model: HookedModel,
    pairs: AnyPairs,
    *,
    method: str = "mean_diff",
    layers: Layers = "all",
    position: Position | Sequence[int] | None = None,
    labels: LabelKind | None = None,
    weight: Weight = WEIGHT,
    items: PreferenceItems | None = None,
    differences: Differences | None = None,
    own_tokens: Count = OWN_TOKENS,
    seed: Whole = 0,
    batch_size: Count | None = None,
    progress: Progress | None = None,
) -> Directions:
    """A unit direction at every hook, by any method: collects what it is fitted from, or trains.

    `collect_differences` or `loss_gradients`, then `fit_directions`; or `train_directions`. The
    readout hooks of heads have another width and are fitted by a pass of their own.

    Args:
        pairs: Or what `ContrastivePairs.load` reads: tuples of two prompts, a file, a name. Two
            lists of prompts in a tuple, of any lengths, have a mean difference without pairs.
        method: One of `METHODS`, with its options after plus signs: `gradient_svd+pooled`,
            `gradient_mean+on_pca`.
        layers: As in `resolve_hooks`.
        position: The tokens of each prompt that are read (see `Position`); by default the last, or
            the last but one for a method fitted from gradients where some pair has no label after
            it. "assistant" is the mean over the response. Gradients and training take one token.
        labels: Of methods fitted from gradients or trained: the tokens whose logprob the loss
            keeps, as of `Study`. Default: that of the pairs.
        weight: That of the coherence term in the gradients (`LossGradients.with_weight`).
        items: For the methods trained on continuations.
        differences: Of the pairs at the layers and the position, where they are there already;
            collected by default.
        own_tokens: The most tokens that the model writes where its own text is read (32); labels
            "own" of gradients and training have 32.
        seed: That of the controls, the scores and the training.
        batch_size: Prompts in a pass; by default what the device can use.
        progress: Told of every stage. Default: bars in a terminal or a notebook.

    Raises:
        InputError: As the functions above; so the other errors. A method but `mean_diff` where
            there are no pairs.

    Examples:
        >>> sl.fit(model, pairs, method="gradient_mean", layers=[1, 2])
        Directions(gradient_mean, 2 hooks, d_model 32, position -2)
        >>> moods = [("I felt so warm", "I felt so cold"), ("a good day", "a bad day")]
        >>> sl.fit(model, moods)[2].shape
        torch.Size([32])
    """
    check_weight(weight)
    chosen = method_of(method)
    pairs = as_pairs(pairs)
    check_pairs(pairs, method)
    at = default_position(method, pairs, labels) if position is None else as_position(position)
    shared: dict[str, Any] = {"layers": layers, "batch_size": batch_size, "progress": progress}
    evidence: Evidence
    if chosen.source == "training":
        how: dict[str, Any] = {"items": items, "position": at, "labels": labels, "seed": seed}
        return _train(model, pairs, chosen, **how, **shared)
    if chosen.source == "gradients":
        how = {"position": at, "labels": labels, "seed": seed}
        gradients = _gradients(model, pairs, [chosen], **how, **shared)
        evidence = gradients.with_weight(weight)
    else:
        evidence = differences or collect_differences(
            model, pairs, position=at, own_tokens=own_tokens, **shared
        )
    fitted = fit_directions(evidence, method=chosen.name, seed=seed)
    if not is_head(fitted.hook_names[0]):
        return fitted
    n_layers = int(model.cfg.n_layers)
    shared["layers"] = [readout_hook(name, n_layers) for name in fitted.hook_names]
    how = {"labels": labels, "weight": weight, "own_tokens": own_tokens, "seed": seed}
    readouts = fit(model, pairs, method=method, position=at, **how, **shared)
    return fitted.read_along(readouts, shared["layers"])


def fit_methods(
    model: HookedModel,
    pairs: ContrastivePairs,
    methods: Sequence[str],
    *,
    differences: Differences,
    layers: Layers,
    position: Position | None,
    items: PreferenceItems | None = None,
    seed: int,
    batch_size: int | None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[dict[str, Directions], dict[str, Evidence]]:
    """Method name, as given, -> directions, and -> what they are fitted from, if not trained.

    From one pass for the gradients on each axis. The differences are there already; gradients and
    trained directions that the checkpoint has are not made again. Otherwise as `fit`.
    """
    pairs.check_paired("methods that are compared are")
    chosen = {name: method_of(name) for name in methods}
    shared: dict[str, Any] = {"layers": layers, "batch_size": batch_size, "progress": progress}
    decided = (
        *("directions", provenance(model).to_dict(), pairs.fingerprint, position, seed),
        *(differences.all_hook_names, differences.positive, differences.negative),
        *(batch_size, None if items is None else items.fingerprint),
    )
    by_axis: dict[str | None, LossGradients] = {}
    for axis in dict.fromkeys(m.axis for m in chosen.values() if m.source == "gradients"):
        alike = [m for m in chosen.values() if m.source == "gradients" and m.axis == axis]
        at = default_position(alike[0].name, pairs) if position is None else position
        by_axis[axis] = _once(
            checkpoint,
            (*decided, axis, any(method.needs_scores for method in alike)),
            LossGradients,
            partial(_gradients, model, pairs, alike, position=at, seed=seed, **shared),
        )
    at = -1 if position is None else position
    fitted: dict[str, Directions] = {}
    evidence: dict[str, Evidence] = {}
    for name, method in chosen.items():
        if method.source == "training":
            how: dict[str, Any] = {"items": items, "position": at, "seed": seed, **shared}
            train = partial(_train, model, pairs, method, **how)
            fitted[name] = _once(checkpoint, (*decided, name), Directions, train)
            continue
        by_gradient = method.source == "gradients"
        evidence[name] = by_axis[method.axis] if by_gradient else differences
        fitted[name] = fit_directions(evidence[name], method=method.name, seed=seed)
    return fitted, evidence


def _once(
    checkpoint: Checkpoint | None,
    decided: Sequence[Any],
    kind: type[Found],
    compute: Callable[[], Found],
) -> Found:
    """The directions or gradients that were kept, else those computed, which are kept."""

    def compute_kept() -> Kept:
        found = compute()
        values = {f.name: getattr(found, f.name) for f in fields(found)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return Kept(tensors=tensors, record={k: v for k, v in values.items() if k not in tensors})

    kept = once_kept(checkpoint, decided, compute_kept)
    record: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in kept.record.items()
    }
    return kind(**{**record, **kept.tensors})


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


def check_pairs(pairs: ContrastivePairs, method: str) -> None:
    """Raise `InputError` where the method needs pairs and there are two lists without any."""
    name = method_of(method).name
    if name != "mean_diff":
        pairs.check_paired(f"{name} is")


def default_position(method: str, pairs: ContrastivePairs, labels: LabelKind | None = None) -> int:
    """-1; or -2 for methods fitted from gradients where some pair has no label after it.

    A gradient of the coherence term needs a label after it: of a continuation, or of own text.
    """
    are_after = labels != "assistant" and all(pair.continuation for pair in pairs)
    follow = labels in OWN or are_after
    return -2 if method_of(method).source == "gradients" and not follow else -1
