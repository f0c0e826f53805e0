"""The differences of the pairs, the coherence boundary and the loss in one plane."""

import math
from typing import Any

import numpy as np
import pandas as pd

from steerlens.errors import InputError
from steerlens.plots import style as vl
from steerlens.plots.checks import Tabular, by_hook, check_distinct, checked_table
from steerlens.plots.figure import Figure, make_figure
from steerlens.plots.isolines import loss_bands

ARROW = 0.16
"""Length of a kind's longest arrow, as a share of the panel."""
HALF = 0.78
"""Half the side of a panel that shows the pairs from near by, as a share of their spread."""
TERMS = {"separation": "separation: outward", "coherence": "coherence: to better logprob"}
PLANE = ["along", "across"]
PUSH = ["angle", "coefficient"]
ENDS = ["boundary_ci_low", "boundary_ci_high"]

SIZE = (440, 440)
AXES = {
    channel: vl.number(
        field, f"{title} ({vl.RESIDUAL})", scale={"zero": False, "nice": False, "padding": 0}
    )
    for channel, field, title in (
        ("x", "along", "along the frozen direction"),
        ("y", "across", "along the main orthogonal axis"),
    )
}


def differences(points: Tabular) -> Figure:
    """The pairs' differences on the frozen direction and the main axis orthogonal to it.

    Takes the points of a sweep or of a geometry, or what has them; one frame a layer. A pair to the
    right of 0 differs the way the direction says. Raises `InputError` on another table.

    Examples:
        >>> result = sl.sweep(model, pairs, directions, layers=[1, 2], coefficients=[0])
        >>> figure = sl.plots.differences(result)
        >>> figure
        Figure('Differences of the pairs', 1 panels, 2 frames)
        >>> figure.at("2")
        Figure('Differences of the pairs', 1 panels)
    """
    names = ["hook_name", "layer", "pair", "along", "across", "separation"]
    points = checked_table(points, names, "the table of points", of="points")
    places, windows = [], []
    for label, rows in by_hook(points).items():
        kept = rows[["pair", *PLANE, "separation"]].assign(frame=label, what="a pair")
        kept["across"] = kept.across.where(kept.across.notna(), 0.0)
        places += [kept, _mean_row(label, kept, "mean")]
        windows.append(_corners(label, *_middle(kept)))
    window = pd.concat(windows)
    drawn = vl.panel(
        [
            *_window("window"),
            vl.layer("places", "point", _pairs("mean", size=50), filled=True),
        ],
        size=SIZE,
        zoom="zoom_pairs",
    )
    caption = (
        "Each point is the difference of one pair, unsteered, on the frozen direction (across the "
        "page) and on the main axis of what is left of the differences (up the page), in residual "
        "units. The diamond is their mean."
    )
    tables = {"places": pd.concat(places), "window": window}
    return make_figure("Differences of the pairs", caption, tables, [drawn], slider="layer")


def loss_geometry(geometry: Any) -> Figure:
    """The loss in the plane of the frozen direction and the main orthogonal one, layer by layer.

    Takes what `steerlens.loss_geometry` gave. On the left the contours of the loss over where
    the mean difference is pushed to, and the measured boundary; on the right the pairs from near
    by, with an arrow for each term of the loss: which way it pushes the pair. Between the measured
    pushes the square root of the penalty is interpolated (shape-preserving, `scipy`'s pchip).
    Raises `InputError` on other tables, on tables of different hooks, and on pushes between which
    nothing can be interpolated.

    Examples:
        >>> geometry = sl.loss_geometry(
        ...     model, pairs, directions, layers=[1], n_angles=4, budget="kl=0.1", n_bootstrap=50
        ... )
        >>> sl.plots.loss_geometry(geometry)
        Figure('Loss geometry', 2 panels)
    """
    if not all(hasattr(geometry, name) for name in ("points", "contours", "shape")):
        raise InputError(
            f"expected the LossGeometry of steerlens.loss_geometry, got {type(geometry).__name__}"
        )
    arrows = [f"{term}_{axis}" for term in TERMS for axis in PLANE]
    points, contours, shape = (
        checked_table(
            getattr(geometry, name),
            ["hook_name", "layer", *columns],
            f"the {name} of a loss geometry",
            finite=finite,
        )
        for name, columns, finite in (
            ("points", [*PLANE, "pair", *arrows], PLANE),
            ("contours", [*PLANE, *PUSH, "coherence_penalty", "loss"], PUSH),
            ("shape", ["angle", "boundary", *ENDS], ["angle"]),
        )
    )
    _check_pushes(contours)
    pushes, shapes = by_hook(contours), by_hook(shape)
    for label in by_hook(points):
        for part, tables in (("contours", pushes), ("shape", shapes)):
            if label not in tables:
                raise InputError(
                    f"the points have hook {label}, the {part} only {', '.join(tables)}"
                )
    parts: dict[str, list[pd.DataFrame]] = {}
    for label, rows in by_hook(points).items():
        mean = (float(rows.along.mean()), float(rows.across.mean()))
        reach = 1.05 * 2 * float(pushes[label].coefficient.max())
        for name, table in (
            ("far", _corners(label, mean, reach)),
            ("near", _corners(label, *_middle(rows))),
            ("pairs", rows[["pair", *PLANE]].assign(what="a pair")),
            ("pairs", _mean_row(label, rows, "mean difference")),
            ("arrows", pair_arrows(rows)),
            ("rings", boundary_rings(shapes[label], mean)),
            ("bands", loss_bands(pushes[label], mean)),
        ):
            parts.setdefault(name, []).append(table.assign(frame=label))
    tables = {name: pd.concat(of_layers) for name, of_layers in parts.items()}
    caption = (
        "First: where the mean difference of the pairs (diamond) is pushed to in the plane of the "
        "frozen direction and the main orthogonal one, the loss there (minus the projection plus "
        "the coherence penalty), and the coherence boundary as measured, with its 95% interval "
        "(dotted). Second: the pairs from near by; arrows are minus the gradient of each term, "
        "lengths to scale within a term only: separation pushes outward, coherence to where the "
        "labels' logprob rises. Axes in residual units."
    )
    panels = [_far(), _near()]
    return make_figure("Loss geometry", caption, tables, panels, columns=2, slider="layer")


def _check_pushes(contours: pd.DataFrame) -> None:
    """Raise `InputError` on pushes between which nothing can be interpolated."""
    check_distinct(
        contours, ["hook_name", "angle", "coefficient"], "give the contours of one loss geometry"
    )
    furthest = contours.groupby("hook_name", sort=False).coefficient.max()
    for column, is_wrong, expected in (
        ("angle", not contours.angle.between(0, 360, inclusive="left").all(), "from 0 up to 360"),
        ("coefficient", bool((contours.coefficient < 0).any()), "0 or more"),
        ("coefficient", bool((furthest == 0).any()), "above 0 in some push of every hook"),
        ("coherence_penalty", bool((contours.coherence_penalty < 0).any()), "0 or more"),
    ):
        if is_wrong:
            raise InputError(f"the contours of a loss geometry: expected {column} {expected}")


def boundary_rings(shape: pd.DataFrame, mean: tuple[float, float]) -> pd.DataFrame:
    """Where the mean difference lies when pushed by each `line`: the boundary and both its ends."""
    turn = np.radians(shape.angle.to_numpy(dtype=float))
    rings = []
    for line in ("boundary", *ENDS):
        push = shape[line].to_numpy(dtype=float)
        push = np.where(np.isfinite(push), push, math.nan)
        along, across = mean[0] + 2 * push * np.cos(turn), mean[1] + 2 * push * np.sin(turn)
        ring = shape[["angle", "boundary", *ENDS]].assign(line=line, along=along, across=across)
        rings.append(pd.concat([ring, ring[:1]]).assign(step=range(len(ring) + len(ring[:1]))))
    return pd.concat(rings)


def pair_arrows(points: pd.DataFrame) -> pd.DataFrame:
    """An arrow for each pair and term; `turn` is clockwise from up, in degrees.

    The longest arrow of a term takes the share `ARROW` of the panel; undefined ones are left out.
    """
    _, half = _middle(points)
    arrows: list[pd.DataFrame] = []
    for term, name in TERMS.items():
        slopes = points[[f"{term}_along", f"{term}_across"]].to_numpy(dtype=float)
        lengths = np.hypot(*slopes.T)
        is_known = np.isfinite(lengths)
        longest = float(lengths[is_known].max(initial=0.0))
        steps = slopes[is_known] * (ARROW * 2 * half / longest if longest > 0 else 0.0)
        drawn = points.loc[is_known, ["pair", *PLANE]]
        arrows.append(
            drawn.assign(
                term=name,
                slope_along=slopes[is_known, 0],
                slope_across=slopes[is_known, 1],
                to_along=drawn.along + steps[:, 0],
                to_across=drawn.across + steps[:, 1],
                turn=np.degrees(np.arctan2(steps[:, 0], steps[:, 1])),
            )
        )
    return pd.concat(arrows)


def _middle(points: pd.DataFrame) -> tuple[tuple[float, float], float]:
    """The middle of the pairs, and half the side of a square panel that shows them from near by."""
    low, high = points[PLANE].min(), points[PLANE].max()
    spread = float((high - low).max())
    middle = (low + high) / 2
    return (float(middle.along), float(middle.across)), HALF * max(spread, 1e-9)


def _mean_row(frame: str, points: pd.DataFrame, name: str) -> pd.DataFrame:
    return pd.DataFrame([{"frame": frame, "what": name, **points[PLANE].mean()}])


def _corners(frame: str, middle: tuple[float, float], reach: float) -> pd.DataFrame:
    """Two corners of a square window, and where 0 lies in it, if it does."""
    ends = pd.DataFrame(
        [dict(zip(PLANE, np.add(middle, by), strict=True)) for by in (-reach, reach)]
    )
    for axis, centre in zip(PLANE, middle, strict=True):
        ends[f"zero_{axis}"] = 0.0 if abs(centre) < reach else math.nan
    return ends.assign(frame=frame)


def _window(data: str) -> list[vl.Spec]:
    """What gives both axes the reach of a window, and a line at 0 of each where it is in sight."""
    rule: vl.Spec = {"color": vl.GREY, "strokeDash": vl.DOTTED}
    return [
        vl.layer(data, "point", AXES, opacity=0),
        vl.layer(data, "rule", {"x": vl.number("zero_along")}, **rule),
        vl.layer(data, "rule", {"y": vl.number("zero_across")}, **rule),
    ]


def _pairs(mean: str, *further: str, size: int) -> vl.Spec:
    """The pairs as circles, their mean as a diamond."""
    symbols = {"a pair": "circle", mean: "diamond", **dict.fromkeys(further, vl.BAR)}
    return {
        **AXES,
        "color": vl.named("what", dict.fromkeys(symbols, vl.ORANGE) | {"a pair": vl.BLUE}),
        "shape": vl.named("what", symbols),
        "size": vl.choose("datum.what === 'a pair'", size, 130),
        "tooltip": vl.tooltip("pair", numbers=PLANE),
    }


def _far() -> vl.Spec:
    """The loss, the boundary with its interval, and the pairs."""
    path = AXES | {"detail": {"field": "area"}}
    loss = {"fill": vl.number("loss", scale={"scheme": "cividis"}), "stroke": {"value": None}}
    area = {"filled": True, "opacity": 0.75, "order": None}
    isoline = {"stroke": "white", "strokeWidth": 0.6, "opacity": 0.6, "order": None}
    loop = AXES | {"order": vl.number("step"), "detail": {"field": "line"}}
    bounds = {"tooltip": vl.tooltip(numbers=["angle", "boundary", *ENDS])}
    measured: dict[str, Any] = {"where": "datum.line === 'boundary'", "color": vl.ORANGE}
    interval = measured | {"where": "!(datum.line === 'boundary')", "strokeDash": vl.DOTTED}
    pairs = _pairs("mean difference", "coherence boundary", size=18)
    drawn = [
        vl.layer("bands", "line", path | loss, where="datum.kind === 'area'", **area),
        vl.layer("bands", "line", path, where="datum.kind === 'isoline'", **isoline),
        _window("far")[0],
        vl.layer("rings", "line", loop, strokeWidth=1, **interval),
        vl.layer("rings", "line", loop, strokeWidth=2.4, **measured),
        vl.layer("rings", "point", AXES | bounds, filled=True, size=20, **measured),
        vl.layer("pairs", "point", pairs, filled=True),
    ]
    for of_bands in drawn[:2]:
        of_bands["transform"].append({"flatten": PLANE})
    return vl.panel(drawn, title="The loss, and the boundary", size=SIZE, zoom="zoom_far")


def _near() -> vl.Spec:
    """The pairs from near by, with an arrow for each term."""
    colours = dict(zip(TERMS.values(), (vl.BLUE, vl.GREEN), strict=True))
    arrow = {
        "color": vl.named("term", colours, symbolType="stroke"),
        "tooltip": vl.tooltip("pair", "term", numbers=["slope_along", "slope_across"]),
    }
    ends = {"x2": {"field": "to_along"}, "y2": {"field": "to_across"}}
    tip = {
        "x": vl.number("to_along"),
        "y": vl.number("to_across"),
        "angle": vl.number("turn", scale=None),
    }
    pair = AXES | {"tooltip": vl.tooltip("pair", numbers=PLANE)}
    dot: dict[str, Any] = {"where": "datum.what === 'a pair'", "color": vl.GREY, "size": 25}
    drawn = [
        *_window("near"),
        vl.layer("arrows", "rule", AXES | arrow | ends, strokeWidth=1.4),
        vl.layer("arrows", "point", arrow | tip, filled=True, shape="triangle-up", size=40),
        vl.layer("pairs", "point", pair, filled=True, **dot),
    ]
    return vl.panel(drawn, title="Both terms, pair by pair", size=SIZE, zoom="zoom_near")
