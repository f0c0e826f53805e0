"""Methods against each other at equal damage, with the band of vectors that know nothing."""

import numpy as np
import pandas as pd

from steerlens.errors import InputError
from steerlens.plots.checks import Tabular, by_hook, check_columns, table_of
from steerlens.plots.figure import Figure, make_figure
from steerlens.plots.style import (
    BLUE,
    NATS,
    ORANGE,
    PALE,
    choose,
    layer,
    named,
    number,
    panel,
    text,
    tooltip,
)

_CHOSEN = "chosen on training items"
_BAND = "95% of nulls"
_DRAWN = (
    *("method", "layer", "coefficient", "effect", "effect_ci_low", "effect_ci_high"),
    *("null_low", "null_high", "verdict"),
)
_COLOURS = {"effect or reversed": ORANGE, "not shown": BLUE}


def comparison(table: Tabular) -> Figure:
    """The effect of every method at equal damage with its interval, and the range of nulls.

    Takes what `compare` gave, or its table. One frame shows each method at its layer chosen on
    training items (where there were some), the others one hook each. Filled points are those whose
    verdict is an effect, or an effect the other way (reversed). Raises `InputError` when the table
    is not a comparison, or an effect is infinite.

    Examples:
        >>> found = sl.compare(
        ...     model,
        ...     pairs,
        ...     items,
        ...     methods=["mean_diff", "pca"],
        ...     layers=[1],
        ...     neutral=["the river was so cold", "it was warm", "I felt the rain", "what a night"],
        ...     n_null=2,
        ...     n_bootstrap=50,
        ... )
        >>> sl.plots.comparison(found)  # or found.plot()
        Figure('Methods at equal damage', 1 panels)
    """
    table = table_of(table, "table")
    effects = ["effect", "effect_ci_low", "effect_ci_high"]
    needed = ["hook_name", "is_chosen", *_DRAWN]
    check_columns(table, needed, "the table of a comparison", finite=["layer", "is_chosen"])
    if np.isinf(table[effects].to_numpy(dtype=float)).any():
        raise InputError("expected a comparison; an effect or its interval is infinite")
    # The largest effect on top; a method without an effect has its row too, at the bottom.
    order = {"field": "place", "op": "min", "order": "descending"}
    axes = {
        "y": text("method", title=None, sort=order),
        "color": named("shown", {**_COLOURS, _BAND: PALE}),
    }
    title = f"effect ({NATS})"
    band, interval = (
        {"x": number(f"{name}_low", title), "x2": {"field": f"{name}_high"}}
        for name in ("null", "effect_ci")
    )
    effect = {
        "x": number("effect", title),
        "fill": choose(f"datum.shown === '{next(iter(_COLOURS))}'", ORANGE, "white"),
        "tooltip": tooltip("method", "layer", "verdict", numbers=["coefficient", *effects]),
    }
    layers = [
        layer(
            "methods", {"type": "rule", "strokeWidth": 7, "color": PALE}, {"y": axes["y"]} | band
        ),
        layer("methods", {"type": "rule", "strokeWidth": 1.2}, axes | interval),
        layer("methods", {"type": "point", "size": 70, "strokeWidth": 1.6}, axes | effect),
    ]
    drawn = panel(layers, size=(560, 26 * table.method.nunique()))
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
    """The table's rows by frame: the chosen layers first, then every hook, with the baseline.

    `place` counts a frame's rows from the smallest effect up, `shown` says whether there is one.
    """
    baseline = table[table.layer < 0]
    chosen = table[table.is_chosen.astype(bool)]
    steered = table[table.layer >= 0].sort_values("layer", kind="stable")
    frames = {_CHOSEN: chosen} if not chosen.empty else {}
    frames |= {f"layer {label}": rows for label, rows in by_hook(steered).items()}
    framed = []
    for label, rows in (frames or {"baseline": baseline[:0]}).items():
        ordered = pd.concat([rows, baseline]).sort_values("effect", na_position="first")
        framed.append(ordered.assign(frame=label, place=range(len(ordered))))
    rows = pd.concat(framed)
    effect, none = _COLOURS
    return rows.assign(shown=np.where(rows.verdict.isin(["effect", "reversed"]), effect, none))[
        ["frame", "place", "shown", *_DRAWN]
    ]
