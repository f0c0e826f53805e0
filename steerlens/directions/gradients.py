"""The gradient of the loss at every hook, pair by pair: one pass over the pairs.

The two terms are kept apart, as their balance is a choice that needs no second pass.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from steerlens.data.pairs import AnyPairs, as_pairs
from steerlens.directions.differences import collect_differences, missing_readouts
from steerlens.directions.directions import Directions
from steerlens.directions.gradient_rows import LossGradients
from steerlens.directions.methods import frozen_axis
from steerlens.directions.old_names import with_old_gradient_keywords
from steerlens.engine.backend import for_hooks
from steerlens.engine.backward import loss_rows, pairs_per_pass
from steerlens.engine.batches import make_pair_batches
from steerlens.engine.capture import are_finite
from steerlens.engine.engine import Engine
from steerlens.engine.labels import LabelKind, labelled_pairs
from steerlens.engine.memory import check_memory
from steerlens.engine.positions import Position, one_token
from steerlens.engine.tokenization import TokenizedPairs
from steerlens.errors import HookError, InputError, ModelError
from steerlens.loss import MARGIN, WEIGHT
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import Layers, hook_layer, readout_hook, resid_post, resolve_hooks
from steerlens.models.identity import weights_fingerprint
from steerlens.models.weight_processing import weight_processing
from steerlens.progress import Progress, by_default
from steerlens.validation import Count, Whole, checked


@with_old_gradient_keywords
@checked
def loss_gradients(
    model: HookedModel,
    pairs: AnyPairs,
    *,
    layers: Layers = "all",
    position: Position = -2,
    axis: Directions | str | None = None,
    loss_hook: str | None = None,
    labels: LabelKind | None = None,
    margin: float | int = MARGIN,
    n_scores: Whole = 0,
    seed: Whole = 0,
    batch_size: Count | None = None,
    progress: Progress | None = None,
) -> LossGradients:
    """The gradient of the noref loss at every hook, for each pair (see `LossGradients`).

        -||hs_pos_i - hs_neg_i||_2 + weight * relu(margin * baseline_i - logp_i)^2   without an axis
        -(hs_pos_i - hs_neg_i) . axis + the same                                     with one

    The weight is 10000, or another `with_weight`. Cost: docs/maths.md, "Gradients of the loss".

    Args:
        layers: As in `resolve_hooks`.
        position: The token of each prompt whose states are read and differentiated. In every
            positive prompt a label must come after it: -1 needs continuations, -2 does not.
        axis: What the separation is measured on: a direction at every loss hook, by any method, or
            the name of a method that is fitted from these pairs' differences at `position` on the
            unsteered model, most often "pca". None, the default: the norm.
        loss_hook: Where the separation is that of the activations: a block's output, or "own" for
            every hook itself; by default the readout hook (see `readout_hook`).
        labels: The tokens whose logprob the coherence term keeps, as of `Study`: "own" has labels
            after position -1, too. Default: that of the pairs (`Study`).
        margin: As in `contrastive_steering_loss_noref`; from 1 on the coherence gradient is 0.
        n_scores: Label sequences drawn for each positive prompt (see `LossGradients.scores`).
        seed: That of the scores, of labels that are drawn, and of an axis that is drawn.
        batch_size: Pairs in a pass; by default what the device can use.
        progress: Told of the pairs. Default: a bar in a terminal or a notebook.

    Raises:
        InputError: A position of several tokens, outside a prompt or without a label after it,
            hooks that are not as wide as the residual stream, a margin or number that cannot be
            used, or an axis of another model or that no method fits to differences.
        HookError: An unknown hook, a loss hook before a hook, or an axis that lacks a loss hook.
        ModelError: NaN or inf in the gradients, or label positions that cannot be run alone.
        MemoryLimitError: A pass would not fit into the device's memory.

    Examples:
        >>> sl.loss_gradients(model, pairs, layers=[1, 2])
        LossGradients(2 hooks, 8 pairs, d_model 32)
        >>> on_axis = sl.loss_gradients(model, pairs, layers=[1, 2], axis="pca", loss_hook="own")
        >>> axis = sl.fit(model, pairs, method="pca", layers=[1, 2], position=-2)
        >>> (on_axis.separation_positive[0] @ axis["blocks.1.hook_resid_post"]).unique()
        tensor([-1.])
    """
    hook_names = resolve_hooks(model, layers)
    readouts = missing_readouts(hook_names, int(model.cfg.n_layers))
    loss_hooks = _loss_hooks(model, hook_names, readouts, loss_hook)
    position = one_token(position, "gradients")
    pairs = as_pairs(pairs)
    pairs.check_paired("gradients are")
    tokenized = labelled_pairs(model, pairs, labels, seed=seed)
    _check_position(tokenized, position)
    targets = dict(zip(hook_names + readouts, loss_hooks, strict=True))
    runner = for_hooks(model, (*targets, *loss_hooks))
    batches = make_pair_batches(model, tokenized, batch_size or pairs_per_pass(runner, tokenized))
    sides = [positive for positive, _ in batches]
    check_memory(runner, sides, with_gradients=True)
    shared: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    unsteered = partial(
        collect_differences, model, pairs, layers=loss_hooks, position=position, **shared
    )
    frozen = None
    if axis is not None:
        frozen = frozen_axis(model, axis, loss_hooks, unsteered=unsteered, seed=seed)
    engine = Engine(runner, progress=by_default(progress))
    drawn = {"n_scores": n_scores, "seed": seed}
    rows = loss_rows(
        engine.stage("gradients: pairs"), batches, targets, axis=frozen, position=position, **drawn
    )
    n_blocks = sum(positive.tokens.numel() for positive in sides) * engine.n_layers
    # d relu(margin * b - l)^2 = -2 relu((margin - 1) * l) dl, as b is l with its gradient stopped.
    slope = -2 * torch.relu((margin - 1) * rows.logprob)
    gradients = LossGradients(
        *(hook_names, readouts, loss_hooks),
        separation_positive=rows.separation_positive,
        separation_negative=rows.separation_negative,
        coherence=slope[:, None] * rows.logprob_slope,
        weights=torch.full((len(targets),), float(WEIGHT)),
        logprob=rows.logprob,
        scores=rows.scores.flatten(1, 2),
        margin=margin,
        position=position,
        fingerprint=pairs.fingerprint,
        forward_equivalents=round(engine.cost.blocks / n_blocks, 3),
        axis=None if frozen is None else frozen.method,
        weight_processing=weight_processing(model),
        weights_fingerprint=weights_fingerprint(model),
        pair_hashes=pairs.prompt_hashes,
    )
    _check_finite(gradients)
    return gradients


def _loss_hooks(
    model: HookedModel, hook_names: Sequence[str], readouts: Sequence[str], loss_hook: str | None
) -> tuple[str, ...]:
    """The loss hook of every hook, and of every readout: itself where it comes after that."""
    names = (*hook_names, *readouts)
    if loss_hook == "own":
        return names
    if loss_hook is None:
        return tuple(readout_hook(name, int(model.cfg.n_layers)) for name in names)
    resolved, *others = resolve_hooks(model, loss_hook)
    if others:
        raise HookError(f"loss_hook is one hook, and {loss_hook!r} names {1 + len(others)}")
    deepest = hook_layer(resolved)
    if resolved != resid_post(deepest):
        raise HookError(f"loss_hook is a block's output, blocks.N.hook_resid_post, not {resolved}")
    late = [name for name in hook_names if hook_layer(name) > deepest]
    if late:
        raise HookError(
            f"the loss hook {resolved} comes before {', '.join(late)}, which cannot move it; give "
            "a later loss hook, or earlier layers"
        )
    return tuple(name if hook_layer(name) > deepest else resolved for name in names)


def _check_position(pairs: TokenizedPairs, position: int) -> None:
    for prompt in pairs.negative:
        prompt.index(position)
    for prompt in pairs.positive:
        if prompt.index(position) >= prompt.label_tokens[-1]:
            raise InputError(
                f"no label comes after position {position} of the {prompt.where}, so its coherence "
                "gradient would be 0; take an earlier position, or give every pair a continuation"
            )


def _check_finite(gradients: LossGradients) -> None:
    g = gradients
    terms = (g.separation_positive, g.separation_negative, g.coherence, g.scores)
    is_finite = torch.stack([are_finite(term) for term in terms]).all(dim=0)
    bad = [n for n, ok in zip(g.all_hook_names, is_finite.tolist(), strict=True) if not ok]
    if bad:
        raise ModelError(
            f"NaN or inf in the gradients at {', '.join(bad)}; load the model in float32 or "
            "bfloat16"
        )
