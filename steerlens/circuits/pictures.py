"""Circuits to look at: one HTML page each, which opens without a network."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from steerlens.circuits.components import Component, components
from steerlens.circuits.graphs import Scores, largest, readers
from steerlens.models import HookedModel
from steerlens.plots.pages import Page
from steerlens.plots.scripts import page


def heat_map_page(writers: pd.DataFrame, readers: pd.DataFrame) -> Page:
    """Contributions to the direction and effects on the answer, by layer and head (plotly).

    The last column of each map is the MLP.
    """
    from plotly.subplots import make_subplots

    titles = (
        "Who writes the direction (residual units)",
        "Who reads it (logits, estimated effect)",
    )
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.15)
    for column, (table, value) in enumerate(
        ((writers, "contribution"), (readers, "effect")), start=1
    ):
        figure.add_trace(_heat_map(table, value, 0.43 if column == 1 else 1.02), row=1, col=column)
        figure.update_yaxes(title_text="layer", row=1, col=column)
    figure.update_layout(height=700, template="plotly_white")
    return _plotly_page("Heads and MLPs", [figure])


def graph_page(model: HookedModel, scores: Mapping[str, Scores], *, n_edges: int = 40) -> Page:
    """The largest edges of each model as a graph, from the embedding up to the logits (plotly)."""
    return _plotly_page(
        f"The {n_edges} largest edges",
        [_graph(model, of, name, n_edges) for name, of in scores.items()],
    )


def _heat_map(table: pd.DataFrame, value: str, bar: float) -> Any:
    import plotly.graph_objects as go

    rows = table[table.component != "embed"]
    n_heads = int(rows["head"].max()) + 1
    place = rows["head"].where(rows["head"] >= 0, n_heads)
    grid = rows.assign(place=place).pivot(index="layer", columns="place", values=value)
    labels = [*(f"H{head}" for head in range(n_heads)), "MLP"]
    reach = float(rows[value].abs().max())
    return go.Heatmap(
        z=grid.to_numpy(),
        x=[labels[int(column)] for column in grid.columns],
        y=[int(layer) for layer in grid.index],
        colorscale="RdBu_r",
        zmin=-reach,
        zmax=reach,
        colorbar={"x": bar, "thickness": 12},
        hovertemplate="layer %{y}, %{x}: %{z:.4g}<extra></extra>",
    )


def _graph(model: HookedModel, scores: Scores, name: str, n_edges: int) -> Any:
    import plotly.graph_objects as go

    mean = scores.edges.mean(dim=-1)
    chosen = largest(mean, n_edges, scores.is_edge)
    parts, seen = components(model), readers(model)
    n_heads = int(model.cfg.n_heads)
    places: dict[str, tuple[float, float]] = {}

    def place(part: Component) -> str:
        label = str(part)
        x = (
            n_heads / 2
            if part.kind == "embed"
            else float(n_heads + 1 if part.head < 0 else part.head)
        )
        places[label] = (x, part.layer + (0.5 if part.kind == "mlp" else 0.0))
        return label

    traces = []
    reach = float(mean[chosen].abs().max())
    for i, j in chosen.nonzero().tolist():
        start = place(parts[i])
        reader = seen[j]
        if reader.kind == "mlp":
            end = place(Component(reader.layer))
        else:
            end = str(reader)
            places[end] = (n_heads / 2, reader.layer - (0.15 if reader.kind == "attn" else -0.5))
        score = float(mean[i, j])
        (x0, y0), (x1, y1) = places[start], places[end]
        traces.append(
            go.Scatter(
                x=[x0, x1],
                y=[y0, y1],
                mode="lines",
                line={
                    "width": 0.5 + 4 * abs(score) / reach,
                    "color": "#b2182b" if score > 0 else "#2166ac",
                },
                hoverinfo="text",
                text=f"{start} to {end}: {score:.4g}",
                showlegend=False,
            )
        )
    labels = list(places)
    traces.append(
        go.Scatter(
            x=[places[label][0] for label in labels],
            y=[places[label][1] for label in labels],
            mode="markers+text",
            text=labels,
            textposition="top center",
            marker={"size": 9, "color": "#444"},
            showlegend=False,
        )
    )
    figure = go.Figure(traces)
    figure.update_layout(
        title=html.escape(f"{name} (logits; red supports the behaviour, blue works against it)"),
        height=800,
        template="plotly_white",
        xaxis={"visible": False},
        yaxis={"title": "layer"},
    )
    return figure


def _plotly_page(title: str, figures: Sequence[Any]) -> Page:
    from plotly.io import to_html

    body = [
        to_html(figure, full_html=False, include_plotlyjs=number == 0)
        for number, figure in enumerate(figures)
    ]
    return Page(title, page(title, "\n".join(body)))
