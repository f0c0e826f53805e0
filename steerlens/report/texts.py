"""Texts of a run: what the steered model writes, side by side, and which tokens lose logprob."""

import math
from typing import Any

import pandas as pd

from steerlens.report.markup import Html, element, joined
from steerlens.report.numbers import change, fixed, short

_ENDS = {
    "stop": "ended by itself",
    "length": "cut at the asked-for length",
    "context": "cut: the context is full",
    "overflow": "no text: the model overflowed",
}
_BREAKS = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}
STEPS = 5
"""Steps of the colour scale in its legend."""


def generations(table: pd.DataFrame, cells: pd.DataFrame | None) -> Html:
    """A grid of texts: a row a prompt and hook, a column a coefficient.

    With the `cells` of a sweep each column says whether its cell is within the budget.
    """
    coherent: dict[tuple[Any, Any], bool] = {}
    if cells is not None:
        coherent = {(c.hook_name, c.coefficient): bool(c.coherent) for c in cells.itertuples()}
    rows = []
    groups: Any = table.groupby(["prompt", "hook_name"], sort=False)
    for (prompt, hook_name), of in groups:
        columns = [
            _text(row, coherent.get((hook_name, row.coefficient)))
            for row in of.sort_values("coefficient", kind="stable").itertuples()
        ]
        title = f"Prompt {prompt}, steered at layer {of.layer.iloc[0]}"
        grid = element("div", *columns, class_="texts", tabindex=0, role="group", aria_label=title)
        rows.append(element("div", element("h4", title), grid, class_="prompt"))
    note = element(
        "p",
        "Greedy continuations at several coefficients (c, residual units); c = 0 is the unsteered "
        "model. One greedy text per cell shows how it reads, not how often.",
        class_="note",
    )
    return joined(note, *rows)


def _text(row: Any, is_coherent: bool | None) -> Html:
    coefficient = row.coefficient
    said = [] if is_coherent is None else ["within budget" if is_coherent else "beyond the budget"]
    said.append(_ENDS.get(row.end, row.end))
    return element(
        "div",
        element("h5", f"c = {short(coefficient)}" + (", unsteered" if coefficient == 0 else "")),
        element("p", "; ".join(said), class_="note"),
        element("p", row.text, class_="said", dir="auto"),
    )


def tokens(table: pd.DataFrame) -> Html:
    """Each prompt's tokens, coloured by their damage, the number above those with the most."""
    found = table[table.coefficient != 0]
    sizes = found.damage_nats.abs()
    sizes = sizes[sizes.map(math.isfinite)]
    reach = float(sizes.quantile(0.98)) if len(sizes) else 0.0
    rows = []
    groups: Any = found.groupby(["prompt", "side", "hook_name", "coefficient"], sort=False)
    for (prompt, side, _, coefficient), of in groups:
        total = of[of.is_label].damage_nats.mean()
        title = f"Prompt {prompt}, {side} side, layer {of.layer.iloc[0]}, c = {short(coefficient)}"
        mean = "" if math.isnan(total) else f"Mean over its label tokens: {change(total)} nats."
        shown = [_token(row.token, row.damage_nats, reach) for row in of.itertuples()]
        rows.append(
            element(
                "div",
                element("h4", title),
                element("p", mean, class_="note"),
                element("p", *shown, class_="tokens", dir="auto"),
                class_="prompt",
            )
        )
    return joined(_legend(reach), *rows)


def _legend(reach: float) -> Html:
    worse = [i * reach / STEPS for i in range(1, STEPS + 1)]
    keys = [
        element("span", short(value), class_="key", style=_tint(value, reach)) for value in worse
    ]
    better = element("span", change(-reach), class_="key better", style=_tint(-reach, reach))
    return element(
        "p",
        "Damage is logprob unsteered minus steered, in nats: how much less likely the token became "
        "(the redder, the more): ",
        *keys,
        "; blue and underlined tokens became likelier: ",
        better,
        f". The number above a token is its damage, where that is at least {short(reach / 10)} in "
        "size; nothing predicts a first token.",
        class_="note",
    )


def _token(token: str, damage: float, reach: float) -> Html:
    text = "".join(_BREAKS.get(c, c) for c in token)
    if math.isnan(damage) or abs(damage) < reach / 10 or reach == 0:
        return element("ruby", text)
    class_ = "better" if damage < 0 else None
    number = element("rt", fixed(damage, 1))
    return element("ruby", text, number, class_=class_, style=_tint(damage, reach))


def _tint(damage: float, reach: float) -> str:
    """How strong a colour is, from 0 to 0.75: the text on it stays readable."""
    share = min(1.0, abs(damage) / reach) if reach else 0.0
    return f"--d:{0.75 * share:.2f}"
