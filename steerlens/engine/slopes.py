"""Derivatives of the labels' logprob by vectors added at all hooks at once, at coefficient 0."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.engine.backward import BACKWARD_COST, adding, differentiable, over_batches
from steerlens.engine.batches import Batch
from steerlens.engine.checkpoint import Tensors, once
from steerlens.engine.engine import Engine
from steerlens.engine.resume import Labels, run_from
from steerlens.engine.tokenization import SteeredPositions, fingerprint
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import hook_width, resid_post
from steerlens.models.identity import provenance


class LabelGradients(NamedTuple):
    """Gradients by a vector added at a hook, at 0, of the labels' logprob and of sampled labels'.

    `logprob` is that of the mean logprob of a prompt's labels (nats per token and residual unit);
    `scores` that of the logprob of labels sampled from the model, over the root of their number.
    """

    logprob: Float[Tensor, "hook prompt d_model"]
    scores: Float[Tensor, "hook prompt d_model"]


class Slopes(NamedTuple):
    """The first two derivatives, at coefficient 0, along directions at hooks.

    `logprob` is d(mean logprob of the labels)/dc, nats per token and residual unit; `curvature` is
    d2(mean KL(unsteered || steered) per label token)/dc2, nats per token and residual unit squared,
    estimated from one sampled sequence of labels a prompt: right on average over many prompts, and
    rough for each of them.
    """

    logprob: Float[Tensor, "direction prompt"]
    curvature: Float[Tensor, "direction prompt"]


def label_slopes(
    engine: Engine,
    batches: Sequence[Batch],
    along: Sequence[Sequence[tuple[str, Float[Tensor, " d_model"]]]],
    *,
    steered_positions: SteeredPositions,
    seed: int,
) -> Slopes:
    """`Slopes` of the batches' prompts, in their order, along each push.

    A push is what it adds: (hook name, direction), of one hook or of several at once.

    The products of `label_gradients` with the directions. The curvature is the Fisher information
    of the model's own next-token distributions: with labels y sampled from the model at the T label
    positions and s = d(sum_t log p(y_t))/dc, E[s^2] / T is the second derivative of the mean KL per
    token, as the s of different positions are uncorrelated (the contexts stay those of the prompt).
    """
    hook_names = tuple(dict.fromkeys(name for added in along for name, _ in added))

    def summed(rows: Tensor, added: Sequence[tuple[str, Tensor]]) -> Tensor:
        parts = [rows[hook_names.index(name)] @ unit.to(rows).cpu() for name, unit in added]
        return torch.stack(parts).sum(dim=0)

    def products(found: LabelGradients) -> Slopes:
        return Slopes(
            torch.stack([summed(found.logprob, added) for added in along]),
            torch.stack([summed(found.scores, added).square() for added in along]),
        )

    how: dict[str, Any] = {"steered_positions": steered_positions, "seed": seed}
    what = [[len(added) for added in along], [part for added in along for part in added]]
    return Slopes(**_by_batch(engine, batches, hook_names, products, Slopes, what, **how))


def label_gradients(
    engine: Engine,
    batches: Sequence[Batch],
    hook_names: Sequence[str],
    *,
    steered_positions: SteeredPositions,
    seed: int,
    with_scores: bool = True,
) -> LabelGradients:
    """`LabelGradients` of the batches' prompts, in their order, at every hook.

    A vector is added at every hook, the same at all steered tokens of a prompt, and the derivative
    taken at 0, so the hooks do not influence each other. Without scores these are NaN. The engine's
    cost is added to: a forward pass and two backward passes (one without scores), each counted as
    two forward passes, and a check of one prompt. Raises `ModelError` as `check_label_rows`.
    """
    how: dict[str, Any] = {"steered_positions": steered_positions, "seed": seed}
    how["with_scores"] = with_scores
    return LabelGradients(
        **_by_batch(engine, batches, hook_names, lambda found: found, LabelGradients, [], **how)
    )


def _by_batch(
    engine: Engine,
    batches: Sequence[Batch],
    hook_names: Sequence[str],
    keep: Callable[[LabelGradients], LabelGradients | Slopes],
    kind: type[LabelGradients | Slopes],
    decided: Sequence[Any],
    *,
    steered_positions: SteeredPositions,
    seed: int,
    with_scores: bool = True,
) -> Tensors:
    """What is kept of each batch's gradients, of that `kind`; `decided` is all that decides it."""

    def run(
        model: HookedModel, generator: torch.Generator, batch: Batch
    ) -> LabelGradients | Slopes:
        mask, labels = batch.steered_mask(steered_positions), Labels.of(batch)
        with differentiable(model):
            wide = torch.promote_types(model.cfg.dtype, torch.float32)
            shape = (len(hook_names), len(batch.prompts), hook_width(model, hook_names[0]))
            steps = torch.zeros(shape, dtype=wide, device=mask.device).requires_grad_()
            hooks = [
                (name, adding(step[:, None], mask))
                for name, step in zip(hook_names, steps, strict=True)
            ]
            last = resid_post(engine.n_layers - 1)
            final = run_from(
                model, batch.tokens, batch.attention_mask, fwd_hooks=hooks, last_hook=last
            )
            read = labels.read(model, final, n_samples=int(with_scores), generator=generator)
            shares = labels.shares.to(read.logprob)
            (slope,) = torch.autograd.grad(read.logprob, steps, shares, retain_graph=with_scores)
            score = torch.full_like(slope, math.nan)
            if with_scores:
                (score,) = torch.autograd.grad(read.outputs, steps, read.of_samples[0])
        return keep(LabelGradients(slope.cpu(), score.cpu() / labels.n_labels.sqrt()[:, None]))

    def compute() -> Tensors:
        groups = [(batch,) for batch in batches]
        stage = engine.stage("slopes: prompts")
        found = over_batches(stage, groups, hook_names, run, seed=seed)
        n_backward = 1 + with_scores
        for batch in batches:
            engine.cost.add(batch.tokens, engine.n_layers * (1 + n_backward * BACKWARD_COST))
        return dict(zip(kind._fields, found, strict=True))

    prompts = [[fingerprint(batch.prompts), batch.rows] for batch in batches]
    how = (steered_positions, seed, with_scores)
    key = ("slopes", provenance(engine.model).to_dict(), prompts, how, hook_names, decided)
    return once(engine.checkpoint, key, compute, engine.cost)
