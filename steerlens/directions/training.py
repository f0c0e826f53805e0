"""Train a vector on the frozen model: by the reference loss, or on given continuations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.data.items import PreferenceItems
from steerlens.data.pairs import ContrastivePairs
from steerlens.directions.differences import collect_differences
from steerlens.directions.directions import Directions
from steerlens.directions.methods import fit_directions
from steerlens.engine.batches import Batch, make_pair_batches
from steerlens.engine.push_steps import Example, Objective, Outputs, make_side, push_example
from steerlens.engine.tokenization import TokenizedPairs, tokenize_items, tokenize_pairs
from steerlens.errors import InputError, finite, whole
from steerlens.loss import contrastive_steering_loss, preference_loss, promotion_loss
from steerlens.models.hooks import Layers, readout_hook
from steerlens.models.loading import HookedModel
from steerlens.progress import Progress, part_of, silent

TOLERANCE = 0.01
"""The loss of logprob that the reference objective permits."""
VALIDATION = 0.2
"""The share of the examples that decides when to stop."""
MIN_EXAMPLES = 5

OBJECTIVES = ("reference", "promotion", "preference")


@dataclass(frozen=True)
class Trained:
    """Directions that were trained, how long the vectors were, and the losses on the way.

    `norms` maps hook name to the norm of the trained vector (residual units). `history` has one row
    a hook and epoch: `hook_name, epoch, train_loss, validation_loss, norm`.
    """

    directions: Directions
    norms: dict[str, float]
    history: pd.DataFrame


def train_directions(
    model: HookedModel,
    pairs: ContrastivePairs,
    *,
    layers: Layers,
    objective: str = "reference",
    items: PreferenceItems | None = None,
    position: int = -1,
    max_epochs: int = 8,
    patience: int = 2,
    step_size: float | int = 0.01,
    examples_per_step: int = 8,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """A vector at every hook, trained with Adam on the frozen model at c = +1 and c = -1.

    `reference`: the loss against the unsteered model (`contrastive_steering_loss`, tolerance 0.01,
    weight 10000) of the pairs, positive prompts pushed by `+c v` and negative ones by `-c v`, read
    at the readout hook along its frozen mean-difference direction; at c = -1 the difference shall
    go the other way. `promotion`: `promotion_loss` of the `items`' continuations, the positive one
    promoted at +1 and suppressed at -1. `preference`: `preference_loss` of their gaps. The last
    two need `items`. All positions are steered.

    Training starts at 0 with steps of `step_size` times the mean residual norm at the hook, over
    the root of d_model, and ends after `max_epochs`, or when the loss on a held-out fifth of the
    examples has not fallen for `patience` epochs; the best vector is kept. A step takes up to
    `examples_per_step` examples of about one length. The readouts keep their mean-difference
    direction. `seed` decides the order and the held-out fifth. Cost of an epoch: two forward and
    two backward passes of all examples through the blocks from the hook on. `progress` counts
    `max_epochs` for every hook, those that it was spared too once it has ended.

    Raises `InputError` on an unknown objective, missing items, fewer than 5 examples, or a
    vector that did not move; `InputError` on a number that cannot be used; and as
    `collect_differences` does.

    Examples:
        >>> trained = sl.train_directions(model, pairs, layers=[1], max_epochs=2)
        >>> trained.directions
        Directions(optimised, 1 hooks, d_model 32, position -1)
        >>> list(trained.history)
        ['hook_name', 'epoch', 'train_loss', 'validation_loss', 'norm']
    """
    if objective not in OBJECTIVES:
        raise InputError(f"no objective {objective!r}; there are {', '.join(OBJECTIVES)}")
    if objective != "reference" and items is None:
        raise InputError(
            f"the {objective} objective is trained on continuations; give items (PreferenceItems)"
        )
    if not (finite("step_size", step_size) > 0 and max_epochs > 0 and patience > 0):
        raise InputError("step_size, max_epochs and patience must be above 0")
    differences = collect_differences(
        model,
        pairs,
        layers=layers,
        position=position,
        batch_size=batch_size,
        progress=progress,
    )
    frozen = fit_directions(differences)
    groups = _groups(
        model,
        pairs,
        items if objective != "reference" else None,
        size=whole("examples_per_step", examples_per_step, 1),
        seed=whole("seed", seed, 0),
    )
    trained, histories, norms = [], [], {}
    n_epochs = max_epochs * len(differences.hook_names)
    for before, hook_name in zip(
        range(0, n_epochs, max_epochs), differences.hook_names, strict=True
    ):
        tell = part_of(progress or silent, "training: epochs", before=before, total=n_epochs)
        index = differences.all_hook_names.index(hook_name)
        both = torch.cat([differences.positive[index], differences.negative[index]])
        readout = readout_hook(hook_name, int(model.cfg.n_layers))
        train, held_out = (
            [_example(model, both_sides, hook_name, position, objective) for both_sides in some]
            for some in (groups.train, groups.held_out)
        )
        run = _Training(
            model=model,
            hook_name=hook_name,
            readout=readout,
            objective=_objective(objective, frozen[readout]),
            learning_rate=float(step_size)
            * float(both.norm(dim=-1).mean())
            / both.shape[-1] ** 0.5,
            max_epochs=max_epochs,
            patience=patience,
            seed=seed,
        )
        vector, history = run.train(train, held_out, d_model=both.shape[-1], progress=tell)
        norm = float(vector.norm())
        if not (math.isfinite(norm) and norm > 0):
            raise InputError(
                f"training at {hook_name} left a vector of norm {norm} with step_size "
                f"{step_size:g}; take another step size or objective"
            )
        norms[hook_name] = norm
        trained.append(vector / norm)
        histories.append(history)
    readouts = [frozen[name] for name in differences.readout_names]
    directions = Directions(
        hook_names=differences.hook_names,
        readout_names=differences.readout_names,
        vectors=torch.stack([*trained, *readouts]).to(differences.positive.dtype),
        method="optimised" if objective == "reference" else f"optimised_{objective}",
        position=position,
        seed=seed,
        fingerprint=differences.fingerprint,
        weight_processing=differences.weight_processing,
    )
    return Trained(directions, norms, pd.concat(histories, ignore_index=True))


@dataclass(frozen=True)
class _Training:
    """One hook's training."""

    model: HookedModel
    hook_name: str
    readout: str
    objective: Objective
    learning_rate: float
    max_epochs: int
    patience: int
    seed: int

    def train(
        self,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        *,
        d_model: int,
        progress: Progress,
    ) -> tuple[Float[Tensor, " d_model"], pd.DataFrame]:
        """The vector with the lowest validation loss, and the losses of every epoch."""
        generator = np.random.default_rng(self.seed)
        sizes = [len(example.positive.batch.rows) for example in held_out]
        device = examples[0].positive.batch.tokens.device
        vector = torch.zeros(d_model, device=device, requires_grad=True)
        adam = torch.optim.Adam([vector], lr=self.learning_rate)
        best, best_loss, since = vector.detach().clone(), math.inf, 0
        rows = []
        progress("epochs", 0, self.max_epochs)
        for epoch in range(self.max_epochs):
            losses = []
            for i in generator.permutation(len(examples)):
                loss, gradient = self._step(examples[i], vector)
                adam.zero_grad()
                vector.grad = gradient
                adam.step()
                losses.append(loss)
            on_held_out = [
                self._step(example, vector, with_gradient=False)[0] for example in held_out
            ]
            validation = float(np.average(on_held_out, weights=sizes))
            norm = float(vector.detach().norm())
            rows.append((self.hook_name, epoch, float(np.mean(losses)), validation, norm))
            since += 1
            if validation < best_loss:
                best, best_loss, since = vector.detach().clone(), validation, 0
            is_over = since >= self.patience
            progress("epochs", self.max_epochs if is_over else epoch + 1, self.max_epochs)
            if is_over:
                break
        names = ["hook_name", "epoch", "train_loss", "validation_loss", "norm"]
        return best.cpu(), pd.DataFrame(rows, columns=names)

    def _step(
        self, example: Example, vector: Tensor, *, with_gradient: bool = True
    ) -> tuple[float, Float[Tensor, " d_model"]]:
        """The loss of an example under +vector and -vector, and its gradient."""
        return push_example(
            self.model,
            example,
            vector,
            hook_name=self.hook_name,
            readout=self.readout,
            objective=self.objective,
            with_gradient=with_gradient,
        )


def _example(
    model: HookedModel,
    sides: tuple[Batch, Batch],
    hook_name: str,
    position: int,
    objective: str,
) -> Example:
    is_pairs = objective == "reference"
    positive = make_side(model, sides[0], hook_name, sign=1)
    # The reference loss has the labels of the positive prompts alone.
    negative = make_side(
        model, sides[1], hook_name, sign=-1 if is_pairs else 1, with_labels=not is_pairs
    )
    return Example(positive, negative, position)


@dataclass(frozen=True)
class _Groups:
    """Batches of examples, positive and negative sides alike; each of `train` is a step."""

    train: tuple[tuple[Batch, Batch], ...]
    held_out: tuple[tuple[Batch, Batch], ...]


def _groups(
    model: HookedModel,
    pairs: ContrastivePairs,
    items: PreferenceItems | None,
    *,
    size: int,
    seed: int,
) -> _Groups:
    """Pairs, or items with either continuation: a random fifth held out, in batches of `size`."""
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
    parts = np.split(order, [round(VALIDATION * n)])
    held_out, train = (
        make_pair_batches(
            model,
            TokenizedPairs(
                tuple(tokenized.positive[i] for i in sorted(part)),
                tuple(tokenized.negative[i] for i in sorted(part)),
            ),
            size,
        )
        for part in parts
    )
    return _Groups(train, held_out)


def _objective(name: str, direction: Float[Tensor, " d_model"]) -> Objective:
    """The objective of that name; `direction` is the readout's frozen one."""

    def reference(found: Outputs) -> Float[Tensor, ""]:
        up, down = (
            contrastive_steering_loss(
                found.readout_positive[c],
                found.readout_negative[c],
                found.logprob_positive[c],
                direction.to(found.readout_positive) * sign,
                found.unsteered_positive,
                tolerance=TOLERANCE,
            ).loss
            for c, sign in enumerate((1, -1))
        )
        return up + down

    def promotion(found: Outputs) -> Float[Tensor, ""]:
        up = promotion_loss(found.logprob_positive[0], found.logprob_negative[0])
        return up + promotion_loss(found.logprob_negative[1], found.logprob_positive[1])

    def preference(found: Outputs) -> Float[Tensor, ""]:
        up, down = found.logprob_positive - found.logprob_negative
        return preference_loss(up, found.unsteered_positive - found.unsteered_negative, down)

    objectives = {"reference": reference, "promotion": promotion, "preference": preference}
    return objectives[name]
