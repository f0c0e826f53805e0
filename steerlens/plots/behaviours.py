"""What a steered model writes: the concept against coherence, and each score by coefficient."""

from collections.abc import Sequence

import pandas as pd

from steerlens.errors import InputError
from steerlens.plots import style as vl
from steerlens.plots.checks import by_hook, checked_table
from steerlens.plots.figure import Figure, make_figure
from steerlens.tables import COLUMNS

_MEASURES = ("mean", "ci_low", "ci_high", "null_low", "null_high")


def behaviour(table: pd.DataFrame, *, x: str = "logprob", y: str = "concept") -> Figure:
    """One score of the texts against another, one curve a layer from the lowest coefficient up.

    Takes the table of `sl.behaviour`. Bars are 95% intervals over groups of prompts; the black
    point is unsteered; grey boxes reach over the random directions at each coefficient; diamonds
    are what a persona in front of the prompts gives.

    Args:
        table: As of `behaviour`, with both scorers.
        x: The scorer to the right: coherence.
        y: The scorer upwards: the concept.

    Raises:
        InputError: It is not that table, or a scorer is not in it.

    Examples:
        >>> result = sl.behaviour(
        ...     model, vector, ["the river was"], coefficients=[4], samples=2, max_new_tokens=5,
        ...     scorers=["logprob", "length"],
        ... )
        >>> sl.plots.behaviour(result.table, y="length")
        Figure('What is written', 1 panels)
    """
    cells = _side_by_side(table, x, y)
    steered = cells[cells.subject == "steered"]
    tables = {
        "curves": steered.sort_values("coefficient"),
        "unsteered": steered[steered.coefficient == 0].drop_duplicates("coefficient"),
        "personas": cells[cells.subject != "steered"],
    }
    colour = _layer_colour(list(by_hook(table[table.subject == "steered"])))
    across = {
        "x": vl.number("x", x, scale={"zero": False}),
        "y": vl.number("y", y, scale={"zero": False}),
        "tooltip": vl.tooltip("subject", "layer", "strength", numbers=["x", "y"]),
    }
    coloured = across | {"color": colour}
    band = vl.span("x", "x_null_low", "x_null_high") | vl.span("y", "y_null_low", "y_null_high")
    has_band = "isValid(datum.x_null_low) && isValid(datum.y_null_low)"
    drawn = [
        vl.layer("curves", "rect", band, where=has_band, color=vl.PALE, opacity=0.5),
        *(
            vl.layer("curves", "rule", coloured | vl.span(at, f"{at}_ci_low", f"{at}_ci_high"))
            for at in ("x", "y")
        ),
        vl.layer("curves", "line", coloured | {"order": vl.number("coefficient")}),
        vl.layer("curves", "point", coloured, filled=True, size=40),
        vl.layer(
            "personas", "point", across, shape="diamond", filled=True, size=110, color=vl.ORANGE
        ),
        vl.layer("unsteered", "point", across, filled=True, size=90, color="black"),
    ]
    caption = (
        f"Mean {y} of the texts against their mean {x}, one curve a layer from the lowest "
        "coefficient to the highest. Bars are 95% intervals over groups of prompts. Black: "
        "unsteered. Grey: random directions added as far, lowest to highest. Diamonds: "
        "unsteered, with a persona in front of the prompts."
    )
    shape = vl.panel(drawn, size=(640, 420), zoom="zoom_written")
    return make_figure("What is written", caption, tables, [shape])


def behaviour_by_coefficient(table: pd.DataFrame) -> Figure:
    """Each score of the texts against the coefficient, one curve a layer, with intervals.

    Takes the table of `sl.behaviour`; grey areas reach over the random directions. Raises
    `InputError` when it is not that table, or nothing in it is steered.

    Examples:
        >>> result = sl.behaviour(
        ...     model, vector, ["the river was"], coefficients=[4], samples=2, max_new_tokens=5,
        ...     scorers=["logprob", "length"],
        ... )
        >>> sl.plots.behaviour_by_coefficient(result.table)
        Figure('What is written, by coefficient', 2 panels)
    """
    checked_table(table, COLUMNS["behaviour"], "the table of behaviour")
    steered = table[(table.subject == "steered") & table.coefficient.notna()]
    if steered.empty:
        raise InputError("nothing in this table is steered by one coefficient; there is no curve")
    cells = pd.concat([rows.assign(layer=label) for label, rows in by_hook(steered).items()])
    colour = _layer_colour(list(by_hook(steered)))
    panels: list[vl.Spec] = []
    for scorer in dict.fromkeys(steered.scorer):
        axes: vl.Spec = {
            "x": vl.number("coefficient", "coefficient (residual units)"),
            "color": colour,
        }
        y: vl.Spec = {"title": scorer, "scale": {"zero": False}}
        where = f"datum.scorer == {scorer!r}"
        null = {"x": axes["x"], **vl.span("y", "null_low", "null_high", **y)}
        area = axes | vl.span("y", "ci_low", "ci_high", **y)
        line = {
            "y": vl.number("mean", **y),
            "tooltip": vl.tooltip("layer", "strength", numbers=list(_MEASURES)),
        }
        curves = [
            vl.zero_line("x"),
            vl.layer("cells", "area", null, where=where, color=vl.GREY, fillOpacity=0.18),
            vl.layer("cells", "area", area, where=where, fillOpacity=0.18),
            vl.layer("cells", "line", axes | line, where=where, point={"size": 14}),
        ]
        if steered.null_low[steered.scorer == scorer].isna().all():
            del curves[1]
        zoom = f"zoom_score{len(panels)}"
        panels.append(vl.panel(curves, title=scorer, size=(300, 220), zoom=zoom))
    caption = (
        "Mean score of the texts at every coefficient, one curve a layer; areas are 95% intervals "
        "over groups of prompts, grey ones reach over random directions added as far."
    )
    tables = {"cells": cells[["layer", "coefficient", "strength", "scorer", *_MEASURES]]}
    title = "What is written, by coefficient"
    return make_figure(title, caption, tables, panels, columns=2, is_one_legend=True)


def _layer_colour(labels: Sequence[str]) -> vl.Spec:
    scale = {"domain": list(labels), "scheme": {"name": "viridis", "extent": [0, 0.9]}}
    return vl.text("layer", scale=scale, legend={"title": "layer"})


def _side_by_side(table: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """A row a cell, with the numbers of two scorers."""
    checked_table(table, COLUMNS["behaviour"], "the table of behaviour")
    missing = [name for name in (x, y) if name not in set(table.scorer)]
    if missing:
        raise InputError(
            f"the table has no scorer {', '.join(missing)}; it has "
            f"{', '.join(dict.fromkeys(table.scorer))}"
        )
    keys = ["subject", "hook_name", "strength", "coefficient"]
    labels = {
        str(rows.hook_name.iloc[0]): label
        for label, rows in by_hook(table[table.subject == "steered"]).items()
    }
    sides = [
        table[table.scorer == name]
        .set_index(keys)[list(_MEASURES)]
        .rename(columns={n: side if n == "mean" else f"{side}_{n}" for n in _MEASURES})
        for side, name in (("x", x), ("y", y))
    ]
    both = pd.concat(sides, axis=1).reset_index()
    return both.assign(layer=both.hook_name.map(labels).fillna(""))
