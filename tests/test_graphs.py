"""Node and edge scores, circuits run alone, and circuits compared."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hand_built import PAIRS, VECTOR, build, build_normed, fitted, good_or_bad, one_by_one

import steerlens as sl
from steerlens.circuits import (
    Answers,
    Component,
    Intervention,
    Reader,
    compare_circuits,
    contrast_answers,
    edge_readers,
    edge_table,
    mean_kl,
    random_intervention,
)
from steerlens.circuits.comparison import UNSTEERED, _areas
from steerlens.circuits.components import components, head_hook, mlp_hook, output_weights
from steerlens.circuits.graphs import (
    Contrast,
    Graph,
    Scores,
    attribute,
    existing_edges,
    largest,
    make_contrast,
    make_graph,
    nodes,
    run_edges,
    run_nodes,
)
from steerlens.errors import InputError
from steerlens.tables import CIRCUIT_COLUMNS, FAITHFULNESS_COLUMNS

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
        assert run_nodes(graph, kept) == pytest.approx(expected, abs=1e-4)
    everything = torch.ones(len(parts), dtype=torch.bool)
    assert run_nodes(graph, everything) == pytest.approx(metric(contrast), abs=1e-4)


def test_edges_cut_equal_brute_force(tiny: Any, contrast: Contrast, graph: Graph) -> None:
    """One head's edge into the attention and the MLP of a later layer, by hooks of its own."""
    exists, readers = existing_edges(tiny), edge_readers(tiny)
    uncut = metric(contrast)
    for reader in (Reader(1, "attn"), Reader(0, "mlp"), Reader(2, "mlp"), readers[-1]):
        kept = exists.clone()
        kept[components(tiny).index(HEAD), readers.index(reader)] = False
        found = run_edges(graph, kept)
        assert found == pytest.approx(metric(contrast, cut_edge(graph, reader)), abs=1e-4)
        assert abs(found - uncut) > 1e-4
    assert run_edges(graph, exists) == pytest.approx(uncut, abs=1e-4)


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


def test_largest_and_areas_by_hand() -> None:
    numbers = torch.tensor([[1.0, -5.0], [3.0, 0.5]])
    assert largest(numbers, 2).tolist() == [[False, True], [True, False]]
    among = torch.tensor([[True, False], [True, True]])
    assert largest(numbers, 2, among).tolist() == [[True, False], [True, False]]
    # f: 0 at 0, 0.5 at 0.5, 1 at 1; and with an overshoot of 2 at 0.5.
    assert _areas([0.5], [0.5]) == pytest.approx((0.5, 0.5))
    assert _areas([0.5], [2.0]) == pytest.approx((1.25, 0.75))


def test_the_circuit_made_by_hand_is_found_and_is_enough() -> None:
    model = build()
    graph = make_graph(make_contrast(model, PAIRS, good_or_bad(model)), NOTHING)
    scores = attribute(graph)
    kept = largest(scores.nodes.mean(dim=-1), 2)
    chosen = {str(part) for part, keep in zip(nodes(model), kept.tolist(), strict=True) if keep}
    assert chosen == {"L0H1", "mlp1"}
    assert run_nodes(graph, kept) == pytest.approx(scores.metric, rel=0.15)
    assert abs(run_nodes(graph, torch.zeros_like(kept))) < 0.1 * scores.metric
    # Positive control: all the others together do nothing.
    assert abs(run_nodes(graph, ~kept)) < 0.1 * scores.metric
    edges = edge_table(model, {"unsteered": scores}, n_edges=2)[["writer", "reader"]]
    assert set(edges.itertuples(index=False, name=None)) >= {("L0H1", "mlp1"), ("mlp1", "logits")}


# Comparisons


@pytest.fixture(scope="module")
def steering(tiny: Any, pairs: sl.ContrastivePairs) -> sl.SteeringVector:
    return sl.SteeringVector.from_directions(tiny, fitted(tiny, pairs))


@pytest.fixture(scope="module")
def compared(
    tiny: Any, pairs: sl.ContrastivePairs, given: Answers, steering: sl.SteeringVector
) -> Any:
    pushed = Intervention(steering, 3.0)
    return compare_circuits(
        tiny,
        pairs,
        given,
        {"mean_diff": pushed},
        floor=random_intervention(tiny, pairs, pushed),
        shares=(0.1, 0.5),
        n_splits=3,
    )


def test_columns_and_rows_of_circuits(compared: Any) -> None:
    table, curves = compared.table, compared.faithfulness
    assert list(table.columns) == [column.name for column in CIRCUIT_COLUMNS]
    assert list(curves.columns) == [column.name for column in FAITHFULNESS_COLUMNS]
    assert table[["level", "a", "b", "share"]].values.tolist() == [
        [level, UNSTEERED, "mean_diff", share] for level in ("node", "edge") for share in (0.1, 0.5)
    ]
    assert len(curves) == 2 * 2 * 2 * 2
    for name in ("iou", "iou_ceiling", "iou_floor"):
        assert table[name].between(0, 1).all()
    for row in table.itertuples():
        curve = curves.query(
            f"level == '{row.level}' and circuit_of == '{row.a}' and run_in == '{row.b}'"
        )
        assert row.a_in_b == curve[curve.share == row.share].faithfulness.item()


def test_an_intervention_that_does_nothing_has_the_same_circuit(
    tiny: Any, pairs: sl.ContrastivePairs, given: Answers, steering: sl.SteeringVector
) -> None:
    nothing = {"nothing": Intervention(steering, 0)}
    table = compare_circuits(tiny, pairs, given, nothing, shares=(0.2,), n_splits=2).table
    assert table.iou.tolist() == [1.0, 1.0]
    assert table["rank"].tolist() == pytest.approx([1.0, 1.0])
    assert table.iou_floor.isna().all()
    assert table.a_in_b.tolist() == pytest.approx(table.a_in_a.tolist())


def test_faithfulness_equals_runs_by_hand(tiny: Any, graph: Graph, compared: Any) -> None:
    scores = compared.scores[UNSTEERED]
    kept = largest(scores.nodes.mean(dim=-1), max(1, round(0.5 * len(nodes(tiny)))))
    empty, whole, alone = (
        run_nodes(graph, mask) for mask in (torch.zeros_like(kept), torch.ones_like(kept), kept)
    )
    found = compared.table.query("level == 'node' and share == 0.5").a_in_a.item()
    assert found == pytest.approx((alone - empty) / (whole - empty), rel=1e-4)


def test_a_random_vector_has_the_same_divergence(
    tiny: Any, pairs: sl.ContrastivePairs, contrast: Contrast, steering: sl.SteeringVector
) -> None:
    pushed = Intervention(steering, 3.0)
    other = random_intervention(tiny, pairs, pushed, seed=1)
    prompts = contrast.prompts.part(slice(0, contrast.n_pairs))
    wanted = mean_kl(tiny, prompts, pushed)
    assert mean_kl(tiny, prompts, other) == pytest.approx(wanted, rel=0.05)
    assert other.vector is not None
    (name,) = other.vector.hook_names
    assert abs(float(other.vector[name] @ steering[name])) < 0.7
    assert mean_kl(tiny, prompts, NOTHING) == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="added at one hook, got 0"):
        random_intervention(tiny, pairs, NOTHING)


def test_mean_kl_by_hand(tiny: Any, contrast: Contrast, steering: sl.SteeringVector) -> None:
    prompts = contrast.prompts.part(slice(0, 2))
    pushed = Intervention(steering, 3.0)
    values = []
    for tokens in one_by_one(prompts):
        with torch.no_grad():
            p = tiny(tokens)[0].double().softmax(dim=-1)
            with pushed.on(tiny):
                q = tiny(tokens)[0].double().softmax(dim=-1)
        values += (p * (p / q).log()).sum(dim=-1).tolist()
    assert mean_kl(tiny, prompts, pushed) == pytest.approx(np.mean(values), rel=1e-3)


def test_circuits_refuse(
    tiny: Any, pairs: sl.ContrastivePairs, given: Answers, steering: sl.SteeringVector
) -> None:
    pushed = {"x": Intervention(steering, 1.0)}
    gone = {"gone": Intervention(replace(steering, operator=sl.Ablate()), 1.0)}
    for interventions, options, message in (
        (pushed, {"shares": (0.0,)}, "between 0 and 1"),
        (pushed, {"shares": ()}, "between 0 and 1"),
        (pushed, {"levels": ("layer",)}, "levels are"),
        ({}, {}, "one or more interventions"),
        ({UNSTEERED: NOTHING}, {}, "one or more interventions"),
        (gone, {"shares": (0.5,)}, "vectors must be added"),
    ):
        with pytest.raises(InputError, match=message):
            compare_circuits(tiny, pairs, given, interventions, **options)
    found = compare_circuits(tiny, pairs, given, gone, shares=(0.5,), levels=("node",), n_splits=1)
    assert found.table.level.tolist() == ["node"]


def test_the_order_of_shares_does_not_matter(
    tiny: Any, pairs: sl.ContrastivePairs, given: Answers, steering: sl.SteeringVector
) -> None:
    options: dict[str, Any] = {"levels": ("node",), "n_splits": 1}
    pushed = {"x": Intervention(steering, 1.0)}
    one, other = (
        compare_circuits(tiny, pairs, given, pushed, shares=shares, **options).faithfulness
        for shares in ((0.2, 0.5), (0.5, 0.2, 0.5))
    )
    pd.testing.assert_frame_equal(one, other)


def test_answers_of_each_pair(tiny: Any, pairs: sl.ContrastivePairs) -> None:
    rows = torch.arange(len(pairs))[:, None] + 10
    contrast = make_contrast(tiny, pairs, Answers(rows, rows + 20))
    assert contrast.answers.positive[:, 0].tolist() == 2 * list(range(10, 18))
    with pytest.raises(InputError, match="one row, or in 16"):
        make_contrast(tiny, pairs, Answers(rows[:3], rows[:3] + 20))
    with pytest.raises(InputError, match="from 0 to 159, got 500"):
        make_contrast(tiny, pairs, Answers(torch.tensor([[500]]), torch.tensor([[1]])))


def test_what_cannot_be_explained_is_refused() -> None:
    """Writes that are normed before they are added, and a behaviour that is not there."""
    normed = build_normed()
    push = {
        "x": Intervention(
            sl.SteeringVector.from_vectors({"blocks.0.hook_resid_post": torch.ones(32)}), 1.0
        )
    }
    with pytest.raises(InputError, match="unexplained"):
        compare_circuits(normed, PAIRS[:2], good_or_bad(normed), push, levels=("node",))
    silent = build(noise=0.0)
    with torch.no_grad():
        silent.original_model.lm_head.weight.zero_()
    with pytest.raises(InputError, match="nothing that a circuit could explain"):
        compare_circuits(
            silent, PAIRS, good_or_bad(silent), {"x": Intervention(VECTOR, 1.0)}, shares=(0.5,)
        )
