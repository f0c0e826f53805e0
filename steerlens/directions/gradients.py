"""The gradient of the loss at every hook, pair by pair: one pass over the pairs.

The two terms are kept apart, as their balance is a choice that needs no second pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.data.pairs import ContrastivePairs
from steerlens.directions.differences import missing_readouts
from steerlens.directions.old_names import with_old_gradient_keywords
from steerlens.engine.backend import for_hooks
from steerlens.engine.backward import loss_rows
from steerlens.engine.batches import make_pair_batches
from steerlens.engine.capture import are_finite
from steerlens.engine.engine import Engine
from steerlens.engine.memory import check_memory
from steerlens.engine.tokenization import TokenizedPairs, tokenize_pairs
from steerlens.errors import HookError, InputError, ModelError, told
from steerlens.loss import MARGIN, WEIGHT
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import Layers, hook_layer, readout_hook, resid_post, resolve_hooks
from steerlens.models.identity import weights_fingerprint
from steerlens.models.weight_processing import UNKNOWN, weight_processing
from steerlens.progress import Progress, silent
from steerlens.tables import GRADIENT_COLUMNS, Row, fragment, hook_label, to_frame
from steerlens.validation import Count, Whole, checked

Weight = float | int | Literal["balanced"]


@checked
@dataclass(frozen=True, eq=False)
class LossGradients:
    """Gradients of each pair's noref loss at every hook and one position; no mean over pairs.

    Row i of the separation is the gradient of `-||hs_pos_i - hs_neg_i||_2` at the hook's loss hook,
    with respect to the activation of the positive and of the negative prompt (no unit). Row i of
    `coherence` is that of `relu(margin * baseline_i - logp_i)^2` (nats^2 per residual unit) with
    respect to the positive one: the labels are the positive prompt's, so the negative prompt has no
    such gradient. `weights` multiply it, one a hook. The readouts come after `hook_names`, as in
    `Differences`. `scores` (none unless asked for) are gradients of the log-probability of label
    sequences drawn from the model, over the root of their length (nats per residual unit).

    Examples:
        >>> gradients = sl.loss_gradients(model, pairs, layers=[1, 2])
        >>> gradients.positive.shape  # both hooks and the readout, 8 pairs
        torch.Size([2, 8, 32])
        >>> balanced = gradients.with_weight("balanced")
        >>> bool((balanced.weights > 0).all())
        True
    """

    hook_names: tuple[str, ...]
    readout_names: tuple[str, ...]
    loss_hooks: tuple[str, ...]
    separation_positive: Float[Tensor, "all_hook pair d_model"]
    separation_negative: Float[Tensor, "all_hook pair d_model"]
    coherence: Float[Tensor, "all_hook pair d_model"]
    weights: Float[Tensor, " all_hook"]
    logprob: Float[Tensor, " pair"]
    scores: Float[Tensor, "all_hook score d_model"] = field(repr=False)
    margin: float
    position: int
    fingerprint: str
    forward_equivalents: float
    weight_processing: str = UNKNOWN
    weights_fingerprint: str = UNKNOWN

    @property
    def all_hook_names(self) -> tuple[str, ...]:
        """`hook_names`, then `readout_names`."""
        return self.hook_names + self.readout_names

    @property
    def positive(self) -> Float[Tensor, "all_hook pair d_model"]:
        """The gradient of the whole loss with respect to the positive prompts' activations."""
        return self.separation_positive + self.weights[:, None, None] * self.coherence

    @property
    def negative(self) -> Float[Tensor, "all_hook pair d_model"]:
        """The same for the negative prompts: of the separation alone."""
        return self.separation_negative

    def __repr__(self) -> str:
        _, n_pairs, d_model = self.coherence.shape
        return f"LossGradients({len(self.hook_names)} hooks, {n_pairs} pairs, d_model {d_model})"

    def _repr_html_(self) -> str:
        terms = gradient_terms(self)
        names = ["separation_norm", "coherence_norm", "coherence_share", "cosine", "weight"]
        table = terms[names].rename(columns=lambda name: name.replace("_", " "))
        for column in ("loss_hook", "hook_name"):
            heading = "layer" if column == "hook_name" else "loss at"
            table.insert(0, heading, [hook_label(name) for name in terms[column]])
        about = [repr(self), f"position {self.position}", f"margin {self.margin:g}"]
        return fragment([*about, f"pairs {self.fingerprint[:12]}"], table, n_labels=2)

    def with_weight(self, weight: Weight) -> "LossGradients":
        """The same gradients with another weight of the coherence term.

        Args:
            weight: From 0 on, or "balanced": at every hook the weight at which both terms have the
                same mean norm over the positive rows.

        Raises:
            InputError: The weight is negative or not finite, or nothing balances the terms, as one
                of them is zero at a hook.
        """
        check_weight(weight)
        if weight != "balanced":
            return replace(self, weights=torch.full_like(self.weights, float(weight)))
        weights = _balanced(self.separation_positive, self.coherence)
        if not bool((weights.isfinite() & (weights > 0)).all()):
            names = [
                name
                for name, weight in zip(self.all_hook_names, weights.tolist(), strict=True)
                if not (math.isfinite(weight) and weight > 0)
            ]
            raise InputError(
                f"one of the two gradients is zero at {', '.join(names)}, so no weight balances "
                "them; take a margin below 1, a loss hook further on, or a weight of your own"
            )
        return replace(self, weights=weights)


@with_old_gradient_keywords
@checked
def loss_gradients(
    model: HookedModel,
    pairs: ContrastivePairs,
    *,
    layers: Layers = "all",
    position: int = -2,
    loss_hook: str | None = None,
    margin: float | int = MARGIN,
    n_scores: Whole = 0,
    seed: Whole = 0,
    batch_size: Count | None = None,
    progress: Progress | None = None,
) -> LossGradients:
    """The gradient of the noref loss at every hook, for each pair (see `LossGradients`).

    A state influences later labels only, so the position must have a label after it in every
    positive prompt: -1 needs continuations, -2 does not. The coherence term has the weight 10000 of
    `contrastive_steering_loss_noref`; take another by `LossGradients.with_weight`, which needs no
    second pass.

    Cost: a forward pass of both sides; a backward pass of both from the loss hook and of the
    positive side from the labels; one more for each score. It is counted so where a GPU runs both
    sides in one pass, too, whose padding and zero rows take more. Weights need no gradient; memory
    grows with the batch alone, and out of memory halves it. The rows do not depend on the batch
    size; the scores are random, and may.

    Args:
        layers: As in `resolve_hooks`.
        position: The token of each prompt whose states are read and differentiated.
        loss_hook: Where the separation is that of the activations: a block's output, or "own" for
            every hook itself; by default the readout hook (see `readout_hook`).
        margin: As in `contrastive_steering_loss_noref`; from 1 on the coherence gradient is 0.
        n_scores: Label sequences drawn for each positive prompt (see `LossGradients.scores`).
        seed: That of the scores.
        batch_size: Pairs in a pass; by default what the device can use.
        progress: Told of the pairs; nobody by default.

    Raises:
        InputError: A position outside a prompt or without a label after it, hooks that are not as
            wide as the residual stream, or a margin or number that cannot be used.
        HookError: An unknown hook, or a loss hook that comes before a hook.
        ModelError: NaN or inf in the gradients, or a model whose label positions cannot be run
            alone.
        MemoryLimitError: A pass would not fit into the device's memory.

    Examples:
        >>> sl.loss_gradients(model, pairs, layers=[1, 2])
        LossGradients(2 hooks, 8 pairs, d_model 32)
    """
    hook_names = resolve_hooks(model, layers)
    readouts = missing_readouts(hook_names, int(model.cfg.n_layers))
    loss_hooks = _loss_hooks(model, hook_names, readouts, loss_hook)
    tokenized = tokenize_pairs(model, pairs)
    _check_position(tokenized, position)
    batches = make_pair_batches(model, tokenized, batch_size)
    sides = [positive for positive, _ in batches]
    targets = dict(zip(hook_names + readouts, loss_hooks, strict=True))
    check_memory(for_hooks(model, (*targets, *loss_hooks)), sides, with_gradients=True)
    engine = Engine(model, progress=progress or silent)
    rows = loss_rows(
        engine.stage("gradients: pairs"),
        batches,
        targets,
        position=position,
        n_scores=n_scores,
        seed=seed,
    )
    n_blocks = sum(positive.tokens.numel() for positive in sides) * engine.n_layers
    # d relu(margin * b - l)^2 = -2 relu((margin - 1) * l) dl, as b is l with its gradient stopped.
    slope = -2 * torch.relu((margin - 1) * rows.logprob)
    gradients = LossGradients(
        hook_names=hook_names,
        readout_names=readouts,
        loss_hooks=loss_hooks,
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
        weight_processing=weight_processing(model),
        weights_fingerprint=weights_fingerprint(model),
    )
    _check_finite(gradients)
    return gradients


@checked
def gradient_terms(gradients: LossGradients) -> pd.DataFrame:
    """Which term dominates where: norms and cosine of the two, one row a hook.

    Norms and cosines are means over the positive rows. The default weight of 10000 is a balance for
    one model and one layer: `balanced_weight` says which would make the two equal here.

    Args:
        gradients: What `loss_gradients` gives.

    Returns:
        Columns `GRADIENT_COLUMNS`; the cosine is NaN where a row of either term is zero.

    Examples:
        >>> terms = sl.directions.gradient_terms(sl.loss_gradients(model, pairs, layers=[1, 2]))
        >>> bool(terms.coherence_share.between(0, 1).all())
        True
    """
    rows: list[Row] = []
    balanced = _balanced(gradients.separation_positive, gradients.coherence)
    for i, name in enumerate(gradients.hook_names):
        separation, coherence = gradients.separation_positive[i], gradients.coherence[i]
        norms = separation.norm(dim=-1) * coherence.norm(dim=-1)
        separation_norm = float(separation.norm(dim=-1).mean())
        coherence_norm = float(gradients.weights[i] * coherence.norm(dim=-1).mean())
        rows.append(
            {
                "hook_name": name,
                "layer": hook_layer(name),
                "loss_hook": gradients.loss_hooks[i],
                "n_pairs": len(separation),
                "separation_norm": separation_norm,
                "coherence_norm": coherence_norm,
                "coherence_share": coherence_norm / (separation_norm + coherence_norm),
                "cosine": float(((separation * coherence).sum(-1) / norms).mean()),
                "weight": float(gradients.weights[i]),
                "balanced_weight": float(balanced[i]),
            }
        )
    attrs = {
        "margin": gradients.margin,
        "position": gradients.position,
        "measured_on": gradients.fingerprint,
        "weight_processing": gradients.weight_processing,
        "forward_equivalents": gradients.forward_equivalents,
    }
    return to_frame(rows, GRADIENT_COLUMNS, attrs)


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
        if prompt.index(position) >= len(prompt) - 1:
            raise InputError(
                f"no label comes after position {position} of the {prompt.where}, so its coherence "
                "gradient would be 0; take an earlier position, or give every pair a continuation"
            )


def check_weight(weight: Any) -> None:
    """Raise `InputError` unless it is "balanced" or a float32 from 0 on."""
    number: Any = weight if isinstance(weight, Real) else math.nan
    is_number = bool(0 <= number <= torch.finfo(torch.float32).max)
    if not (isinstance(weight, str) and weight == "balanced") and not is_number:
        raise InputError(f'weight is "balanced" or a float32 of 0 or more, got {told(weight)}')


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


def _balanced(
    separation: Float[Tensor, "all_hook pair d_model"],
    coherence: Float[Tensor, "all_hook pair d_model"],
) -> Float[Tensor, " all_hook"]:
    """The weight of the coherence term at which both have the same mean row norm; may be inf."""
    weights: Tensor = separation.norm(dim=-1).mean(dim=-1) / coherence.norm(dim=-1).mean(dim=-1)
    return weights
