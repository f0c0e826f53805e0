"""Node and edge scores, circuits run alone, and circuits compared."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hand_built import PAIRS, build, good_or_bad, one_by_one

import steerlens as sl
from steerlens.circuits import (
    Answers,
    Component,
    Intervention,
    Reader,
    contrast_answers,
    edge_readers,
    edge_table,
)
from steerlens.circuits.components import components, head_hook, mlp_hook, output_weights
from steerlens.circuits.graphs import (
    Contrast,
    Graph,
    Scores,
    attribute,
    existing_edges,
    make_contrast,
    make_graph,
    nodes,
    run_edges,
    run_nodes,
)
from steerlens.circuits.overlap import Sizes

NOTHING = Intervention()
HEAD = Component(0, 2)


@pytest.fixture(scope="module")
def given(tiny: Any, pairs: sl.ContrastivePairs) -> Answers:
    return contrast_answers(tiny, pairs, n_tokens=3)


@pytest.fixture(scope="module")
def contrast(tiny: Any, pairs: sl.ContrastivePairs, given: Answers) -> Contrast:
    return make_contrast(tiny, pairs, given)


@pytest.fixture(scope="module")
def graph(contrast: Contrast) -> Graph:
    return make_graph(contrast, NOTHING)


@pytest.fixture(scope="module")
def scores(graph: Graph) -> Scores:
    return attribute(graph)


def metric(contrast: Contrast, hooks: Any = ()) -> float:
    """Prompt by prompt, unpadded, with hooks made for each prompt's length."""
    total = 0.0
    for i, tokens in enumerate(one_by_one(contrast.prompts)):
        with torch.no_grad():
            logits = contrast.model.run_with_hooks(tokens, fwd_hooks=list(hooks))
        sign = 1 if i < contrast.n_pairs else -1
        total += sign * float(contrast.answers.logit_difference(logits[:, -1]))
    return total / contrast.n_pairs


def ablation(graph: Graph, part: Component, share: float = 1.0) -> tuple[str, Any]:
    """A hook that moves one component a share of the way to its mean, but for the first token."""
    name = head_hook(part.layer) if part.kind == "head" else mlp_hook(part.layer)
    mean = graph.means[name]

    def put(a: Any, hook: Any) -> Any:
        b = a.clone()
        if part.kind == "head":
            b[:, 1:, part.head] = mean[part.head]
        else:
            b[:, 1:] = mean
        return a + share * (b - a) if share != 1 else b

    return name, put


def cut_edge(graph: Graph, reader: Reader, share: float = 1.0) -> list[tuple[str, Any]]:
    """Hooks that take a share of what `HEAD` writes beyond its mean from what one reader sees."""
    written: list[torch.Tensor] = []
    name = head_hook(HEAD.layer)
    weights = output_weights(graph.contrast.model, name)[HEAD.head]

    def keep(a: Any, hook: Any) -> None:
        written[:] = [a]

    def cut(a: Any, hook: Any) -> Any:
        delta = (written[0][:, :, HEAD.head] - graph.means[name][HEAD.head]) @ weights
        delta[:, 0] = 0
        return a - share * delta

    return [(name, keep), (reader.hook_name, cut)]


def test_means_are_over_real_tokens_but_the_first(
    tiny: Any, contrast: Contrast, graph: Graph
) -> None:
    with torch.no_grad():
        rows = [
            tiny.run_with_cache(tokens)[1][mlp_hook(1)][0, 1:]
            for tokens in one_by_one(contrast.prompts)
        ]
    mean = torch.cat(rows).mean(dim=0)
    torch.testing.assert_close(graph.means[mlp_hook(1)], mean, rtol=1e-4, atol=1e-4)


def test_a_circuit_alone_equals_brute_force(tiny: Any, contrast: Contrast, graph: Graph) -> None:
    parts = nodes(tiny)
    for gone in (parts[:1], parts[4:5], parts[3:8]):
        kept = torch.tensor([part not in gone for part in parts])
        expected = metric(contrast, [ablation(graph, part) for part in gone])
        assert run_nodes(graph, kept).mean() == pytest.approx(expected, abs=1e-4)
    everything = torch.ones(len(parts), dtype=torch.bool)
    assert run_nodes(graph, everything).mean() == pytest.approx(metric(contrast), abs=1e-4)


def test_edges_cut_equal_brute_force(tiny: Any, contrast: Contrast, graph: Graph) -> None:
    """One head's edge into the attention and the MLP of a later layer, by hooks of its own."""
    exists, readers = existing_edges(tiny), edge_readers(tiny)
    uncut = metric(contrast)
    for reader in (Reader(1, "attn"), Reader(0, "mlp"), Reader(2, "mlp"), readers[-1]):
        kept = exists.clone()
        kept[components(tiny).index(HEAD), readers.index(reader)] = False
        found = float(run_edges(graph, kept).mean())
        assert found == pytest.approx(metric(contrast, cut_edge(graph, reader)), abs=1e-4)
        assert abs(found - uncut) > 1e-4
    assert run_edges(graph, exists).mean() == pytest.approx(uncut, abs=1e-4)


def test_scores_are_derivatives_of_cutting(
    tiny: Any, contrast: Contrast, graph: Graph, scores: Scores
) -> None:
    """Moving a component a little towards its mean changes the metric by its score."""
    assert scores.metric == pytest.approx(metric(contrast), abs=1e-4)
    step = 1e-2  # float32: small, and still seen

    def slope(hooks: Callable[[float], list[tuple[str, Any]]]) -> Any:
        up, down = (metric(contrast, hooks(share)) for share in (step, -step))
        return pytest.approx(-(up - down) / (2 * step), rel=0.02, abs=2e-3)

    parts, readers = nodes(tiny), edge_readers(tiny)
    for part in (parts[0], parts[4], parts[7]):
        score = float(scores.nodes[parts.index(part)].mean())
        assert score == slope(lambda share, part=part: [ablation(graph, part, share)])
    row = components(tiny).index(HEAD)
    for reader in (Reader(1, "attn"), Reader(0, "mlp"), readers[-1]):
        score = float(scores.edges[row, readers.index(reader)].mean())
        assert score == slope(lambda share, reader=reader: cut_edge(graph, reader, share))


def test_the_table_of_edges_has_the_largest_ones(tiny: Any, scores: Scores) -> None:
    table = edge_table(tiny, {"unsteered": scores}, n_edges=5)
    mean = scores.edges.mean(dim=-1)
    assert sorted(table.score.abs()) == pytest.approx(
        mean[scores.is_edge].abs().topk(5).values.flip(0).tolist(), rel=1e-6
    )
    writers, readers = ([str(x) for x in every] for every in (components(tiny), edge_readers(tiny)))
    for row in table.itertuples():
        at = writers.index(row.writer), readers.index(row.reader)
        assert float(mean[at]) == pytest.approx(row.score, rel=1e-6)
        assert row.writer_layer <= row.reader_layer
    assert set(table.model) == {"unsteered"}


def test_a_writers_edges_add_up_to_its_node(scores: Scores) -> None:
    torch.testing.assert_close(scores.edges.sum(dim=1)[1:], scores.nodes, rtol=1e-3, atol=1e-4)
    assert not scores.edges[~scores.is_edge].any()


def test_edges_that_exist(llama: Any) -> None:
    exists = existing_edges(llama)
    parts, readers = components(llama), edge_readers(llama)
    for part, reader, is_there in (
        (Component(-1), Reader(0, "attn"), True),
        (Component(1, 3), Reader(1, "mlp"), True),
        (Component(1, 3), Reader(1, "attn"), False),
        (Component(1), Reader(1, "mlp"), False),
        (Component(1), Reader(2, "attn"), True),
        (Component(4), Reader(5, "logits"), True),
    ):
        assert bool(exists[parts.index(part), readers.index(reader)]) == is_there
    # 5 layers of 4 heads: to each reader, all that was written before it.
    before_attention = [1 + 5 * layer for layer in range(5)]
    before_mlp = [1 + 5 * layer + 4 for layer in range(5)]
    assert int(exists.sum()) == sum(before_attention) + sum(before_mlp) + 26


def test_circuits_and_overlaps_by_hand() -> None:
    a = torch.tensor([1.0, -5.0, 3.0, 0.5])
    b = torch.tensor([-4.0, -5.0, 3.0, 2.0])
    absolute, signed = (Sizes("node", kind, (0.25, 0.5), 4) for kind in ("absolute", "signed"))
    assert [kept.tolist() for kept in absolute.circuits(a)] == [
        [False, True, False, False],
        [False, True, True, False],
    ]
    assert signed.circuits(a)[1].tolist() == [True, False, True, False]
    # Of two: {1, 2} and {0, 1} by size, {0, 2} and {2, 3} by sign.
    # Ranks: 2 4 3 1 and 3 4 2 1 by size, 3 1 4 2 and 2 1 4 3 by sign: 1 - 6 (1 + 1) / (4 (16 - 1)).
    assert absolute.overlaps(a, b) == pytest.approx([1, 1 / 3, 0.8])
    assert signed.overlaps(a, b) == pytest.approx([1, 1 / 3, 0.8])
    equal = torch.ones(4)
    assert absolute.circuits(equal)[1].tolist() == [True, True, False, False]


def test_the_circuit_made_by_hand_is_found_and_is_enough() -> None:
    model = build()
    graph = make_graph(make_contrast(model, PAIRS, good_or_bad(model)), NOTHING)
    scores = attribute(graph)
    (kept,) = Sizes("node", "absolute", (2 / 9,), 9).circuits(scores.nodes.mean(dim=-1))
    chosen = {str(part) for part, keep in zip(nodes(model), kept.tolist(), strict=True) if keep}
    assert chosen == {"L0H1", "mlp1"}
    assert run_nodes(graph, kept).mean() == pytest.approx(scores.metric, rel=0.15)
    assert abs(run_nodes(graph, torch.zeros_like(kept)).mean()) < 0.1 * scores.metric
    # Positive control: all the others together do nothing.
    assert abs(run_nodes(graph, ~kept).mean()) < 0.1 * scores.metric
    edges = edge_table(model, {"unsteered": scores}, n_edges=2)[["writer", "reader"]]
    assert set(edges.itertuples(index=False, name=None)) >= {("L0H1", "mlp1"), ("mlp1", "logits")}
