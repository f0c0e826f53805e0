"""What differs from layer to layer: the profile of the unsteered model, and the boundary."""

import numpy as np
import pandas as pd

from steerlens.plots import style as vl
from steerlens.plots.checks import Tabular, by_kind, checked_table
from steerlens.plots.figure import Figure, make_figure

_LAYER = vl.number(
    "layer",
    "layer",
    axis={"tickMinStep": 1, "format": "d"},
    scale={"zero": False, "nice": False, "padding": 8},
)

_SIGNS = {"outward, c > 0": "pos", "inward, c < 0": "neg"}
_ENDS = ("low", "high")
_PROFILE = (
    ("separation", "Separation", vl.RESIDUAL),
    ("agreement", "Agreement with the direction", "mean cosine"),
    ("explained_variance", "Explained variance", "share"),
    ("resid_norm", "Residual norm", vl.RESIDUAL),
)


def layer_profile(layers: Tabular) -> Figure:
    """Separation, agreement, explained variance and residual norm of every layer, with intervals.

    Takes the per-layer table, or a result or study that has it; one frame a kind of hook. Areas
    are 95% intervals over groups of pairs. Raises `InputError` when the table is not a per-layer
    table.

    Examples:
        >>> sl.plots.layer_profile(sl.Study(model, pairs, directions))
        Figure('Layer by layer, unsteered', 4 panels)
    """
    intervals = [f"{name}_ci_{end}" for name, *_ in _PROFILE for end in _ENDS]
    names = ["hook_name", "layer", *(name for name, *_ in _PROFILE), *intervals]
    layers = checked_table(layers, names, "the per-layer table", of="layers")
    caption = (
        "The unsteered model, layer by layer: mean length of the pairs' differences, their mean "
        "cosine with the frozen direction, the share of their squared length along it, and the "
        "mean length of the residual stream. Areas are 95% intervals over groups of pairs."
    )
    rows = pd.concat(of_kind.assign(frame=kind) for kind, of_kind in by_kind(layers).items())
    panels = []
    for name, title, unit in _PROFILE:
        y: vl.Spec = {"title": unit, "scale": {"zero": False}}
        ends = vl.span("y", f"{name}_ci_low", f"{name}_ci_high", **y)
        value = {"y": vl.number(name, **y), "tooltip": vl.tooltip(numbers=["layer", name])}
        curves = [
            vl.layer("layers", "area", {"x": _LAYER} | ends, color=vl.BLUE, fillOpacity=0.18),
            vl.layer("layers", "line", {"x": _LAYER} | value, color=vl.BLUE, point={"size": 20}),
        ]
        panels.append(vl.panel(curves, title=title, size=(380, 200), zoom=f"zoom_{name}"))
    tables = {"layers": rows[["frame", *names[1:]]]}
    return make_figure(
        "Layer by layer, unsteered", caption, tables, panels, columns=2, slider="hook:"
    )


def boundary(layers: Tabular) -> Figure:
    """The coherence boundary of both signs over layers, measured and predicted.

    Takes what `find_boundary` gave, or the per-layer table of that or `predict_boundary`; one frame
    a kind of hook. On the left in residual units, on the right as a share of the layer's mean
    residual norm. Areas are 95% intervals; a boundary beyond the searched range is a triangle at
    the edge of the panel, a tenth beyond the largest that was found. Raises `InputError` when the
    table is not a per-layer table.

    Examples:
        >>> study = sl.Study(model, pairs, directions, budget="kl=0.1")
        >>> sl.plots.boundary(study.predicted_boundary())
        Figure('Coherence boundary', 2 panels)
    """
    signs = ("pos", "neg")
    names = [f"{part}boundary_{sign}" for part in ("", "predicted_") for sign in signs]
    names += [f"boundary_{sign}_ci_{end}" for sign in signs for end in _ENDS]
    needed = ["hook_name", "layer", "resid_norm", *names]
    kind = "the per-layer table of find_boundary"
    layers = checked_table(layers, needed, kind, of="layers")
    panels, tables = [], {}
    for name, unit, scale in (
        ("units", vl.RESIDUAL, np.ones(len(layers))),
        ("shares", "mean residual norms", layers.resid_norm),
    ):
        shares = layers.assign(**layers[names].div(scale, axis=0))
        tables[name] = pd.concat(
            boundary_rows(rows, kind) for kind, rows in by_kind(shares).items()
        )
        panels.append(_boundary_panel(name, unit))
    text = str(layers.boundary_on.iloc[0]) if "boundary_on" in layers else "none"
    where = "" if text == "none" else f" on {text} text"
    caption = (
        "The first coefficient of each sign, outward from 0, at which the budget is spent"
        f"{where}: measured (line, with its 95% interval) and predicted from gradients "
        "at 0 (dashed). A triangle is a boundary beyond the searched range."
    )
    if any(rows.is_cut.any() for rows in tables.values()):
        caption += " Predictions beyond the panel are left out, intervals end at its edge."
    return make_figure(
        "Coherence boundary",
        caption,
        tables,
        panels,
        columns=2,
        slider="hook:",
        is_one_legend=True,
    )


def boundary_rows(layers: pd.DataFrame, frame: str) -> pd.DataFrame:
    """A row for each layer, sign and way to know the boundary (measured, predicted).

    The panel's edge is a tenth beyond the largest boundary, or prediction where none was found:
    predictions beyond it are left out, intervals end there; `beyond` is where a triangle stands.
    """
    edge = _edge(layers)
    rows = []
    for name, sign in _SIGNS.items():
        measured = layers[f"boundary_{sign}"].to_numpy(dtype=float)
        predicted = layers[f"predicted_boundary_{sign}"].to_numpy(dtype=float)
        low, high = (layers[f"boundary_{sign}_ci_{end}"].to_numpy(dtype=float) for end in _ENDS)
        place = {"frame": frame, "layer": layers.layer.to_numpy(), "sign": name}
        rows.append(
            {
                **place,
                "kind": "measured",
                "boundary": np.where(np.isfinite(measured), measured, np.nan),
                "low": np.clip(low, -edge, edge),
                "high": np.clip(high, -edge, edge),
                "beyond": np.where(np.isinf(measured), edge if sign == "pos" else -edge, np.nan),
                "is_cut": (np.abs(low) > edge) | (np.abs(high) > edge),
            }
        )
        is_far = np.abs(predicted) > edge
        shown = np.where(is_far | ~np.isfinite(predicted), np.nan, predicted)
        rows.append({**place, "kind": "predicted", "boundary": shown, "is_cut": is_far})
    return pd.concat(pd.DataFrame(columns) for columns in rows)


def _edge(layers: pd.DataFrame) -> float:
    for kind in ("", "predicted_"):
        names = [f"{kind}boundary_{sign}" for sign in _SIGNS.values()]
        sizes = np.abs(layers[names].to_numpy(dtype=float))
        if np.isfinite(sizes).any():
            return 1.1 * float(sizes[np.isfinite(sizes)].max())
    return 1.1


def _boundary_panel(data: str, unit: str) -> vl.Spec:
    axes = {
        "x": _LAYER,
        "y": vl.number("boundary", f"boundary ({unit})"),
        "color": vl.named("sign", dict(zip(_SIGNS, (vl.ORANGE, vl.BLUE), strict=True))),
    }
    dash = vl.named("kind", {"measured": vl.SOLID, "predicted": vl.DASHED})
    shown = {"tooltip": vl.tooltip("sign", numbers=["layer", "boundary", "low", "high"])}
    is_measured = "datum.kind === 'measured'"
    triangles = {
        "x": _LAYER,
        "y": vl.number("beyond"),
        "shape": vl.choose("datum.beyond > 0", "triangle-up", "triangle-down"),
        "tooltip": vl.tooltip("sign", numbers=["layer"]),
    }
    ends = vl.span("y", "low", "high", axes["y"]["title"])
    known = "isValid(datum.beyond)"
    return vl.panel(
        [
            vl.zero_line("y", dash=vl.SOLID),
            vl.layer(data, "area", axes | ends, where=is_measured, fillOpacity=0.18),
            vl.layer(data, "line", axes | {"strokeDash": dash}),
            vl.layer(data, "point", triangles, where=known, filled=True, size=60, color=vl.GREY),
            vl.layer(data, "point", axes | shown, where=is_measured, filled=True, size=25),
        ],
        size=(420, 320),
        zoom=f"zoom_{data}",
    )
