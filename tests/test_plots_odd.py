"""Figures of odd tables: undefined and far values, several hooks of a layer, repeated rows."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from run_folders import circuits_tables, compare_tables, geometry_tables, layers_table, sweep_table
from test_plots import boundaries, rows

from steerlens import plots
from steerlens.errors import InputError
from steerlens.measure.plane import LossGeometry
from steerlens.measure.rows import as_asked
from steerlens.plots.plane import ARROW


@pytest.fixture
def layers() -> pd.DataFrame:
    """Of three layers, with boundaries of 5, 6, 8 and -6, -7, -8, in norms of 10; and intervals."""
    table = layers_table(3).assign(boundary_pos=[5.0, 6.0, 8.0], resid_norm=10.0)
    for sign in ("pos", "neg"):
        table[f"boundary_{sign}_ci_low"] = table[f"boundary_{sign}"] - 0.5
        table[f"boundary_{sign}_ci_high"] = table[f"boundary_{sign}"] + 0.5
    return table


@pytest.fixture
def geometry() -> LossGeometry:
    tables = geometry_tables()
    return LossGeometry(tables["geometry"], tables["contours"], tables["shape"])


# Layers

SIGNS = ("outward, c > 0", "inward, c < 0")


def test_an_interval_without_ends_is_a_gap(layers: pd.DataFrame) -> None:
    ends = [f"boundary_{sign}_ci_{end}" for sign in ("pos", "neg") for end in ("low", "high")]
    layers.loc[1, ends] = math.nan
    for panel in ("units", "shares"):
        for sign in SIGNS:
            measured = boundaries(plots.boundary(layers), sign, panel=panel)
            assert measured.low.isna().tolist() == [False, True, False]
            assert measured.high.isna().tolist() == [False, True, False]


def test_what_lies_beyond_the_panel_is_told(layers: pd.DataFrame) -> None:
    told = "Predictions beyond the panel are left out, intervals end at its edge."
    assert told not in plots.boundary(layers).caption
    far = plots.boundary(layers.assign(predicted_boundary_neg=-100.0))
    assert told in far.caption
    assert boundaries(far, "inward, c < 0", "predicted").boundary.isna().all()
    # 8 is the largest boundary, so the panel's edge lies at 8.8.
    cut = plots.boundary(layers.assign(boundary_pos_ci_high=20.0))
    assert told in cut.caption
    assert list(boundaries(cut, "outward, c > 0").high) == pytest.approx([8.8, 8.8, 8.8])


def test_without_any_boundary_the_predictions_make_the_panel(layers: pd.DataFrame) -> None:
    figure = plots.boundary(layers.assign(boundary_pos=math.inf, boundary_neg=-math.inf))
    predicted = boundaries(figure, "outward, c > 0", "predicted")
    assert list(predicted.boundary) == pytest.approx([5.5, 6.5, 7.5])
    measured = boundaries(figure, "outward, c > 0")
    assert measured.boundary.isna().all()
    assert list(measured.beyond) == pytest.approx([1.1 * 7.5] * 3)


def two_kinds(table: pd.DataFrame) -> pd.DataFrame:
    """The table's block outputs, and as many MLP outputs."""
    names = table.hook_name.str.replace("hook_resid_post", "hook_mlp_out")
    both = pd.concat([table, table.assign(hook_name=names)], ignore_index=True)
    both.attrs.update(table.attrs)
    return both


@pytest.mark.parametrize("draw", [plots.layer_profile, plots.boundary])
def test_hooks_of_one_layer_are_not_joined(
    draw: Callable[[pd.DataFrame], plots.Figure], layers: pd.DataFrame
) -> None:
    figure = draw(two_kinds(layers))
    assert figure.frames == ("hook_resid_post", "hook_mlp_out")
    for data in figure.spec["datasets"].values():
        shown = {(row["frame"], row["layer"]) for row in data if "layer" in row}
        assert shown <= {(frame, layer) for frame in figure.frames for layer in range(3)}
        assert not shown or len(shown) == 6
    assert len(draw(layers).frames) == 1
    assert figure.to_bytes("png")


def test_a_comparison_has_a_frame_for_every_hook() -> None:
    figure = plots.comparison(two_kinds(compare_tables()["comparison"]))
    assert figure.frames[1:] == (
        "layer 10",
        "blocks.10.hook_mlp_out",
        "layer 20",
        "blocks.20.hook_mlp_out",
    )
    assert len(rows(figure, "methods", frame="layer 10")) == 2


# Repeated rows, and numbers that are nearly the same


def test_a_component_has_one_row() -> None:
    tables = circuits_tables()
    with pytest.raises(InputError, match=r"layer 0, head 5.*find_writers\(\.\.\.\)\.table"):
        plots.components(tables["positions"], tables["readers"])
    assert plots.components(tables["writers"], tables["readers"])


def test_a_cell_has_one_row() -> None:
    table = sweep_table(2)
    twice = pd.concat([table, table[table.coefficient == 10]])
    with pytest.raises(InputError, match=r"blocks\.0\.hook_resid_post, asked 10"):
        plots.heat_maps(twice)
    assert plots.heat_maps(table)


def test_coefficients_that_are_nearly_the_same_keep_their_columns() -> None:
    table = sweep_table(2)
    table = table[table.coefficient.isin([-40.0, 40.0])]
    near = table.coefficient.map({-40.0: 1.0000001, 40.0: 1.0000002})
    figure = plots.heat_maps(table.assign(coefficient=near, asked=near.map(as_asked)))
    assert set(rows(figure, "cells").asked) == {"1.0000001", "1.0000002"}
    assert as_asked(-40.0) == "-40"


# Arrows


def lengths(figure: plots.Figure, term: str) -> pd.Series:
    arrows = rows(figure, "arrows")
    kept = arrows[arrows.term.str.startswith(term)]
    return np.hypot(kept.to_along - kept.along, kept.to_across - kept.across)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_undefined_arrow_does_not_hide_the_others(value: float, geometry: LossGeometry) -> None:
    odd = geometry.points.copy()
    odd.loc[0, "coherence_along"] = value
    figure = plots.loss_geometry(replace(geometry, points=odd))
    whole = lengths(plots.loss_geometry(geometry), "coherence")
    assert len(lengths(figure, "separation")) == 8
    assert len(lengths(figure, "coherence")) == 7
    assert lengths(figure, "coherence").max() == pytest.approx(whole.max(), rel=1e-3)
    assert figure.to_bytes("png")


def test_the_longest_arrow_is_the_share_of_the_panel_that_is_told(geometry: LossGeometry) -> None:
    figure = plots.loss_geometry(geometry)
    low, high = rows(figure, "near").along
    for term in ("separation", "coherence"):
        longest = lengths(figure, term).max()
        assert longest == pytest.approx(ARROW * (high - low), rel=1e-3)


# What cannot be drawn


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (plots.tradeoff, "sweep"),
        (plots.heat_maps, "sweep"),
        (plots.dose_response, "sweep"),
        (plots.layer_profile, "per-layer"),
        (plots.boundary, "per-layer"),
        (plots.comparison, "comparison"),
        (plots.differences, "points"),
        (plots.circuit_graph, "edges"),
        (plots.training, "history"),
    ],
)
def test_another_table_is_refused(make: Callable[[pd.DataFrame], plots.Figure], word: str) -> None:
    with pytest.raises(InputError, match=f"{word}.*no column"):
        make(pd.DataFrame({"a": [1]}))


def test_text_where_numbers_belong_is_refused() -> None:
    with pytest.raises(InputError, match="projection hold text"):
        plots.tradeoff(sweep_table(2).astype({"projection": str}))


def test_components_need_a_head_or_an_mlp() -> None:
    writers, readers = (circuits_tables()[name] for name in ("writers", "readers"))
    alone = writers.assign(component="embed", layer=-1)
    with pytest.raises(InputError, match="the embedding"):
        plots.components(alone, readers)


def geometry_with(part: str, **columns: Any) -> Callable[[LossGeometry], LossGeometry]:
    return lambda whole: replace(whole, **{part: getattr(whole, part).assign(**columns)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (geometry_with("contours", hook_name="blocks.1.hook_resid_post"), "hook 10, the contours"),
        (geometry_with("shape", hook_name="blocks.1.hook_resid_post"), "hook 10, the shape"),
        (geometry_with("points", along=math.nan), "along holds values that are not finite"),
        (geometry_with("points", across=math.inf), "across holds values"),
        (geometry_with("contours", coefficient=math.nan), "coefficient holds values"),
        (geometry_with("contours", angle=math.inf), "angle holds values"),
        (geometry_with("contours", coefficient=0.0), "several; give the contours"),
        (geometry_with("contours", angle=range(360, 376)), "angle from 0 up to 360"),
        (geometry_with("contours", coefficient=[-1.0, 1.0] * 8), "coefficient 0 or more"),
        (geometry_with("contours", coherence_penalty=-1.0), "coherence_penalty 0 or more"),
    ],
)
def test_a_geometry_that_cannot_be_drawn(
    change: Callable[[LossGeometry], LossGeometry], words: str, geometry: LossGeometry
) -> None:
    assert plots.loss_geometry(geometry)
    with pytest.raises(InputError, match=words):
        plots.loss_geometry(change(geometry))


def test_pushes_of_no_length_are_no_plane(geometry: LossGeometry) -> None:
    still = geometry.contours.groupby("angle").head(1).assign(coefficient=0.0)
    with pytest.raises(InputError, match="coefficient above 0"):
        plots.loss_geometry(replace(geometry, contours=still))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"effect": math.inf}, "infinite"),
        ({"effect_ci_low": -math.inf}, "infinite"),
        ({"is_chosen": math.nan}, "is_chosen holds values"),
        ({"layer": math.nan}, "layer holds values"),
    ],
)
def test_a_comparison_that_cannot_be_drawn(columns: dict[str, Any], words: str) -> None:
    table = compare_tables()["comparison"]
    with pytest.raises(InputError, match=words):
        plots.comparison(table.assign(**columns))
    # Truth values as numbers, as some files have them, are read as what they are.
    numbered = table.assign(is_chosen=table.is_chosen.astype(int))
    assert plots.comparison(numbered) == plots.comparison(table)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "column"),
    [
        *(("writers", "head"), ("writers", "layer"), ("edges", "score")),
        *(("edges", "writer_layer"), ("edges", "reader_layer")),
    ],
)
def test_circuits_that_cannot_be_drawn(name: str, column: str, value: float) -> None:
    tables = circuits_tables()
    assert plots.circuit_graph(tables["edges"])
    tables[name] = tables[name].assign(**{column: value})
    given = [tables["edges"]] if name == "edges" else [tables["writers"], tables["readers"]]
    draw: Any = plots.circuit_graph if name == "edges" else plots.components
    with pytest.raises(InputError, match=f"{column} holds values that are not finite"):
        draw(*given)
