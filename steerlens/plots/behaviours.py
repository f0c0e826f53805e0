"""What a steered model writes: the concept against coherence, and each score by coefficient."""

from collections.abc import Sequence

import pandas as pd

from steerlens.errors import InputError
from steerlens.plots.checks import by_hook, check_columns
from steerlens.plots.figure import Figure, make_figure
from steerlens.plots.style import (
    GREY,
    ORANGE,
    PALE,
    Spec,
    layer,
    number,
    panel,
    text,
    tooltip,
    zero_line,
)
from steerlens.tables import BEHAVIOUR_COLUMNS

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
        "x": number("x", x, scale={"zero": False}),
        "y": number("y", y, scale={"zero": False}),
        "tooltip": tooltip("subject", "layer", "strength", numbers=["x", "y"]),
    }
    coloured = {"color": colour}
    band = {
        "x": number("x_null_low"),
        "x2": {"field": "x_null_high"},
        "y": number("y_null_low"),
        "y2": {"field": "y_null_high"},
    }
    bars = [
        layer("curves", {"type": "rule"}, {**across, **coloured, **ends})
        for ends in (
            {"x": number("x_ci_low"), "x2": {"field": "x_ci_high"}},
            {"y": number("y_ci_low"), "y2": {"field": "y_ci_high"}},
        )
    ]
    has_band = "isValid(datum.x_null_low) && isValid(datum.y_null_low)"
    drawn = [
        layer("curves", {"type": "rect", "color": PALE, "opacity": 0.5}, band, where=has_band),
        *bars,
        layer("curves", {"type": "line"}, {**across, **coloured, "order": number("coefficient")}),
        layer("curves", {"type": "point", "filled": True, "size": 40}, {**across, **coloured}),
        layer(
            "personas",
            {"type": "point", "shape": "diamond", "filled": True, "size": 110, "color": ORANGE},
            across,
        ),
        layer("unsteered", {"type": "point", "filled": True, "size": 90, "color": "black"}, across),
    ]
    caption = (
        f"Mean {y} of the texts against their mean {x}, one curve a layer from the lowest "
        "coefficient to the highest. Bars are 95% intervals over groups of prompts. Black: "
        "unsteered. Grey: random directions added as far, lowest to highest. Diamonds: "
        "unsteered, with a persona in front of the prompts."
    )
    shape = panel(drawn, size=(640, 420), zoom="zoom_written")
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
    _check(table)
    steered = table[(table.subject == "steered") & table.coefficient.notna()]
    if steered.empty:
        raise InputError("nothing in this table is steered by one coefficient; there is no curve")
    cells = pd.concat([rows.assign(layer=label) for label, rows in by_hook(steered).items()])
    colour = _layer_colour(list(by_hook(steered)))
    panels: list[Spec] = []
    for scorer in dict.fromkeys(steered.scorer):
        axes: Spec = {"x": number("coefficient", "coefficient (residual units)"), "color": colour}
        y: Spec = {"title": scorer, "scale": {"zero": False}}
        where = f"datum.scorer == {scorer!r}"
        null = {"y": number("null_low", **y), "y2": {"field": "null_high"}}
        area = {"y": number("ci_low", **y), "y2": {"field": "ci_high"}}
        line = {
            "y": number("mean", **y),
            "tooltip": tooltip("layer", "strength", numbers=list(_MEASURES)),
        }
        grey = {"type": "area", "color": GREY, "fillOpacity": 0.18}
        has_nulls = steered.null_low[steered.scorer == scorer].notna().any()
        curves = [
            zero_line("x"),
            *([layer("cells", grey, {"x": axes["x"], **null}, where=where)] if has_nulls else []),
            layer("cells", {"type": "area", "fillOpacity": 0.18}, axes | area, where=where),
            layer("cells", {"type": "line", "point": {"size": 14}}, axes | line, where=where),
        ]
        zoom = f"zoom_score{len(panels)}"
        panels.append(panel(curves, title=scorer, size=(300, 220), zoom=zoom))
    caption = (
        "Mean score of the texts at every coefficient, one curve a layer; areas are 95% intervals "
        "over groups of prompts, grey ones reach over random directions added as far."
    )
    tables = {"cells": cells[["layer", "coefficient", "strength", "scorer", *_MEASURES]]}
    title = "What is written, by coefficient"
    return make_figure(title, caption, tables, panels, columns=2, is_one_legend=True)


def _layer_colour(labels: Sequence[str]) -> Spec:
    scale = {"domain": list(labels), "scheme": {"name": "viridis", "extent": [0, 0.9]}}
    return text("layer", scale=scale, legend={"title": "layer"})


def _check(table: pd.DataFrame) -> None:
    check_columns(table, [column.name for column in BEHAVIOUR_COLUMNS], "the table of behaviour")


def _side_by_side(table: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """A row a cell, with the numbers of two scorers."""
    _check(table)
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
