"""What differs from layer to layer: the profile of the unsteered model, and the boundary."""

import math

import pandas as pd

from steerlens.plots.figure import Figure
from steerlens.plots.marks import (
    BLUE,
    GREY,
    ORANGE,
    Axis,
    Band,
    Frame,
    Layout,
    Line,
    Mark,
    Panel,
    Points,
    Rule,
)
from steerlens.plots.sweeps import RESIDUAL, by_kind, check_columns, numbers

_PROFILE = (
    ("separation", "Separation", RESIDUAL),
    ("agreement", "Agreement with the direction", "mean cosine"),
    ("explained_variance", "Explained variance", "share"),
    ("resid_norm", "Residual norm", RESIDUAL),
)


def layer_profile(layers: pd.DataFrame) -> Figure:
    """Separation, agreement, explained variance and residual norm of every layer, with intervals.

    Takes the per-layer table; one frame a kind of hook. Areas are 95% bootstrap intervals over
    pairs. Raises `InputError` when the table is not a per-layer table.

    Examples:
        >>> sl.plots.layer_profile(sl.measure_layers(model, pairs, directions))
        Figure('Layer by layer, unsteered', 4 panels)
    """
    ends = ("low", "high")
    intervals = [f"{name}_ci_{end}" for name, *_ in _PROFILE for end in ends]
    names = ["hook_name", "layer", *(name for name, *_ in _PROFILE), *intervals]
    check_columns(layers, names, "the per-layer table")
    caption = (
        "The unsteered model, layer by layer: mean length of the pairs' differences, their mean "
        "cosine with the frozen direction, the share of their squared length along it, and the "
        "mean length of the residual stream. Areas are 95% bootstrap intervals over pairs."
    )
    frames = tuple(Frame(kind, _profile(rows)) for kind, rows in by_kind(layers).items())
    layout = Layout(columns=2, width=480, height=300, slider="hook:")
    return Figure("Layer by layer, unsteered", caption, frames, layout)


def _profile(rows: pd.DataFrame) -> tuple[Panel, ...]:
    x = numbers(rows.layer)
    panels = []
    for name, title, unit in _PROFILE:
        low, high = (numbers(rows[f"{name}_ci_{end}"]) for end in ("low", "high"))
        marks: list[Mark] = [
            Band(x, low, high, BLUE),
            Line(x, numbers(rows[name]), color=BLUE),
            Points(x, numbers(rows[name]), color=BLUE, size=4),
        ]
        panels.append(Panel(marks, Axis("layer", whole=True), Axis(unit), title))
    return tuple(panels)


def boundary(layers: pd.DataFrame) -> Figure:
    """The coherence boundary of both signs over layers, measured and predicted.

    Takes the per-layer table of `find_boundary` or `predict_boundary`; one frame a kind of hook. On
    the left in residual units, on the right as a share of the layer's mean residual norm. Areas are
    95% bootstrap intervals; a boundary beyond the searched range is a triangle at the edge of the
    panel, a tenth beyond the largest that was found. Raises `InputError` when the table is not a
    per-layer table.

    Examples:
        >>> sl.plots.boundary(sl.predict_boundary(model, pairs, directions, budget="kl=0.1"))
        Figure('Coherence boundary', 2 panels)
    """
    signs = ("pos", "neg")
    names = [f"{part}boundary_{sign}" for part in ("", "predicted_") for sign in signs]
    names += [f"boundary_{sign}_ci_{end}" for sign in signs for end in ("low", "high")]
    needed = ["hook_name", "layer", "resid_norm", *names]
    check_columns(layers, needed, "the per-layer table of find_boundary")
    frames, is_cut = [], False
    for kind, rows in by_kind(layers).items():
        panels = []
        for unit, scale in ((RESIDUAL, 1.0), ("mean residual norms", rows.resid_norm)):
            shares = rows[names].div(scale, axis=0)
            edge = _edge(shares)
            is_cut |= bool((shares[names[2:]].abs() > edge).to_numpy().any())
            lines = _lines(numbers(rows.layer), shares, edge)
            panels.append(Panel(lines, Axis("layer", whole=True), Axis(f"boundary ({unit})")))
        frames.append(Frame(kind, tuple(panels)))
    text = str(layers.boundary_on.iloc[0]) if "boundary_on" in layers else "none"
    where = "" if text == "none" else f" on {text} text"
    caption = (
        f"The first coefficient of each sign, outward from 0, at which the budget is spent{where}: "
        "measured (line, with its 95% bootstrap interval) and predicted from gradients at 0 "
        "(dashed). A triangle is a boundary beyond the searched range."
    )
    if is_cut:
        caption += " Predictions beyond the panel are left out, intervals end at its edge."
    layout = Layout(columns=2, width=560, height=420, slider="hook:")
    return Figure("Coherence boundary", caption, tuple(frames), layout)


def _edge(table: pd.DataFrame) -> float:
    """A tenth beyond the largest boundary; beyond the largest prediction where none was found."""
    for part in ("", "predicted_"):
        values = [v for sign in ("pos", "neg") for v in numbers(table[f"{part}boundary_{sign}"])]
        if finite := [abs(value) for value in values if math.isfinite(value)]:
            return 1.1 * max(finite)
    return 1.1


def _lines(x: tuple[float, ...], table: pd.DataFrame, edge: float) -> list[Mark]:
    marks: list[Mark] = [Rule(0.0, "y", dash="solid")]
    for sign, name, color in (("pos", "outward, c > 0", ORANGE), ("neg", "inward, c < 0", BLUE)):
        at = numbers(table[f"boundary_{sign}"])
        low, high = (
            tuple(
                v if math.isnan(v) else max(-edge, min(edge, v))
                for v in numbers(table[f"boundary_{sign}_ci_{end}"])
            )
            for end in ("low", "high")
        )
        predicted = numbers(table[f"predicted_boundary_{sign}"])
        marks.append(Band(x, low, high, color))
        marks.append(Line(x, _only_finite(at), name, color))
        marks.append(Points(x, _only_finite(at), name, color, size=4))
        shown = tuple(v if abs(v) <= edge else math.nan for v in predicted)
        marks.append(Line(x, _only_finite(shown), f"predicted, {name}", color, dash="dash"))
        beyond = [layer for layer, value in zip(x, at, strict=True) if math.isinf(value)]
        marks.append(
            Points(
                tuple(beyond),
                tuple(edge if sign == "pos" else -edge for _ in beyond),
                "beyond the searched range" if beyond else "",
                GREY,
                symbol="triangle-up" if sign == "pos" else "triangle-down",
                size=8,
            )
        )
    return marks


def _only_finite(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(value if math.isfinite(value) else math.nan for value in values)
