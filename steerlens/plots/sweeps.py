"""What a sweep measured: projection against damage, layer by coefficient, dose and response."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from steerlens.errors import InputError
from steerlens.models.weight_processing import check_same, processing_of
from steerlens.plots.figure import Figure
from steerlens.plots.marks import (
    GREY,
    ORANGE,
    Axis,
    Band,
    Frame,
    HeatMap,
    Layout,
    Line,
    Mark,
    Panel,
    Points,
    Rule,
    Scale,
)
from steerlens.tables import hook_label

RESIDUAL = "residual units"
TEXTS = (
    *("hook_name", "readout_hook", "pair", "prompt", "side", "token", "raw_token"),
    *("method", "verdict", "component", "model", "writer", "reader"),
)
"""Columns of text; the others of a figure's tables are numbers."""
NATS = "nats per token"


def check_columns(
    table: pd.DataFrame, names: Sequence[str], what: str, *, finite: Sequence[str] = ()
) -> None:
    """Raise `InputError` when a table lacks columns or rows, or has text where numbers belong.

    `what` says which table it should be; the columns in `finite` may hold neither NaN nor inf.
    """
    given: Any = table  # what the annotation promises is what is checked here
    if not isinstance(given, pd.DataFrame):
        raise InputError(
            f"expected {what}, a DataFrame such as result.table, got {type(given).__name__}"
        )
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise InputError(f"expected {what}; this table has no column {', '.join(missing)}")
    if table.empty:
        raise InputError(f"expected {what}; this table has no rows")
    texts = [n for n in names if n not in TEXTS and not is_numeric_dtype(table[n])]
    if texts:
        raise InputError(f"expected {what}; {', '.join(texts)} hold text, not numbers")
    for name in finite:
        if not np.isfinite(table[name].to_numpy(dtype=float)).all():
            raise InputError(f"expected {what}; {name} holds values that are not finite")


def check_distinct(table: pd.DataFrame, names: Sequence[str], what: str) -> None:
    """Raise `InputError` when two rows have the same values there; `what` is the remedy."""
    repeated = table[table.duplicated(list(names))]
    if not repeated.empty:
        row = ", ".join(f"{name} {repeated[name].iloc[0]}" for name in names)
        raise InputError(f"expected one row for {row}, got several; {what}")


def by_hook(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Label of each hook -> its rows, in the table's order."""
    return {hook_label(str(name)): rows for name, rows in table.groupby("hook_name", sort=False)}


def by_kind(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Kind of hook (its name after the block's) -> its rows, from the first layer to the last."""
    kinds = table.hook_name.astype(str).str.replace(r"^blocks\.\d+\.", "", regex=True)
    rows = table.sort_values("layer", kind="stable")
    return {str(kind): of for kind, of in rows.groupby(kinds, sort=False)}


def ramp(n: int) -> list[str]:
    """`n` colours from dark blue to yellow-green, even in lightness: for layers in their order."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    # The map's last tenth is too pale for a line on white.
    return [to_hex(colormaps["viridis"](0.9 * i / max(1, n - 1))) for i in range(n)]


def numbers(values: object) -> tuple[float, ...]:
    """A table's column, or any array, as a tuple of floats."""
    return tuple(float(value) for value in np.asarray(values, dtype=np.float64))


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
    curves = by_hook(sweep)
    marks: list[Mark] = [Rule(0.0, "x")]
    for (label, rows), color in zip(curves.items(), ramp(len(curves)), strict=True):
        rows = rows.sort_values("coefficient")
        rows = rows[rows.projection.notna() & rows.degradation_nats.notna()]
        hover = tuple(
            f"layer {label}, coefficient {c:g}\nprojection {p:.4g}, degradation {d:+.4f}"
            for c, p, d in rows[["coefficient", "projection", "degradation_nats"]].to_numpy()
        )
        x, y = numbers(rows.degradation_nats), numbers(rows.projection)
        marks.append(Line(x, y, name=f"layer {label}", color=color, hover=hover))
        for is_coherent, symbol in ((True, "circle"), (False, "circle-open")):
            kept = np.flatnonzero(rows.coherent.to_numpy(dtype=bool) == is_coherent)
            marks.append(
                Points(
                    tuple(x[i] for i in kept),
                    tuple(y[i] for i in kept),
                    name=f"layer {label}",
                    color=color,
                    symbol="circle" if symbol == "circle" else "circle-open",
                    hover=tuple(hover[i] for i in kept),
                )
            )
    if layers is not None:
        _check_layers(layers)
        check_same(
            "the sweep is of a model",
            processing_of(sweep.attrs),
            "that of the per-layer table",
            processing_of(layers.attrs),
        )
        marks.append(_boundaries(curves, layers))
    panel = Panel(
        marks,
        Axis(f"degradation ({NATS}; right is worse)"),
        Axis(f"projection at the readout ({RESIDUAL})"),
    )
    caption = (
        "Each curve is one layer, from the lowest coefficient to the highest: mean projection of "
        "the pairs' differences at the readout hook (residual units) against the loss of logprob "
        "of the positive prompts' labels (nats per token). Open circles are beyond the budget."
    )
    if layers is not None:
        caption += " Diamonds: the measured coherence boundary of each sign."
    return Figure("Projection against degradation", caption, (Frame("", (panel,)),), _wide())


def _check_layers(layers: pd.DataFrame) -> None:
    names = ["hook_name", "layer", "boundary_pos", "boundary_neg"]
    check_columns(layers, names, "the per-layer table")


def _boundaries(curves: dict[str, pd.DataFrame], layers: pd.DataFrame) -> Points:
    x, y, hover = [], [], []
    for label, rows in by_hook(layers).items():
        if label not in curves:
            continue
        cells = curves[label].sort_values("coefficient")
        reach = numbers(cells.coefficient)
        for at in (float(rows.boundary_neg.iloc[0]), float(rows.boundary_pos.iloc[0])):
            if not (math.isfinite(at) and reach[0] <= at <= reach[-1]):
                continue
            x.append(float(np.interp(at, reach, numbers(cells.degradation_nats))))
            y.append(float(np.interp(at, reach, numbers(cells.projection))))
            hover.append(f"layer {label}: boundary at {at:.4g}")
    return Points(
        tuple(x), tuple(y), "boundary", ORANGE, symbol="diamond", size=9, hover=tuple(hover)
    )


def heat_maps(sweep: pd.DataFrame) -> Figure:
    """Layer by coefficient: projection, degradation and loss of every cell.

    Takes the table of a sweep. Crosses are cells beyond the budget. Colours of degradation and loss
    stop at the 95th percentile of their size, so that a few broken cells do not bleach all others.
    Raises `InputError` when the table is not that of a sweep, or has two rows of one cell.

    Examples:
        >>> result = sl.sweep(model, pairs, directions, layers=[1, 2], coefficients=[-4, 0, 4])
        >>> sl.plots.heat_maps(result.table)
        Figure('Every cell', 3 panels)
    """
    shown: tuple[tuple[str, str, str, Scale], ...] = (
        ("projection", "Projection", RESIDUAL, "sequential"),
        ("degradation_nats", "Degradation", NATS, "diverging"),
        ("loss", "Loss", "reference form", "sequential"),
    )
    columns = ["hook_name", "layer", "coefficient", "coherent", *(name for name, *_ in shown)]
    check_columns(sweep, columns, "the table of a sweep")
    check_distinct(sweep, ["hook_name", "coefficient"], "give the table of one sweep")
    curves = by_hook(sweep)
    coefficients = sorted(set(numbers(sweep.coefficient)))
    named = _labels(coefficients)
    x, y = tuple(named.values()), tuple(curves)
    beyond = [
        (named[coefficient], label)
        for label, rows in curves.items()
        for coefficient, is_coherent in zip(numbers(rows.coefficient), rows.coherent, strict=True)
        if not is_coherent
    ]
    panels = []
    for name, title, unit, scale in shown:
        z = tuple(_row_of(rows, coefficients, name) for rows in curves.values())
        values = np.abs([v for row in z for v in row if math.isfinite(v)] or [0.0])
        cut = float(np.quantile(values, 0.95)) or float(values.max())
        low = min((v for row in z for v in row if math.isfinite(v)), default=0.0)
        reach = {"degradation_nats": (-cut, cut), "loss": (min(low, cut), cut)}.get(name)
        crosses = Points(
            tuple(c for c, _ in beyond), tuple(r for _, r in beyond), color=GREY, symbol="x", size=5
        )
        marks: list[Mark] = [HeatMap(x, y, z, unit, scale, reach)]
        panels.append(
            Panel(
                [*marks, crosses] if beyond else marks,
                Axis(f"coefficient ({RESIDUAL})"),
                Axis("layer"),
                title,
            )
        )
    caption = (
        "Every cell of the sweep: mean projection at the readout hook (residual units), loss of "
        "logprob (nats per token; positive is worse) and the loss in its reference form. A cross "
        "marks a cell beyond the budget; colours stop at the 95th percentile of degradation and "
        "loss. Undefined cells are empty."
    )
    height = max(360, 12 * len(y) + 160)
    layout = Layout(columns=3, width=400, height=height)
    return Figure("Every cell", caption, (Frame("", tuple(panels)),), layout)


def _labels(coefficients: Sequence[float]) -> dict[float, str]:
    """Each coefficient as text: six digits, or all of them where six tell some not apart."""
    short = {c: f"{c:g}" for c in coefficients}
    return short if len(set(short.values())) == len(short) else {c: repr(c) for c in coefficients}


def _row_of(rows: pd.DataFrame, coefficients: Sequence[float], name: str) -> tuple[float, ...]:
    at = dict(zip(numbers(rows.coefficient), numbers(rows[name]), strict=True))
    return tuple(at.get(c, math.nan) for c in coefficients)


def dose_response(sweep: pd.DataFrame) -> Figure:
    """Projection and degradation against the coefficient, with intervals, one curve a layer.

    Takes the table of a sweep. Intervals are its 95% bootstrap intervals over pairs. Raises
    `InputError` when the table is not that of a sweep.

    Examples:
        >>> result = sl.sweep(model, pairs, directions, layers=[1, 2], coefficients=[-4, 0, 4])
        >>> sl.plots.dose_response(result.table)
        Figure('Dose and response', 2 panels)
    """
    parts = (
        ("projection", "projection", f"projection at the readout ({RESIDUAL})"),
        ("degradation_nats", "degradation", f"degradation ({NATS})"),
    )
    intervals = [f"{name}_ci_{end}" for _, name, _ in parts for end in ("low", "high")]
    columns = ["hook_name", "layer", "coefficient", *(name for name, *_ in parts), *intervals]
    check_columns(sweep, columns, "the table of a sweep")
    curves = by_hook(sweep)
    panels = []
    for column, name, title in parts:
        marks: list[Mark] = [Rule(0.0, "x")]
        for (label, rows), color in zip(curves.items(), ramp(len(curves)), strict=True):
            rows = rows.sort_values("coefficient")
            x = numbers(rows.coefficient)
            low, high = (numbers(rows[f"{name}_ci_{end}"]) for end in ("low", "high"))
            shown = f"layer {label}"
            marks.append(Band(x, low, high, color, shown))
            marks.append(Line(x, numbers(rows[column]), shown, color))
        panels.append(Panel(marks, Axis(f"coefficient ({RESIDUAL})"), Axis(title)))
    caption = (
        "Mean projection at the readout hook (residual units) and loss of logprob (nats per token) "
        "at every coefficient, one curve a layer; areas are 95% bootstrap intervals over pairs."
    )
    layout = Layout(columns=2, width=560, height=420)
    return Figure("Dose and response", caption, (Frame("", tuple(panels)),), layout)


def _wide() -> Layout:
    return Layout(width=860, height=520)
