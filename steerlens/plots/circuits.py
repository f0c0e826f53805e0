"""Which heads and MLPs write and read a direction, and the largest edges between them."""

import numpy as np
import pandas as pd

from steerlens.errors import InputError
from steerlens.plots import style as vl
from steerlens.plots.checks import check_distinct, checked_table
from steerlens.plots.figure import Figure, make_figure

_NAMES = ("model", "writer", "reader")
_SIGNS = {"supports": vl.ORANGE, "works against": vl.BLUE}


def components(writers: pd.DataFrame, readers: pd.DataFrame) -> Figure:
    """Contributions to the direction and effects on the answer, by layer and head.

    Takes the tables of `find_writers` and `find_readers`. The last column of each map is the MLP;
    the embedding is left out. Raises `InputError` on other tables, and on several rows a component.

    Examples:
        >>> from steerlens.circuits import contrast_answers, make_prompts
        >>> from steerlens.circuits import find_readers, find_writers
        >>> prompts = make_prompts(model, list(sl.engine.tokenize_pairs(model, pairs).positive))
        >>> answers = contrast_answers(model, pairs, n_tokens=3)
        >>> writers = find_writers(model, pairs, directions, layer=2)
        >>> readers = find_readers(model, prompts, answers, vector, 4, top=0, n_claimed=0)
        >>> sl.plots.components(writers.table, readers.table)
        Figure('Heads and MLPs', 2 panels)
    """
    panels, tables = [], {}
    for name, table, value, title, unit in (
        ("writers", writers, "contribution", "Who writes the direction", "residual units"),
        ("readers", readers, "effect", "Who reads it (estimated effect)", "logits"),
    ):
        needed = ["component", "layer", "head", value]
        checked_table(table, needed, "a table of components", finite=["layer", "head"])
        tables[name] = cells = component_cells(table, value)
        heads = [f"H{head}" for head in range(int(table["head"].max()) + 1)]
        layers = sorted(set(cells.layer), key=int)
        x, y = ("head", [*heads, "MLP"], "head"), ("layer", layers, "layer")
        colours = vl.heat_map(name, cells[value], unit, x=x, y=y, is_diverging=True)
        panels.append(vl.panel([colours], title=title, size=(360, max(220, 16 * len(layers)))))
    caption = (
        "First: what each head and MLP wrote of the pairs' difference, projected on the direction "
        "(residual units). Second: the estimated change of the answer logit difference by each "
        "component's change under the steering (logits)."
    )
    return make_figure("Heads and MLPs", caption, tables, panels, columns=2)


def component_cells(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """The heads and MLPs of a table by the labels of their layer and head, with a value each."""
    rows = table[table.component != "embed"]
    if rows.empty:
        raise InputError(f"expected heads or MLPs with a {value}; the table holds the embedding")
    check_distinct(
        rows, ["layer", "head"], "give find_writers(...).table and find_readers(...).table"
    )
    return pd.DataFrame(
        {
            "head": [f"H{int(head)}" if head >= 0 else "MLP" for head in rows["head"]],
            "layer": [str(int(layer)) for layer in rows.layer],
            value: rows[value].astype(float),
        }
    )


def circuit_graph(edges: pd.DataFrame) -> Figure:
    """The largest edges of each model as a graph, from the embedding up to the logits.

    Takes the table of edges of `edge_table`; one frame a model. Raises `InputError` on another,
    and on a place or score that is not finite.

    Examples:
        >>> from steerlens.circuits import (
        ...     Intervention, compare_circuits, contrast_answers, edge_table
        ... )
        >>> answers = contrast_answers(model, pairs, n_tokens=3)
        >>> pushed = {"cheerful": Intervention(vector, 4)}
        >>> found = compare_circuits(model, pairs, answers, pushed, shares=[0.2], n_splits=2)
        >>> edges = edge_table(model, found.scores, n_edges=5)
        >>> sl.plots.circuit_graph(edges)
        Figure('The largest edges', 1 panels, 2 frames)
    """
    names = ["model", "writer", "writer_layer", "writer_head", "reader", "reader_layer", "score"]
    numbered = ["writer_layer", "writer_head", "reader_layer", "score"]
    checked_table(edges, names, "the table of edges", finite=numbered)
    lines, places = graph_rows(edges)
    axes = {
        "x": vl.number("x", axis=None, scale={"padding": 40}),
        "y": vl.number("y", "layer", scale={"zero": False, "padding": 20}),
    }
    edge = {
        "x2": {"field": "to_x"},
        "y2": {"field": "to_y"},
        "color": vl.named("sign", _SIGNS, symbolType="stroke"),
        "strokeWidth": vl.number("width", scale=None),
        "strokeDash": vl.choose("datum.score > 0", vl.SOLID, vl.DASHED),
        "tooltip": vl.tooltip("writer", "reader", numbers=["score"]),
    }
    point: vl.Spec = {"filled": True, "color": vl.GREY, "size": 60}
    layers = [
        vl.layer("edges", "rule", axes | edge),
        vl.layer("places", "text", axes | {"text": vl.text("name")}, dy=-10),
        vl.layer("places", "point", axes | {"tooltip": vl.text("name")}, **point),
    ]
    drawn = vl.panel(layers, size=(740, 600), zoom="zoom_edges")
    caption = (
        "The largest edges by attribution (logits), from the component that writes (named by layer "
        "and head) to what reads it: a layer's attention or MLP as a whole, or the logits. Orange "
        "supports the behaviour, blue and dashed works against it; width by size."
    )
    tables = {"edges": lines, "places": places}
    return make_figure("The largest edges", caption, tables, [drawn], slider="model")


def graph_rows(edges: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The edges as lines with a width by size, and the places of what they join, model by model."""
    by_model = [rows for _, rows in edges.groupby("model", sort=False)]
    edges = pd.concat(by_model, ignore_index=True).astype(dict.fromkeys(_NAMES, str))
    # Heads by number, MLPs right of them and higher; what is one a layer, in the middle.
    right = float(edges.writer_head.max()) + 2
    middle = (right - 1) / 2
    is_embed, is_mlp = edges.writer_layer < 0, (edges.writer_layer >= 0) & (edges.writer_head < 0)
    reads_mlp, is_logits = edges.reader.str.startswith("mlp"), edges.reader.eq("logits")
    largest = edges.score.abs().groupby(edges.model).transform("max").replace(0.0, 1.0)
    lines = pd.DataFrame(
        {
            "frame": edges.model,
            "writer": edges.writer,
            "reader": edges.reader,
            "score": edges.score,
            "x": np.select([is_embed, is_mlp], [middle, right], edges.writer_head),
            "y": edges.writer_layer + 0.5 * is_mlp,
            "to_x": np.where(reads_mlp, right, middle),
            "to_y": edges.reader_layer + np.where(reads_mlp | is_logits, 0.5, -0.15),
            "width": 0.5 + 4 * edges.score.abs() / largest,
            "sign": np.where(edges.score > 0, *_SIGNS),
        }
    )
    names = ["frame", "name", "x", "y"]
    ends = (["frame", "writer", "x", "y"], ["frame", "reader", "to_x", "to_y"])
    places = pd.concat([lines[end].set_axis(names, axis=1) for end in ends])
    return lines, places.sort_index(kind="stable").drop_duplicates(["frame", "name"])
