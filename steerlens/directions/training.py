"""Train a vector on the frozen model: by the reference loss, or on given continuations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.data.items import PreferenceItems
from steerlens.data.pairs import AnyPairs, ContrastivePairs, as_pairs
from steerlens.directions.differences import collect_differences
from steerlens.directions.directions import Directions
from steerlens.directions.methods import METHODS, directions_of, frozen_axis
from steerlens.directions.old_names import with_grouped
from steerlens.directions.training_step import (
    Push,
    Side,
    item_sides,
    make_side,
    objective_of,
    push_sides,
)
from steerlens.engine.batches import Batch, make_pair_batches
from steerlens.engine.labels import LabelKind, labelled_pairs
from steerlens.engine.positions import Position, one_token
from steerlens.engine.tokenization import TokenizedPairs, tokenize_items
from steerlens.errors import InputError
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import Layers, hook_layer, is_head, readout_hook
from steerlens.progress import Progress, by_default, part_of
from steerlens.tables import Row, to_frame
from steerlens.validation import Count, Positive, Whole, checked

VALIDATION = 0.2
"""The share of the groups of examples that decides when to stop."""
MIN_EXAMPLES = 5

METHOD_OF = {method.objective: method.name for method in METHODS.values() if method.objective}
"""Objective -> the name of the method that trains by it."""


@checked
@dataclass(frozen=True)
class Schedule:
    """How long a vector is trained, and in which steps.

    Args:
        max_epochs: Passes over the examples at the most.
        patience: Epochs without a lower loss on the held-out examples that end it sooner.
        step_size: Adam's, in mean residual norms at the hook over the root of d_model.
        examples_per_step: Examples, of about one length, in a step at the most.

    Raises:
        InputError: A number that is not above 0.
    """

    max_epochs: Count = 8
    patience: Count = 2
    step_size: Positive = 0.01
    examples_per_step: Count = 8


@dataclass(frozen=True, eq=False)
class Trained:
    """Directions that were trained, how long the vectors were, and what they did on the way.

    `norms` maps hook name to the norm of the trained vector (residual units). `history` has the
    columns `training`: one row a hook and step, measured on the step's examples before it,
    and one an epoch on the held-out examples, the first before any step.
    """

    directions: Directions
    norms: dict[str, float]
    history: pd.DataFrame


@with_grouped("schedule", Schedule, frozenset(field.name for field in fields(Schedule)))
@checked
def train_directions(
    model: HookedModel,
    pairs: AnyPairs,
    *,
    layers: Layers,
    objective: str = "reference",
    axis: Directions | str | None = "pca",
    items: PreferenceItems | None = None,
    position: Position = -1,
    labels: LabelKind | None = None,
    schedule: Schedule = Schedule(),
    seed: Whole = 0,
    batch_size: Count | None = None,
    progress: Progress | None = None,
) -> Trained:
    """A vector at every hook, trained with Adam on the frozen model at c = +1 and c = -1.

    `reference` trains by the loss against the unsteered model (`contrastive_steering_loss`), read
    at the readout hook along its frozen axis; `promotion` and `preference` by those losses of the
    items' continuations. All positions are steered. Training starts at 0; a fifth of the examples'
    groups is held out (of the examples, where there are fewer than five groups), and the vector
    with the lowest loss on them is kept. What is pushed which way, without an axis too, and what an
    epoch costs: "Training" in the maths.

    Args:
        layers: As in `resolve_hooks`.
        objective: `reference`, `promotion` or `preference`.
        axis: What the separation is measured on: a direction at every readout hook, by any method,
            or the name of a method that is fitted from the differences of these pairs, on the
            unsteered model and signed to the positive side. None: the norm; `history` is then
            measured on the PCA axis, which the readouts keep.
        items: What the last two are trained on.
        position: The token of each prompt at which the readout is read.
        labels: The tokens whose logprob the reference loss keeps, as of `Study`. Default: that of
            the pairs.
        schedule: Epochs, steps and when to stop.
        seed: Decides the order and the held-out fifth, and an axis that is drawn.
        batch_size: Prompts in a pass that collects the differences; by default what the device can
            use.
        progress: Told of `schedule.max_epochs` for every hook, those that it was spared too once it
            has ended. Default: bars in a terminal or a notebook.

    Raises:
        InputError: An unknown objective, a position of several tokens, missing items, fewer than 5
            examples, a vector that did not move, a number that cannot be used, or an axis of
            another model or that no method fits to differences; and as `collect_differences`.
        HookError: An unknown hook, or an axis that lacks a readout hook.

    Examples:
        >>> schedule = sl.directions.Schedule(max_epochs=2)
        >>> trained = sl.directions.train_directions(model, pairs, layers=[1], schedule=schedule)
        >>> trained.directions
        Directions(optimised, 1 hooks, d_model 32, position -1)
        >>> held_out = trained.history[trained.history.part == "held_out"]
        >>> list(held_out.epoch), bool(held_out.projection.is_monotonic_increasing)
        ([0, 1, 2], True)
    """
    position = one_token(position, "the states of training")
    pairs = as_pairs(pairs)
    pairs.check_paired("a trained direction is")
    items = _items_for(objective, items)
    differences = collect_differences(
        model, pairs, layers=layers, position=position, batch_size=batch_size, progress=progress
    )
    hook_names = differences.hook_names
    readouts = [readout_hook(name, int(model.cfg.n_layers)) for name in hook_names]
    at_heads = is_head(hook_names[0])
    at_readouts = partial(
        collect_differences,
        *(model, pairs),
        layers=readouts,
        position=position,
        batch_size=batch_size,
    )
    frozen = frozen_axis(
        *(model, "pca" if axis is None else axis, readouts),
        unsteered=at_readouts if at_heads else lambda: differences,
        seed=seed,
    )
    method = METHODS[METHOD_OF[objective]].on(None if axis is None else frozen.method).name
    size = schedule.examples_per_step
    train, held_out = _split(model, pairs, items, labels=labels, size=size, seed=seed)
    vectors, norms = [], {}
    histories: list[Row] = []
    n_epochs, tell = schedule.max_epochs * len(hook_names), by_default(progress)
    for index, (hook_name, readout) in enumerate(zip(hook_names, readouts, strict=True)):
        both = torch.cat([differences.positive[index], differences.negative[index]])
        step = partial(
            push_sides,
            model,
            objective=objective_of(objective, None if axis is None else frozen[readout]),
            hook_name=hook_name,
            readout=readout,
            position=position,
        )
        before = index * schedule.max_epochs
        vector, history = _train(
            step,
            *(_sides(model, part, hook_name, objective) for part in (train, held_out)),
            axis=frozen[readout] if objective == "reference" else None,
            vector=torch.zeros(both.shape[-1], device=train[0][0].tokens.device),
            unit=float(both.norm(dim=-1).mean()) / both.shape[-1] ** 0.5,
            schedule=schedule,
            seed=seed,
            progress=part_of(tell, "training: epochs", before=before, total=n_epochs),
        )
        norm = float(vector.norm())
        if not 0 < norm < math.inf:
            raise InputError(
                f"training at {hook_name} left a vector of norm {norm} with step_size "
                f"{schedule.step_size:g}; take another step size or objective"
            )
        norms[hook_name] = norm
        vectors.append(vector / norm)
        at = {"method": method, "hook_name": hook_name, "layer": hook_layer(hook_name)}
        histories += [{**at, **row} for row in history]
    vectors += [frozen[name].cpu() for name in differences.readout_names]
    directions = directions_of(differences, vectors, method=method, seed=seed)
    if at_heads:
        directions = directions.read_along(frozen, readouts)
    attrs = {"method": method, "axis": frozen.method, "position": position, "seed": seed}
    attrs |= {"fitted_on": differences.fingerprint, "settings": asdict(schedule)}
    return Trained(directions, norms, to_frame(histories, "training", attrs))


def _items_for(objective: str, items: PreferenceItems | None) -> PreferenceItems | None:
    """The items that an objective is trained on, if any. Raises `InputError` where it lacks one."""
    if objective not in METHOD_OF:
        raise InputError(f"no objective {objective!r}; there are {', '.join(METHOD_OF)}")
    if objective == "reference":
        return None
    if items is None:
        raise InputError(
            f"the {objective} objective is trained on continuations; give items (PreferenceItems)"
        )
    return items


def _sides(
    model: HookedModel, batches: Sequence[tuple[Batch, Batch]], hook_name: str, objective: str
) -> list[tuple[Side, ...]]:
    if objective != "reference":
        return item_sides(model, batches, hook_name)
    side = partial(make_side, model, hook_name=hook_name)
    # Of pairs the positive prompts alone have labels.
    return [(side(up, sign=1), side(down, sign=-1, with_labels=False)) for up, down in batches]


def _train(
    push: Callable[..., Push],
    examples: Sequence[tuple[Side, ...]],
    held_out: Sequence[tuple[Side, ...]],
    *,
    axis: Float[Tensor, " d_readout"] | None,
    vector: Float[Tensor, " d_model"],
    unit: float,
    schedule: Schedule,
    seed: int,
    progress: Progress,
) -> tuple[Float[Tensor, " d_model"], list[Row]]:
    """The vector, from `vector` on, with the lowest held-out loss; the rows of the history."""
    generator, max_epochs = np.random.default_rng(seed), schedule.max_epochs
    vector.requires_grad_()
    adam = torch.optim.Adam([vector], lr=float(schedule.step_size) * unit)
    best, best_loss, since = vector.detach().clone(), math.inf, 0
    rows: list[Row] = []

    def record(part: str, pushes: Sequence[Push], *, epoch: int, step: int) -> float:
        sizes = [len(push.positive.unsteered) for push in pushes]
        of_each = pd.DataFrame([push.measures(axis) for push in pushes])
        means = {str(n): float(np.average(of_each[n], weights=sizes)) for n in of_each}
        at = {"part": part, "epoch": epoch, "step": step, "n_examples": sum(sizes)}
        rows.append({**at, **means, "vector_norm": float(vector.detach().norm())})
        return means["loss"]

    def validate(epoch: int) -> float:
        pushes = [push(sides, vector, with_gradient=False) for sides in held_out]
        return record("held_out", pushes, epoch=epoch, step=epoch * len(examples))

    validate(0)
    progress("epochs", 0, max_epochs)
    for epoch in range(max_epochs):
        for step, i in enumerate(generator.permutation(len(examples)), epoch * len(examples)):
            pushed = push(examples[i], vector)
            record("train", [pushed], epoch=epoch, step=step)
            vector.grad = pushed.gradient
            adam.step()
        validation = validate(epoch + 1)
        since += 1
        if validation < best_loss:
            best, best_loss, since = vector.detach().clone(), validation, 0
        is_over = since >= schedule.patience
        progress("epochs", max_epochs if is_over else epoch + 1, max_epochs)
        if is_over:
            break
    return best.cpu(), rows


Batches = tuple[tuple[Batch, Batch], ...]
"""Positive and negative sides of as many examples; each is a step."""


def _split(
    model: HookedModel,
    pairs: ContrastivePairs,
    items: PreferenceItems | None,
    *,
    labels: LabelKind | None,
    size: int,
    seed: int,
) -> tuple[Batches, Batches]:
    """Pairs, or items with either continuation, to train on and held out, in batches of `size`."""
    if items is not None:
        tokenized, groups = TokenizedPairs(*tokenize_items(model, items)), items.groups
    else:
        tokenized, groups = labelled_pairs(model, pairs, labels, seed=seed), pairs.groups
    n = len(tokenized.positive)
    if n < MIN_EXAMPLES:
        raise InputError(
            f"training holds a fifth of the examples out, so it takes at least {MIN_EXAMPLES}; got "
            f"{n}"
        )
    # Fewer groups have no fifth, so that their parts share groups: the loss may stop later.
    unit = np.array(groups if len(set(groups)) >= MIN_EXAMPLES else range(n))
    order = np.random.default_rng(seed).permutation(int(unit.max()) + 1)
    chosen = np.isin(unit, order[: round(VALIDATION * len(order))])
    held_out, train = (
        make_pair_batches(
            model,
            TokenizedPairs(
                tuple(tokenized.positive[i] for i in np.flatnonzero(part)),
                tuple(tokenized.negative[i] for i in np.flatnonzero(part)),
            ),
            size,
        )
        for part in (chosen, ~chosen)
    )
    return train, held_out
