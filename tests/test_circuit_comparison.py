"""Circuits compared: chosen on one half, run on the other, ranked among nulls."""

# ruff: noqa: F401, F811 (fixtures are imported, and named as parameters)

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hand_built import PAIRS, VECTOR, build, build_normed, fitted, good_or_bad, one_by_one
from test_graphs import NOTHING, contrast, given

import steerlens as sl
from steerlens.circuits import (
    Answers,
    Intervention,
    compare_circuits,
    null_interventions,
)
from steerlens.circuits.comparison import UNSTEERED
from steerlens.circuits.graphs import (
    Contrast,
    attribute,
    make_contrast,
    make_graph,
    nodes,
    run_nodes,
)
from steerlens.circuits.overlap import Halves, Sizes, overlap_rows
from steerlens.circuits.prompts import choosing_half, first_half
from steerlens.errors import InputError
from steerlens.stats import ratio_interval
from steerlens.tables import COLUMNS

# Comparisons


@pytest.fixture(scope="module")
def steering(tiny: Any, pairs: sl.ContrastivePairs) -> sl.SteeringVector:
    return sl.SteeringVector.from_directions(tiny, fitted(tiny, pairs))


SHARES = (0.1, 0.5)


@pytest.fixture(scope="module")
def pushed(steering: sl.SteeringVector) -> Intervention:
    return Intervention(steering, 3.0)


@pytest.fixture(scope="module")
def nulls(tiny: Any, pairs: sl.ContrastivePairs, pushed: Intervention) -> Any:
    differences = sl.collect_differences(tiny, pairs, layers=[0])
    return null_interventions(tiny, pairs, pushed, differences, n=2)


@pytest.fixture(scope="module")
def compared(
    tiny: Any, pairs: sl.ContrastivePairs, given: Answers, pushed: Intervention, nulls: Any
) -> Any:
    with pytest.warns(UserWarning, match="8 independent groups"):
        return compare_circuits(
            tiny,
            pairs,
            given,
            {"mean_diff": pushed},
            nulls={"mean_diff": nulls},
            shares=SHARES,
            n_splits=3,
        )


compare = partial(compare_circuits, n_splits=1)


def test_columns_and_rows_of_circuits(compared: Any) -> None:
    table, curves = compared.table, compared.faithfulness
    assert list(table.columns) == [column.name for column in COLUMNS["circuits"]]
    assert list(curves.columns) == [column.name for column in COLUMNS["faithfulness"]]
    kinds = [(level, by) for level in ("node", "edge") for by in ("absolute", "signed")]
    assert table[["level", "selection", "a", "b", "share"]].values.tolist() == [
        [*kind, UNSTEERED, "mean_diff", share] for kind in kinds for share in SHARES
    ]
    assert len(curves) == 4 * 2 * 2 * 2
    for name in ("iou", "iou_across", "iou_ceiling", "iou_null_low", "iou_null_high"):
        assert table[name].between(0, 1).all()
    assert (table.iou_null_low <= table.iou_null_high).all()
    for of_table in (table, curves):
        assert set(of_table.n_groups) == {4}
        chosen, tested = (of_table.attrs[half] for half in ("chosen_on", "tested_on"))
        assert sorted(chosen["rows"] + tested["rows"]) == list(range(8))
        assert chosen["n_groups"] == tested["n_groups"] == 4
    for frame, value, ends in (
        (table, "iou", "iou_ci"),
        (table, "rank", "rank_ci"),
        (curves, "faithfulness", "ci"),
        (curves, "shortfall", "shortfall_ci"),
        (curves, "area_under_faithfulness", "area_ci"),
    ):
        assert frame[value].between(frame[f"{ends}_low"], frame[f"{ends}_high"]).all(), value


def test_what_is_ranked_among_nulls(compared: Any) -> None:
    """Overlaps at all sizes; the unsteered node circuit's faithfulness, at the largest."""
    table, curves = compared.table, compared.faithfulness
    assert (table.n_null == 2).all()
    thirds = (1 / 3, 2 / 3, 1)
    for name in ("iou_p", "iou_p_family", "rank_p"):
        assert table[name].map(lambda p: any(p == pytest.approx(x) for x in thirds)).all()
    is_ranked = (curves.level == "node") & (curves.share == 0.5)
    is_ranked &= (curves.circuit_of == UNSTEERED) & (curves.run_in == "mean_diff")
    assert is_ranked.sum() == 2
    assert curves.p_value.notna().eq(is_ranked).all()
    assert curves.n_null.eq(2 * is_ranked).all()


def test_a_vector_that_is_its_own_null_is_ranked_last(
    tiny: Any, pairs: sl.ContrastivePairs, given: Answers, pushed: Intervention
) -> None:
    """Positive control: among nulls that do nothing it is first."""
    nothing = Intervention(pushed.vector, 1e-6)
    for stand_in, rank in ((pushed, 1.0), (nothing, 0.25)):
        options: dict[str, Any] = {"nulls": {"x": {"some": [stand_in] * 3}}, "shares": (0.2,)}
        found = compare(tiny, pairs, given, {"x": pushed}, levels=("node",), **options)
        assert found.table.rank_p.tolist() == pytest.approx([rank, rank])
        is_ranked = found.faithfulness.p_value.notna()
        assert found.faithfulness[is_ranked].p_value.tolist() == pytest.approx([rank, rank])


def test_circuits_are_chosen_on_one_half_and_run_on_the_other(
    tiny: Any, pairs: sl.ContrastivePairs, given: Answers, compared: Any
) -> None:
    """By hand: means and scores of the one half, runs of the other."""
    halves = [compared.table.attrs[half]["rows"] for half in ("chosen_on", "tested_on")]
    chosen, tested = (
        make_contrast(tiny, sl.ContrastivePairs(tuple(pairs.pairs[i] for i in rows)), given)
        for rows in halves
    )
    graph = make_graph(chosen, NOTHING)
    for by in ("absolute", "signed"):
        sizes = Sizes("node", by, (0.5,), len(nodes(tiny)))
        (kept,) = sizes.circuits(attribute(graph).nodes.mean(dim=-1))
        empty, whole, alone = (
            run_nodes(replace(graph, contrast=tested), mask)
            for mask in (torch.zeros_like(kept), torch.ones_like(kept), kept)
        )
        row = compared.faithfulness.query(
            f"level == 'node' and share == 0.5 and selection == '{by}' "
            f"and circuit_of == run_in == '{UNSTEERED}'"
        ).squeeze()
        expected = (alone - empty).mean() / (whole - empty).mean()
        assert row.faithfulness == pytest.approx(float(expected), rel=1e-3)
        kept_by_pair, whole_by_pair = ((x - empty).numpy() for x in (alone, whole))
        ends = ratio_interval(kept_by_pair, whole_by_pair)
        assert (row.ci_low, row.ci_high) == pytest.approx(ends, rel=1e-2)


def test_areas_are_of_the_whole_curve(compared: Any) -> None:
    columns = ["level", "selection", "circuit_of", "run_in"]
    sizes = {"node": len(compared.scores[UNSTEERED].nodes)}
    sizes["edge"] = int(compared.scores[UNSTEERED].is_edge.sum())
    for (level, *_), curve in compared.faithfulness.groupby(columns):
        x = [0, *(curve["size"] / sizes[level]), 1]
        f = [0, *curve.faithfulness, 1]
        area = sum((f[i] + f[i + 1]) / 2 * (x[i + 1] - x[i]) for i in range(3))
        assert curve.area_under_faithfulness.tolist() == pytest.approx([area, area], rel=1e-6)
        away = [abs(1 - y) for y in f]
        area = sum((away[i] + away[i + 1]) / 2 * (x[i + 1] - x[i]) for i in range(3))
        assert curve.area_from_one.tolist() == pytest.approx([area, area], rel=1e-6)


def test_an_intervention_that_does_nothing_has_the_same_circuit(
    tiny: Any, pairs: sl.ContrastivePairs, given: Answers, steering: sl.SteeringVector
) -> None:
    nothing = {"nothing": Intervention(steering, 0)}
    found = compare(tiny, pairs, given, nothing, shares=(0.2,), n_splits=2)
    table, curves = found.table, found.faithfulness
    assert table.iou.tolist() == table.iou_ci_low.tolist() == [1.0] * 4
    assert table["rank"].tolist() == pytest.approx([1.0] * 4)
    assert table.iou_across.tolist() == pytest.approx(table.iou_ceiling.tolist())
    assert (table.iou_ceiling < 1).any(), "halves of the pairs have other circuits"
    assert table.n_null.eq(0).all()
    assert table[["iou_p", "iou_null_low", "rank_p"]].isna().all(axis=None)
    assert curves.shortfall.tolist() == pytest.approx([0.0] * len(curves), abs=1e-6)


def test_halves_hold_whole_groups() -> None:
    groups = (7, 7, 3, 3, 0, 9, 9, 1)
    for seed in range(10):
        is_first = first_half(groups, seed)
        chosen = {g for g, is_in in zip(groups, is_first.tolist(), strict=True) if is_in}
        rest = {g for g, is_in in zip(groups, is_first.tolist(), strict=True) if not is_in}
        assert not chosen & rest
        assert (len(chosen), len(rest)) == (3, 2)
    assert len({tuple(first_half(groups, seed).tolist()) for seed in range(10)}) > 3
    with pytest.raises(InputError, match="takes 4 groups or more; got 3"):
        choosing_half((0, 1, 2, 2, 2), 0)


def test_intervals_of_overlaps_hold_the_expected_overlap() -> None:
    """Two models whose scores differ, on 6 groups: the interval covers what is seen on average."""
    generator = torch.Generator().manual_seed(0)
    sizes = Sizes("node", "absolute", (0.2,), 60)
    truth = torch.randn(60, generator=generator) ** 3
    apart = truth + torch.randn(60, generator=generator)
    seen, ends = [], []
    for seed in range(60):
        noise = torch.randn(2, 60, 12, generator=generator)
        noise += torch.randn(2, 60, 6, generator=generator).repeat_interleave(2, dim=2)
        scores = {"a": truth[:, None] + noise[0], "b": apart[:, None] + noise[1]}
        halves = Halves(torch.ones(12, dtype=torch.bool), [i // 2 for i in range(12)], 0, seed)
        (drawn,) = overlap_rows(sizes, scores, ("a", "b"), {}, halves)
        seen.append(drawn.row["iou"])
        ends.append((drawn.row["iou_ci_low"], drawn.row["iou_ci_high"]))
    low, high = np.array(ends).T
    assert ((low <= np.mean(seen)) & (np.mean(seen) <= high)).mean() >= 0.9
    assert (high - low).mean() < 0.6, "and says something"


def test_nulls_are_at_the_vectors_divergence(
    tiny: Any,
    pairs: sl.ContrastivePairs,
    contrast: Contrast,
    steering: sl.SteeringVector,
    pushed: Intervention,
    nulls: Any,
) -> None:
    """By hand, prompt by prompt; the directions are those that a comparison of methods draws."""
    prompts = contrast.prompts.part(slice(0, contrast.n_pairs))

    def mean_kl(intervention: Intervention) -> float:
        values = []
        for tokens in one_by_one(prompts):
            with torch.no_grad():
                p = tiny(tokens)[0, :-1].double().softmax(dim=-1)
                with intervention.on(tiny):
                    q = tiny(tokens)[0, :-1].double().softmax(dim=-1)
            values.append(float((p * (p / q).log()).sum(dim=-1).mean()))
        return float(np.mean(values))

    wanted = mean_kl(pushed)
    differences = sl.collect_differences(tiny, pairs, layers=[0])
    expected = sl.directions.null_directions(differences, n=2, seed=0)
    (name,) = steering.hook_names
    for kind, some in nulls.items():
        for null, directions in zip(some, expected[kind], strict=True):
            assert mean_kl(null) == pytest.approx(wanted, rel=0.1)
            torch.testing.assert_close(null.vector[name], directions[name])
    assert mean_kl(NOTHING) == pytest.approx(0, abs=1e-6)
    for intervention in (NOTHING, Intervention(replace(steering, operator=sl.Ablate()), 1.0)):
        with pytest.raises(InputError, match="added at one hook"):
            null_interventions(tiny, pairs, intervention, differences, n=2)
    elsewhere = sl.collect_differences(tiny, pairs, layers=[1])
    with pytest.raises(InputError, match="no differences at"):
        null_interventions(tiny, pairs, pushed, elsewhere, n=2)


def test_circuits_refuse(
    tiny: Any, pairs: sl.ContrastivePairs, given: Answers, steering: sl.SteeringVector
) -> None:
    pushed = {"x": Intervention(steering, 1.0)}
    gone = {"gone": Intervention(replace(steering, operator=sl.Ablate()), 1.0)}
    for interventions, options, message in (
        (pushed, {"shares": (0.0,)}, "between 0 and 1"),
        (pushed, {"shares": ()}, "between 0 and 1"),
        (pushed, {"levels": ("layer",)}, "levels are"),
        (pushed, {"null_shares": (0.3,)}, "null_shares are some of shares"),
        (pushed, {"nulls": {"y": {"random": [pushed["x"]]}}}, "none is called"),
        (pushed, {"nulls": {"x": {"random": []}}}, "no vector of some kind"),
        ({}, {}, "one or more interventions"),
        ({UNSTEERED: NOTHING}, {}, "one or more interventions"),
        (gone, {"shares": (0.5,)}, "vectors must be added"),
        (pushed, {"nulls": {"x": {"random": [gone["gone"]]}}}, "vectors must be added"),
    ):
        with pytest.raises(InputError, match=message):
            compare_circuits(tiny, pairs, given, interventions, **options)
    with pytest.raises(InputError, match="4 groups or more; got 3"):
        compare_circuits(tiny, pairs[:3], given, pushed)
    found = compare(tiny, pairs, given, gone, shares=(0.5,), levels=("node",))
    assert set(found.table.level) == {"node"}


def test_the_order_of_shares_does_not_matter(
    tiny: Any, pairs: sl.ContrastivePairs, given: Answers, steering: sl.SteeringVector
) -> None:
    pushed = {"x": Intervention(steering, 1.0)}
    one, other = (
        compare(tiny, pairs, given, pushed, shares=shares, levels=("node",)).faithfulness
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
        compare(normed, PAIRS[:4], good_or_bad(normed), push, levels=("node",))
    silent = build(noise=0.0)
    with torch.no_grad():
        silent.original_model.lm_head.weight.zero_()
    with pytest.raises(InputError, match="nothing that a circuit could explain"):
        compare_circuits(
            silent, PAIRS, good_or_bad(silent), {"x": Intervention(VECTOR, 1.0)}, shares=(0.5,)
        )
