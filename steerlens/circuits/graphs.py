"""Scores of nodes and edges against their means, and models run with a part of them alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from steerlens.circuits.answers import Answers
from steerlens.circuits.components import (
    Component,
    by_hook,
    components,
    holds_heads,
    rows_of,
    tolerance,
    writer_hooks,
    writes,
)
from steerlens.circuits.interventions import Intervention, capture, replacing
from steerlens.circuits.prompts import make_prompts
from steerlens.circuits.tasks import Task
from steerlens.data.pairs import ContrastivePairs
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.errors import InputError
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import HookFunction, resid_post
from steerlens.tables import Row, to_frame
from steerlens.validation import Count, checked


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

    def is_behind(self, part: Component) -> bool:
        """Whether it sees what a component writes."""
        if part.layer != self.layer:
            return part.layer < self.layer
        return part.kind == "head" and self.kind == "mlp"

    def __str__(self) -> str:
        return "logits" if self.kind == "logits" else f"{self.kind}{self.layer}"


@dataclass(frozen=True, eq=False)
class Contrast(Task):
    """A behaviour: prompts of both sides, positive ones first, as many of each; and answers.

    It is the positive prompts' mean answer logit difference minus the negative ones' (logits).
    """

    @property
    def n_pairs(self) -> int:
        """How many pairs there are."""
        return len(self.prompts) // 2

    def of_pairs(self, is_in: Bool[Tensor, " pair"]) -> "Contrast":
        """Some of the pairs."""
        rows: list[int] = is_in.nonzero().flatten().tolist()
        return self.part(rows + [self.n_pairs + row for row in rows])

    @staticmethod
    def by_pair(values: Float[Tensor, "*rest prompt"]) -> Float[Tensor, "*rest pair"]:
        """Each positive prompt's value minus that of the negative one."""
        positive, negative = values.chunk(2, dim=-1)
        return positive - negative


@dataclass(frozen=True, eq=False)
class Graph:
    """The heads and MLPs of a model on a contrast, steered or not, and what they write on average.

    `means` has, by hook, the mean of all real tokens but the first, both sides together: what an
    ablated component writes. The first token, the same in all prompts, is never ablated.
    """

    contrast: Contrast
    intervention: Intervention
    means: Mapping[str, Tensor]

    def deviation(
        self, hook_name: str, activation: Float[Tensor, "prompt token *rest"]
    ) -> Float[Tensor, "prompt token *rest"]:
        """What is at a hook beyond the mean there; 0 at the first token."""
        beyond = activation.float() - self.means[hook_name]
        beyond[:, 0] = 0
        return beyond


@dataclass(frozen=True, eq=False)
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

    def items(self, level: str) -> Float[Tensor, "item pair"]:
        """Those of all nodes ("node"), or of the edges that exist ("edge")."""
        return self.nodes if level == "node" else self.edges[self.is_edge]


@checked
def make_contrast(model: HookedModel, pairs: ContrastivePairs, answers: Answers) -> Contrast:
    """Both sides of the pairs as one batch, positive prompts first.

    Args:
        model: The model, unsteered.
        pairs: Prompts that begin with the same token, which is never ablated.
        answers: One row, one a pair, or one a prompt, positive ones first.

    Raises:
        InputError: The prompts begin with different tokens, or the answers do not fit.

    Examples:
        >>> from steerlens.circuits import contrast_answers, make_contrast
        >>> make_contrast(model, pairs, contrast_answers(model, pairs, n_tokens=3)).n_pairs
        8
    """
    pairs.check_paired("the contrast of a circuit is")
    tokenized = tokenize_pairs(model, pairs)
    both = [*tokenized.positive, *tokenized.negative]
    prompts = make_prompts(model, both, groups=2 * pairs.groups)
    if bool((prompts.tokens[:, 0] != prompts.tokens[0, 0]).any()):
        raise InputError(
            "the prompts begin with different tokens; circuits are compared on prompts that begin "
            "with the same one, such as BOS, because it is left as it is"
        )
    if len(answers.positive) == len(pairs) > 1:
        answers = Answers(answers.positive.repeat(2, 1), answers.negative.repeat(2, 1))
    return Contrast(model, prompts, answers)


@checked
def make_graph(contrast: Contrast, intervention: Intervention) -> Graph:
    """The model's graph under an intervention: a forward pass over all prompts for the means.

    Args:
        contrast: As `make_contrast` makes it.
        intervention: What the model is steered by; `Intervention()`: nothing.

    Examples:
        >>> from steerlens.circuits import Intervention, attribute, make_contrast, make_graph
        >>> from steerlens.circuits import contrast_answers, run_edges, run_nodes
        >>> contrast = make_contrast(model, pairs, contrast_answers(model, pairs, n_tokens=3))
        >>> graph = make_graph(contrast, Intervention(vector, 4))
        >>> scores = attribute(graph)
        >>> kept = scores.nodes.mean(dim=-1).abs() > 0  # all that have any effect
        >>> bool(np.isclose(run_nodes(graph, kept).mean(), scores.metric, rtol=1e-3))
        True
        >>> bool(np.isclose(run_edges(graph, scores.is_edge).mean(), scores.metric, rtol=1e-3))
        True
    """
    names = writer_hooks(contrast.model)
    totals: dict[str, Tensor] = {}
    n_tokens = 0
    for batch in contrast.passes():
        real = batch.prompts.real.clone()
        real[:, 0] = False
        n_tokens += int(real.sum())
        found = capture(batch.model, batch.prompts.tokens, names, intervention)
        for name, activation in found.items():
            weight = real.reshape(*real.shape, *[1] * (activation.ndim - 2))
            part = (activation.float() * weight).sum(dim=(0, 1))
            totals[name] = totals[name] + part if name in totals else part
    means = {name: total / n_tokens for name, total in totals.items()}
    return Graph(contrast, intervention, means)


def nodes(model: HookedModel) -> tuple[Component, ...]:
    """What a node circuit is made of: heads and MLPs; the embedding is always part of it."""
    return components(model)[1:]


@checked
def edge_readers(model: HookedModel) -> tuple[Reader, ...]:
    """What edges lead to: attention and MLP of every layer in order, then the logits.

    Args:
        model: The model.

    Raises:
        InputError: They have no norm of their own to read through, so edges cannot be compared.

    Examples:
        >>> from steerlens.circuits import edge_readers
        >>> [str(reader) for reader in edge_readers(model)][-3:]
        ['attn4', 'mlp4', 'logits']
    """
    n_layers = int(model.cfg.n_layers)
    readers = (
        *(Reader(layer, kind) for layer in range(n_layers) for kind in ("attn", "mlp")),
        Reader(n_layers, "logits"),
    )
    missing = [reader.hook_name for reader in readers if reader.hook_name not in model.hook_dict]
    if missing or getattr(model.cfg, "parallel_attn_mlp", False):
        raise InputError(
            f"edges are read at the norm before attention, MLP and logits; this model has no "
            f"{', '.join(missing) or 'MLP that reads the attention of its block'}: compare nodes "
            'alone, levels=("node",)'
        )
    return readers


def existing_edges(model: HookedModel) -> Bool[Tensor, "writer reader"]:
    """Whether each component comes before each of the `edge_readers`, whose errors it raises."""
    readers = edge_readers(model)
    return torch.tensor([[to.is_behind(part) for to in readers] for part in components(model)])


def check_sum(contrast: Contrast) -> None:
    """Raise `InputError` unless heads and MLPs add up to the stream, biases aside, on 2 prompts."""
    model = contrast.model
    final = resid_post(int(model.cfg.n_layers) - 1)
    tokens = contrast.prompts.tokens[:2]
    written = capture(model, tokens, [*writer_hooks(model), final])
    stream = written.pop(final).float()
    rest = stream.clone()
    for name, activation in written.items():
        rest -= writes(model, name, activation).sum(dim=2)
    off = float((rest - rest[:1, :1]).norm() / stream.norm())
    if not off <= tolerance(model.cfg.dtype):
        raise InputError(
            f"heads and MLPs leave {off:.2g} of the residual stream unexplained: this model norms, "
            "scales or mixes them before they are added, so it cannot be taken apart this way"
        )


@checked
def attribute(graph: Graph, *, with_edges: bool = True) -> Scores:
    """Score every node and every edge, from one forward and one backward pass of each batch.

    `node = sum (a - mean) . d metric / d a`; `edge = sum (a_writer - mean) . d metric / d input of
    the reader` (edge attribution patching, Syed et al. 2023, arXiv:2310.10348, against the mean),
    summed over tokens. Keys and values may be shared by heads: a reader is a layer's attention as a
    whole.

    Args:
        graph: As `make_graph` makes it; its example goes on to here.
        with_edges: False: nodes alone.

    Raises:
        InputError: As `edge_readers`.
    """
    contrast = graph.contrast
    model, names = contrast.model, writer_hooks(contrast.model)
    seen = [reader.hook_name for reader in edge_readers(model)] if with_edges else []
    by_node: list[Tensor] = []
    by_edge: list[Tensor] = []
    metrics: list[Tensor] = []
    for batch in contrast.passes():
        run = batch.trace([*names, *seen], graph.intervention, with_gradients=True)
        metrics.append(run.metric.cpu())
        into = torch.stack([run.gradients[name].float() for name in seen]) if seen else None
        node_rows, edge_rows = [], []
        for name in names:
            beyond = graph.deviation(name, run.activations[name])
            product = (beyond * run.gradients[name].float()).sum(dim=(1, -1))
            node_rows.append(product.T if holds_heads(name) else product[None])
            if into is not None:
                wrote = writes(model, name, beyond)
                edge_rows.append(einsum(wrote, into, "p t part d, reader p t d -> part reader p"))
        by_node.append(torch.cat(node_rows)[1:].cpu())
        by_edge += [torch.cat(edge_rows).cpu()] if edge_rows else []
    node_scores = contrast.by_pair(torch.cat(by_node, dim=1))
    if with_edges:
        is_edge = existing_edges(model)
        edges = contrast.by_pair(torch.cat(by_edge, dim=2)).masked_fill(~is_edge[..., None], 0)
    else:
        is_edge = torch.zeros((len(components(model)), 0), dtype=torch.bool)
        edges = torch.zeros((*is_edge.shape, node_scores.shape[1]))
    metric = float(contrast.by_pair(torch.cat(metrics)).mean())
    return Scores(node_scores, edges, is_edge, metric)


@checked
def run_nodes(graph: Graph, kept: Bool[Tensor, " node"]) -> Float[Tensor, " pair"]:
    """The metric (logits), pair by pair, with all heads and MLPs that are not kept at their means.

    Args:
        graph: As `make_graph` makes it; its example goes on to here.
        kept: True for those of the circuit, in the order of `Scores.nodes`.
    """
    parts = zip(nodes(graph.contrast.model), kept.tolist(), strict=True)
    places = by_hook(part for part, is_kept in parts if not is_kept)
    means = graph.means
    hooks = [replacing(name, means[name], heads, first=1) for name, heads in places.items()]
    return _run(graph, lambda: hooks)


@checked
def run_edges(graph: Graph, kept: Bool[Tensor, "writer reader"]) -> Float[Tensor, " pair"]:
    """The metric (logits), pair by pair, when each reader sees the writers kept for it, else means.

    A reader's input is the stream minus what each cut writer wrote beyond its mean in this same
    run, so what it does see is what the circuit itself computes.

    Args:
        graph: As `make_graph` makes it; its example goes on to here. A vector that acts in between
            must be added: `compare_circuits` refuses other operators.
        kept: True for those of the circuit, as in `Scores.is_edge`.
    """
    cut = existing_edges(graph.contrast.model) & ~kept
    return _run(graph, lambda: _cutting(graph, cut))


def run_circuit(graph: Graph, level: str, kept: Bool[Tensor, " item"]) -> Float[Tensor, " pair"]:
    """`run_nodes` or `run_edges` with the kept of `Scores.items`."""
    if level == "node":
        return run_nodes(graph, kept)
    edges = existing_edges(graph.contrast.model)
    return run_edges(graph, edges.masked_scatter(edges, kept))


@checked
def edge_table(
    model: HookedModel, scores: Mapping[str, Scores], *, n_edges: Count = 40
) -> pd.DataFrame:
    """The edges of each model with the largest absolute score, as a table (columns `edges`).

    Args:
        model: The model that they are of.
        scores: Those of `compare_circuits`: a model's name each.
        n_edges: How many of each.

    Raises:
        InputError: `n_edges` is below 1; and as `edge_readers`.

    Examples:
        >>> from steerlens.circuits import (
        ...     Intervention, compare_circuits, contrast_answers, edge_table
        ... )
        >>> answers = contrast_answers(model, pairs, n_tokens=3)
        >>> pushed = {"cheerful": Intervention(vector, 4)}
        >>> circuits = compare_circuits(model, pairs, answers, pushed, shares=[0.2], n_splits=2)
        >>> edges = edge_table(model, circuits.scores, n_edges=5)
        >>> edges.groupby("model").size().to_dict()
        {'cheerful': 5, 'unsteered': 5}
    """
    parts, readers = components(model), edge_readers(model)
    rows: list[Row] = []
    for name, model_scores in scores.items():
        exists = model_scores.is_edge.nonzero()
        mean = model_scores.items("edge").mean(dim=-1)
        chosen = mean.abs().topk(min(n_edges, len(mean))).indices.sort().values
        edges = [(parts[i], readers[j]) for i, j in exists[chosen].tolist()]
        rows += rows_of(
            model=name,
            writer=[str(writer) for writer, _ in edges],
            writer_layer=[writer.layer for writer, _ in edges],
            writer_head=[writer.head for writer, _ in edges],
            reader=[str(reader) for _, reader in edges],
            reader_layer=[reader.layer for _, reader in edges],
            score=mean[chosen].tolist(),
        )
    return to_frame(rows, "edges", {"n_edges": n_edges})


def _run(graph: Graph, make_hooks: Any) -> Float[Tensor, " pair"]:
    """The metric of the model with hooks, made anew for every pass."""
    metrics = [batch.measure(graph.intervention, make_hooks()) for batch in graph.contrast.passes()]
    return graph.contrast.by_pair(torch.cat(metrics).double())


def _cutting(graph: Graph, cut: Bool[Tensor, "writer reader"]) -> list[tuple[str, HookFunction]]:
    """Hooks of one pass that keep what was written, and take what is cut out of readers' inputs."""
    model = graph.contrast.model
    readers, names = edge_readers(model), writer_hooks(model)
    sizes = [int(model.cfg.n_heads) if holds_heads(name) else 1 for name in names]
    cut_at = dict(zip(names, torch.split(cut, sizes), strict=True))
    written: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, activation: Tensor, hook: Any) -> None:  # noqa: ARG001
        wrote = writes(model, name, graph.deviation(name, activation))
        written[name] = wrote, wrote.sum(dim=2)

    def read(column: int, activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        stream = activation.float()
        for name, (wrote, total) in written.items():
            gone = cut_at[name][:, column]
            if bool(gone.any()):
                stream = stream - _summed(wrote, total, gone.to(wrote.device))
        return stream.to(activation)

    return [
        *((name, partial(keep, name)) for name in names),
        *(
            (reader.hook_name, partial(read, column))
            for column, reader in enumerate(readers)
            if bool(cut[:, column].any())
        ),
    ]


def _summed(
    wrote: Float[Tensor, "prompt token part d_model"],
    total: Float[Tensor, "prompt token d_model"],
    gone: Bool[Tensor, " part"],
) -> Float[Tensor, "prompt token d_model"]:
    """The sum over the parts that are gone, from whichever are fewer, these or the others."""
    if bool(gone.all()):
        return total
    if 2 * int(gone.sum()) > len(gone):
        return total - wrote[:, :, ~gone].sum(dim=2)
    return wrote[:, :, gone].sum(dim=2)
