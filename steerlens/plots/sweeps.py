"""What a sweep measured: projection against damage, layer by coefficient, dose and response."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from steerlens.models.weight_processing import check_same, processing_of
from steerlens.plots.checks import by_hook, check_columns, check_distinct
from steerlens.plots.figure import Figure, make_figure
from steerlens.plots.style import (
    CROSS,
    GREY,
    NATS,
    ORANGE,
    RESIDUAL,
    Spec,
    chosen_opacity,
    heat_map,
    layer,
    layer_colour,
    number,
    panel,
    text,
    tooltip,
    zero_line,
)

PROJECTION = f"projection at the readout ({RESIDUAL})"
COEFFICIENT = f"coefficient ({RESIDUAL})"


_SHAPES: dict[str, Spec] = {"no": {}, "undecided": {"shape": "square"}, "yes": {"filled": True}}
"""How a cell is drawn that is beyond the budget, undecided, or within it."""


def _labelled(sweep: pd.DataFrame) -> pd.DataFrame:
    """The cells by layer and coefficient, with the layer's label in the column `layer`."""
    tables = [rows.assign(layer=label) for label, rows in by_hook(sweep).items()]
    return pd.concat([rows.sort_values("coefficient") for rows in tables], ignore_index=True)


def tradeoff(sweep: pd.DataFrame, layers: pd.DataFrame | None = None) -> Figure:
    """Projection against degradation, one curve a layer from the lowest coefficient to the highest.

    Takes the table of a sweep; with the per-layer table of `find_boundary` the boundary of each
    sign is marked where the straight line between the cells on either side of it crosses it.
    Undefined cells are left out. Raises `InputError` when the table is not that of a sweep,
    `InputError` when the two are of models with different weight processing.

    Examples:
        >>> result = sl.sweep(model, pairs, directions, layers=[1, 2], coefficients=[-4, 0, 4])
        >>> sl.plots.tradeoff(result.table)
        Figure('Projection against degradation', 1 panels)
    """
    columns = ["hook_name", "layer", "coefficient", "projection", "degradation_nats", "coherent"]
    check_columns(sweep, columns, "the table of a sweep")
    cells = _labelled(sweep)
    cells = cells.loc[cells.projection.notna() & cells.degradation_nats.notna(), columns[1:]]
    colour, chosen = layer_colour(list(by_hook(sweep)), "layers_tradeoff")
    axes = {
        "x": number("degradation_nats", f"degradation ({NATS}; right is worse)"),
        "y": number("projection", PROJECTION, scale={"zero": False}),
        "color": colour,
        "opacity": chosen_opacity("layers_tradeoff", 1.0),
        "tooltip": tooltip("layer", "coefficient", numbers=["projection", "degradation_nats"]),
    }
    point = {"type": "point", "size": 40}
    drawn = [
        zero_line("x"),
        layer("cells", {"type": "line"}, axes | {"order": number("coefficient")}),
        *(
            layer("cells", point | shape, axes, where=f"datum.coherent == '{word}'")
            for word, shape in _SHAPES.items()
            if (cells.coherent == word).any()
        ),
    ]
    tables = {"cells": cells}
    caption = (
        "Each curve is one layer, from the lowest coefficient to the highest: mean projection of "
        "the pairs' differences at the readout hook (residual units) against the loss of logprob "
        "of the positive prompts' labels (nats per token). Open circles are beyond the budget, "
        "open squares undecided: the interval of their degradation reaches across it."
    )
    if layers is not None:
        needed = ["hook_name", "layer", "boundary_pos", "boundary_neg"]
        check_columns(layers, needed, "the per-layer table")
        check_same(
            "the sweep is of a model",
            processing_of(sweep.attrs),
            "that of the per-layer table",
            processing_of(layers.attrs),
        )
        tables["boundaries"] = boundary_places(sweep, layers)
        mark = {"type": "point", "shape": "diamond", "filled": True, "size": 110, "color": ORANGE}
        shown = {"tooltip": tooltip("layer", numbers=["boundary"])}
        drawn.insert(-1, layer("boundaries", mark, {"x": axes["x"], "y": axes["y"], **shown}))
        caption += " Diamonds: the measured coherence boundary of each sign."
    panels = [panel(drawn, size=(640, 420), zoom="zoom_tradeoff", params=[chosen])]
    return make_figure("Projection against degradation", caption, tables, panels)


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
                places.append({"layer": label, "boundary": boundary, **at})
    return pd.DataFrame(places, columns=["layer", "boundary", "degradation_nats", "projection"])


def heat_maps(sweep: pd.DataFrame) -> Figure:
    """Layer by coefficient: projection, degradation and loss of every cell.

    Takes the table of a sweep. Crosses are cells beyond the budget, circles
    undecided ones. Colours of degradation and loss
    stop at the 95th percentile of their size, so that a few broken cells do not bleach all others.
    Raises `InputError` when the table is not that of a sweep, or has two rows of one cell.

    Examples:
        >>> result = sl.sweep(model, pairs, directions, layers=[1, 2], coefficients=[-4, 0, 4])
        >>> sl.plots.heat_maps(result.table)
        Figure('Every cell', 3 panels)
    """
    shown = (
        ("projection", "Projection", RESIDUAL),
        ("degradation_nats", "Degradation", NATS),
        ("loss", "Loss", "reference form"),
    )
    columns = ["hook_name", "layer", "coefficient", "coherent", *(name for name, *_ in shown)]
    check_columns(sweep, columns, "the table of a sweep")
    check_distinct(sweep, ["hook_name", "coefficient"], "give the table of one sweep")
    cells, labels = _labelled(sweep)[columns[1:]], list(by_hook(sweep))
    names = coefficient_labels(sorted(set(cells.coefficient)))
    cells["coefficient"] = cells.coefficient.map(names)
    axes = {"x": text("coefficient"), "y": text("layer")}
    cross = {"type": "point", "shape": CROSS, "stroke": GREY, "size": 16, "strokeWidth": 1.4}
    dot = {"type": "point", "stroke": GREY, "size": 12, "strokeWidth": 1.4}
    panels = []
    for name, title, unit in shown:
        colours = heat_map(
            "cells",
            cells[name],
            unit,
            x=("coefficient", list(names.values()), COEFFICIENT),
            y=("layer", labels, "layer"),
            reach=_reach(cells[name].to_numpy(dtype=float), name),
            is_diverging=name == "degradation_nats",
        )
        crosses = layer("cells", cross, axes, where="datum.coherent == 'no'")
        dots = layer("cells", dot, axes, where="datum.coherent == 'undecided'")
        size = (280, max(240, 12 * len(labels)))
        panels.append(panel([colours, crosses, dots], title=title, size=size))
    caption = (
        "Every cell of the sweep: mean projection at the readout hook (residual units), loss of "
        "logprob (nats per token; positive is worse) and the loss in its reference form. A cross "
        "marks a cell beyond the budget, a circle an undecided one; colours stop at the 95th "
        "percentile of degradation and loss. Undefined cells are empty."
    )
    return make_figure("Every cell", caption, {"cells": cells}, panels, columns=3)


def _reach(values: Float[np.ndarray, "cell"], name: str) -> tuple[float, float] | None:
    """The values at the ends of the colours; None where they reach as far as the values do."""
    known = values[np.isfinite(values)]
    if name == "projection" or not known.size:
        return None
    cut = float(np.quantile(np.abs(known), 0.95)) or float(np.abs(known).max())
    return (-cut, cut) if name == "degradation_nats" else (min(float(known.min()), cut), cut)


def coefficient_labels(coefficients: Sequence[float]) -> dict[float, str]:
    """Each coefficient as text: six digits, or all of them where six tell some not apart."""
    short = {c: f"{c:g}" for c in coefficients}
    return short if len(set(short.values())) == len(short) else {c: repr(c) for c in coefficients}


def dose_response(sweep: pd.DataFrame) -> Figure:
    """Projection and degradation against the coefficient, with intervals, one curve a layer.

    Takes the table of a sweep. Intervals are its 95% intervals over groups of pairs. Raises
    `InputError` when the table is not that of a sweep.

    Examples:
        >>> result = sl.sweep(model, pairs, directions, layers=[1, 2], coefficients=[-4, 0, 4])
        >>> sl.plots.dose_response(result.table)
        Figure('Dose and response', 2 panels)
    """
    parts = (
        ("projection", "projection", PROJECTION),
        ("degradation_nats", "degradation", f"degradation ({NATS})"),
    )
    intervals = [f"{name}_ci_{end}" for _, name, _ in parts for end in ("low", "high")]
    columns = ["hook_name", "layer", "coefficient", *(name for name, *_ in parts), *intervals]
    check_columns(sweep, columns, "the table of a sweep")
    panels = []
    for column, name, title in parts:
        choice, ends = f"layers_{name}", [f"{name}_ci_low", f"{name}_ci_high"]
        colour, chosen = layer_colour(list(by_hook(sweep)), choice)
        x = number("coefficient", COEFFICIENT, scale={"nice": False, "padding": 8})
        y: Spec = {"title": title, "scale": {"zero": False}}
        area = {"y": number(ends[0], **y), "y2": {"field": ends[1]}}
        shown = {"tooltip": tooltip("layer", "coefficient", numbers=[column, *ends])}
        line = {"y": number(column, **y), "opacity": chosen_opacity(choice, 1.0), **shown}
        axes = {"x": x, "color": colour}
        curves = [
            zero_line("x"),
            layer(
                "cells",
                {"type": "area"},
                axes | area | {"fillOpacity": chosen_opacity(choice, 0.18)},
            ),
            layer("cells", {"type": "line", "point": {"size": 14}}, axes | line),
        ]
        panels.append(panel(curves, size=(420, 320), zoom=f"zoom_{name}", params=[chosen]))
    caption = (
        "Mean projection at the readout hook (residual units) and loss of logprob (nats per token) "
        "at every coefficient, one curve a layer; areas are 95% intervals over groups of "
        "pairs."
    )
    tables = {"cells": _labelled(sweep)[columns[1:]]}
    return make_figure("Dose and response", caption, tables, panels, columns=2, is_one_legend=True)
