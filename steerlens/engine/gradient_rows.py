"""One batch of pairs, forward and backward: the rows of both terms at every hook."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.engine.backend import BareModel
from steerlens.engine.batches import Batch, before_labels, join
from steerlens.engine.capture import at_position, check_residual, reading_hook
from steerlens.engine.resume import Residual, advance, labels_gradients, run_from
from steerlens.engine.slopes import frozen_weights
from steerlens.engine.transfer import to_device, to_host
from steerlens.errors import InputError
from steerlens.models.hooks import HookFunction, hook_layer, resid_post
from steerlens.models.loading import HookedModel, inference

LAUNCH_BOUND = 4e11
"""Floating-point operations of a block below which a GPU waits for its next one: about a
millisecond's. Both sides of the pairs then run in one pass, which takes more arithmetic."""


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
    is_joined = _is_launch_bound(model, both)
    batches = (join(model, both),) if is_joined else both
    batch = batches[0].halves()[0] if is_joined else both[0]
    device, on_cpu = batch.tokens.device, batch.labels_on_cpu()
    before = before_labels(on_cpu, device)
    n_labels = on_cpu[:, 1:].sum(dim=1)
    shares = to_device((1 / n_labels).repeat_interleave(n_labels)[:, None], device)
    with inference(model), frozen_weights(model), torch.enable_grad():
        graphs, final = _forward(model, batches, batch, targets, position)
        separation = to_host(_separation_rows(graphs, targets))
        predictions = final.flatten(0, 1)[before.to(final.device)]
        labels = batch.tokens.flatten()[before + 1]
        found = labels_gradients(
            model, predictions.detach(), labels, n_samples=n_scores, generator=generator
        )
        scale = shares.to(predictions)
        cotangents = [found.of_label * scale, *(of * scale.sqrt() for of in found.of_samples)]
        slopes = [
            to_host(graphs[0].rows_of(targets, predictions, cotangent)[:, : len(batch.prompts)])
            for cotangent in cotangents
        ]
    per_label = torch.split(found.logprob.cpu(), n_labels.tolist())
    # Copies, since what has arrived is in pinned memory, of which there should not be much.
    positive, negative = separation.arrived().clone().chunk(2, dim=1)
    slope, *scores = [of.arrived().clone() for of in slopes]
    return Rows(
        positive,
        negative,
        slope,
        torch.stack(scores, dim=1) if scores else slope[:, None][:, :0],
        torch.stack([values.mean() for values in per_label])[:, None],
    )


@dataclass(frozen=True)
class _Graph:
    """A pass with its graph: the activations at the hooks, the states there, and the output."""

    held: dict[str, Float[Tensor, "row token d_model"]]
    states: dict[str, Float[Tensor, "row d_model"]]
    indices: Int[Tensor, " row"]
    output: Float[Tensor, "row token d_model"]

    def rows_of(
        self,
        names: Iterable[str],
        of: Float[Tensor, "any d_model"],
        by: Float[Tensor, "any d_model"],
    ) -> Float[Tensor, "hook row d_model"]:
        """The gradient of `(of * by).sum()` at the hooks, at the position."""
        held = [self.held[name] for name in names]
        grads = torch.autograd.grad(of, held, by, retain_graph=True, materialize_grads=True)
        return _stacked([at_position(grad, self.indices) for grad in grads])


def _is_launch_bound(model: HookedModel, both: tuple[Batch, Batch]) -> bool:
    """Whether a GPU would be done with a block before it is given the next one."""
    tokens = 2 * len(both[0].prompts) * max(batch.tokens.shape[1] for batch in both)
    return isinstance(model, BareModel) and model.block_operations * tokens < LAUNCH_BOUND


def _forward(
    model: HookedModel,
    batches: tuple[Batch, ...],
    positive: Batch,
    targets: dict[str, str],
    position: int,
) -> tuple[list[_Graph], Float[Tensor, "row token d_model"]]:
    """The graph of every batch, and the last block's output for `positive`.

    That is the first batch, or its first half where there is but one.
    """
    last_block = int(model.cfg.n_layers) - 1
    deepest = max(hook_layer(name) for name in targets.values())
    # Where a position is, and what is padded, is looked up before the device is kept busy.
    places = [(batch.indices(position), not bool(batch.is_whole.all())) for batch in batches]
    ends = (last_block, deepest) if len(batches) == 2 else (deepest,)
    graphs = [
        _run(model, batch, targets, *place, last_block=end)
        for batch, place, end in zip(batches, places, ends, strict=True)
    ]
    final = graphs[0].output
    if len(batches) == 1:
        final = advance(
            model,
            positive.tokens,
            positive.attention_mask,
            start=Residual(deepest + 1, final[: len(positive.prompts)]),
            block=last_block + 1,
            is_padded=not bool(positive.is_whole.all()),
        ).values
    return graphs, final


def _run(
    model: HookedModel,
    batch: Batch,
    targets: dict[str, str],
    indices: Int[Tensor, " row"],
    is_padded: bool,
    *,
    last_block: int,
) -> _Graph:
    """Run a batch up to the end of `last_block`, with a graph from the first hook on."""
    indices = to_device(indices, batch.tokens.device)
    held: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    kept: list[Tensor] = []
    wanted = dict.fromkeys([*targets, *targets.values()])
    last_hook = resid_post(last_block)
    run_from(
        model,
        batch.tokens,
        batch.attention_mask,
        fwd_hooks=[
            *((name, _holding(held, name)) for name in targets),
            *(reading_hook(states, name, indices) for name in wanted),
            (last_hook, lambda activation, hook: kept.append(activation)),  # noqa: ARG005
        ],
        last_hook=last_hook,
        is_padded=is_padded,
    )
    widths = {name: activation.shape[-1] for name, activation in held.items()}
    if set(widths.values()) != {kept[0].shape[-1]}:
        raise InputError(
            f"the hooks' activations have the widths {widths}; gradients are taken where it is "
            "that of the residual stream"
        )
    return _Graph(held, states, indices, kept[0])


def _holding(held: dict[str, Tensor], name: str) -> HookFunction:
    """A hook after which the pass goes on from `held[name]` alone, and from a copy of it.

    So nothing that the model does to the copy in place, or with the activation elsewhere, is in
    the gradient.
    """

    def hold(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        check_residual(activation, name)
        if activation.requires_grad:
            held[name] = activation.view_as(activation)
        else:
            held[name] = activation.detach().requires_grad_()
        return held[name].clone()

    return hold


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
    graphs: Sequence[_Graph], targets: dict[str, str]
) -> Float[Tensor, "all_hook row d_model"]:
    """The gradient of `-||hs_pos - hs_neg||` at each hook's loss hook, of both sides' activations.

    The positive rows come first.
    """
    rows: dict[str, Tensor] = {}
    for loss_hook in dict.fromkeys(targets.values()):
        states = torch.cat([graph.states[loss_hook] for graph in graphs]).detach()
        hs_pos, hs_neg = states.chunk(2)
        outward = _unit(hs_pos - hs_neg, like=hs_pos)
        slope = torch.cat([-outward, outward])
        rows[loss_hook] = slope
        names = [n for n, target in targets.items() if target == loss_hook and n != loss_hook]
        if names:
            sizes = [len(graph.indices) for graph in graphs]
            found = torch.cat(
                [
                    graph.rows_of(names, graph.states[loss_hook], part)
                    for graph, part in zip(graphs, torch.split(slope, sizes), strict=True)
                ],
                dim=1,
            )
            rows |= dict(zip(names, found, strict=True))
    return _stacked([rows[name] for name in targets])


def _stacked(rows: Sequence[Float[Tensor, "row d_model"]]) -> Float[Tensor, "hook row d_model"]:
    """Rows of hooks whose blocks may lie on different devices."""
    return torch.stack([row.to(rows[0].device) for row in rows])
