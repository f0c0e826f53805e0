"""Derivatives of the frozen model: a forward pass that keeps its graph, and what is pulled back.

`run_from` runs a batch with the residual stream held, or a step added to it; `Labels.read` gives
the labels' log-probabilities, which can be differentiated though their logits are not kept. On the
two stand `loss_rows` (gradients at every hook, pair by pair), `slopes.label_gradients` (by vectors
added at hooks, at 0) and `directions.training`.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.engine.backend import BareModel, for_hooks
from steerlens.engine.batches import Batch, in_pair_order, join, rows_per_pass
from steerlens.engine.capture import at_position, by_halves, check_residual, reading_hook
from steerlens.engine.engine import Engine
from steerlens.engine.resume import Labels, Residual, advance, labels_logprob, run_from
from steerlens.engine.tokenization import TokenizedPairs
from steerlens.engine.transfer import to_device, to_host
from steerlens.engine.workload import Cost
from steerlens.errors import InputError, ModelError
from steerlens.loss import label_logprob
from steerlens.models.hooked_model import HookedModel, side_of_switches, weight_module
from steerlens.models.hooks import HookFunction, hook_layer, hook_width, resid_post
from steerlens.models.loading import inference
from steerlens.models.tolerance import allowed_gap

BACKWARD_COST = 2
"""Block-evaluations that a backward pass through a block counts for: the usual estimate."""
LAUNCH_BOUND = 4e11
"""Floating-point operations of a block below which a GPU waits for its next one: about a
millisecond's. Both sides of the pairs then run in one pass, which takes more arithmetic."""

GRAPH_OPERATIONS = 3 * LAUNCH_BOUND
"""Floating-point operations of a block, on one side, from which more pairs in a pass run no faster
on a GPU. Both sides' graphs are there at once, so they would only take memory."""

_checked: "weakref.WeakSet[BareModel]" = weakref.WeakSet()


# One pass with its graph


@dataclass(frozen=True)
class Graph:
    """A pass that can be differentiated: its last output, and what was held and read on the way.

    `states` are those at the hooks read, at `indices`; `held` the activations at the hooks held.
    """

    output: Float[Tensor, "row token d_model"]
    states: dict[str, Float[Tensor, "row _"]]
    held: dict[str, Float[Tensor, "row token _"]]
    indices: Int[Tensor, " row"]

    def rows_of(
        self, names: Sequence[str], values: Float[Tensor, "..."], cotangent: Float[Tensor, "..."]
    ) -> Float[Tensor, "hook row width"]:
        """The gradient of `(values * cotangent).sum()` at the hooks held, at the indices."""
        held = [self.held[name] for name in names]
        grads = torch.autograd.grad(
            values, held, cotangent, retain_graph=True, materialize_grads=True
        )
        return _stacked([at_position(grad, self.indices) for grad in grads])


def _run_graph(
    model: HookedModel, batch: Batch, targets: dict[str, str], indices: Tensor, is_padded: bool
) -> Graph:
    """A batch run to the last loss hook, held at every hook, hooks and loss hooks read."""
    held: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    holding = [(name, _holding(held, name)) for name in targets]
    read = dict.fromkeys([*targets, *targets.values()])
    reading = [reading_hook(states, name, indices) for name in read]
    output = run_from(
        *(model, batch.tokens, batch.attention_mask),
        fwd_hooks=[*holding, *reading],
        last_hook=resid_post(max(map(hook_layer, targets.values()))),
        is_padded=is_padded,
    )
    widths = {name: activation.shape[-1] for name, activation in held.items()}
    if any(width != hook_width(model, name) for name, width in widths.items()):
        raise InputError(
            f"the hooks' activations have the widths {widths}; gradients are taken where it is "
            "that of the residual stream, and at heads (attn.hook_z[3])"
        )
    return Graph(output, states, held, indices)


def adding(steps: Float[Tensor, "row 1 d_model"], mask: Bool[Tensor, "row token"]) -> HookFunction:
    """A hook that adds each row's step where `mask` is True."""

    def add(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 (TransformerLens's signature)
        return activation + (steps * mask[..., None]).to(activation)

    return add


def _holding(held: dict[str, Tensor], name: str) -> HookFunction:
    """A hook after which the pass goes on from `held[name]` alone, and from a copy of it."""

    def hold(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        check_residual(activation, name)
        if activation.requires_grad:
            held[name] = activation.view_as(activation)
        else:
            held[name] = activation.detach().requires_grad_()
        # Nothing that the model does to the copy in place, or elsewhere, is in the gradient.
        return held[name].clone()

    return hold


@contextmanager
def differentiable(model: Any, *, with_gradient: bool = True) -> Iterator[None]:
    """Evaluation mode and, unless told not to, a graph of everything but the weights.

    They need no gradient inside the block: nothing is kept for it, nothing computed. Raises
    `InputError` under `torch.inference_mode`, where no gradient can be taken at all.
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            "gradients cannot be taken inside torch.inference_mode; call this outside of it"
        )
    weights = [p for p in weight_module(model).parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        with inference(model), torch.set_grad_enabled(with_gradient):
            yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def check_label_rows(model: HookedModel, batch: Batch, *, cost: Cost) -> None:
    """See that label positions alone give the model's own logprobs, on the batch's first prompt.

    Gradients start from the final norm and the unembedding run on those rows alone. Raises
    `ModelError` where that is another function than the model's (a hook there that looks at other
    positions, for one). `cost` is added to. A `BareModel` is looked at once, as nobody else can
    hook it; it is counted every time, so that a cost does not depend on what was run before.
    """
    first, n_layers = batch.row(0), int(model.cfg.n_layers)
    cost.add(first.tokens, 2 * n_layers)
    if model in _checked:
        return
    labels = Labels.of(first)
    with inference(model):
        logits = model(first.tokens, return_type="logits", **first.forward_kwargs)
        expected = label_logprob(logits, first.tokens, first.label_mask())
        final = advance(model, first.tokens, first.attention_mask, start=None, block=n_layers)
        logprob = labels_logprob(model, labels.outputs(final.values), labels.ids)
    if not math.isfinite(float(expected[0])):
        raise ModelError(
            f"the labels of the {first.prompts[0].where} have logprob {float(expected[0])}; check "
            "the model's weights, or load it in float32 or bfloat16"
        )
    gap = float((logprob.mean() - expected[0]).abs())
    if not gap <= allowed_gap(model.cfg.dtype, roundings=4):
        raise ModelError(
            f"the final norm and unembedding, run on label positions alone, differ from the model "
            f"by {gap:.2g} nats per token, so its gradients cannot be taken here; take off hooks "
            "at ln_final or unembed that look at other positions"
        )
    if isinstance(model, BareModel):
        _checked.add(model)


def over_batches(
    engine: Engine,
    groups: Sequence[tuple[Batch, ...]],
    hook_names: Sequence[str],
    run: Callable[..., tuple[Float[Tensor, "..."], ...]],
    *,
    seed: int,
) -> list[Float[Tensor, "..."]]:
    """What `run(model, generator, *group)` gives for every group, joined in the pairs' order."""
    model = for_hooks(engine.model, hook_names)
    check_label_rows(model, groups[0][0], cost=engine.cost)
    generator = torch.Generator().manual_seed(seed)
    results = by_halves(
        groups, lambda *group: run(model, generator, *group), progress=engine.progress
    )
    batches = [group[0] for group, _ in results]
    columns = zip(*(values for _, values in results), strict=True)
    # Pairs are the last dimension, or the last but one where there are three or more.
    return [in_pair_order(batches, c, dim=-1 if c[0].ndim < 3 else -2) for c in columns]


# Rows of the loss: the residual stream held at every hook


class LossRows(NamedTuple):
    """Gradients pair by pair (the last dimension but one), on the CPU; see `LossGradients`."""

    separation_positive: Float[Tensor, "all_hook pair d_model"]
    separation_negative: Float[Tensor, "all_hook pair d_model"]
    logprob_slope: Float[Tensor, "all_hook pair d_model"]
    scores: Float[Tensor, "all_hook n_scores pair d_model"]
    logprob: Float[Tensor, " pair"]


def pairs_per_pass(model: HookedModel, pairs: TokenizedPairs) -> int | None:
    """Pairs in a pass by default, as many in each; None: as `rows_per_pass` says of any pass."""
    if not isinstance(model, BareModel):
        return None
    width = max(map(len, (*pairs.positive, *pairs.negative)))
    most = min(int(GRAPH_OPERATIONS / model.block_operations) // width, rows_per_pass(model, width))
    n_passes = math.ceil(len(pairs.positive) / max(1, most))
    return math.ceil(len(pairs.positive) / n_passes)


def loss_rows(
    engine: Engine,
    batches: Sequence[tuple[Batch, Batch]],
    targets: dict[str, str],
    *,
    axis: Mapping[str, Float[Tensor, " d_model"]] | None,
    position: int,
    n_scores: int,
    seed: int,
) -> LossRows:
    """The rows of both terms of the loss at every hook; `targets` maps a hook to its loss hook.

    The separation is the projection on the loss hook's `axis`, or the norm without one.
    The engine's cost is added to, a backward pass counted as `BACKWARD_COST` forward passes through
    the same blocks, and a check of one prompt. Raises `ModelError` as `check_label_rows`,
    `InputError` where a hook is not as wide as the residual stream.
    """
    rows = over_batches(
        engine,
        batches,
        (*targets, *targets.values()),
        lambda model, generator, *both: _batch_rows(
            model, both, targets, axis, position, n_scores, generator
        ),
        seed=seed,
    )
    depth = {hook: hook_layer(hook) + 1 for hook in targets.values()}
    # At a loss hook itself the gradient is known without a backward pass.
    backward = sum(depth[hook] for hook in {h for name, h in targets.items() if name != h})
    for positive, negative in batches:
        labels = engine.n_layers * (1 + n_scores)
        engine.cost.add(positive.tokens, engine.n_layers + BACKWARD_COST * (labels + backward))
        engine.cost.add(negative.tokens, max(depth.values()) + BACKWARD_COST * backward)
    return LossRows(*rows)


def _batch_rows(
    model: HookedModel,
    both: tuple[Batch, ...],
    targets: dict[str, str],
    axis: Mapping[str, Tensor] | None,
    position: int,
    n_scores: int,
    generator: torch.Generator,
) -> LossRows:
    sides = {side_of_switches(model, batch.tokens.shape[1]) for batch in both}
    is_joined = _is_launch_bound(model, both) and len(sides) == 1
    batches = (join(model, both),) if is_joined else both
    positive = batches[0].halves()[0] if is_joined else both[0]
    # Where labels and positions are, and what is padded, is known before a device is kept busy.
    labels = Labels.of(positive)
    places = [
        (to_device(batch.places(position), batch.tokens.device), not bool(batch.is_whole.all()))
        for batch in batches
    ]
    deepest = max(hook_layer(name) for name in targets.values())
    with differentiable(model):
        passes = [
            _run_graph(model, batch, targets, *of)
            for batch, of in zip(batches, places, strict=True)
        ]
        final = advance(
            model,
            positive.tokens,
            positive.attention_mask,
            start=Residual(deepest + 1, passes[0].output[: len(positive.prompts)]),
            block=int(model.cfg.n_layers),
            is_padded=not bool(positive.is_whole.all()),
        ).values
        separation = to_host(_separation_rows(passes, targets, axis))
        read = labels.read(model, final, n_samples=n_scores, generator=generator)
        roots = labels.shares.to(read.outputs).sqrt()[:, None]
        pulled = [
            (read.logprob, labels.shares.to(read.logprob)),
            *((read.outputs, sample * roots) for sample in read.of_samples),
        ]
        arriving = [
            to_host(passes[0].rows_of([*targets], *part)[:, : len(positive.prompts)])
            for part in pulled
        ]
    by_prompt = torch.split(read.logprob.detach().cpu(), labels.n_labels.tolist())
    # Copies, since what has arrived is in pinned memory, of which there should not be much.
    hs_pos_rows, hs_neg_rows = separation.arrived().clone().chunk(2, dim=1)
    slope, *scores = [rows.arrived().clone() for rows in arriving]
    return LossRows(
        hs_pos_rows,
        hs_neg_rows,
        slope,
        torch.stack(scores, dim=1) if scores else slope[:, None][:, :0],
        torch.stack([logprobs.mean() for logprobs in by_prompt]),
    )


def _is_launch_bound(model: HookedModel, both: tuple[Batch, ...]) -> bool:
    """Whether a GPU would be done with a block before it is given the next one."""
    tokens = 2 * len(both[0].prompts) * max(batch.tokens.shape[1] for batch in both)
    return isinstance(model, BareModel) and model.block_operations * tokens < LAUNCH_BOUND


def _unit(
    differences: Float[Tensor, "pair d_model"], *, like: Float[Tensor, "pair d_model"]
) -> Float[Tensor, "pair d_model"]:
    """The differences at norm 1; 0 where they are the rounding of such activations."""
    # There the two prompts are equal, and the norm has no gradient.
    norms = differences.norm(dim=-1, keepdim=True)
    rounding = 8 * torch.finfo(like.dtype).eps * like.norm(dim=-1, keepdim=True)
    return torch.where(norms > rounding, differences / norms, torch.zeros_like(differences))


def _separation_rows(
    passes: Sequence[Graph], targets: dict[str, str], axis: Mapping[str, Tensor] | None
) -> Float[Tensor, "all_hook row d_model"]:
    """The gradient of minus the separation at loss hooks, of positive, then negative rows."""
    rows: dict[str, Tensor] = {}
    for loss_hook in dict.fromkeys(targets.values()):
        states = [graph.states[loss_hook] for graph in passes]
        hs_pos, hs_neg = torch.cat(states).detach().chunk(2)
        if axis is None:
            outward = _unit(hs_pos - hs_neg, like=hs_pos)
        else:
            outward = axis[loss_hook].to(hs_pos).expand_as(hs_pos)
        rows[loss_hook] = torch.cat([-outward, outward])
        names = [n for n, target in targets.items() if target == loss_hook and n != loss_hook]
        if names:
            parts = torch.split(rows[loss_hook], [len(state) for state in states])
            pulled = [
                graph.rows_of(names, state, part)
                for graph, state, part in zip(passes, states, parts, strict=True)
            ]
            rows |= dict(zip(names, torch.cat(pulled, dim=1), strict=True))
    return _stacked([rows[name] for name in targets])


def _stacked(rows: Sequence[Float[Tensor, "row d_model"]]) -> Float[Tensor, "hook row d_model"]:
    """Rows of hooks whose blocks may lie on different devices."""
    return torch.stack([row.to(rows[0].device) for row in rows])
