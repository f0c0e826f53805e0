"""Which heads and MLPs write and read a direction, and the largest edges between them."""

import math
from typing import Any

import pandas as pd

from steerlens.errors import InputError
from steerlens.plots.figure import Figure
from steerlens.plots.marks import (
    BLUE,
    GREY,
    ORANGE,
    Axis,
    Frame,
    HeatMap,
    Layout,
    Line,
    Mark,
    Panel,
    Points,
)
from steerlens.plots.sweeps import check_columns, check_distinct, numbers


def components(writers: pd.DataFrame, readers: pd.DataFrame) -> Figure:
    """Contributions to the direction and effects on the answer, by layer and head.

    Takes the tables of `find_writers` and `find_readers`. The last column of each map is the MLP;
    the embedding is left out. Raises `InputError` on other tables, and on several rows a component.

    Examples:
        >>> from steerlens.circuits import contrast_answers, make_prompts
        >>> from steerlens.circuits import find_readers, find_writers
        >>> prompts = make_prompts(model, list(sl.tokenize_pairs(model, pairs).positive))
        >>> answers = contrast_answers(model, pairs, n_tokens=3)
        >>> writers = find_writers(model, pairs, directions, layer=2)
        >>> readers = find_readers(model, prompts, answers, vector, 4, top=0, n_claimed=0)
        >>> sl.plots.components(writers.table, readers.table)
        Figure('Heads and MLPs', 2 panels)
    """
    panels: list[Panel] = []
    for table, value, title, unit in (
        (writers, "contribution", "Who writes the direction", "residual units"),
        (readers, "effect", "Who reads it (estimated effect)", "logits"),
    ):
        needed = ["component", "layer", "head", value]
        check_columns(table, needed, "a table of components", finite=["layer", "head"])
        panels.append(Panel([_grid(table, value, unit)], Axis("head"), Axis("layer"), title))
    caption = (
        "Left: what each head and MLP wrote of the pairs' difference, projected on the direction "
        "(residual units). Right: the estimated change of the answer logit difference by each "
        "component's change under the steering (logits)."
    )
    n_layers = max(int(table.layer.max()) for table in (writers, readers)) + 1
    layout = Layout(columns=2, width=480, height=max(320, 16 * n_layers + 120))
    return Figure("Heads and MLPs", caption, (Frame("", tuple(panels)),), layout)


def _grid(table: pd.DataFrame, value: str, unit: str) -> HeatMap:
    rows = table[table.component != "embed"]
    if rows.empty:
        raise InputError(
            f"expected heads or MLPs with a {value}; the table has the embedding alone"
        )
    check_distinct(
        rows, ["layer", "head"], "give find_writers(...).table and find_readers(...).table"
    )
    n_heads = int(rows["head"].max()) + 1
    layers = sorted(set(rows.layer.astype(int)))
    at = {
        (int(layer), int(head) if head >= 0 else n_heads): float(number)
        for layer, head, number in zip(rows.layer, rows["head"], rows[value], strict=True)
    }
    z = tuple(
        tuple(at.get((layer, column), math.nan) for column in range(n_heads + 1))
        for layer in layers
    )
    labels = (*(f"H{head}" for head in range(n_heads)), "MLP")
    return HeatMap(labels, tuple(map(str, layers)), z, unit, "diverging")


def circuit_graph(edges: pd.DataFrame) -> Figure:
    """The largest edges of each model as a graph, from the embedding up to the logits.

    Takes the table of edges of `edge_table`; one frame a model. Raises `InputError` on another,
    and on a place or score that is not finite.

    Examples:
        >>> from steerlens.circuits import Intervention, compare_circuits, contrast_answers
        >>> from steerlens.circuits.edges import edge_table
        >>> answers = contrast_answers(model, pairs, n_tokens=3)
        >>> pushed = {"cheerful": Intervention(vector, 4)}
        >>> found = compare_circuits(model, pairs, answers, pushed, shares=[0.2], n_splits=2)
        >>> edges = edge_table(model, found.scores, n_edges=5)
        >>> sl.plots.circuit_graph(edges)
        Figure('The largest edges', 1 panels, 2 frames)
    """
    names = ["model", "writer", "writer_layer", "writer_head", "reader", "reader_layer", "score"]
    numbered = ["writer_layer", "writer_head", "reader_layer", "score"]
    check_columns(edges, names, "the table of edges", finite=numbered)
    width = int(edges.writer_head.max()) + 2
    frames = []
    for name, rows in edges.groupby("model", sort=False):
        panel = Panel(_graph(rows, width), Axis("", shown=False), Axis("layer"))
        frames.append(Frame(str(name), (panel,)))
    caption = (
        "The largest edges by attribution (logits), from the component that writes (named by layer "
        "and head) to what reads it: a layer's attention or MLP as a whole, or the logits. Orange "
        "supports the behaviour, blue and dashed works against it; width by size."
    )
    return Figure(
        "The largest edges", caption, tuple(frames), Layout(width=860, height=720, slider="model")
    )


def _graph(rows: pd.DataFrame, width: int) -> list[Mark]:
    places: dict[str, tuple[float, float]] = {}
    marks: list[Mark] = []
    reach = float(rows.score.abs().max()) or 1.0
    for row in rows.itertuples():
        places[str(row.writer)] = start = _writer_place(row, width)
        places[str(row.reader)] = end = _reader_place(row, width)
        score = float(str(row.score))
        is_for = score > 0
        marks.append(
            Line(
                (start[0], end[0]),
                (start[1], end[1]),
                name="supports" if is_for else "works against",
                color=ORANGE if is_for else BLUE,
                dash="solid" if is_for else "dash",
                width=0.5 + 4 * abs(score) / reach,
                hover=(f"{row.writer} to {row.reader}: {score:.4g}",) * 2,
            )
        )
    x, y = zip(*places.values(), strict=True)
    return [*marks, Points(numbers(x), numbers(y), color=GREY, size=8, labels=tuple(places))]


def _writer_place(row: Any, width: int) -> tuple[float, float]:
    layer, head = float(row.writer_layer), float(row.writer_head)
    if layer < 0:
        return (width - 1) / 2, layer
    return (float(width), layer + 0.5) if head < 0 else (head, layer)


def _reader_place(row: Any, width: int) -> tuple[float, float]:
    layer, kind = float(row.reader_layer), str(row.reader)
    if kind.startswith("mlp"):
        return float(width), layer + 0.5
    return (width - 1) / 2, layer + (0.5 if kind == "logits" else -0.15)
