"""Texts of a run: what the steered model writes, side by side."""

from typing import Any

import pandas as pd

from steerlens.runs.html_report.markup import Html, element, joined
from steerlens.runs.html_report.numbers import short

_ENDS = {
    "stop": "ended by itself",
    "length": "cut at the asked-for length",
    "context": "cut: the context is full",
    "overflow": "no text: the model overflowed",
}


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
