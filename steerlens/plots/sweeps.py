"""What a sweep measured: projection against damage, layer by coefficient, dose and response."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from steerlens.models.weight_processing import check_same, processing_of
from steerlens.plots import style as vl
from steerlens.plots.checks import Tabular, by_hook, check_distinct, checked_table
from steerlens.plots.figure import Figure, make_figure
from steerlens.tables import hook_label

MOST_STANDING_OUT = 5
PROJECTION = f"projection at the readout ({vl.RESIDUAL})"
COEFFICIENT = f"coefficient ({vl.RESIDUAL})"
RUN = "datum.exact"
"""Of the cells of a sweep those that were run, not interpolated."""


_HALO, _DARK = {"stroke": "white", "strokeWidth": 3.8}, {"stroke": "#1d1f21", "strokeWidth": 1.5}
_COLUMNS = [
    *("hook_name", "layer", "coefficient", "projection", "degradation_nats", "coherent"),
    *("exact", "projection_shift", "readout_hook"),
]
_DRAWN = ["layer", "number", "stands_out", *_COLUMNS[2:7]]
_STANDOUT = (
    "The layers that the legend names stand out: those pushed furthest within the budget, "
    "and the quartiles of the depth. A click picks a layer."
)
_MARKS: dict[str, vl.Spec] = {
    "no": {"shape": vl.CROSS, "size": 26},
    "undecided": {"size": 22},
}
_SHAPES: dict[str, vl.Spec] = {"no": {}, "undecided": {"shape": "square"}, "yes": {"filled": True}}
"""How a cell is drawn that is beyond the budget, undecided, or within it."""


def _is(word: str) -> str:
    return f"datum.coherent == '{word}'"


def _sweep_table(sweep: Tabular, *further: str) -> pd.DataFrame:
    return checked_table(sweep, [*_COLUMNS, *further], "the table of a sweep", of="table")


def _labelled(sweep: pd.DataFrame) -> pd.DataFrame:
    """The cells by layer and coefficient; `stands_out`: whether the curve is coloured at first."""
    named = standing_out(sweep)
    tables = [
        rows.assign(layer=label, number=rows.layer, stands_out=label in named)
        for label, rows in by_hook(sweep).items()
    ]
    return pd.concat([rows.sort_values("coefficient") for rows in tables], ignore_index=True)


def furthest_cell(cells: pd.DataFrame) -> Any:
    """The coherent cell with the largest projection shift, none at a readout; None without one."""
    is_before = (cells.hook_name != cells.readout_hook) & (cells.coefficient != 0)
    sizes = cells.projection_shift.abs().where(is_before & (cells.coherent == "yes"))
    return None if sizes.isna().all() else cells.iloc[int(np.nanargmax(sizes))]


def standing_out(sweep: pd.DataFrame) -> list[str]:
    """Labels of up to five layers: with the furthest cell of each sign, quartiles of the depth."""
    labels = list(by_hook(sweep))
    if len(labels) <= MOST_STANDING_OUT:
        return labels
    quartiles = [labels[round(share * (len(labels) - 1))] for share in (0.25, 0.5, 0.75)]
    signs = (sweep[sweep.coefficient > 0], sweep[sweep.coefficient < 0])
    cells = map(furthest_cell, signs)
    return [*{*quartiles, *(hook_label(str(cell.hook_name)) for cell in cells if cell is not None)}]


def tradeoff(sweep: Tabular, layers: Tabular | None = None) -> Figure:
    """Projection against degradation, one curve a layer from the lowest coefficient to the highest.

    Takes what `sweep` gave, or its table; with what `find_boundary` gave the boundary of each sign
    is marked where the straight line between the cells on either side of it crosses it.
    Undefined cells are left out. Raises `InputError` when the table is not that of a sweep, or
    the two are of models with different weight processing.

    Examples:
        >>> result = sl.sweep(model, pairs, directions, layers=[1, 2], coefficients=[-4, 0, 4])
        >>> sl.plots.tradeoff(result)  # or result.plot()
        Figure('Projection against degradation', 1 panels)
    """
    sweep = _sweep_table(sweep)
    cells = _labelled(sweep)
    cells = cells.loc[cells.projection.notna() & cells.degradation_nats.notna(), _DRAWN]
    axes = {
        "x": vl.number("degradation_nats", f"degradation ({vl.NATS}; right is worse)"),
        "y": vl.number("projection", PROJECTION, scale={"zero": False}),
        "tooltip": vl.tooltip("layer", "coefficient", numbers=["projection", "degradation_nats"]),
    }
    coloured = axes | {"color": vl.layer_colour(cells)}
    drawn = [
        vl.zero_line("x"),
        *_curves(axes | {"order": vl.number("coefficient")}, cells),
        *(
            vl.layer("cells", "point", coloured, where=[_is(word), RUN, vl.SHOWN], size=40, **look)
            for word, look in _SHAPES.items()
            if (cells.coherent == word).any()
        ),
    ]
    tables = {"cells": cells}
    caption = (
        "Each curve is one layer, from the lowest coefficient to the highest: mean projection of "
        "the pairs' differences at the readout hook (residual units) against the loss of logprob "
        "of the positive prompts' labels (nats per token). Open circles are beyond the budget, "
        "open squares undecided: the interval of their degradation reaches across it. Points are "
        "cells that were run; of a dense sweep the curve between them is interpolated. " + _STANDOUT
    )
    if layers is not None:
        needed = ["hook_name", "layer", "boundary_pos", "boundary_neg"]
        layers = checked_table(layers, needed, "the per-layer table", of="layers")
        both = processing_of(sweep.attrs), processing_of(layers.attrs)
        check_same("the sweep is of a model", both[0], "that of the per-layer table", both[1])
        tables["boundaries"] = boundary_places(sweep, layers)
        look = {"shape": "diamond", "filled": True, "size": 110, "color": vl.ORANGE}
        places = axes | {"tooltip": vl.tooltip("layer", numbers=["boundary"])}
        drawn.insert(-1, vl.layer("boundaries", "point", places, where=vl.SHOWN, **look))
        caption += " Diamonds: the measured coherence boundary of each sign."
    choice = vl.layer_choice(list(by_hook(sweep)))
    panels = [vl.panel(drawn, size=(640, 420), zoom="zoom_tradeoff", params=[choice])]
    return make_figure("Projection against degradation", caption, tables, panels)


def _curves(axes: vl.Spec, cells: pd.DataFrame) -> list[vl.Spec]:
    """A grey curve of every layer, and over it a coloured one of those that are shown."""
    line = axes | {"detail": {"field": "layer"}}
    colour = {"color": vl.layer_colour(cells)}
    return [
        vl.layer("cells", "line", line, color=vl.PALE, strokeWidth=1),
        vl.layer("cells", "point", axes, where=RUN, filled=True, color=vl.PALE, size=8),
        vl.layer("cells", "line", line | colour, where=vl.SHOWN, strokeWidth=2.4),
    ]


def boundary_places(sweep: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """Where each boundary lies on its layer's curve, on the straight line between two cells."""
    cells = _labelled(sweep)
    places = []
    for label, rows in by_hook(layers).items():
        curve = cells[cells.layer == label]
        for boundary in rows[["boundary_neg", "boundary_pos"]].iloc[0]:
            if curve.coefficient.min() <= boundary <= curve.coefficient.max():
                names = ("degradation_nats", "projection")
                at = {name: np.interp(boundary, curve.coefficient, curve[name]) for name in names}
                stands_out = bool(curve.stands_out.any())
                at |= {"layer": label, "boundary": boundary, "stands_out": stands_out}
                places.append(at)
    columns = ["layer", "boundary", "degradation_nats", "projection", "stands_out"]
    return pd.DataFrame(places, columns=columns)


def heat_maps(sweep: Tabular) -> Figure:
    """Layer by coefficient: projection, degradation and loss of every cell.

    Takes what `sweep` gave, or its table. Projections are coloured by their change from the
    unsteered model's (without a cell at 0, as they are). Crosses are cells beyond the budget,
    circles undecided ones. Colours stop at the 95th percentile of the size, so that a few broken
    cells bleach no others.
    Raises `InputError` when the table is not that of a sweep, or has two rows of one cell.

    Examples:
        >>> result = sl.sweep(model, pairs, directions, layers=[1, 2], coefficients=[-4, 0, 4])
        >>> sl.plots.heat_maps(result)
        Figure('Every cell', 3 panels)
    """
    sweep = _sweep_table(sweep, "asked", "loss")
    check_distinct(sweep, ["hook_name", "asked"], "give the table of one sweep")
    cells, labels = _labelled(sweep)[[*_DRAWN, "asked", "loss"]], list(by_hook(sweep))
    cells["asked"] = cells.asked.astype(str)  # plain pandas reads numbers from a file
    unsteered = cells[cells.coefficient == 0].set_index("layer").projection
    cells["projection_change"] = cells.projection - cells.layer.map(unsteered)
    has_unsteered = not unsteered.empty
    shown = (
        ("projection_change", "Projection: change from unsteered", vl.RESIDUAL)
        if has_unsteered
        else ("projection", "Projection", vl.RESIDUAL),
        ("degradation_nats", "Degradation", vl.NATS),
        ("loss", "Loss", "reference form"),
    )
    names = list(dict.fromkeys(cells.asked))
    axes = {"x": vl.text("asked"), "y": vl.text("layer")}
    marks = [
        vl.layer("cells", "point", axes, where=_is(word), **look, **ink)
        for word, look in _MARKS.items()
        for ink in (_HALO, _DARK)
    ]
    panels: list[vl.Spec] = []
    for name, title, unit in shown:
        colours = vl.heat_map(
            "cells",
            cells[name],
            unit,
            x=("asked", names, COEFFICIENT),
            y=("layer", labels, "layer"),
            reach=_reach(cells[name].to_numpy(dtype=float), name),
            is_diverging=name in ("degradation_nats", "projection_change"),
        )
        if name == "projection_change":
            colours["encoding"]["tooltip"].append(vl.number("projection", format=".4~g"))
        colours["encoding"]["opacity"] = vl.choose(
            f"!isValid(picked_layer) || {vl.PICKED}", 1, 0.25
        )
        size = (240, max(240, 12 * len(labels)))
        choice = [] if panels else [vl.layer_choice(labels)]
        panels.append(vl.panel([colours, *marks], title=title, size=size, params=choice))
    caption = (
        "Every cell of the sweep: mean projection at the readout hook (residual units), as its "
        "change from the unsteered model's where coefficient 0 was measured, loss of logprob (nats "
        "per token; positive is worse) and the loss in its reference form. A cross marks a cell "
        "beyond the budget, a circle an undecided one; colours stop at the 95th percentile of the "
        "sizes. Undefined cells are empty. A click picks a layer."
    )
    return make_figure("Every cell", caption, {"cells": cells}, panels, columns=3)


def _reach(values: Float[np.ndarray, "cell"], name: str) -> tuple[float, float] | None:
    """The values at the ends of the colours; None where they reach as far as the values do."""
    known = values[np.isfinite(values)]
    if name == "projection" or not known.size:
        return None
    cut = float(np.quantile(np.abs(known), 0.95)) or float(np.abs(known).max())
    return (min(float(known.min()), cut), cut) if name == "loss" else (-cut, cut)


def dose_response(sweep: Tabular) -> Figure:
    """Projection and degradation against the coefficient, with intervals, one curve a layer.

    Takes what `sweep` gave, or its table. Intervals are its 95% intervals over groups of pairs.
    Raises `InputError` when the table is not that of a sweep.

    Examples:
        >>> result = sl.sweep(model, pairs, directions, layers=[1, 2], coefficients=[-4, 0, 4])
        >>> sl.plots.dose_response(result)
        Figure('Dose and response', 2 panels)
    """
    parts = (
        ("projection", "projection", PROJECTION),
        ("degradation_nats", "degradation", f"degradation ({vl.NATS})"),
    )
    intervals = [f"{name}_ci_{end}" for _, name, _ in parts for end in ("low", "high")]
    sweep = _sweep_table(sweep, *intervals)
    cells = _labelled(sweep)[[*_DRAWN, *intervals]]
    panels: list[vl.Spec] = []
    for column, name, title in parts:
        ends = [f"{name}_ci_low", f"{name}_ci_high"]
        x = vl.number("coefficient", COEFFICIENT, scale={"nice": False, "padding": 8})
        y: vl.Spec = {"title": title, "scale": {"zero": False}}
        area = {"x": x, **vl.span("y", "low", "high", **y), "detail": vl.text("layer")}
        shown = vl.tooltip("layer", "coefficient", numbers=[column, *ends])
        axes = {"x": x, "y": vl.number(column, **y), "tooltip": shown}
        # Without width where no layer is picked: without rows Vega would warn of it.
        picked = vl.layer("cells", "area", area, fillOpacity=0.25, color=vl.GREY)
        for end, field in zip(("low", "high"), ends, strict=True):
            width = f"{vl.PICKED} ? datum['{field}'] : datum['{column}']"
            picked["transform"].append({"calculate": width, "as": end})
        drawn = [vl.zero_line("x"), picked, *_curves(axes, cells)]
        choice = [] if panels else [vl.layer_choice(list(by_hook(sweep)))]
        panels.append(vl.panel(drawn, size=(420, 320), zoom=f"zoom_{name}", params=choice))
    caption = (
        "Mean projection at the readout hook (residual units) and loss of logprob (nats per token) "
        "at every coefficient, one curve a layer; the area of a picked layer is its 95% interval "
        "over groups of pairs. " + _STANDOUT
    )
    return make_figure(
        "Dose and response", caption, {"cells": cells}, panels, columns=2, is_one_legend=True
    )
