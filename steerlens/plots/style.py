"""How figures look, and the pieces of Vega-Lite that several of them are made of."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from steerlens.files import packaged

Spec: TypeAlias = dict[str, Any]
"""A piece of a Vega-Lite specification (https://vega.github.io/vega-lite/docs)."""

# Okabe and Ito's colours, which people with any common colour blindness can tell apart.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
GREY, PALE = "#767676", "#b8b8b8"

RESIDUAL = "residual units"
NATS = "nats per token"

CROSS, BAR = "M-1,-1L1,1M-1,1L1,-1", "M-1,-0.2H1V0.2H-1Z"
SOLID, DASHED, DOTTED = [1, 0], [6, 4], [2, 3]

CONFIG: Spec = json.loads(packaged("plots", "config.json"))
"""Vega-Lite's. A gap in a line stays one; the shown part of an axis goes by all that is known."""


def number(field: str, title: str | None = None, **options: Any) -> Spec:
    """A column of numbers, as Vega-Lite encodes it: on an axis, in a colour, in a tooltip."""
    named = {} if title is None else {"title": title}
    return {"field": field, "type": "quantitative", **named, **options}


def text(field: str, **options: Any) -> Spec:
    """A column of names, as Vega-Lite encodes it."""
    return {"field": field, "type": "nominal", **options}


def tooltip(*texts: str, numbers: Sequence[str] = (), form: str = ".4~g") -> list[Spec]:
    """What is shown of a row under the pointer: columns of text, then numbers of four digits."""
    return [*map(text, texts), *(number(name, format=form) for name in numbers)]


def named(field: str, values: Mapping[str, Any], **legend: Any) -> Spec:
    """A colour, symbol or dash for each name in a column, in the legend's order."""
    scale = {"domain": list(values), "range": list(values.values())}
    return text(field, scale=scale, legend={"title": None, **legend})


def choose(test: str, value: Any, other: Any) -> Spec:
    """One value where a test of the row is true, and another where it is not."""
    return {"condition": {"test": test, "value": value}, "value": other}


def span(axis: str, low: str, high: str, title: str | None = None, **options: Any) -> Spec:
    """From one column to another along an axis, as Vega-Lite encodes it."""
    return {axis: number(low, title, **options), f"{axis}2": {"field": high}}


def layer(
    data: str, mark: str, encoding: Spec, *, where: str | Sequence[str] = (), **look: Any
) -> Spec:
    """A mark with a `look` for every row of the table `data` that passes the tests `where`."""
    tests = [where] if isinstance(where, str) else where
    kept = [{"filter": test} for test in tests if test]
    drawn = {"type": mark, **look}
    return {"data": {"name": data}, "transform": kept, "mark": drawn, "encoding": encoding}


def panel(
    layers: Sequence[Spec],
    *,
    size: tuple[int, int],
    title: str = "",
    zoom: str = "",
    params: Sequence[Spec] = (),
) -> Spec:
    """Layers on one pair of axes, of a width and height in pixels.

    `zoom` names the parameter by which it is moved and zoomed (a wheel with the Alt key, since one
    alone scrolls the page); without a name it is not.
    """
    select = {"type": "interval", "zoom": "wheel![event.altKey]"}
    moved = [{"name": zoom, "select": select, "bind": "scales"}] if zoom else []
    # Parameters stand at the top of a chart, and name the layer that they listen to.
    *below, top = layers
    view = f"view_{zoom}"
    held = [{**param, "views": [view]} for param in (*params, *moved)]
    drawn = [*below, {**top, "name": view} if held else top]
    shape = {"title": title, "width": size[0], "height": size[1]}
    return {"layer": drawn, "params": held, **shape}


def zero_line(axis: str, dash: Sequence[int] = DOTTED) -> Spec:
    """A line across the panel at 0 of an axis."""
    # A row to stand on: without data of its own a layer repeats for every row of another.
    mark = {"type": "rule", "color": GREY, "strokeDash": dash}
    return {"data": {"values": [{}]}, "mark": mark, "encoding": {axis: {"datum": 0}}}


PICKED = "datum.layer === picked_layer"
SHOWN = f"isValid(picked_layer) ? {PICKED} : datum.stands_out"
"""Tests of a row: its layer is the picked one; it is, or none is and the layer stands out."""


def layer_choice(labels: Sequence[str]) -> Spec:
    """The choice of one layer in a whole figure, by a click or from a list: `picked_layer`."""
    select = {"type": "point", "fields": ["layer"], "on": "click", "clear": False}
    names = {"options": [None, *labels], "labels": ["all", *labels], "name": "layer "}
    value = {"value": [{"layer": labels[0]}]} if len(labels) == 1 else {}
    return {"name": "picked", "select": select, "bind": {"input": "select", **names}, **value}


def layer_colour(cells: pd.DataFrame) -> Spec:
    """Layers as a bar of colours, even in lightness, that names those that stand out."""
    ends = [int(cells.number.min()), int(cells.number.max())]
    # The map's last tenth is too pale for a line on white.
    scale = {"scheme": {"name": "viridis", "extent": [0, 0.9]}, "domain": ends}
    named = sorted({int(layer) for layer in cells.number[cells.stands_out]})
    bar = {"title": "layer", "type": "gradient", "values": named, "format": "d"}
    return number("number", scale=scale, legend=bar if ends[0] < ends[1] else None)


def heat_map(
    data: str,
    values: pd.Series,
    unit: str,
    *,
    x: tuple[str, Sequence[str], str],
    y: tuple[str, Sequence[str], str],
    reach: tuple[float, float] | None = None,
    is_diverging: bool = False,
) -> Spec:
    """A colour for every cell of the table `data`; undefined cells are empty.

    `x` and `y` are the column, labels in order and title of an axis; `reach` the values at the ends
    of the colours, by default as far as they reach; a diverging scale is centred on 0.
    """
    known = values[np.isfinite(values.astype(float))].astype(float)
    if reach is None:
        largest = float(known.abs().max()) if len(known) else 1.0
        reach = (-largest, largest)
        if not is_diverging and len(known):
            reach = (float(known.min()), float(known.max()))
    colours = {"scheme": "redblue", "reverse": True} if is_diverging else {"scheme": "cividis"}
    value, (column, columns, x_title), (row, rows, y_title) = str(values.name), x, y
    encoding = {
        "x": text(column, title=x_title, scale={"domain": list(columns)}, axis={"labelAngle": 0}),
        "y": text(row, title=y_title, scale={"domain": list(rows), "reverse": True}),
        "color": number(value, unit, scale={**colours, "domain": list(reach), "clamp": True}),
        "tooltip": tooltip(row, column, numbers=[value]),
    }
    return layer(data, "rect", encoding, where=f"isValid(datum['{value}'])")
