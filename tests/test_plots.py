"""Figures from tables: what is drawn, and that both renderers draw it."""

import json
import math
import struct
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlens import plots
from steerlens.errors import FileError, InputError
from steerlens.measure.plane import SHARES, LossGeometry
from steerlens.plots.geometry import interpolated_penalty
from steerlens.plots.marks import (
    Arrows,
    Axis,
    Band,
    Contours,
    Frame,
    HeatMap,
    Layout,
    Line,
    Mark,
    Panel,
    Points,
    Rule,
)
from steerlens.tables import (
    COMPARISON_COLUMNS,
    CONTOUR_COLUMNS,
    EDGE_COLUMNS,
    GEOMETRY_COLUMNS,
    LAYER_COLUMNS,
    POINT_COLUMNS,
    READER_COLUMNS,
    SHAPE_COLUMNS,
    SWEEP_COLUMNS,
    WRITER_COLUMNS,
    Column,
    to_frame,
)

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
COEFFICIENTS = [-2.0, 0.0, 2.0, 4.0]
HOSTILE = "<img src=x onerror=alert(1)></script><b>%{x} $a$"


def frame(columns: tuple[Column, ...], rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows with a plain value in every column that they do not give."""
    plain = {"str": "a", "int64": 1, "float64": 1.0, "bool": True}
    filled = [{column.name: plain[column.dtype] for column in columns} | row for row in rows]
    return to_frame(filled, columns, {})


@pytest.fixture
def sweep() -> pd.DataFrame:
    """Projection 10 + c at block 0, 10 + 2c at the MLP; degradation c^2 / 100; 4 is too far."""
    return frame(
        SWEEP_COLUMNS,
        [
            {
                "hook_name": hook,
                "layer": layer,
                "coefficient": c,
                "projection": 10 + (layer + 1) * c,
                "projection_ci_low": 9 + (layer + 1) * c,
                "projection_ci_high": 11 + (layer + 1) * c,
                "degradation_nats": c * c / 100,
                "degradation_ci_low": c * c / 100 - 0.01,
                "degradation_ci_high": c * c / 100 + 0.01,
                "loss": -c,
                "coherent": c < 4,
            }
            for layer, hook in enumerate(HOOKS)
            for c in COEFFICIENTS
        ],
    )


@pytest.fixture
def layers() -> pd.DataFrame:
    return frame(
        LAYER_COLUMNS,
        [
            {
                "hook_name": hook,
                "layer": layer,
                "resid_norm": 2.0,
                "boundary_pos": [3.0, math.inf][layer],
                "boundary_neg": -1.0,
                "boundary_neg_ci_low": -1.5,
                "boundary_neg_ci_high": -0.5,
                "boundary_pos_ci_high": math.inf,
                "predicted_boundary_pos": 2.0,
                "predicted_boundary_neg": -2.0,
                "boundary_on": "positive",
            }
            for layer, hook in enumerate(HOOKS)
        ],
    )


@pytest.fixture
def comparison() -> pd.DataFrame:
    effects = {"mean_diff": (0.8, "effect"), "random": (0.1, "no effect shown"), "pca": (0.5, "")}
    return frame(
        COMPARISON_COLUMNS,
        [
            {
                "method": method,
                "hook_name": f"blocks.{layer}.hook_resid_post",
                "layer": layer,
                "effect": effect,
                "effect_ci_low": effect - 0.1,
                "effect_ci_high": effect + 0.1,
                "null_low": -0.3,
                "null_high": 0.3,
                "is_chosen": layer == 5,
                "verdict": verdict,
            }
            for layer in (5, 10)
            for method, (effect, verdict) in effects.items()
        ]
        + [{"method": "prompt", "layer": -1, "is_chosen": False, "null_low": math.nan}],
    )


@pytest.fixture
def points() -> pd.DataFrame:
    rows = [(3.0, 4.0), (1.0, -2.0), (2.0, 1.0)]
    return frame(
        POINT_COLUMNS,
        [
            {"hook_name": h, "layer": i, "pair": f"p{k}", "along": x, "across": y}
            for i, h in enumerate(HOOKS)
            for k, (x, y) in enumerate(rows)
        ],
    )


@pytest.fixture
def geometry(points: pd.DataFrame) -> LossGeometry:
    """A round boundary of 2 at block 0, of 3 at the other hook; penalty (c / boundary)^2."""
    pushed, shape = [], []
    for layer, hook in enumerate(HOOKS):
        place, b = {"hook_name": hook, "layer": layer}, 2.0 + layer
        for angle in range(0, 360, 45):
            turn = math.radians(angle)
            ring = {"angle": angle, "boundary": b, "boundary_ci_low": b - 1}
            shape.append(place | ring | {"boundary_ci_high": b + 1})
            for c in (0.0, *(b * s for s in SHARES)):
                x, y = 2 + 2 * c * math.cos(turn), 1 + 2 * c * math.sin(turn)
                at = {"angle": angle, "coefficient": c, "boundary": b, "along": x, "across": y}
                penalty = (c / b) ** 2
                pushed.append(place | at | {"coherence_penalty": penalty, "loss": penalty - x})
    arrows = points.assign(separation_along=0.6, separation_across=0.8)
    return LossGeometry(
        frame(GEOMETRY_COLUMNS, arrows.to_dict("records")),
        frame(CONTOUR_COLUMNS, pushed),
        frame(SHAPE_COLUMNS, shape),
    )


@pytest.fixture
def parts() -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = [
        {"component": "embed", "layer": -1, "head": -1},
        {"component": "head", "layer": 0, "head": 0},
        {"component": "head", "layer": 0, "head": 1},
        {"component": "mlp", "layer": 0, "head": -1},
        {"component": "head", "layer": 2, "head": 1},
    ]
    numbered = [row | {"contribution": float(i), "effect": -float(i)} for i, row in enumerate(rows)]
    return (
        frame(WRITER_COLUMNS, [{k: v for k, v in r.items() if k != "effect"} for r in numbered]),
        frame(
            READER_COLUMNS, [{k: v for k, v in r.items() if k != "contribution"} for r in numbered]
        ),
    )


@pytest.fixture
def edges() -> pd.DataFrame:
    rows = [("embed", -1, -1, "attn0", 0, 2.0), ("L0H1", 0, 1, "mlp0", 0, -1.0)]
    rows += [("mlp0", 0, -1, "logits", 2, 0.5)]
    names = [column.name for column in EDGE_COLUMNS]
    return frame(EDGE_COLUMNS, [dict(zip(names, ("unsteered", *r), strict=True)) for r in rows])


@pytest.fixture
def figures(
    sweep: pd.DataFrame,
    layers: pd.DataFrame,
    comparison: pd.DataFrame,
    points: pd.DataFrame,
    geometry: LossGeometry,
    parts: tuple[pd.DataFrame, pd.DataFrame],
    edges: pd.DataFrame,
) -> dict[str, plots.Figure]:
    return {
        "tradeoff": plots.tradeoff(sweep, layers),
        "heat_maps": plots.heat_maps(sweep),
        "dose_response": plots.dose_response(sweep),
        "layer_profile": plots.layer_profile(layers),
        "boundary": plots.boundary(layers),
        "comparison": plots.comparison(comparison),
        "differences": plots.differences(points),
        "loss_geometry": plots.loss_geometry(geometry),
        "components": plots.components(*parts),
        "circuit_graph": plots.circuit_graph(edges),
    }


def marks(figure: plots.Figure, kind: type, panel: int = 0, frame: int = 0) -> list[Any]:
    return [m for m in figure.frames[frame].panels[panel].marks if isinstance(m, kind)]


# What is drawn


def test_every_figure_is_there(figures: dict[str, plots.Figure]) -> None:
    pages = {"Page", "attention_page", "projection_page", "token_page", "token_table_html"}
    assert set(figures) | {"Figure"} | pages == set(plots.__all__)


def test_a_tradeoff_has_a_curve_a_layer(sweep: pd.DataFrame, layers: pd.DataFrame) -> None:
    curves = {line.name: line for line in marks(plots.tradeoff(sweep), Line)}
    assert curves["layer 0"].x == pytest.approx((0.04, 0, 0.04, 0.16))
    assert curves["layer 0"].y == pytest.approx((8, 10, 12, 14))
    # Another hook than a block's output goes by its own name.
    assert curves["layer blocks.1.hook_mlp_out"].y == pytest.approx((6, 10, 14, 18))
    at = {(point.name, point.symbol): point.x for point in marks(plots.tradeoff(sweep), Points)}
    assert at["layer 0", "circle"] == pytest.approx((0.04, 0, 0.04))
    assert at["layer 0", "circle-open"] == pytest.approx((0.16,))
    (diamonds,) = (m for m in marks(plots.tradeoff(sweep, layers), Points) if m.symbol == "diamond")
    # -1 and 3 at block 0, half way between cells: (0.04 + 0) / 2, (0.04 + 0.16) / 2; -1 at the MLP.
    assert diamonds.x == pytest.approx((0.02, 0.1, 0.02))
    assert diamonds.y == pytest.approx((9, 13, 8))


def test_undefined_cells_are_left_out_not_drawn_at_0(sweep: pd.DataFrame) -> None:
    sweep.loc[sweep.coefficient == 4, ["projection", "degradation_nats", "loss"]] = math.nan
    (line, _) = marks(plots.tradeoff(sweep), Line)
    assert line.y == pytest.approx((8, 10, 12))
    (shown,) = marks(plots.heat_maps(sweep), HeatMap)
    assert shown.z[0][:3] == pytest.approx((8, 10, 12))
    assert math.isnan(shown.z[0][3])


def test_heat_maps_by_hand(sweep: pd.DataFrame) -> None:
    figure = plots.heat_maps(sweep)
    first, second, third = (marks(figure, HeatMap, panel=i)[0] for i in range(3))
    assert first.x == ("-2", "0", "2", "4")
    assert first.y == ("0", "blocks.1.hook_mlp_out")
    assert first.z == ((8, 10, 12, 14), (6, 10, 14, 18))
    # 95% of the sizes: 0.04 twice, 0 and 0.16 in each row, so the reach is that of the largest.
    assert second.reach == pytest.approx((-0.16, 0.16))
    assert third.z == ((2, 0, -2, -4), (2, 0, -2, -4))
    (crosses,) = marks(figure, Points)
    assert list(zip(crosses.x, crosses.y, strict=True)) == [
        ("4", "0"),
        ("4", "blocks.1.hook_mlp_out"),
    ]


def test_dose_and_response_carry_their_intervals(sweep: pd.DataFrame) -> None:
    figure = plots.dose_response(sweep)
    band, _ = marks(figure, Band)
    line, _ = marks(figure, Line)
    assert line.x == band.x == tuple(COEFFICIENTS)
    assert band.low == pytest.approx(tuple(y - 1 for y in line.y))
    assert band.high == pytest.approx(tuple(y + 1 for y in line.y))
    below, _ = marks(figure, Band, panel=1)
    assert below.low == pytest.approx((0.03, -0.01, 0.03, 0.15))


def test_boundaries_beyond_the_range_are_triangles(layers: pd.DataFrame) -> None:
    layers["hook_name"] = [HOOKS[0], "blocks.1.hook_resid_post"]
    figure = plots.boundary(layers)
    lines = {line.name: line for line in marks(figure, Line)}
    assert lines["outward, c > 0"].y[0] == 3
    assert math.isnan(lines["outward, c > 0"].y[1])
    assert lines["inward, c < 0"].y == (-1, -1)
    assert lines["predicted, inward, c < 0"].y == (-2, -2)
    (beyond,) = (m for m in marks(figure, Points) if m.symbol == "triangle-up" and m.x)
    assert beyond.x == (1,)
    shares = {line.name: line for line in marks(figure, Line, panel=1)}
    assert shares["outward, c > 0"].y[0] == 1.5
    assert "on positive text" in figure.caption


def test_a_comparison_shows_the_chosen_layer_first(comparison: pd.DataFrame) -> None:
    figure = plots.comparison(comparison)
    assert [f.label for f in figure.frames] == ["chosen on training items", "layer 5", "layer 10"]
    rows, band, effect, none = marks(figure, Points)
    assert sorted(rows.y) == ["mean_diff", "pca", "prompt", "random"]
    assert set(band.y) == {"mean_diff", "pca", "random"}  # the prompt has no null vectors
    assert (effect.x, effect.y, effect.low) == ((0.8,), ("mean_diff",), pytest.approx((0.7,)))
    assert effect.symbol == "circle"
    assert none.symbol == "circle-open"


def test_differences_and_their_mean(points: pd.DataFrame) -> None:
    figure = plots.differences(points)
    assert [f.label for f in figure.frames] == ["0", "blocks.1.hook_mlp_out"]
    pairs, mean = marks(figure, Points)
    assert pairs.x == (3, 1, 2)
    assert (mean.x, mean.y) == ((2,), (1,))
    assert pairs.hover[0].startswith("p0\n")


def test_the_loss_geometry_by_hand(geometry: LossGeometry) -> None:
    figure = plots.loss_geometry(geometry)
    # The ring lies round the mean difference (2, 1), twice the boundary away.
    (ring,) = (line for line in marks(figure, Line) if line.name)
    distance = [math.dist(xy, (2, 1)) for xy in zip(ring.x, ring.y, strict=True)]
    assert distance == pytest.approx([4] * 9)
    assert (ring.x[0], ring.y[0]) == pytest.approx((6, 1))
    assert (ring.x[2], ring.y[2]) == pytest.approx((2, 5))
    assert ring.x[0] == ring.x[-1]
    (contours,) = marks(figure, Contours)
    middle = len(contours.x) // 2
    assert (contours.x[middle], contours.y[middle]) == pytest.approx((2, 1))
    assert contours.z[middle][middle] == pytest.approx(-2)  # no penalty, minus the projection
    column = int(np.argmin([abs(x - 6) for x in contours.x]))
    expected = ((contours.x[column] - 2) / 4) ** 2 - contours.x[column]
    assert contours.z[middle][column] == pytest.approx(expected, abs=1e-3)
    assert math.isnan(contours.z[0][0])
    separation, coherence = marks(figure, Arrows, panel=1)
    assert separation.x == (3, 1, 2)
    slope = [dy / dx for dx, dy in zip(separation.dx, separation.dy, strict=True)]
    assert slope == pytest.approx([0.8 / 0.6] * 3)
    assert [dy / dx for dx, dy in zip(coherence.dx, coherence.dy, strict=True)] == [1, 1, 1]


@settings(max_examples=30, deadline=None)
@given(
    n_angles=st.integers(4, 16),
    reach=st.floats(0.01, 1e3),
    lean=st.floats(0, 0.8),
    x=st.floats(-1, 1),
    y=st.floats(-1, 1),
)
def test_interpolation_is_exact_where_it_was_measured_and_within_its_ends(
    n_angles: int, reach: float, lean: float, x: float, y: float
) -> None:
    rows = [
        {
            "angle": 360 * i / n_angles,
            "coefficient": s * reach,
            "coherence_penalty": (s * (1 + lean * math.cos(2 * math.pi * i / n_angles))) ** 2,
        }
        for i in range(n_angles)
        for s in (0.0, *SHARES)
    ]
    table = pd.DataFrame(rows)
    turn = np.radians(table.angle.to_numpy())[None]
    distance = table.coefficient.to_numpy()[None] * (1 - 1e-9)
    found = interpolated_penalty(table, distance * np.cos(turn), distance * np.sin(turn))
    assert found[0] == pytest.approx(table.coherence_penalty.to_numpy(), rel=1e-3, abs=1e-6)
    (value,) = interpolated_penalty(table, np.array([[x * reach]]), np.array([[y * reach]]))[0]
    assert 0 <= value <= table.coherence_penalty.max() * (1 + 1e-9)
    beyond = interpolated_penalty(table, np.array([[1.6 * reach]]), np.array([[0.0]]))
    assert np.isnan(beyond).all()


def test_components_by_hand(parts: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    figure = plots.components(*parts)
    (grid,) = marks(figure, HeatMap)
    assert grid.x == ("H0", "H1", "MLP")
    assert grid.y == ("0", "2")
    assert grid.z[0] == (1, 2, 3)
    assert grid.z[1][1] == 4
    assert math.isnan(grid.z[1][0])
    assert marks(figure, HeatMap, panel=1)[0].z[0] == (-1, -2, -3)


def test_the_graph_leads_from_writer_to_reader(edges: pd.DataFrame) -> None:
    lines = marks(plots.circuit_graph(edges), Line)
    assert [line.name for line in lines] == ["supports", "works against", "supports"]
    assert [line.width for line in lines] == pytest.approx([4.5, 2.5, 1.5])
    assert lines[1].x[0] == 1  # head 1
    assert all(line.y[0] < line.y[1] for line in lines)
    (names,) = marks(plots.circuit_graph(edges), Points)
    assert set(names.labels) == {"embed", "attn0", "L0H1", "mlp0", "logits"}


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
    ],
)
def test_another_table_is_refused(make: Callable[[pd.DataFrame], plots.Figure], word: str) -> None:
    with pytest.raises(InputError, match=f"{word}.*no column"):
        make(pd.DataFrame({"a": [1]}))


def test_text_where_numbers_belong_is_refused(sweep: pd.DataFrame) -> None:
    with pytest.raises(InputError, match="projection hold text"):
        plots.tradeoff(sweep.astype({"projection": str}))


def test_components_need_a_head_or_an_mlp(parts: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    writers, readers = parts
    with pytest.raises(InputError, match="embedding alone"):
        plots.components(writers[writers.component == "embed"], readers)


def test_pushes_that_overflowed_are_left_out(geometry: LossGeometry) -> None:
    pushes = geometry.contours
    is_far = pushes.coefficient > pushes.boundary
    cut = pushes.assign(coherence_penalty=pushes.coherence_penalty.mask(is_far, math.inf))
    (seen,) = marks(plots.loss_geometry(replace(geometry, contours=cut)), Contours)
    middle = len(seen.x) // 2
    assert seen.z[middle][middle] == pytest.approx(-2)
    whole = (m for m in marks(plots.loss_geometry(geometry), Contours))
    assert np.isfinite(seen.z).sum() < np.isfinite(next(whole).z).sum()
    none = pushes.assign(coherence_penalty=math.nan)
    (empty,) = marks(plots.loss_geometry(replace(geometry, contours=none)), Contours)
    assert not np.isfinite(empty.z).any()


def test_an_empty_table_is_refused(sweep: pd.DataFrame) -> None:
    with pytest.raises(InputError, match="no rows"):
        plots.tradeoff(sweep[:0])


# How it is drawn


def test_both_renderers_draw_every_figure(figures: dict[str, plots.Figure]) -> None:
    for name, figure in figures.items():
        png = figure.to_bytes("png")
        assert png[:8] == b"\x89PNG\r\n\x1a\n", name
        width, height = struct.unpack(">II", png[16:24])
        assert width > 600, name
        assert height > 250, name
        assert ET.fromstring(figure.to_bytes("svg")).tag.endswith("svg"), name
        drawn = figure.to_plotly()
        assert len(drawn.data) >= len(figure.frames), name
        assert bool(drawn.layout.sliders) == (len(figure.frames) > 1), name
        assert figure.caption.endswith("."), name
        assert "\n" not in repr(figure), name


def test_a_slider_shows_one_frame_at_a_time(points: pd.DataFrame) -> None:
    drawn = plots.differences(points).to_plotly()
    (slider,) = drawn.layout.sliders
    assert [step.label for step in slider.steps] == ["0", "blocks.1.hook_mlp_out"]
    visible = [step.args[0]["visible"] for step in slider.steps]
    assert [trace.visible for trace in drawn.data] == visible[0]
    assert all(a != b for a, b in zip(*visible, strict=True))


def test_the_same_tables_give_the_same_bytes(sweep: pd.DataFrame) -> None:
    for kind in ("png", "svg"):
        assert plots.tradeoff(sweep).to_bytes(kind) == plots.tradeoff(sweep).to_bytes(kind)
    assert plots.tradeoff(sweep).to_html() == plots.tradeoff(sweep).to_html()
    # A global setting of matplotlib is as it was.
    import matplotlib as mpl

    assert mpl.rcParams["svg.hashsalt"] is None


def test_text_of_prompts_stays_text(points: pd.DataFrame) -> None:
    figure = plots.differences(points.assign(pair=HOSTILE))
    assert figure.frames[0].panels[0].marks[2].hover[0].startswith(HOSTILE)  # the control
    (pairs,) = (t for t in figure.to_plotly().data if t.name == "a pair" and t.visible)
    assert "<b>" not in pairs.text[0]
    assert "&lt;b&gt;" in pairs.text[0]
    assert pairs.hovertemplate is None
    page = figure.to_html()
    assert "onerror=alert(1)" in page
    assert "<img" not in page
    assert page.count("</script>") == page.count("<script ")
    titled = replace(figure, title=HOSTILE)
    assert "<img" not in titled.to_html()
    text = "".join(ET.fromstring(titled.to_bytes("svg")).itertext())
    assert titled.to_bytes("svg")
    assert "alert" in titled.to_bytes("svg").decode() or "alert" in text


def test_dollar_signs_are_not_mathematics() -> None:
    """matplotlib would refuse `$\\frac$`, and set `$a$` in italics."""
    panel = Panel([Line((0, 1), (0, 1), name=r"$\frac$")], Axis(r"$\x$"), Axis("$a$"), "$$")
    figure = plots.Figure(r"costs $\nothing$", "A caption.", (Frame("", (panel,)),))
    assert figure.to_bytes("png")


def test_gaps_stay_gaps() -> None:
    nan = math.nan
    drawn_marks: list[Mark] = [
        Line((0, 1, 2), (0, nan, 2)),
        Band((0, 1, 2, 3), (0, 0, nan, 0), (1, 1, nan, 1)),
        Rule(0.5, "x", "here"),
        Rule(0.5, "y", "there"),
    ]
    figure = plots.Figure("t", "c.", (Frame("", (Panel(drawn_marks, Axis("x"), Axis("y")),)),))
    line, first, second = figure.to_plotly().data
    assert line.y == (0, None, 2)
    assert (first.x, second.x) == ((0, 1, 1, 0), (3, 3))
    assert len(figure.to_plotly().layout.shapes) == 2
    assert figure.to_bytes("svg")


def test_frames_and_files(points: pd.DataFrame, tmp_path: Path) -> None:
    figure = plots.differences(points)
    assert figure.at(0) == figure.at("0")
    assert [f.label for f in figure.at(0).frames] == ["0"]
    with pytest.raises(InputError, match="no frame '7'"):
        figure.at("7")
    for name in ("a.png", "a.svg", "a.html"):
        figure.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(InputError, match=r"\.png, \.svg, \.html"):
        figure.save(tmp_path / "a.pdf")
    with pytest.raises(FileError, match="cannot write"):
        figure.save(tmp_path / "none" / "a.png")
    with pytest.raises(InputError, match="one frame or more"):
        plots.Figure("t", "c", ())


def test_a_notebook_gets_plotly_and_a_picture(sweep: pd.DataFrame) -> None:
    import base64

    shown = plots.tradeoff(sweep)._repr_mimebundle_()
    assert base64.b64decode(shown["image/png"])[:4] == b"\x89PNG"
    assert json.loads(json.dumps(shown["application/vnd.plotly.v1+json"]))["data"]
    assert len(json.dumps(shown)) < 200_000
    assert shown["text/plain"] == "Figure('Projection against degradation', 1 panels)"


def test_a_page_asks_no_network_and_is_small(figures: dict[str, plots.Figure]) -> None:
    page = figures["loss_geometry"].to_html()
    assert len(page) < 3_000_000
    head = page[: page.index("packed-plotly")]
    assert "://" not in head
    assert "src=" not in head
    assert "scripts are off here" in page


def test_layout_has_a_place_for_every_panel() -> None:
    panels = tuple(Panel([Line((0, 1), (0, i))], Axis("x"), Axis("y")) for i in range(3))
    figure = plots.Figure("t", "c.", (Frame("", panels),), Layout(columns=2))
    assert len(figure.to_plotly().data) == 3
    assert figure.to_bytes("png")
