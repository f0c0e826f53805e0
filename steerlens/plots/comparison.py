"""Methods against each other at equal damage, with the band of vectors that know nothing."""

import math

import numpy as np
import pandas as pd

from steerlens.errors import InputError
from steerlens.plots.figure import Figure
from steerlens.plots.marks import BLUE, GREY, ORANGE, PALE, Axis, Frame, Layout, Mark, Panel, Points
from steerlens.plots.sweeps import NATS, by_hook, check_columns, numbers

_CHOSEN = "chosen on training items"
_SHOWN = ("effect", "reversed")


def comparison(table: pd.DataFrame) -> Figure:
    """The effect of every method at equal damage with its interval, and the null band.

    Takes the table of `compare`. One frame shows each method at its layer chosen on training items
    (where there were some), the others one hook each. Filled points are effects, or effects the
    other way (reversed), outside the null band with a corrected p-value below 0.05. Raises
    `InputError` when the table is not a comparison, or an effect is infinite.

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
        >>> sl.plots.comparison(found.table)
        Figure('Methods at equal damage', 1 panels)
    """
    effects = ["effect", "effect_ci_low", "effect_ci_high"]
    needed = ["method", "hook_name", "layer", *effects, "null_low", "null_high", "is_chosen"]
    needed += ["verdict", "coefficient"]
    check_columns(table, needed, "the table of a comparison", finite=["layer", "is_chosen"])
    if np.isinf(table[effects].to_numpy(dtype=float)).any():
        raise InputError(
            "expected the table of a comparison; an effect or its interval is infinite"
        )
    baseline = table[table.layer < 0]
    frames = []
    chosen = table[table.is_chosen.astype(bool)]
    if not chosen.empty:
        frames.append(Frame(_CHOSEN, (_panel(pd.concat([chosen, baseline])),)))
    steered = table[table.layer >= 0].sort_values("layer", kind="stable")
    for label, rows in by_hook(steered).items():
        frames.append(Frame(f"layer {label}", (_panel(pd.concat([rows, baseline])),)))
    if not frames:
        frames.append(Frame("baseline", (_panel(baseline),)))
    caption = (
        "Mean change of logprob(positive continuation) - logprob(negative one) on held-out items "
        "(nats per token), every method at the coefficient that spends the same budget; bars are "
        "95% bootstrap intervals over items. Grey: where 95% of random and shuffled vectors at the "
        "same budget lie. Filled points are effects, or effects the other way (outside the band, "
        "corrected p below 0.05)."
    )
    height = 130 + 26 * table.method.nunique()
    layout = Layout(width=860, height=height, slider="shown:")
    return Figure("Methods at equal damage", caption, tuple(frames), layout)


def _panel(rows: pd.DataFrame) -> Panel:
    rows = rows.sort_values("effect", na_position="first")
    names = tuple(str(name) for name in rows.method)
    marks: list[Mark] = [
        # Every method has its row, also one without an effect.
        Points(tuple(0.0 for _ in names), names, color=GREY, size=1),
    ]
    bands = list(zip(names, numbers(rows.null_low), numbers(rows.null_high), strict=True))
    known = [(name, low, high) for name, low, high in bands if math.isfinite(low + high)]
    if known:
        middle = tuple((low + high) / 2 for _, low, high in known)
        marks.append(
            Points(
                middle,
                tuple(name for name, *_ in known),
                "null band (95%)",
                PALE,
                symbol="circle-open",
                size=1,
                low=tuple(low for _, low, _ in known),
                high=tuple(high for *_, high in known),
                interval="x",
                bar=7,
            )
        )
    for is_shown, name, color in (
        (True, "effect or reversed", ORANGE),
        (False, "no effect shown", BLUE),
    ):
        some = rows[rows.verdict.isin(_SHOWN) == is_shown]
        some = some[some.effect.notna()]
        if some.empty:
            continue
        marks.append(
            Points(
                numbers(some.effect),
                tuple(str(method) for method in some.method),
                name,
                color,
                symbol="circle" if is_shown else "circle-open",
                size=8,
                low=numbers(some.effect_ci_low),
                high=numbers(some.effect_ci_high),
                interval="x",
                hover=tuple(
                    f"{row.method}, layer {row.layer}, coefficient {row.coefficient:.4g}\n"
                    f"{row.effect:+.3f} ({row.effect_ci_low:+.3f} to {row.effect_ci_high:+.3f})\n"
                    f"{row.verdict}"
                    for row in some.itertuples()
                ),
            )
        )
    return Panel(marks, Axis(f"effect ({NATS})"), Axis(""))
