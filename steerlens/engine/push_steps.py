"""One training step's arithmetic: a vector pushed at c = +1 and -1, a loss, and its gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.engine.batches import Batch
from steerlens.engine.capture import reading_hook
from steerlens.engine.resume import Residual, advance, labels_gradients, labels_logprob, run_from
from steerlens.engine.slopes import frozen_weights
from steerlens.loss import mean_by_prompt
from steerlens.models.hooks import HookFunction, hook_layer, resid_post
from steerlens.models.loading import HookedModel, inference

SIGNS = (1.0, -1.0)
"""The coefficients a vector is trained at."""


@dataclass(frozen=True)
class Side:
    """One side of an example: a batch, where it starts, what the unsteered model says of it.

    `sign` is that of the push at c = +1. `residual` enters the hook's block (None: from the
    tokens on). `logprob` is that of the labels, unsteered (nats per token); None where the labels
    do not matter, and the side is then run to the readout only.
    """

    batch: Batch
    sign: int
    residual: Residual | None
    logprob: Float[Tensor, " row"] | None


@dataclass(frozen=True)
class Example:
    """What one step is made on: pairs, or items with their positive and negative continuation."""

    positive: Side
    negative: Side
    position: int


@dataclass(frozen=True)
class Outputs:
    """What an objective is given: of either side at c = +1 and -1 (`sign`), and unsteered.

    Readouts in residual units, logprobs in nats per token.
    """

    readout_positive: Float[Tensor, "sign row d_model"]
    readout_negative: Float[Tensor, "sign row d_model"]
    logprob_positive: Float[Tensor, "sign row"]
    logprob_negative: Float[Tensor, "sign row"]
    unsteered_positive: Float[Tensor, " row"]
    unsteered_negative: Float[Tensor, " row"]


Objective = Callable[[Outputs], Float[Tensor, ""]]


def make_side(
    model: HookedModel, batch: Batch, hook_name: str, *, sign: int, with_labels: bool = True
) -> Side:
    """A side, with the unsteered residual entering the hook's block and its labels' logprob."""
    block, n_layers = hook_layer(hook_name), int(model.cfg.n_layers)
    is_label = batch.label_mask()[:, 1:]
    with inference(model):
        residual = None
        if block > 0:
            residual = advance(model, batch.tokens, batch.attention_mask, start=None, block=block)
        if not with_labels:
            return Side(batch, sign, residual, None)
        final = advance(
            model, batch.tokens, batch.attention_mask, start=residual, block=n_layers
        ).values
        labels = batch.tokens[:, 1:][is_label]
        logprob = labels_logprob(model, final[:, :-1][is_label.to(final.device)], labels)
    return Side(batch, sign, residual, mean_by_prompt(logprob, is_label))


def push_example(
    model: HookedModel,
    example: Example,
    vector: Float[Tensor, " d_model"],
    *,
    hook_name: str,
    readout: str,
    objective: Objective,
    with_gradient: bool = True,
) -> tuple[float, Float[Tensor, " d_model"]]:
    """The objective of an example under `+vector` and `-vector`, and its gradient there.

    Without `with_gradient` that is zero and not computed. Logprobs of a side whose labels do not
    matter are NaN. The gradient is taken in two steps, so that the logits of all labels never exist
    at once: of the objective with respect to readouts and logprobs, then of these with respect to
    the vector.
    """
    with inference(model), frozen_weights(model), torch.set_grad_enabled(with_gradient):
        passes = [
            _push(model, side, vector, example.position, hook_name=hook_name, readout=readout)
            for side in (example.positive, example.negative)
        ]
        leaves = [
            part.detach().requires_grad_(with_gradient)
            for one in passes
            for part in (one.readout, one.logprob)
        ]
        readout_pos, logprob_pos, readout_neg, logprob_neg = leaves
        loss = objective(
            Outputs(
                readout_pos,
                readout_neg,
                logprob_pos,
                logprob_neg,
                _known(example.positive),
                _known(example.negative),
            )
        )
        if not with_gradient:
            return float(loss), torch.zeros_like(vector)
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
        total = torch.zeros_like(vector)
        for one, of_readout, of_logprob in zip(passes, grads[::2], grads[1::2], strict=True):
            per_label = (of_logprob / one.n_labels).flatten().repeat_interleave(one.counts)
            outputs = (one.readout, one.predictions)
            (gradient,) = torch.autograd.grad(
                outputs, vector, (of_readout, one.of_label * per_label[:, None])
            )
            total += gradient
    return float(loss.detach()), total


def _known(side: Side) -> Float[Tensor, " row"]:
    if side.logprob is not None:
        return side.logprob
    return torch.full((len(side.batch.rows),), torch.nan, device=side.batch.tokens.device)


@dataclass(frozen=True)
class _Pass:
    """One side under both signs; `predictions` and `of_label` are those of `labels_gradients`."""

    readout: Float[Tensor, "sign row d_model"]
    logprob: Float[Tensor, "sign row"]
    predictions: Float[Tensor, "label d_model"]
    of_label: Float[Tensor, "label d_model"]
    n_labels: Float[Tensor, " row"]
    counts: Int[Tensor, " pushed_row"]


def _push(
    model: HookedModel,
    side: Side,
    vector: Tensor,
    position: int,
    *,
    hook_name: str,
    readout: str,
) -> _Pass:
    batch, n_signs = side.batch, len(SIGNS)
    tokens = batch.tokens.repeat(n_signs, 1)
    mask = batch.steered_mask("all").repeat(n_signs, 1)
    is_label = batch.label_mask()[:, 1:].repeat(n_signs, 1)
    signs = side.sign * torch.tensor(SIGNS, device=vector.device)
    steps = signs.repeat_interleave(len(batch.prompts))[:, None, None] * vector
    found: dict[str, Tensor] = {}
    kept: list[Tensor] = []

    def add(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return activation + (mask[..., None] * steps).to(activation)

    has_labels = side.logprob is not None
    last = resid_post(int(model.cfg.n_layers) - 1 if has_labels else hook_layer(readout))
    hooks: list[tuple[str, HookFunction]] = [
        (hook_name, add),
        reading_hook(found, readout, batch.indices(position).repeat(n_signs)),
        (last, lambda activation, hook: kept.append(activation)),  # noqa: ARG005
    ]
    start = side.residual
    if start is not None:
        start = Residual(start.block, start.values.repeat(n_signs, 1, 1))
    run_from(
        model,
        tokens,
        batch.attention_mask.repeat(n_signs, 1),
        start=start,
        fwd_hooks=hooks,
        last_hook=last,
    )
    shape = n_signs, len(batch.prompts)
    state = found[readout].reshape(*shape, -1)
    if not has_labels:
        nothing = kept[0][:0, 0]
        unknown = state.detach().new_full(shape, torch.nan)
        counts = torch.zeros(shape[0] * shape[1], dtype=torch.long, device=tokens.device)
        return _Pass(state, unknown, nothing, nothing.detach(), unknown[0], counts)
    predictions = kept[0][:, :-1][is_label.to(kept[0].device)]
    labels = labels_gradients(
        model,
        predictions.detach(),
        tokens[:, 1:][is_label],
        n_samples=0,
        generator=torch.Generator(),
    )
    return _Pass(
        readout=state,
        logprob=mean_by_prompt(labels.logprob, is_label).reshape(shape),
        predictions=predictions,
        of_label=labels.of_label,
        n_labels=is_label[: shape[1]].sum(dim=1).to(labels.logprob),
        counts=is_label.sum(dim=1),
    )
