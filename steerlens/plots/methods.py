"""Methods against each other at equal damage, with the band of vectors that know nothing."""

import numpy as np
import pandas as pd

from steerlens.errors import InputError
from steerlens.plots import style as vl
from steerlens.plots.checks import Tabular, by_hook, checked_table
from steerlens.plots.figure import Figure, make_figure

_CHOSEN = "chosen on training items"
_BAND = "95% of nulls"
_DRAWN = (
    *("method", "layer", "coefficient", "effect", "effect_ci_low", "effect_ci_high"),
    *("null_low", "null_high", "verdict"),
)
_COLOURS = {"effect or reversed": vl.ORANGE, "not shown": vl.BLUE}


def comparison(table: Tabular) -> Figure:
    """The effect of every method at equal damage with its interval, and the range of nulls.

    Takes what `compare` gave, or its table. One frame shows each method at its layer chosen on
    training items (where there were some), the others one hook each. Filled points are those whose
    verdict is an effect, or an effect the other way (reversed). Raises `InputError` when the table
    is not a comparison, or an effect is infinite.

    Examples:
        >>> neutral = ["the river was so cold", "it was warm", "I felt the rain", "what a night"]
        >>> found = sl.compare(
        ...     model, pairs, items, methods=["mean_diff", "pca"], layers=[1], neutral=neutral,
        ...     n_null=2, n_bootstrap=50,
        ... )
        >>> sl.plots.comparison(found)  # or found.plot()
        Figure('Methods at equal damage', 1 panels)
    """
    effects = ["effect", "effect_ci_low", "effect_ci_high"]
    needed = ["hook_name", "is_chosen", *_DRAWN]
    finite = ["layer", "is_chosen"]
    table = checked_table(table, needed, "the table of a comparison", of="table", finite=finite)
    if np.isinf(table[effects].to_numpy(dtype=float)).any():
        raise InputError("expected a comparison; an effect or its interval is infinite")
    # The largest effect on top; a method without an effect has its row too, at the bottom.
    order = {"field": "place", "op": "min", "order": "descending"}
    axes = {
        "y": vl.text("method", title=None, sort=order),
        "color": vl.named("shown", {**_COLOURS, _BAND: vl.PALE}),
    }
    title = f"effect ({vl.NATS})"
    band, interval = (
        vl.span("x", f"{name}_low", f"{name}_high", title) for name in ("null", "effect_ci")
    )
    effect = {
        "x": vl.number("effect", title),
        "fill": vl.choose(f"datum.shown === '{next(iter(_COLOURS))}'", vl.ORANGE, "white"),
        "tooltip": vl.tooltip("method", "layer", "verdict", numbers=["coefficient", *effects]),
    }
    layers = [
        vl.layer("methods", "rule", {"y": axes["y"]} | band, strokeWidth=7, color=vl.PALE),
        vl.layer("methods", "rule", axes | interval, strokeWidth=1.2),
        vl.layer("methods", "point", axes | effect, size=70, strokeWidth=1.6),
    ]
    drawn = vl.panel(layers, size=(560, 26 * table.method.nunique()))
    caption = (
        "Mean change of logprob(positive continuation) - logprob(negative one) on held-out items "
        "(nats per token), every method at the coefficient that spends the same budget; bars are "
        "95% intervals over groups of items (and over refits on groups of pairs, where the table "
        "says so). Grey: "
        "where 95% of random and of shuffled vectors at the same budget lie. Filled points are "
        "effects, or effects the other way, by the rank among the nulls at the best layer (p below "
        "0.05)."
    )
    tables = {"methods": comparison_rows(table)}
    return make_figure("Methods at equal damage", caption, tables, [drawn], slider="shown:")


def comparison_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Rows by frame, chosen layers first, with the baseline; `place` 0 is the smallest effect."""
    baseline = table[table.layer < 0]
    chosen = table[table.is_chosen.astype(bool)]
    steered = table[table.layer >= 0].sort_values("layer", kind="stable")
    frames = {_CHOSEN: chosen} if not chosen.empty else {}
    frames |= {
        f"layer {label}" if label.isdigit() else label: rows
        for label, rows in by_hook(steered).items()
    }
    framed = []
    for label, rows in (frames or {"baseline": baseline[:0]}).items():
        ordered = pd.concat([rows, baseline]).sort_values("effect", na_position="first")
        framed.append(ordered.assign(frame=label, place=range(len(ordered))))
    rows = pd.concat(framed)
    effect, none = _COLOURS
    return rows.assign(shown=np.where(rows.verdict.isin(["effect", "reversed"]), effect, none))[
        ["frame", "place", "shown", *_DRAWN]
    ]
