"""Scores of nodes and edges against their means, and models run with a part of them alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from steerlens.circuits.answers import Answers, last_logits, row_slices
from steerlens.circuits.components import (
    EMBED,
    TOLERANCE,
    Component,
    Prompts,
    components,
    head_hook,
    hook_of,
    mlp_hook,
    output_weights,
    writer_hooks,
)
from steerlens.circuits.interventions import Intervention, trace
from steerlens.errors import InputError
from steerlens.models.hooks import HookFunction, hooked, resid_post
from steerlens.models.loading import HookedModel


@dataclass(frozen=True, order=True)
class Reader:
    """What an edge leads to: the attention or the MLP of a layer, or the logits."""

    layer: int
    kind: str

    @property
    def hook_name(self) -> str:
        """Its own copy of the residual stream: the input of the norm in front of it."""
        norms = {"attn": f"blocks.{self.layer}.ln1", "mlp": f"blocks.{self.layer}.ln2"}
        return f"{norms.get(self.kind, 'ln_final')}.hook_in"

    def __str__(self) -> str:
        return "logits" if self.kind == "logits" else f"{self.kind}{self.layer}"


@dataclass(frozen=True)
class Contrast:
    """A behaviour: prompts of both sides, positive ones first, as many of each; and answers.

    Its metric is the mean over pairs of the positive prompt's answer logit difference minus the
    negative one's (logits).
    """

    prompts: Prompts
    answers: Answers

    @property
    def n_pairs(self) -> int:
        """How many pairs there are."""
        return len(self.prompts) // 2

    @property
    def signs(self) -> Float[Tensor, " prompt"]:
        """1 for positive prompts, -1 for negative ones."""
        return torch.tensor([1.0, -1.0]).repeat_interleave(self.n_pairs)


@dataclass(frozen=True)
class Means:
    """What an ablated component writes: its mean over all real tokens but the first.

    `heads` is at `hook_z`; the first token, the same in all prompts, is never ablated.
    """

    embed: Float[Tensor, " d_model"]
    heads: Float[Tensor, "layer head d_head"]
    mlps: Float[Tensor, "layer d_model"]


@dataclass(frozen=True)
class Scores:
    """Attribution of every node and edge, pair by pair, in logits: positive ones support the
    behaviour.

    A node's score estimates by how much the metric falls when its output is replaced by its mean
    (its first-order effect); an edge's, when that of the writer is replaced in what one reader
    sees. Only edges with `is_edge` exist: a writer before its reader.
    """

    nodes: Float[Tensor, "node pair"]
    edges: Float[Tensor, "writer reader pair"]
    is_edge: Bool[Tensor, "writer reader"]
    metric: float


def readers(model: HookedModel) -> tuple[Reader, ...]:
    """Attention and MLP of every layer in order, then the logits.

    Raises `InputError` where they have no norm of their own to read through.
    """
    n_layers = int(model.cfg.n_layers)
    found = (
        *(Reader(layer, kind) for layer in range(n_layers) for kind in ("attn", "mlp")),
        Reader(n_layers, "logits"),
    )
    missing = [reader.hook_name for reader in found if reader.hook_name not in model.hook_dict]
    if missing or getattr(model.cfg, "parallel_attn_mlp", False):
        raise InputError(
            f"edges are read at the norm before attention, MLP and logits; this model has no "
            f"{', '.join(missing) or 'MLP that reads the attention of its block'}: compare nodes "
            'alone, levels=("node",)'
        )
    return found


def nodes(model: HookedModel) -> tuple[Component, ...]:
    """What a node circuit is made of: heads and MLPs; the embedding is always part of it."""
    return components(model)[1:]


def existing_edges(model: HookedModel) -> Bool[Tensor, "writer reader"]:
    """Whether each component (`components` order) comes before each reader (`readers` order).

    Raises `InputError` as `readers` does.
    """
    return torch.tensor(
        [[_is_before(part, reader) for reader in readers(model)] for part in components(model)]
    )


def _is_before(part: Component, reader: Reader) -> bool:
    if part.layer != reader.layer:
        return part.layer < reader.layer
    return part.kind == "head" and reader.kind == "mlp"


def mean_writes(model: HookedModel, contrast: Contrast, intervention: Intervention) -> Means:
    """The mean output of every component under an intervention, both sides together."""
    totals: dict[str, Tensor] = {}
    count = 0.0
    for rows in row_slices(len(contrast.prompts)):
        some = contrast.prompts.part(rows)
        found = trace(
            model,
            some,
            contrast.answers.part(rows),
            writer_hooks(model),
            intervention=intervention,
        )
        real = some.real.clone()
        real[:, 0] = 0
        count += float(real.sum())
        for name, activation in found.activations.items():
            weight = real.reshape(*real.shape, *[1] * (activation.ndim - 2))
            part = (activation.float() * weight).sum(dim=(0, 1))
            totals[name] = totals[name] + part if name in totals else part
    layers = range(int(model.cfg.n_layers))
    return Means(
        totals[EMBED] / count,
        torch.stack([totals[head_hook(layer)] for layer in layers]) / count,
        torch.stack([totals[mlp_hook(layer)] for layer in layers]) / count,
    )


def check_sum(model: HookedModel, contrast: Contrast) -> None:
    """Raise `InputError` unless heads and MLPs, as they are read, add up to the residual stream.

    On two prompts, to 1e-3 of the stream (4 epsilon in 16-bit dtypes); biases, the same everywhere,
    are left out.
    """
    some = contrast.prompts.part(slice(0, 2))
    final = resid_post(int(model.cfg.n_layers) - 1)
    names = writer_hooks(model)
    found = trace(model, some, contrast.answers.part(slice(0, 2)), [*names, final]).activations
    rest = found[final].float()
    for name in names:
        activation = found[name].float()
        if name.endswith("hook_z"):
            weights = output_weights(model, int(name.split(".")[1])).to(activation)
            activation = einsum(activation, weights, "p t h k, h k d -> p t d")
        rest = rest - activation
    off = float((rest - rest[:1, :1]).norm() / found[final].float().norm())
    if not off <= max(TOLERANCE, 4 * torch.finfo(model.cfg.dtype).eps):
        raise InputError(
            f"heads and MLPs leave {off:.2g} of the residual stream unexplained: this model norms, "
            "scales or mixes them before they are added, so it cannot be taken apart this way"
        )


def attribute(
    model: HookedModel,
    contrast: Contrast,
    intervention: Intervention,
    means: Means,
    *,
    with_edges: bool = True,
) -> Scores:
    """Score every node and every edge, from one forward and one backward pass of each batch.

    `node = sum (a - mean) . d metric / d a`; `edge = sum (a_writer - mean) . d metric / d input of
    the reader` (edge attribution patching, Syed et al. 2023, arXiv:2310.10348, against the mean),
    summed over tokens. Keys and values may be shared by heads: a reader is a layer's attention as a
    whole. Raises `InputError` as `readers` does.
    """
    seen = readers(model) if with_edges else ()
    by_node, by_edge, metrics = [], [], []
    for rows in row_slices(len(contrast.prompts)):
        some = contrast.prompts.part(rows)
        found = trace(
            model,
            some,
            contrast.answers.part(rows),
            [*writer_hooks(model), *(reader.hook_name for reader in seen)],
            intervention=intervention,
            with_gradients=True,
        )
        into = [found.gradients[reader.hook_name].float() for reader in seen]
        edge, node = [], []
        for name in writer_hooks(model):
            if with_edges:
                edge.append(
                    einsum(
                        deviation(model, name, found.activations[name], means),
                        torch.stack(into),
                        "prompt token part d, reader prompt token d -> part reader prompt",
                    )
                )
            delta = found.activations[name].float() - _mean_at(name, means)
            delta[:, 0] = 0
            product = (delta * found.gradients[name].float()).sum(dim=(1, -1))
            node.append(product.T if name.endswith("hook_z") else product[None])
        if with_edges:
            by_edge.append(torch.cat(edge).cpu())
        by_node.append(torch.cat(node)[1:].cpu())
        metrics.append(found.metric.cpu())
    signs = contrast.signs
    metric = torch.cat(metrics) * signs
    nodes_by_pair = _by_pair(torch.cat(by_node, dim=1) * signs)
    if with_edges:
        exists = existing_edges(model)
        edges = torch.where(exists[..., None], _by_pair(torch.cat(by_edge, dim=2) * signs), 0.0)
    else:
        exists = torch.zeros((len(components(model)), 0), dtype=torch.bool)
        edges = torch.zeros((*exists.shape, nodes_by_pair.shape[1]))
    return Scores(
        nodes_by_pair,
        edges,
        exists,
        float(_by_pair(metric).mean()),
    )


def deviation(
    model: HookedModel,
    name: str,
    activation: Float[Tensor, "prompt token *rest"],
    means: Means,
) -> Float[Tensor, "prompt token part d_model"]:
    """What the components at a hook write beyond their means; 0 at the first token."""
    delta = activation.float() - _mean_at(name, means)
    delta[:, 0] = 0
    if not name.endswith("hook_z"):
        return delta[:, :, None]
    weights = output_weights(model, int(name.split(".")[1])).to(delta)
    return einsum(
        delta,
        weights,
        "prompt token head d_head, head d_head d_model -> prompt token head d_model",
    )


def run_nodes(
    model: HookedModel,
    contrast: Contrast,
    intervention: Intervention,
    means: Means,
    kept: Bool[Tensor, " node"],
) -> float:
    """The metric with every head and MLP that is not `kept` replaced by its mean."""
    gone = [part for part, keep in zip(nodes(model), kept.tolist(), strict=True) if not keep]
    heads: dict[str, list[int]] = {}
    for part in gone:
        if part.kind == "head":
            heads.setdefault(head_hook(part.layer), []).append(part.head)
    fwd_hooks = [
        *(_to_mean(name, _mean_at(name, means), which) for name, which in heads.items()),
        *(
            _to_mean(mlp_hook(part.layer), means.mlps[part.layer], None)
            for part in gone
            if part.kind == "mlp"
        ),
    ]
    return _run(model, contrast, intervention, lambda: fwd_hooks)


def run_edges(
    model: HookedModel,
    contrast: Contrast,
    intervention: Intervention,
    means: Means,
    kept: Bool[Tensor, "writer reader"],
) -> float:
    """The metric when each reader sees only the writers `kept` for it, the others' means instead.

    A reader's input is the stream minus what each cut writer wrote beyond its mean in this same
    run, so what it does see is what the circuit itself computes. A vector that acts in between must
    be added: `compare_circuits` refuses other operators.
    """
    parts, seen = components(model), readers(model)
    start: dict[str, int] = {}
    for index, part in enumerate(parts):
        start.setdefault(hook_of(part), index)
    cut = existing_edges(model) & ~kept

    def fresh() -> list[tuple[str, HookFunction]]:
        written: dict[str, Tensor] = {}
        totals: dict[str, Tensor] = {}

        def keeping(name: str) -> tuple[str, HookFunction]:
            def keep(activation: Tensor, hook: Any) -> None:  # noqa: ARG001
                written[name] = deviation(model, name, activation, means)
                totals[name] = written[name].sum(dim=2)

            return name, keep

        def reading(column: int) -> tuple[str, HookFunction]:
            def read(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
                out = activation.float()
                for name, wrote in written.items():
                    gone = cut[start[name] : start[name] + wrote.shape[2], column]
                    if bool(gone.any()):
                        out = out - _summed(wrote, totals[name], gone.to(wrote.device))
                return out.to(activation)

            return seen[column].hook_name, read

        return [
            *(keeping(name) for name in writer_hooks(model)),
            *(reading(column) for column in range(len(seen)) if bool(cut[:, column].any())),
        ]

    return _run(model, contrast, intervention, fresh)


def largest(
    scores: Float[Tensor, "*shape"], size: int, among: Bool[Tensor, "*shape"] | None = None
) -> Bool[Tensor, "*shape"]:
    """True at the `size` largest absolute scores (`among` those that exist)."""
    flat = scores.abs().flatten().clone()
    if among is not None:
        flat[~among.flatten()] = -1
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:size]] = True
    return chosen.reshape(scores.shape)


def _summed(
    wrote: Float[Tensor, "prompt token part d_model"],
    total: Float[Tensor, "prompt token d_model"],
    which: Bool[Tensor, " part"],
) -> Float[Tensor, "prompt token d_model"]:
    """The sum over some parts, from whichever are fewer, those in it or those out of it."""
    if bool(which.all()):
        return total
    if 2 * int(which.sum()) > len(which):
        return total - wrote[:, :, ~which].sum(dim=2)
    return wrote[:, :, which].sum(dim=2)


def _mean_at(name: str, means: Means) -> Tensor:
    if name == EMBED:
        return means.embed
    layer = int(name.split(".")[1])
    return means.heads[layer] if name.endswith("hook_z") else means.mlps[layer]


def _to_mean(name: str, mean: Tensor, heads: Sequence[int] | None) -> tuple[str, HookFunction]:
    def put(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        changed = activation.clone()
        if heads is None:
            changed[:, 1:] = mean.to(activation)
        else:
            changed[:, 1:, list(heads)] = mean[list(heads)].to(activation)
        return changed

    return name, put


def _run(
    model: HookedModel, contrast: Contrast, intervention: Intervention, make_hooks: Any
) -> float:
    """The metric of the model with hooks, made anew for every pass."""
    found = []
    for rows in row_slices(len(contrast.prompts)):
        with intervention.on(model), hooked(model, make_hooks()):
            logits = last_logits(model, contrast.prompts.part(rows))
        found.append(contrast.answers.part(rows).logit_difference(logits))
    return float(_by_pair(torch.cat(found) * contrast.signs).mean())


def _by_pair(values: Float[Tensor, "*rest prompt"]) -> Float[Tensor, "*rest pair"]:
    """The two prompts of each pair, already signed, added up."""
    positive, negative = values.chunk(2, dim=-1)
    return positive + negative
