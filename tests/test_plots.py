"""Figures from tables: the data of their charts, and the files that are written of them."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import behave_tables, compare_tables, sweep_table, table

from steerlens import plots
from steerlens.measure.plane import SHARES, LossGeometry
from steerlens.plots.isolines import interpolated_penalty
from steerlens.tables import COLUMNS, to_frame

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
COEFFICIENTS = [-2.0, 0.0, 2.0, 4.0]
HOSTILE = "<img src=x onerror=alert(1)></script><b>%{x} $a$"


@pytest.fixture
def sweep() -> pd.DataFrame:
    """Projection 10 + c at block 0, 10 + 2c at the MLP; degradation c^2 / 100; 4 is too far."""
    return table(
        "sweep",
        [
            {
                "hook_name": hook,
                "layer": layer,
                "coefficient": c,
                "asked": f"{c:g}",
                "projection": 10 + (layer + 1) * c,
                "projection_ci_low": 9 + (layer + 1) * c,
                "projection_ci_high": 11 + (layer + 1) * c,
                "degradation_nats": c * c / 100,
                "degradation_ci_low": c * c / 100 - 0.01,
                "degradation_ci_high": c * c / 100 + 0.01,
                "loss": -c,
                "coherent": {2: "undecided", 4: "no"}.get(c, "yes"),
            }
            for layer, hook in enumerate(HOOKS)
            for c in COEFFICIENTS
        ],
    )


@pytest.fixture
def layers() -> pd.DataFrame:
    return table(
        "layers",
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
    """Two methods at two layers, and a prompt, which has no null vectors."""
    methods = compare_tables()["comparison"]
    prompt = {"method": "prompt", "layer": -1, "is_chosen": False, "null_low": math.nan}
    return pd.concat([methods, table("comparison", [prompt | {"effect": 1.0}])], ignore_index=True)


@pytest.fixture
def points() -> pd.DataFrame:
    rows = [(3.0, 4.0), (1.0, -2.0), (2.0, 1.0)]
    return table(
        "points",
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
    arrows = arrows.assign(coherence_along=1.0, coherence_across=1.0)
    return LossGeometry(
        table("geometry", arrows.to_dict("records")),
        table("contours", pushed),
        table("shape", shape),
    )


@pytest.fixture
def parts() -> tuple[pd.DataFrame, pd.DataFrame]:
    places = [("embed", -1, -1), ("head", 0, 0), ("head", 0, 1), ("mlp", 0, -1), ("head", 2, 1)]
    keys = ("component", "layer", "head", "contribution", "effect")
    numbered = [dict(zip(keys, (*of, i, -i), strict=True)) for i, of in enumerate(places)]
    return (
        table("writers", [{k: v for k, v in r.items() if k != "effect"} for r in numbered]),
        table("readers", [{k: v for k, v in r.items() if k != "contribution"} for r in numbered]),
    )


@pytest.fixture
def edges() -> pd.DataFrame:
    rows = [("embed", -1, -1, "attn0", 0, 2.0), ("L0H1", 0, 1, "mlp0", 0, -1.0)]
    rows += [("mlp0", 0, -1, "logits", 2, 0.5)]
    names = [column.name for column in COLUMNS["edges"]]
    return table("edges", [dict(zip(names, ("unsteered", *r), strict=True)) for r in rows])


@pytest.fixture
def history() -> pd.DataFrame:
    """Two hooks and methods; a step of each, and held-out rows before and after it."""
    rows = [
        {"method": method, "hook_name": hook, "layer": i, "part": part, "step": step, **ends}
        for i, hook in enumerate(HOOKS)
        for method, ends in (("a", {"separation": 2.0}), ("b", {"separation": 3.0}))
        for part, step in (("held_out", 0), ("train", 0), ("held_out", 1))
    ]
    return to_frame([{"epoch": 0, "n_examples": 4, **row} for row in rows], "training", {})


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> dict[str, plots.Figure]:
    given = request.getfixturevalue
    sweep, layers = given("sweep"), given("layers")
    return {
        "tradeoff": plots.tradeoff(sweep, layers),
        "heat_maps": plots.heat_maps(sweep),
        "dose_response": plots.dose_response(sweep),
        "layer_profile": plots.layer_profile(layers),
        "boundary": plots.boundary(layers),
        "comparison": plots.comparison(given("comparison")),
        "differences": plots.differences(given("points")),
        "loss_geometry": plots.loss_geometry(given("geometry")),
        "components": plots.components(*given("parts")),
        "circuit_graph": plots.circuit_graph(given("edges")),
        "training": plots.training(given("history")),
        "behaviour": plots.behaviour(behave_tables()["behaviour"]),
        "behaviour_by_coefficient": plots.behaviour_by_coefficient(behave_tables()["behaviour"]),
    }


def rows(figure: plots.Figure, name: str, frame: str | None = None) -> pd.DataFrame:
    """What a figure draws, of one frame (the first by default); null is NaN."""
    shown = frame or (figure.frames[0] if figure.frames else None)
    table = pd.DataFrame(figure.spec["datasets"][name])
    kept = table[table.frame == shown] if "frame" in table else table
    return kept.reset_index(drop=True)


# What is drawn


def test_every_figure_is_there(figures: dict[str, plots.Figure]) -> None:
    pages = {"Page", "attention_page", "projection_page", "reading_page", "token_page"}
    pages |= {"token_table_html"}
    assert set(figures) | {"Figure"} | pages == set(plots.__all__)


def test_a_tradeoff_has_a_curve_a_layer(sweep: pd.DataFrame, layers: pd.DataFrame) -> None:
    cells = rows(plots.tradeoff(sweep), "cells")
    curve = cells[cells.layer == "0"]
    assert list(curve.degradation_nats) == pytest.approx([0.04, 0, 0.04, 0.16])
    assert list(curve.projection) == pytest.approx([8, 10, 12, 14])
    assert list(curve.coherent) == ["yes", "yes", "undecided", "no"]
    # Another hook than a block's output goes by its own name.
    other = cells[cells.layer == "blocks.1.hook_mlp_out"]
    assert list(other.projection) == pytest.approx([6, 10, 14, 18])
    diamonds = rows(plots.tradeoff(sweep, layers), "boundaries")
    # -1 and 3 at block 0, half way between cells: (0.04 + 0) / 2, (0.04 + 0.16) / 2; -1 at the MLP.
    assert list(diamonds.degradation_nats) == pytest.approx([0.02, 0.1, 0.02])
    assert list(diamonds.projection) == pytest.approx([9, 13, 8])


def test_marks_tell_what_is_beyond_the_budget_and_what_is_undecided(sweep: pd.DataFrame) -> None:
    layers = plots.tradeoff(sweep).spec["layer"]
    points = {
        layer["transform"][0]["filter"]: layer["mark"] for layer in layers if layer.get("transform")
    }
    marks = {value: points[f"datum.coherent == '{value}'"] for value in ("yes", "undecided", "no")}
    filled = {value: mark.get("filled", False) for value, mark in marks.items()}
    assert filled == {"yes": True, "undecided": False, "no": False}
    assert marks["undecided"]["shape"] == "square"
    assert "shape" not in marks["no"]
    heat = plots.heat_maps(sweep).spec["concat"][0]["layer"][1:]
    drawn = {layer["transform"][0]["filter"]: layer["mark"].get("shape") for layer in heat}
    assert set(drawn) == {"datum.coherent == 'no'", "datum.coherent == 'undecided'"}
    assert len(set(drawn.values())) == 2


def test_few_of_many_layers_stand_out(sweep: pd.DataFrame) -> None:
    """The furthest cell within the budget is at layer 12, quartiles of 30 layers are 7, 14, 22."""
    cells = sweep_table()
    many = rows(plots.tradeoff(cells), "cells")
    assert sorted({*many.number[many.stands_out]}) == [7, 12, 14, 22]
    far = cells.assign(coherent=cells.coherent.mask(cells.layer == 12, "no"))
    chosen = rows(plots.dose_response(far), "cells")
    assert sorted({*chosen.number[chosen.stands_out]}) == [7, 11, 14, 22]
    assert rows(plots.tradeoff(sweep), "cells").stands_out.all()  # two layers
    for figure in (plots.tradeoff, plots.heat_maps, plots.dose_response):
        (picked,) = (p for p in figure(cells).spec["params"] if p["name"] == "picked")
        assert picked["bind"]["options"] == [None, *map(str, range(30))]
        assert "value" not in picked
        (picked,) = (p for p in figure(cells[:7]).spec["params"] if p["name"] == "picked")
        assert picked["value"] == [{"layer": "0"}]


def test_undefined_cells_are_left_out_not_drawn_at_0(sweep: pd.DataFrame) -> None:
    sweep.loc[sweep.coefficient == 4, ["projection", "degradation_nats", "loss"]] = math.nan
    assert sorted(set(rows(plots.tradeoff(sweep), "cells").coefficient)) == [-2, 0, 2]
    for panel in plots.heat_maps(sweep).spec["concat"]:
        value = panel["layer"][0]["encoding"]["color"]["field"]
        assert {"filter": f"isValid(datum['{value}'])"} in panel["layer"][0]["transform"]
    assert rows(plots.heat_maps(sweep), "cells").loss.isna().tolist() == [False] * 3 + [True] + [
        False
    ] * 3 + [True]


def test_heat_maps_by_hand(sweep: pd.DataFrame) -> None:
    figure = plots.heat_maps(sweep)
    maps = [panel["layer"][0]["encoding"] for panel in figure.spec["concat"]]
    assert maps[0]["x"]["scale"]["domain"] == ["-2", "0", "2", "4"]
    assert maps[0]["y"]["scale"] == {"domain": ["0", "blocks.1.hook_mlp_out"], "reverse": True}
    cells = rows(figure, "cells")
    assert list(cells.asked) == ["-2", "0", "2", "4"] * 2
    assert list(cells.projection) == [8, 10, 12, 14, 6, 10, 14, 18]
    assert list(cells.loss) == [2, 0, -2, -4] * 2
    assert list(cells.coherent) == ["yes", "yes", "undecided", "no"] * 2
    # 95% of the sizes: 0.04 twice, 0 and 0.16 in each row, so the reach is that of the largest.
    assert maps[1]["color"]["scale"]["domain"] == pytest.approx([-0.16, 0.16])
    # Of the unsteered 10: colours are centred on it, and the largest change is one of 8 in 8.
    assert list(cells.projection_change) == [-2, 0, 2, 4, -4, 0, 4, 8]
    assert maps[0]["color"]["field"] == "projection_change"
    assert maps[0]["color"]["scale"]["domain"] == pytest.approx([-6.6, 6.6])
    without = plots.heat_maps(sweep[sweep.coefficient != 0]).spec["concat"][0]["layer"][0]
    assert without["encoding"]["color"]["field"] == "projection"
    assert without["encoding"]["color"]["scale"]["domain"] == [6, 18]


def test_dose_and_response_carry_their_intervals(sweep: pd.DataFrame) -> None:
    cells = rows(plots.dose_response(sweep), "cells")
    assert list(cells.coefficient[:4]) == COEFFICIENTS
    assert list(cells.projection_ci_low) == pytest.approx(list(cells.projection - 1))
    assert list(cells.projection_ci_high) == pytest.approx(list(cells.projection + 1))
    assert list(cells.degradation_ci_low[:4]) == pytest.approx([0.03, -0.01, 0.03, 0.15])


def boundaries(
    figure: plots.Figure, sign: str, kind: str = "measured", panel: str = "units"
) -> pd.DataFrame:
    """The rows of a sign and way to know it, of the panel in units or that of shares."""
    table = rows(figure, panel)
    return table[(table.sign == sign) & (table.kind == kind)].reset_index(drop=True)


def test_boundaries_beyond_the_range_are_triangles(layers: pd.DataFrame) -> None:
    layers["hook_name"] = [HOOKS[0], "blocks.1.hook_resid_post"]
    figure = plots.boundary(layers)
    outward = boundaries(figure, "outward, c > 0")
    assert outward.boundary[0] == 3
    assert math.isnan(outward.boundary[1])
    assert math.isnan(outward.beyond[0])
    assert outward.beyond[1] == pytest.approx(3.3)
    assert list(boundaries(figure, "inward, c < 0").boundary) == [-1, -1]
    assert list(boundaries(figure, "inward, c < 0", "predicted").boundary) == [-2, -2]
    assert boundaries(figure, "outward, c > 0", panel="shares").boundary[0] == 1.5
    assert "on positive text" in figure.caption


def test_a_comparison_shows_the_chosen_layer_first(comparison: pd.DataFrame) -> None:
    figure = plots.comparison(comparison)
    assert figure.frames == ("chosen on training items", "layer 10", "layer 20")
    methods = rows(figure, "methods").set_index("method")
    assert sorted(methods.index) == ["mean_diff", "pca", "prompt"]
    assert math.isnan(methods.null_low["prompt"])
    effect = methods.loc["mean_diff"]
    assert (effect.effect, effect.effect_ci_low) == pytest.approx((0.7, 0.5))
    assert effect.shown == "effect or reversed"
    assert methods.shown["pca"] == "not shown"
    assert list(methods.sort_values("place").effect) == pytest.approx([0.3, 0.7, 1])


def test_differences_and_their_mean(points: pd.DataFrame) -> None:
    figure = plots.differences(points)
    assert figure.frames == ("0", "blocks.1.hook_mlp_out")
    places = rows(figure, "places")
    assert list(places.along[places.what == "a pair"]) == [3, 1, 2]
    (mean,) = places[places.what == "mean"].itertuples()
    assert (mean.along, mean.across) == (2, 1)
    assert list(places.pair[:3]) == ["p0", "p1", "p2"]
    # Both axes have the same reach in units.
    (left, right), (low, high) = rows(figure, "window")[["along", "across"]].to_numpy().T
    assert right - left == pytest.approx(high - low)


def test_the_loss_geometry_by_hand(geometry: LossGeometry) -> None:
    figure = plots.loss_geometry(geometry)
    # The ring lies round the mean difference (2, 1), twice the boundary away.
    rings = rows(figure, "rings")
    ring = rings[rings.line == "boundary"].reset_index(drop=True)
    distance = [math.dist(xy, (2, 1)) for xy in zip(ring.along, ring.across, strict=True)]
    assert distance == pytest.approx([4] * 9, rel=1e-4)
    assert (ring.along[0], ring.across[0]) == pytest.approx((6, 1))
    assert (ring.along[2], ring.across[2]) == pytest.approx((2, 5))
    assert ring.along[0] == ring.along[8]
    assert list(ring.step) == list(range(9))
    arrows = rows(figure, "arrows")
    dx, dy = arrows.to_along - arrows.along, arrows.to_across - arrows.across
    assert list(dy / dx) == pytest.approx([0.8 / 0.6] * 3 + [1] * 3, rel=1e-3)
    assert list(arrows.turn) == pytest.approx([36.87] * 3 + [45] * 3)


def test_isolines_lie_at_their_loss_and_areas_fill_what_was_measured(
    geometry: LossGeometry,
) -> None:
    """Holes too: the areas add up to the disc of pushes up to one and a half boundaries."""
    bands = rows(plots.loss_geometry(geometry), "bands")
    lines = bands[bands.kind == "isoline"]
    assert len(lines) > 10
    for line in lines.itertuples():
        along, across = np.array(line.along), np.array(line.across)
        push = np.hypot(along - 2, across - 1) / 2
        # Penalty (c / 2)^2 minus the projection; a straight line crosses a cell of the grid.
        assert (push / 2) ** 2 - along == pytest.approx(line.loss, abs=0.03)
    sizes = []
    for area in bands[bands.kind == "area"].itertuples():
        x, y = np.array(area.along), np.array(area.across)
        sizes.append(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)
    assert sum(sizes) == pytest.approx(math.pi * (1.5 * 4) ** 2, rel=0.05)


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
    whole = {("0", "H0"): 1, ("0", "H1"): 2, ("0", "MLP"): 3, ("2", "H1"): 4}
    kinds = (("writers", "contribution", 1), ("readers", "effect", -1))
    for panel, (name, value, sign) in enumerate(kinds):
        encoding = figure.spec["concat"][panel]["layer"][0]["encoding"]
        assert encoding["x"]["scale"]["domain"] == ["H0", "H1", "MLP"]
        assert encoding["y"]["scale"]["domain"] == ["0", "2"]
        assert encoding["color"]["scale"]["domain"] == [-4, 4]
        cells = rows(figure, name)
        at = dict(zip(zip(cells.layer, cells["head"], strict=True), cells[value], strict=True))
        assert at == {place: sign * number for place, number in whole.items()}


def test_the_graph_leads_from_writer_to_reader(edges: pd.DataFrame) -> None:
    lines = rows(plots.circuit_graph(edges), "edges")
    assert list(lines.sign) == ["supports", "works against", "supports"]
    assert list(lines.width) == pytest.approx([4.5, 2.5, 1.5])
    assert lines.x[1] == 1  # head 1
    assert (lines.y < lines.to_y).all()
    names = rows(plots.circuit_graph(edges), "places")
    assert set(names.name) == {"embed", "attn0", "L0H1", "mlp0", "logits"}


def test_training_has_a_curve_a_method_and_a_frame_a_hook(history: pd.DataFrame) -> None:
    figure = plots.training(history)
    assert figure.frames == ("0", HOOKS[1])
    drawn = rows(figure, "steps")
    assert drawn.separation.tolist() == [2.0] * 3 + [3.0] * 3
    assert drawn.projection.isna().all()
    titles = [panel["title"] for panel in figure.spec["concat"]]
    assert titles[1:3] == ["Projection on the axis", "Angle to the axis"]
    assert figure.spec["concat"][2]["layer"][1]["encoding"]["y"]["title"] == "degrees"


def test_pushes_that_overflowed_are_left_out(geometry: LossGeometry) -> None:
    pushes = geometry.contours
    is_far = pushes.coefficient > pushes.boundary
    cut = pushes.assign(coherence_penalty=pushes.coherence_penalty.mask(is_far, math.inf))

    def furthest(contours: pd.DataFrame) -> float:
        figure = plots.loss_geometry(replace(geometry, contours=contours))
        return max(max(corners) for corners in rows(figure, "bands").along)

    assert furthest(pushes) == pytest.approx(2 + 1.5 * 4, abs=0.3)
    assert furthest(cut) == pytest.approx(2 + 4, abs=0.3)
    none = plots.loss_geometry(
        replace(geometry, contours=pushes.assign(coherence_penalty=math.nan))
    )
    assert none.spec["datasets"]["bands"] == []
    assert none.to_bytes("png")


def test_gaps_stay_gaps(layers: pd.DataFrame) -> None:
    """An undefined value is null, which breaks a line; it is neither 0 nor joined across."""
    layers["hook_name"] = [HOOKS[0], "blocks.1.hook_resid_post"]
    layers["separation"] = [1.0, math.nan]
    figure = plots.layer_profile(layers)
    assert rows(figure, "layers").separation.isna().tolist() == [False, True]
    assert figure.spec["config"]["mark"]["invalid"].startswith("break-paths")
    assert figure.to_bytes("svg")
