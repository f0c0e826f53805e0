"""Node and edge scores, circuits run alone, and circuits compared."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import bridge
from hand_built import DIRECTION, WIDTH, build
from test_circuits import answers, axis, hand_pairs  # noqa: F401 (fixture)

import steerlens as sl
from steerlens.circuits import (
    Answers,
    Component,
    Intervention,
    compare_circuits,
    contrast_answers,
    random_intervention,
)
from steerlens.circuits.comparison import UNSTEERED, _areas, make_contrast
from steerlens.circuits.components import components, head_hook, mlp_hook, output_weights
from steerlens.circuits.edges import edge_table
from steerlens.circuits.graphs import (
    Means,
    Reader,
    attribute,
    existing_edges,
    largest,
    mean_writes,
    nodes,
    readers,
    run_edges,
    run_nodes,
)
from steerlens.circuits.random_control import mean_kl
from steerlens.errors import InputError
from steerlens.tables import CIRCUIT_COLUMNS, FAITHFULNESS_COLUMNS

NOTHING = Intervention()


@pytest.fixture(scope="module")
def contrast(tiny: Any, pairs: sl.ContrastivePairs) -> Any:
    return make_contrast(tiny, pairs, contrast_answers(tiny, pairs, n_tokens=3))


@pytest.fixture(scope="module")
def means(tiny: Any, contrast: Any) -> Means:
    return mean_writes(tiny, contrast, NOTHING)


def metric(model: Any, contrast: Any, hooks: Any = ()) -> float:
    """Prompt by prompt, unpadded, with hooks made for each prompt's length."""
    total = 0.0
    for i in range(len(contrast.prompts)):
        tokens = contrast.prompts.tokens[i : i + 1, : int(contrast.prompts.last[i]) + 1]
        with torch.no_grad():
            logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks))
        sign = 1 if i < contrast.n_pairs else -1
        total += sign * float(contrast.answers.logit_difference(logits[:, -1]))
    return total / contrast.n_pairs


def ablation(model: Any, means: Means, part: Component) -> tuple[str, Any]:
    """A hook that puts one component at its mean, but for the first token."""
    name = head_hook(part.layer) if part.kind == "head" else mlp_hook(part.layer)

    def put(a: Any, hook: Any) -> Any:
        b = a.clone()
        if part.kind == "head":
            b[:, 1:, part.head] = means.heads[part.layer, part.head]
        else:
            b[:, 1:] = means.mlps[part.layer]
        return b

    return name, put


def test_means_are_over_real_tokens_but_the_first(tiny: Any, contrast: Any, means: Means) -> None:
    rows = []
    for i in range(len(contrast.prompts)):
        tokens = contrast.prompts.tokens[i : i + 1, : int(contrast.prompts.last[i]) + 1]
        with torch.no_grad():
            rows.append(tiny.run_with_cache(tokens)[1][mlp_hook(1)][0, 1:])
    torch.testing.assert_close(means.mlps[1], torch.cat(rows).mean(dim=0), rtol=1e-4, atol=1e-4)


def test_a_circuit_alone_equals_brute_force(tiny: Any, contrast: Any, means: Means) -> None:
    parts = nodes(tiny)
    for gone in (parts[:1], parts[4:5], parts[3:8]):
        kept = torch.tensor([part not in gone for part in parts])
        expected = metric(tiny, contrast, [ablation(tiny, means, part) for part in gone])
        assert run_nodes(tiny, contrast, NOTHING, means, kept) == pytest.approx(expected, abs=1e-4)
    everything = torch.ones(len(parts), dtype=torch.bool)
    whole = run_nodes(tiny, contrast, NOTHING, means, everything)
    assert whole == pytest.approx(metric(tiny, contrast), abs=1e-4)


def test_edges_cut_equal_brute_force(tiny: Any, contrast: Any, means: Means) -> None:
    """One head's edge into the attention and the MLP of a later layer, by hooks of its own."""
    exists = existing_edges(tiny)
    row = components(tiny).index(Component(0, 2))
    weights = output_weights(tiny, 0)[2]
    for reader in (Reader(1, "attn"), Reader(0, "mlp"), Reader(2, "mlp"), readers(tiny)[-1]):
        kept = exists.clone()
        kept[row, readers(tiny).index(reader)] = False
        kept_z: list[torch.Tensor] = []

        def keep(a: Any, hook: Any, into: Any = kept_z) -> None:
            into[:] = [a]

        def cut(a: Any, hook: Any, kept_z: Any = kept_z) -> Any:
            delta = (kept_z[0][:, :, 2] - means.heads[0, 2]) @ weights
            delta[:, 0] = 0
            return a - delta

        expected = metric(tiny, contrast, [(head_hook(0), keep), (reader.hook_name, cut)])
        found = run_edges(tiny, contrast, NOTHING, means, kept)
        assert found == pytest.approx(expected, abs=1e-4)
        assert abs(found - metric(tiny, contrast)) > 1e-4
    assert run_edges(tiny, contrast, NOTHING, means, exists) == pytest.approx(
        metric(tiny, contrast), abs=1e-4
    )


def test_scores_are_derivatives_of_cutting(tiny: Any, contrast: Any, means: Means) -> None:
    """Moving a component a little towards its mean changes the metric by its score."""
    scores = attribute(tiny, contrast, NOTHING, means)
    assert scores.metric == pytest.approx(metric(tiny, contrast), abs=1e-4)
    double = tiny  # float32: a step that is small and still seen
    step = 1e-2
    parts = nodes(tiny)
    for part in (parts[0], parts[4], parts[7]):
        name, to_mean = ablation(tiny, means, part)
        hooks = [
            [(name, lambda a, hook, s=s, f=to_mean: a + s * (f(a, hook) - a))]
            for s in (step, -step)
        ]
        up, down = (metric(double, contrast, h) for h in hooks)
        slope = -(up - down) / (2 * step)
        assert float(scores.nodes[parts.index(part)].mean()) == pytest.approx(
            slope, rel=0.02, abs=2e-3
        )
    row = components(tiny).index(Component(0, 2))
    weights = output_weights(tiny, 0)[2]
    for reader in (Reader(1, "attn"), Reader(0, "mlp"), readers(tiny)[-1]):
        kept_z: list[torch.Tensor] = []

        def keep(a: Any, hook: Any, into: Any = kept_z) -> None:
            into[:] = [a]

        def cut(a: Any, hook: Any, s: float, kept_z: Any = kept_z) -> Any:
            delta = (kept_z[0][:, :, 2] - means.heads[0, 2]) @ weights
            delta[:, 0] = 0
            return a - s * delta

        up, down = (
            metric(
                tiny,
                contrast,
                [
                    (head_hook(0), keep),
                    (reader.hook_name, lambda a, hook, s=s, f=cut: f(a, hook, s)),
                ],
            )
            for s in (step, -step)
        )
        found = float(scores.edges[row, readers(tiny).index(reader)].mean())
        assert found == pytest.approx(-(up - down) / (2 * step), rel=0.02, abs=2e-3)


def test_the_table_of_edges_has_the_largest_ones(tiny: Any, contrast: Any, means: Means) -> None:
    scores = attribute(tiny, contrast, NOTHING, means)
    table = edge_table(tiny, {"unsteered": scores}, n_edges=5)
    mean = scores.edges.mean(dim=-1)
    assert sorted(table.score.abs()) == pytest.approx(
        mean[scores.is_edge].abs().topk(5).values.flip(0).tolist(), rel=1e-6
    )
    names = [str(part) for part in components(tiny)], [str(reader) for reader in readers(tiny)]
    for row in table.itertuples():
        at = names[0].index(row.writer), names[1].index(row.reader)
        assert float(mean[at]) == pytest.approx(row.score, rel=1e-6)
        assert row.writer_layer <= row.reader_layer
    assert set(table.model) == {"unsteered"}


def test_a_writers_edges_add_up_to_its_node(tiny: Any, contrast: Any, means: Means) -> None:
    scores = attribute(tiny, contrast, NOTHING, means)
    torch.testing.assert_close(scores.edges.sum(dim=1)[1:], scores.nodes, rtol=1e-3, atol=1e-4)
    assert not scores.edges[~scores.is_edge].any()


def test_edges_that_exist(llama: Any) -> None:
    exists = existing_edges(llama)
    parts, seen = components(llama), readers(llama)

    def edge(part: Component, reader: Reader) -> bool:
        return bool(exists[parts.index(part), seen.index(reader)])

    assert edge(Component(-1), Reader(0, "attn"))
    assert edge(Component(1, 3), Reader(1, "mlp"))
    assert not edge(Component(1, 3), Reader(1, "attn"))
    assert not edge(Component(1), Reader(1, "mlp"))
    assert edge(Component(1), Reader(2, "attn"))
    assert edge(Component(4), Reader(5, "logits"))
    # 5 layers of 4 heads: to each reader, all that was written before it.
    before_attention = [1 + 5 * layer for layer in range(5)]
    before_mlp = [1 + 5 * layer + 4 for layer in range(5)]
    assert int(exists.sum()) == sum(before_attention) + sum(before_mlp) + 26


def test_largest_by_hand() -> None:
    scores = torch.tensor([[1.0, -5.0], [3.0, 0.5]])
    assert largest(scores, 2).tolist() == [[False, True], [True, False]]
    among = torch.tensor([[True, False], [True, True]])
    assert largest(scores, 2, among).tolist() == [[True, False], [True, False]]


def test_areas_by_hand() -> None:
    # f: 0 at 0, 0.5 at 0.5, 1 at 1; and with an overshoot of 2 at 0.5.
    assert _areas([0.5], [0.5]) == pytest.approx((0.5, 0.5))
    assert _areas([0.5], [2.0]) == pytest.approx((1.25, 0.75))


# The hand-built circuit


def test_the_circuit_made_by_hand_is_found_and_is_enough(
    hand_pairs: sl.ContrastivePairs,  # noqa: F811
) -> None:
    model = build()
    contrast = make_contrast(model, hand_pairs, answers(model))
    means = mean_writes(model, contrast, NOTHING)
    scores = attribute(model, contrast, NOTHING, means)
    parts = nodes(model)
    kept = largest(scores.nodes.mean(dim=-1), 2)
    chosen = {str(part) for part, keep in zip(parts, kept.tolist(), strict=True) if keep}
    assert chosen == {"L0H1", "mlp1"}
    alone = run_nodes(model, contrast, NOTHING, means, kept)
    empty = run_nodes(model, contrast, NOTHING, means, torch.zeros_like(kept))
    assert alone == pytest.approx(scores.metric, rel=0.15)
    assert abs(empty) < 0.1 * scores.metric
    # Positive control: all the others together do nothing.
    assert abs(run_nodes(model, contrast, NOTHING, means, ~kept)) < 0.1 * scores.metric
    edges = largest(scores.edges.mean(dim=-1), 2, scores.is_edge)
    rows = [
        (str(components(model)[i]), str(readers(model)[j])) for i, j in edges.nonzero().tolist()
    ]
    assert ("L0H1", "mlp1") in rows
    assert ("mlp1", "logits") in rows


# Comparisons


@pytest.fixture(scope="module")
def steering(tiny: Any, pairs: sl.ContrastivePairs) -> sl.SteeringVector:
    directions = sl.fit_directions(sl.collect_differences(tiny, pairs, layers=[0]))
    return sl.SteeringVector.from_directions(tiny, directions)


@pytest.fixture(scope="module")
def compared(tiny: Any, pairs: sl.ContrastivePairs, steering: sl.SteeringVector) -> Any:
    pushed = Intervention(steering, 3.0)
    return compare_circuits(
        tiny,
        pairs,
        contrast_answers(tiny, pairs, n_tokens=3),
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
    tiny: Any, pairs: sl.ContrastivePairs, steering: sl.SteeringVector
) -> None:
    given = contrast_answers(tiny, pairs, n_tokens=3)
    table = compare_circuits(
        tiny, pairs, given, {"nothing": Intervention(steering, 0)}, shares=(0.2,), n_splits=2
    ).table
    assert table.iou.tolist() == [1.0, 1.0]
    assert table["rank"].tolist() == pytest.approx([1.0, 1.0])
    assert table.iou_floor.isna().all()
    assert table.a_in_b.tolist() == pytest.approx(table.a_in_a.tolist())


def test_faithfulness_equals_runs_by_hand(
    tiny: Any, pairs: sl.ContrastivePairs, contrast: Any, means: Means, compared: Any
) -> None:
    scores = compared.scores[UNSTEERED]
    kept = largest(scores.nodes.mean(dim=-1), max(1, round(0.5 * len(nodes(tiny)))))
    empty, whole, alone = (
        run_nodes(tiny, contrast, NOTHING, means, mask)
        for mask in (torch.zeros_like(kept), torch.ones_like(kept), kept)
    )
    found = compared.table.query("level == 'node' and share == 0.5").a_in_a.item()
    assert found == pytest.approx((alone - empty) / (whole - empty), rel=1e-4)


def test_a_random_vector_has_the_same_divergence(
    tiny: Any, pairs: sl.ContrastivePairs, contrast: Any, steering: sl.SteeringVector
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


def test_mean_kl_by_hand(tiny: Any, contrast: Any, steering: sl.SteeringVector) -> None:
    prompts = contrast.prompts.part(slice(0, 2))
    pushed = Intervention(steering, 3.0)
    values = []
    for i in range(2):
        tokens = prompts.tokens[i : i + 1, : int(prompts.last[i]) + 1]
        with torch.no_grad():
            p = tiny(tokens)[0].double().softmax(dim=-1)
            with pushed.on(tiny):
                q = tiny(tokens)[0].double().softmax(dim=-1)
        values += (p * (p / q).log()).sum(dim=-1).tolist()
    assert mean_kl(tiny, prompts, pushed) == pytest.approx(np.mean(values), rel=1e-3)


def test_circuits_refuse(tiny: Any, pairs: sl.ContrastivePairs, steering: Any) -> None:
    given = contrast_answers(tiny, pairs, n_tokens=3)
    pushed = {"x": Intervention(steering, 1.0)}
    for options, message in (
        ({"shares": (0.0,)}, "between 0 and 1"),
        ({"shares": ()}, "between 0 and 1"),
        ({"levels": ("layer",)}, "levels are"),
    ):
        with pytest.raises(InputError, match=message):
            compare_circuits(tiny, pairs, given, pushed, **options)
    for bad in ({}, {UNSTEERED: NOTHING}):
        with pytest.raises(InputError, match="one or more interventions"):
            compare_circuits(tiny, pairs, given, bad)
    with pytest.raises(InputError, match="added at one hook, got 0"):
        random_intervention(tiny, pairs, NOTHING)


def test_edges_are_for_vectors_that_are_added(
    tiny: Any, pairs: sl.ContrastivePairs, steering: sl.SteeringVector
) -> None:
    given = contrast_answers(tiny, pairs, n_tokens=3)
    gone = {"gone": Intervention(replace(steering, operator=sl.Ablate()), 1.0)}
    with pytest.raises(InputError, match="vectors must be added"):
        compare_circuits(tiny, pairs, given, gone, shares=(0.5,))
    found = compare_circuits(tiny, pairs, given, gone, shares=(0.5,), levels=("node",), n_splits=1)
    assert found.table.level.tolist() == ["node"]


def test_the_order_of_shares_does_not_matter(
    tiny: Any, pairs: sl.ContrastivePairs, steering: sl.SteeringVector
) -> None:
    given = contrast_answers(tiny, pairs, n_tokens=3)
    options: dict[str, Any] = {"levels": ("node",), "n_splits": 1}
    pushed = {"x": Intervention(steering, 1.0)}
    one, other = (
        compare_circuits(tiny, pairs, given, pushed, shares=shares, **options).faithfulness
        for shares in ((0.2, 0.5), (0.5, 0.2, 0.5))
    )
    pd.testing.assert_frame_equal(one, other)


def test_blocks_whose_writes_are_normed_are_refused() -> None:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    model = bridge(transformers.Gemma2ForCausalLM(config).eval())
    pairs = sl.ContrastivePairs.from_lists(
        ["the day was good", "I felt good"], ["the day was bad", "I felt bad"]
    )
    vector = sl.SteeringVector.from_vectors({"blocks.0.hook_resid_post": torch.ones(32)})
    with pytest.raises(InputError, match="unexplained"):
        compare_circuits(
            model, pairs, answers(model), {"x": Intervention(vector, 1.0)}, levels=("node",)
        )


def test_answers_of_each_pair(tiny: Any, pairs: sl.ContrastivePairs) -> None:
    rows = torch.arange(len(pairs))[:, None] + 10
    contrast = make_contrast(tiny, pairs, Answers(rows, rows + 20))
    assert contrast.answers.positive[:, 0].tolist() == 2 * list(range(10, 18))
    with pytest.raises(InputError, match="one row, or in 16"):
        make_contrast(tiny, pairs, Answers(rows[:3], rows[:3] + 20))
    with pytest.raises(InputError, match="from 0 to 159, got 500"):
        make_contrast(tiny, pairs, Answers(torch.tensor([[500]]), torch.tensor([[1]])))


def test_a_behaviour_that_is_not_there(hand_pairs: sl.ContrastivePairs) -> None:  # noqa: F811
    model = build(noise=0.0)
    with torch.no_grad():
        model.original_model.lm_head.weight.zero_()
    steering = sl.SteeringVector.from_vectors({"blocks.0.hook_resid_post": axis()})
    assert steering.d_model == WIDTH > DIRECTION
    with pytest.raises(InputError, match="nothing that a circuit could explain"):
        compare_circuits(
            model, hand_pairs, answers(model), {"x": Intervention(steering, 1.0)}, shares=(0.5,)
        )
