"""Circuits to look at: one HTML page each, which opens without a network."""

import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.circuits.attribution import Intervention
from steerlens.circuits.components import Component, Prompts, components
from steerlens.circuits.graphs import Scores, largest, readers
from steerlens.directions import Directions
from steerlens.hooks import HookFunction, hook_layer, hooked
from steerlens.models import HookedModel, inference

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font-family: sans-serif; margin: 1.5rem; max-width: 75rem }}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


def attention_page(
    model: HookedModel,
    prompts: Prompts,
    intervention: Intervention,
    heads: Sequence[Component],
    *,
    prompt: int = 0,
) -> str:
    """Attention patterns of some heads on one prompt, unsteered and steered (circuitsvis)."""
    n_tokens = int(prompts.last[prompt]) + 1
    tokens = prompts.tokens[prompt : prompt + 1, :n_tokens]
    names = sorted({f"blocks.{head.layer}.attn.hook_pattern" for head in heads})
    words = _words(model, tokens[0].tolist())
    views = []
    for title, of in (("Unsteered", Intervention()), ("Steered", intervention)):
        patterns = _activations(model, tokens, names, of)
        shown = [patterns[f"blocks.{head.layer}.attn.hook_pattern"][0, head.head] for head in heads]
        props = {
            "tokens": words,
            "attention": [pattern.tolist() for pattern in shown],
            "headLabels": [str(head) for head in heads],
        }
        views.append((f"{title}: {', '.join(map(str, heads))}", "AttentionPatterns", props))
    return _circuitsvis_page("Attention of the top heads", views)


def tokens_page(
    model: HookedModel,
    prompts: Prompts,
    directions: Directions,
    intervention: Intervention,
    *,
    prompt: int = 0,
) -> str:
    """One prompt's tokens by their projection on each layer's direction, unsteered and steered.

    Residual units; a button a layer (circuitsvis).
    """
    n_tokens = int(prompts.last[prompt]) + 1
    tokens = prompts.tokens[prompt : prompt + 1, :n_tokens]
    names = list(directions)
    views = []
    for title, of in (("Unsteered", Intervention()), ("Steered", intervention)):
        found = _activations(model, tokens, names, of)
        values = torch.stack([found[name][0] @ directions[name].float() for name in names], dim=1)
        props = {
            "tokens": _words(model, tokens[0].tolist()),
            "values": values.tolist(),
            "labels": [f"layer {hook_layer(name)}" for name in names],
        }
        views.append((title, "ColoredTokensMulti", props))
    return _circuitsvis_page("Projection on the direction, token by token", views)


def heat_map_page(writers: pd.DataFrame, readers: pd.DataFrame) -> str:
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


def graph_page(model: HookedModel, scores: Mapping[str, Scores], *, n_edges: int = 40) -> str:
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


def _activations(
    model: HookedModel, tokens: Tensor, names: Sequence[str], intervention: Intervention
) -> dict[str, Float[Tensor, "..."]]:
    found: dict[str, Tensor] = {}

    def keeping(name: str) -> tuple[str, HookFunction]:
        def keep(activation: Tensor, hook: Any) -> None:  # noqa: ARG001
            found[name] = activation.float().cpu()

        return name, keep

    with inference(model), intervention.on(model), hooked(model, [keeping(n) for n in names]):
        model(tokens)
    return found


def _words(model: HookedModel, ids: Sequence[int]) -> list[str]:
    return [str(model.tokenizer.decode([token])) for token in ids]


def _circuitsvis_page(title: str, views: Sequence[tuple[str, str, Mapping[str, Any]]]) -> str:
    """Views of circuitsvis with the script that the package ships: its own loads from a CDN."""
    script = files("circuitsvis").joinpath("dist/cdn/iife.js").read_text(encoding="utf-8")
    body = ["<script>" + script.replace("</", "<\\/") + "</script>"]
    for number, (heading, element, props) in enumerate(views):
        # JSON inside a script: no token may end the element or begin another.
        given = json.dumps(props).replace("<", "\\u003c")
        body.append(
            f'<h2>{html.escape(heading)}</h2>\n<div id="view{number}"></div>\n'
            f'<script>CircuitsVis.render("view{number}", CircuitsVis.{element}, {given});</script>'
        )
    return _PAGE.format(title=html.escape(title), body="\n".join(body))


def _plotly_page(title: str, figures: Sequence[Any]) -> str:
    from plotly.io import to_html

    body = [
        to_html(figure, full_html=False, include_plotlyjs=number == 0)
        for number, figure in enumerate(figures)
    ]
    return _PAGE.format(title=html.escape(title), body="\n".join(body))
