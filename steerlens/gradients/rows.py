"""One batch of pairs, forward and backward: the rows of both terms at every hook."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.activations import reading_hook
from steerlens.bare import for_hooks
from steerlens.errors import ActivationError
from steerlens.hooks import HookFunction, hook_layer, resid_post
from steerlens.models import HookedModel, inference
from steerlens.passes import labels_gradients, run_from
from steerlens.slopes import frozen_weights
from steerlens.tokens import Batch


@dataclass(frozen=True)
class Rows:
    """What one batch of pairs gives, pair by pair (the second dimension from the end)."""

    separation_positive: Float[Tensor, "all_hook pair d_model"]
    separation_negative: Float[Tensor, "all_hook pair d_model"]
    logprob_slope: Float[Tensor, "all_hook pair d_model"]
    scores: Float[Tensor, "all_hook n_scores pair d_model"]
    logprob: Float[Tensor, "pair 1"]


def batch_rows(
    model: HookedModel,
    both: tuple[Batch, Batch],
    targets: dict[str, str],
    position: int,
    n_scores: int,
    generator: torch.Generator,
) -> Rows:
    """Run a batch of pairs forward and backward; `targets` maps each hook to its loss hook."""
    model = for_hooks(model, [*targets, *targets.values()])
    batch = both[0]
    is_label = batch.label_mask()[:, 1:]
    n_labels = is_label.sum(dim=1)
    last = resid_post(int(model.cfg.n_layers) - 1)
    deepest = resid_post(max(hook_layer(name) for name in targets.values()))
    with inference(model), frozen_weights(model), torch.enable_grad():
        positive = _run(model, batch, targets, position, last_hook=last)
        negative = _run(model, both[1], targets, position, last_hook=deepest)
        separation_positive, separation_negative = _separation_rows(positive, negative, targets)
        predictions = positive.final[:, :-1][is_label.to(positive.final.device)]
        labels = batch.tokens[:, 1:][is_label]
        found = labels_gradients(
            model, predictions.detach(), labels, n_samples=n_scores, generator=generator
        )
        steps = [positive.steps[name] for name in targets]
        shares = (1 / n_labels).repeat_interleave(n_labels)[:, None].to(predictions)
        slopes = [
            _on_cpu(
                torch.autograd.grad(
                    predictions, steps, of * scale, retain_graph=True, materialize_grads=True
                )
            )
            for of, scale in [
                (found.of_label, shares),
                *((sample, shares.sqrt()) for sample in found.of_samples),
            ]
        ]
    per_label = torch.split(found.logprob, n_labels.tolist())
    logprob = torch.stack([values.mean() for values in per_label])[:, None]
    scores = torch.stack(slopes[1:], dim=1) if n_scores else slopes[0][:, None][:, :0]
    return Rows(
        separation_positive,
        separation_negative,
        slopes[0],
        scores,
        logprob.cpu(),
    )


@dataclass(frozen=True)
class _Run:
    """One side's pass, with its graph: a zero step at every hook, the states, and the output."""

    steps: dict[str, Float[Tensor, "prompt d_model"]]
    states: dict[str, Float[Tensor, "prompt d_model"]]
    final: Float[Tensor, "prompt token d_model"]


def _run(
    model: HookedModel, batch: Batch, targets: dict[str, str], position: int, *, last_hook: str
) -> _Run:
    """Run a batch with a differentiable step of 0 at `position` of every hook.

    The derivative with respect to the step is that with respect to the activation.
    """
    indices = batch.indices(position).to(batch.tokens.device)
    steps: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    kept: list[Tensor] = []
    stepped = [(name, _stepping(steps, name, indices)) for name in targets]
    wanted = dict.fromkeys([*targets, *targets.values()])
    read = [reading_hook(states, name, indices) for name in wanted]
    keep = (last_hook, lambda activation, hook: kept.append(activation))  # noqa: ARG005
    run_from(
        model,
        batch.tokens,
        batch.attention_mask,
        fwd_hooks=[*_reached(stepped, last_hook), *_reached(read, last_hook), keep],
        last_hook=last_hook,
    )
    widths = {name: step.shape[-1] for name, step in steps.items()}
    if set(widths.values()) != {kept[0].shape[-1]}:
        raise ActivationError(
            f"the hooks' activations have the widths {widths}; gradients are taken where it is "
            "that of the residual stream"
        )
    return _Run(steps, states, kept[0])


def _reached(
    hooks: Sequence[tuple[str, HookFunction]], last_hook: str
) -> list[tuple[str, HookFunction]]:
    return [(name, hook) for name, hook in hooks if hook_layer(name) <= hook_layer(last_hook)]


def _stepping(steps: dict[str, Tensor], name: str, indices: Int[Tensor, " prompt"]) -> HookFunction:
    def add(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        if activation.ndim != 3:
            raise ActivationError(
                f"hook {name} holds a tensor of shape {tuple(activation.shape)}; expected "
                "[prompt, token, d_model], so choose a hook on the residual stream or its writers"
            )
        wide = torch.promote_types(activation.dtype, torch.float32)
        step = activation.new_zeros((len(activation), activation.shape[-1]), dtype=wide)
        steps[name] = step.requires_grad_()
        rows = torch.arange(len(activation), device=activation.device)
        return activation.index_put(
            (rows, indices.to(rows.device)), steps[name].to(activation.dtype), accumulate=True
        )

    return add


def _unit(
    differences: Float[Tensor, "pair d_model"], *, like: Float[Tensor, "pair d_model"]
) -> Float[Tensor, "pair d_model"]:
    """The differences at norm 1; 0 where they are the rounding of such activations.

    There the two prompts are equal, and the norm has no gradient.
    """
    norms = differences.norm(dim=-1, keepdim=True)
    rounding = 8 * torch.finfo(like.dtype).eps * like.norm(dim=-1, keepdim=True)
    return torch.where(norms > rounding, differences / norms, torch.zeros_like(differences))


def _separation_rows(
    positive: _Run, negative: _Run, targets: dict[str, str]
) -> tuple[Float[Tensor, "all_hook pair d_model"], Float[Tensor, "all_hook pair d_model"]]:
    """The gradient of `-||hs_pos - hs_neg||` at each hook's loss hook, of either side's step."""
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    for loss_hook in dict.fromkeys(targets.values()):
        hs_pos, hs_neg = positive.states[loss_hook], negative.states[loss_hook]
        outward = _unit((hs_pos - hs_neg).detach(), like=hs_pos.detach())
        names = [name for name, target in targets.items() if target == loss_hook]
        before = [name for name in names if name != loss_hook]
        sides = []
        for side, state, sign in ((positive, hs_pos, -1), (negative, hs_neg, 1)):
            steps = [side.steps[name] for name in before]
            grads = (
                torch.autograd.grad(state, steps, sign * outward, retain_graph=True)
                if steps
                else ()
            )
            sides.append(dict(zip(before, grads, strict=True)) | {loss_hook: sign * outward})
        rows |= {name: (sides[0][name], sides[1][name]) for name in names}
    return (
        _on_cpu([rows[name][0] for name in targets]),
        _on_cpu([rows[name][1] for name in targets]),
    )


def _on_cpu(rows: Sequence[Float[Tensor, "pair d_model"]]) -> Float[Tensor, "hook pair d_model"]:
    """Rows of hooks whose blocks may lie on different devices, stacked."""
    return torch.stack([row.cpu() for row in rows])
