"""Gradients at coefficient 0: how fast logprob falls along every direction, and how it bends.

One forward pass, and one backward pass for each of the two, for all hooks at once.
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerlens.engine.backend import BareModel, for_hooks
from steerlens.engine.batches import Batch, before_labels, in_pair_order
from steerlens.engine.capture import by_halves
from steerlens.engine.resume import advance, labels_gradients, labels_logprob, run_from
from steerlens.engine.tokenization import SteeredPositions
from steerlens.engine.transfer import to_device
from steerlens.engine.workload import Cost
from steerlens.errors import InputError, ModelError
from steerlens.loss import label_logprob
from steerlens.models.hooks import HookFunction, resid_post
from steerlens.models.loading import HookedModel, inference
from steerlens.progress import Progress, part_of, silent

BACKWARD_COST = 2
"""Block-evaluations that a backward pass through a block counts for: the usual estimate."""


_checked: "weakref.WeakSet[BareModel]" = weakref.WeakSet()


@dataclass(frozen=True)
class Slopes:
    """The first two derivatives, at coefficient 0, along directions at hooks.

    `logprob` is d(mean logprob of the labels)/dc, nats per token and residual unit; `curvature` is
    d2(mean KL(unsteered || steered) per label token)/dc2, nats per token and residual unit squared,
    estimated from one sampled sequence of labels a prompt: right on average over many prompts, and
    rough for each of them.
    """

    logprob: Float[Tensor, "direction prompt"]
    curvature: Float[Tensor, "direction prompt"]


def label_slopes(
    model: HookedModel,
    batches: Sequence[Batch],
    along: Sequence[tuple[str, Float[Tensor, " d_model"]]],
    *,
    steered_positions: SteeredPositions,
    seed: int,
    cost: Cost,
    progress: Progress | None = None,
) -> Slopes:
    """`Slopes` of the batches' prompts, in their order, along each (hook name, direction).

    A scalar step along the direction is added at every hook and its derivative taken at 0, so the
    hooks do not influence each other. The curvature is the Fisher information of the model's own
    next-token distributions: with labels y sampled from the model at the T label positions and
    s = d(sum_t log p(y_t))/dc, E[s^2] / T is the second derivative of the mean KL per token, as the
    s of different positions are uncorrelated (the contexts stay those of the prompt). `cost` is
    added to: a forward pass and two backward passes, each counted as two forward passes, and a
    check of one prompt. Raises `ModelError` as `check_label_rows`.
    """
    model = for_hooks(model, [name for name, _ in along])
    check_label_rows(model, batches[0], cost=cost)
    generator = torch.Generator().manual_seed(seed)
    found = by_halves(
        [(batch,) for batch in batches],
        lambda batch: _batch_slopes(model, batch, along, steered_positions, generator),
        progress=part_of(progress or silent, "slopes: prompts"),
    )
    run = [batch for (batch,), _ in found]
    for batch in run:
        cost.add(batch.tokens, int(model.cfg.n_layers) * (1 + 2 * BACKWARD_COST))
    return Slopes(
        in_pair_order(run, [logprob for _, (logprob, _) in found]),
        in_pair_order(run, [curvature for _, (_, curvature) in found]),
    )


def check_label_rows(model: HookedModel, batch: Batch, *, cost: Cost) -> None:
    """See that label positions alone give the model's own logprobs, on the batch's first prompt.

    Gradients start from the final norm and the unembedding run on those rows alone. Raises
    `ModelError` where that is another function than the model's (a hook there that looks at other
    positions, for one). `cost` is added to. A `BareModel` is looked at once, as nobody else can
    hook it; it is counted every time, so that a cost does not depend on what was run before.
    """
    one = batch.row(0)
    cost.add(one.tokens, 2 * int(model.cfg.n_layers))
    if model in _checked:
        return
    is_label = one.label_mask()[:, 1:]
    n_layers = int(model.cfg.n_layers)
    with inference(model):
        logits = model(one.tokens, return_type="logits", **one.forward_kwargs)
        expected = label_logprob(logits, one.tokens, one.label_mask())
        final = advance(model, one.tokens, one.attention_mask, start=None, block=n_layers).values
        found = labels_logprob(
            model, final[:, :-1][is_label.to(final.device)], one.tokens[:, 1:][is_label]
        )
    if not math.isfinite(float(expected[0])):
        raise ModelError(
            f"the labels of the {one.prompts[0].where} have logprob {float(expected[0])}; check "
            "the model's weights, or load it in float32 or bfloat16"
        )
    gap = float((found.mean() - expected[0]).abs())
    if not gap <= max(1e-4, 4 * torch.finfo(model.cfg.dtype).eps):
        raise ModelError(
            f"the final norm and unembedding, run on label positions alone, differ from the model "
            f"by {gap:.2g} nats per token, so its gradients cannot be taken here; take off hooks "
            "at ln_final or unembed that look at other positions"
        )
    if isinstance(model, BareModel):
        _checked.add(model)


def _batch_slopes(
    model: HookedModel,
    batch: Batch,
    along: Sequence[tuple[str, Float[Tensor, " d_model"]]],
    steered_positions: SteeredPositions,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "direction prompt"], Float[Tensor, "direction prompt"]]:
    mask, on_cpu = batch.steered_mask(steered_positions), batch.labels_on_cpu()
    n_labels = on_cpu[:, 1:].sum(dim=1)
    before = before_labels(on_cpu, mask.device)
    shares = to_device((1 / n_labels).repeat_interleave(n_labels)[:, None], mask.device)
    kept: list[Tensor] = []
    with inference(model), frozen_weights(model), torch.enable_grad():
        wide = torch.promote_types(model.cfg.dtype, torch.float32)
        steps = torch.zeros(len(along), len(batch.prompts), dtype=wide, device=mask.device)
        steps.requires_grad_()
        hooks: list[tuple[str, HookFunction]] = [
            (name, _stepping(direction, step, mask))
            for (name, direction), step in zip(along, steps, strict=True)
        ]
        last = resid_post(int(model.cfg.n_layers) - 1)
        run_from(
            model,
            batch.tokens,
            batch.attention_mask,
            fwd_hooks=[*hooks, (last, lambda activation, hook: kept.append(activation))],  # noqa: ARG005
            last_hook=last,
        )
        predictions = kept[0].flatten(0, 1)[before.to(kept[0].device)]
        found = labels_gradients(
            model,
            predictions.detach(),
            batch.tokens.flatten()[before + 1],
            n_samples=1,
            generator=generator,
        )
        weights = shares.to(predictions)
        (slope,) = torch.autograd.grad(
            predictions, steps, found.of_label * weights, retain_graph=True
        )
        (score,) = torch.autograd.grad(predictions, steps, found.of_samples[0])
    return slope.cpu(), score.cpu().square() / n_labels


def _stepping(
    direction: Float[Tensor, " d_model"],
    step: Float[Tensor, " row"],
    mask: Bool[Tensor, "row token"],
) -> HookFunction:
    def add(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        added = step[:, None, None] * direction.to(step) * mask[..., None]
        return activation + added.to(activation)

    return add


@contextmanager
def frozen_weights(model: Any) -> Iterator[None]:
    """Inside the block weights need no gradient: nothing is kept for it, nothing computed.

    Raises `InputError` under `torch.inference_mode`, where no gradient can be taken at all.
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            "gradients cannot be taken inside torch.inference_mode; call this outside of it"
        )
    weights = [p for p in getattr(model, "original_model", model).parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
