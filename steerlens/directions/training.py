"""Train a vector on the frozen model: by the reference loss, or on given continuations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.data.items import PreferenceItems
from steerlens.data.pairs import ContrastivePairs
from steerlens.directions.differences import collect_differences
from steerlens.directions.directions import Directions
from steerlens.directions.methods import METHODS, fit_directions
from steerlens.directions.old_names import with_grouped
from steerlens.engine.backward import adding, differentiable
from steerlens.engine.batches import Batch, make_pair_batches
from steerlens.engine.capture import reading_hook
from steerlens.engine.resume import Labels, Residual, advance, labels_logprob, run_from
from steerlens.engine.tokenization import TokenizedPairs, tokenize_items, tokenize_pairs
from steerlens.errors import InputError
from steerlens.loss import (
    contrastive_steering_loss,
    mean_by_prompt,
    preference_loss,
    promotion_loss,
)
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import Layers, hook_layer, readout_hook, resid_post
from steerlens.models.loading import inference
from steerlens.progress import Progress, part_of, silent
from steerlens.validation import Count, Positive, Whole, checked

SIGNS = (1.0, -1.0)
"""The coefficients a vector is trained at."""
TOLERANCE = 0.01
"""The loss of logprob that the reference objective permits."""
VALIDATION = 0.2
"""The share of the examples that decides when to stop."""
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
    """Directions that were trained, how long the vectors were, and the losses on the way.

    `norms` maps hook name to the norm of the trained vector (residual units). `history` has one row
    a hook and epoch: `hook_name, epoch, train_loss, validation_loss, norm`.
    """

    directions: Directions
    norms: dict[str, float]
    history: pd.DataFrame


@with_grouped("schedule", Schedule, frozenset(field.name for field in fields(Schedule)))
@checked
def train_directions(
    model: HookedModel,
    pairs: ContrastivePairs,
    *,
    layers: Layers,
    objective: str = "reference",
    items: PreferenceItems | None = None,
    position: int = -1,
    schedule: Schedule = Schedule(),
    seed: Whole = 0,
    batch_size: Count | None = None,
    progress: Progress | None = None,
) -> Trained:
    """A vector at every hook, trained with Adam on the frozen model at c = +1 and c = -1.

    `reference`: the loss against the unsteered model (`contrastive_steering_loss`, tolerance 0.01,
    weight 10000) of the pairs, positive prompts pushed by `+c v` and negative ones by `-c v`, read
    at the readout hook along its frozen mean-difference direction; at c = -1 the difference shall
    go the other way. `promotion`: `promotion_loss` of the `items`' continuations, the positive one
    promoted at +1 and suppressed at -1. `preference`: `preference_loss` of their gaps. All
    positions are steered.

    Training starts at 0; a fifth of the examples is held out, and the vector with the lowest loss
    on them is kept. The readouts keep their mean-difference direction. Cost of an epoch: two
    forward and two backward passes of all examples through the blocks from the hook on.

    Args:
        layers: As in `resolve_hooks`.
        objective: `reference`, `promotion` or `preference`.
        items: What the last two are trained on.
        position: The token of each prompt at which the readout is read.
        schedule: Epochs, steps and when to stop.
        seed: Decides the order and the held-out fifth.
        batch_size: Prompts in a pass that collects the differences; by default what the device can
            use.
        progress: Told of `schedule.max_epochs` for every hook, those that it was spared too once it
            has ended; nobody by default.

    Raises:
        InputError: An unknown objective, missing items, fewer than 5 examples, a vector that did
            not move, or a number that cannot be used; and as `collect_differences`.

    Examples:
        >>> schedule = sl.directions.Schedule(max_epochs=2)
        >>> trained = sl.directions.train_directions(model, pairs, layers=[1], schedule=schedule)
        >>> trained.directions
        Directions(optimised, 1 hooks, d_model 32, position -1)
        >>> list(trained.history)
        ['hook_name', 'epoch', 'train_loss', 'validation_loss', 'norm']
    """
    items = _items_of(objective, items)
    differences = collect_differences(
        model, pairs, layers=layers, position=position, batch_size=batch_size, progress=progress
    )
    frozen = fit_directions(differences)
    train, held_out = _split(model, pairs, items, size=schedule.examples_per_step, seed=seed)
    vectors, histories, norms = [], [], {}
    n_epochs, tell = schedule.max_epochs * len(differences.hook_names), progress or silent
    for index, hook_name in enumerate(differences.hook_names):
        both = torch.cat([differences.positive[index], differences.negative[index]])
        readout = readout_hook(hook_name, int(model.cfg.n_layers))
        step = partial(
            push_sides,
            model,
            objective=_objective(objective, frozen[readout]),
            hook_name=hook_name,
            readout=readout,
            position=position,
        )
        before = index * schedule.max_epochs
        vector, history = _train(
            step,
            *(_sides(model, part, hook_name, objective) for part in (train, held_out)),
            vector=torch.zeros(both.shape[-1], device=train[0][0].tokens.device),
            unit=float(both.norm(dim=-1).mean()) / both.shape[-1] ** 0.5,
            schedule=schedule,
            seed=seed,
            progress=part_of(tell, "training: epochs", before=before, total=n_epochs),
        )
        history.insert(0, "hook_name", hook_name)
        norm = float(vector.norm())
        if not 0 < norm < math.inf:
            raise InputError(
                f"training at {hook_name} left a vector of norm {norm} with step_size "
                f"{schedule.step_size:g}; take another step size or objective"
            )
        norms[hook_name] = norm
        vectors.append(vector / norm)
        histories.append(history)
    vectors += [frozen[name] for name in differences.readout_names]
    directions = replace(
        frozen,
        vectors=torch.stack(vectors).to(differences.positive.dtype),
        method=METHOD_OF[objective],
        seed=seed,
    )
    return Trained(directions, norms, pd.concat(histories, ignore_index=True))


@dataclass(frozen=True)
class Side:
    """One side of an example: its prompts twice, to be pushed by `signs` times the vector.

    The first half is at c = +1, the other at -1. `residual` enters the hook's block, each prompt
    once (None: from the tokens on). `labels` is None where they do not matter, and the side is then
    run to the readout only. `unsteered` is the labels' logprob at 0 (nats per token; NaN without).
    """

    batch: Batch
    signs: Float[Tensor, "pushed_row 1 1"]
    residual: Residual | None
    labels: Labels | None
    unsteered: Float[Tensor, " row"]


class Pushed(NamedTuple):
    """What an objective is given of a side: readout (residual units) and logprob (nats per token).

    Both at c = +1 and -1 (`sign`); `unsteered` is the logprob at 0. Logprobs of a side without
    labels are NaN.
    """

    readout: Float[Tensor, "sign row d_model"]
    logprob: Float[Tensor, "sign row"]
    unsteered: Float[Tensor, " row"]


Objective = Callable[[Pushed, Pushed], Float[Tensor, ""]]
"""The loss of the positive and the negative side."""


def make_side(
    model: HookedModel, batch: Batch, hook_name: str, *, sign: int, with_labels: bool = True
) -> Side:
    """A side pushed by `sign` times the vector at c = +1, with what is known unsteered."""
    tokens, mask, block = batch.tokens, batch.attention_mask, hook_layer(hook_name)
    logprob = torch.full((len(batch.prompts),), torch.nan, device=tokens.device)
    residual = None
    with inference(model):
        if block > 0:
            residual = advance(model, tokens, mask, start=None, block=block)
        if with_labels:
            final = advance(model, tokens, mask, start=residual, block=int(model.cfg.n_layers))
            labels = Labels.of(batch)
            logprob = mean_by_prompt(
                labels_logprob(model, labels.outputs(final.values), labels.ids),
                batch.label_mask()[:, 1:],
            )
    n = len(SIGNS)
    pushed = Batch(batch.rows * n, batch.prompts * n, tokens.repeat(n, 1), mask.repeat(n, 1))
    signs = sign * torch.tensor(SIGNS, device=tokens.device).repeat_interleave(len(batch.prompts))
    labels_twice = Labels.of(pushed) if with_labels else None
    return Side(pushed, signs[:, None, None], residual, labels_twice, logprob)


def _sides(
    model: HookedModel, batches: Sequence[tuple[Batch, Batch]], hook_name: str, objective: str
) -> list[tuple[Side, Side]]:
    is_pairs = objective == "reference"  # which has the labels of the positive prompts alone
    others: dict[str, Any] = {"sign": -1 if is_pairs else 1, "with_labels": not is_pairs}
    side = partial(make_side, model, hook_name=hook_name)
    return [(side(up, sign=1), side(down, **others)) for up, down in batches]


def push_sides(
    model: HookedModel,
    sides: tuple[Side, Side],
    vector: Float[Tensor, " d_model"],
    objective: Objective,
    *,
    hook_name: str,
    readout: str,
    position: int,
    with_gradient: bool = True,
) -> tuple[float, Float[Tensor, " d_model"]]:
    """The objective under `+vector` and `-vector` at a hook, and its gradient there.

    Readouts are at `position`. Without `with_gradient` the gradient is zero and not computed.
    """

    def push(side: Side) -> Pushed:
        batch, start, labels = side.batch, side.residual, side.labels
        if start is not None:
            start = replace(start, values=start.values.repeat(len(SIGNS), 1, 1))
        states: dict[str, Tensor] = {}
        final = run_from(
            *(model, batch.tokens, batch.attention_mask),
            start=start,
            fwd_hooks=[
                (hook_name, adding(side.signs * vector, batch.steered_mask("all"))),
                reading_hook(states, readout, batch.indices(position)),
            ],
            last_hook=readout if labels is None else resid_post(int(model.cfg.n_layers) - 1),
        )
        shape = len(SIGNS), len(side.unsteered)
        state = states[readout].reshape(*shape, -1)
        logprob = state.detach().new_full(shape, torch.nan)
        if labels is not None:
            by_label = labels.read(model, final).logprob
            logprob = mean_by_prompt(by_label, batch.label_mask()[:, 1:]).reshape(shape)
        return Pushed(state, logprob, side.unsteered)

    with differentiable(model, with_gradient=with_gradient):
        loss = objective(*map(push, sides))
        if not with_gradient:
            return float(loss), torch.zeros_like(vector)
        (gradient,) = torch.autograd.grad(loss, vector, materialize_grads=True)
    return float(loss.detach()), gradient


def _train(
    step: Callable[..., tuple[float, Float[Tensor, " d_model"]]],
    examples: Sequence[tuple[Side, Side]],
    held_out: Sequence[tuple[Side, Side]],
    *,
    vector: Float[Tensor, " d_model"],
    unit: float,
    schedule: Schedule,
    seed: int,
    progress: Progress,
) -> tuple[Float[Tensor, " d_model"], pd.DataFrame]:
    """The vector, from `vector` on, with the lowest validation loss; the losses of every epoch."""
    generator, max_epochs = np.random.default_rng(seed), schedule.max_epochs
    sizes = [len(positive.unsteered) for positive, _ in held_out]
    vector.requires_grad_()
    adam = torch.optim.Adam([vector], lr=float(schedule.step_size) * unit)
    best, best_loss, since = vector.detach().clone(), math.inf, 0
    rows = []
    progress("epochs", 0, max_epochs)
    for epoch in range(max_epochs):
        losses = []
        for i in generator.permutation(len(examples)):
            loss, vector.grad = step(examples[i], vector)
            adam.step()
            losses.append(loss)
        on_held_out = [step(sides, vector, with_gradient=False)[0] for sides in held_out]
        validation = float(np.average(on_held_out, weights=sizes))
        rows.append((epoch, float(np.mean(losses)), validation, float(vector.detach().norm())))
        since += 1
        if validation < best_loss:
            best, best_loss, since = vector.detach().clone(), validation, 0
        is_over = since >= schedule.patience
        progress("epochs", max_epochs if is_over else epoch + 1, max_epochs)
        if is_over:
            break
    return best.cpu(), pd.DataFrame(
        rows, columns=["epoch", "train_loss", "validation_loss", "norm"]
    )


def _items_of(objective: str, items: PreferenceItems | None) -> PreferenceItems | None:
    """What the objective is trained on; None for the pairs."""
    if objective not in METHOD_OF:
        raise InputError(f"no objective {objective!r}; there are {', '.join(METHOD_OF)}")
    if objective == "reference":
        return None
    if items is None:
        raise InputError(
            f"the {objective} objective is trained on continuations; give items (PreferenceItems)"
        )
    return items


Batches = tuple[tuple[Batch, Batch], ...]
"""Positive and negative sides of as many examples; each is a step."""


def _split(
    model: HookedModel,
    pairs: ContrastivePairs,
    items: PreferenceItems | None,
    *,
    size: int,
    seed: int,
) -> tuple[Batches, Batches]:
    """Pairs, or items with either continuation, to train on and held out, in batches of `size`."""
    tokenized = tokenize_pairs(model, pairs)
    if items is not None:
        tokenized = TokenizedPairs(*tokenize_items(model, items))
    n = len(tokenized.positive)
    if n < MIN_EXAMPLES:
        raise InputError(
            f"training holds a fifth of the examples out, so it takes at least {MIN_EXAMPLES}; got "
            f"{n}"
        )
    order = np.random.default_rng(seed).permutation(n)
    held_out, train = (
        make_pair_batches(
            model,
            TokenizedPairs(
                tuple(tokenized.positive[i] for i in sorted(part)),
                tuple(tokenized.negative[i] for i in sorted(part)),
            ),
            size,
        )
        for part in np.split(order, [round(VALIDATION * n)])
    )
    return train, held_out


def _objective(name: str, direction: Float[Tensor, " d_model"]) -> Objective:
    """The objective of that name; `direction` is the readout's frozen one."""

    def reference(positive: Pushed, negative: Pushed) -> Float[Tensor, ""]:
        up, down = (
            contrastive_steering_loss(
                positive.readout[c],
                negative.readout[c],
                positive.logprob[c],
                direction.to(positive.readout) * sign,
                positive.unsteered,
                tolerance=TOLERANCE,
            ).loss
            for c, sign in enumerate((1, -1))
        )
        return up + down

    def promotion(positive: Pushed, negative: Pushed) -> Float[Tensor, ""]:
        up = promotion_loss(positive.logprob[0], negative.logprob[0])
        return up + promotion_loss(negative.logprob[1], positive.logprob[1])

    def preference(positive: Pushed, negative: Pushed) -> Float[Tensor, ""]:
        up, down = positive.logprob - negative.logprob
        return preference_loss(up, positive.unsteered - negative.unsteered, down)

    return {"reference": reference, "promotion": promotion, "preference": preference}[name]
