"""Tables and texts as HTML: units and meanings in the head, texts side by side."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from steerlens.models.hooks import resid_post
from steerlens.runs.contents import TableContent
from steerlens.runs.html_report.markup import Html, element, joined
from steerlens.runs.html_report.numbers import MINUS, decimals_for, fixed, short, signed
from steerlens.tables import Column

MAX_ROWS = 600
"""Rows of a table that are shown; of a longer one, the largest by `TableContent.by`."""
_NUMBERS = ("float64", "int64")
_BUDGET = {
    None: "",
    "yes": "within budget; ",
    "no": "beyond the budget; ",
    "undecided": "within budget or not: undecided; ",
}
_ENDS = {
    "stop": "ended by itself",
    "length": "cut at the asked-for length",
    "context": "cut: the context is full",
    "overflow": "no text: the model overflowed",
}


def listing(name: str, table: pd.DataFrame, content: TableContent, ident: str) -> Html:
    """One table with its title, what is the same in every row, notes, and the columns' meanings.

    `name` is its file's, `ident` begins the ids of its elements.
    """
    rows = _largest(table, content)
    columns = content.columns_of([str(n) for n in table.columns])
    empty, same, shown = _split(rows, columns)
    notes = [_about(name, table, rows, content)]
    if len(rows) > 1 and _are_block_outputs(rows):
        shown = [column for column in shown if column.name != "hook_name"]
        name_of = element("code", "blocks.N.hook_resid_post")
        notes.append(joined("Hooks are block outputs, ", name_of, " of layer N."))
    if same:
        values = joined(*(_the_same(column, rows) for column in same), by="; ")
        notes.append(joined("The same in every row: ", values, "."))
    if empty:
        names = joined(*(element("code", column.name) for column in empty), by=", ")
        notes.append(joined("Without a value in this run: ", names, "."))
    body, has_gaps = _body(rows, shown)
    if has_gaps:
        notes.append(joined("An empty cell is undefined."))
    head = element("thead", element("tr", *(_heading(column) for column in shown)))
    title = f"{ident}-title"
    grid = element(
        "div",
        element("table", head, element("tbody", body), class_="sortable", aria_labelledby=title),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_labelledby=title,
    )
    return element(
        "section",
        element("h4", content.title, id=title),
        element("p", joined(*notes, by=" "), class_="note"),
        *([grid] if shown and len(rows) else []),
        _meanings(columns),
        class_="table",
        id=ident,
    )


def _are_block_outputs(rows: pd.DataFrame) -> bool:
    if not {"hook_name", "layer"} <= {*rows.columns}:
        return False
    return bool((rows["hook_name"] == rows["layer"].map(resid_post)).all())


def _largest(table: pd.DataFrame, content: TableContent) -> pd.DataFrame:
    if len(table) <= MAX_ROWS:
        return table
    if not content.by:
        return table.head(MAX_ROWS)
    order = table[content.by].abs().sort_values(ascending=False, kind="stable").index[:MAX_ROWS]
    return table.loc[sorted(order)]


def _about(name: str, table: pd.DataFrame, rows: pd.DataFrame, content: TableContent) -> Html:
    file = element("code", f"{name}.csv")
    if len(rows) == len(table):
        return joined(f"A row is {content.row}; {len(table)} rows, from ", file, ".")
    which = f"the {len(rows)} largest by {content.by}" if content.by else f"the first {len(rows)}"
    return joined(
        f"A row is {content.row}; {which} of {len(table)} rows, which are all in ", file, "."
    )


def _split(
    rows: pd.DataFrame, columns: tuple[Column, ...]
) -> tuple[list[Column], list[Column], list[Column]]:
    """The columns without a value, those with one value in every row, and the others."""
    empty, same, shown = [], [], []
    for column in columns:
        values = rows[column.name]
        if column.dtype == "float64" and values.isna().all():
            empty.append(column)
        elif len(rows) > 1 and values.nunique(dropna=False) == 1:
            same.append(column)
        else:
            shown.append(column)
    return empty, same, shown


def _the_same(column: Column, rows: pd.DataFrame) -> Html:
    first = rows.head(1)
    records: list[Any] = first.to_dict("records")
    decimals = decimals_for(first[column.name]) if column.dtype == "float64" else 0
    text, _ = _cell(column, records[0][column.name], decimals, _searched(rows.attrs, records[0]))
    unit = f" {column.unit}" if column.unit and column.dtype in _NUMBERS else ""
    return joined(element("code", column.name), " ", text, unit)


def _heading(column: Column) -> Html:
    name = element("abbr", column.name.replace("_", " "), title=column.meaning)
    unit = [element("small", column.unit, class_="unit")] if column.unit else []
    class_ = "n" if column.dtype in _NUMBERS else None
    return element("th", name, *unit, scope="col", class_=class_)


def _body(rows: pd.DataFrame, columns: list[Column]) -> tuple[Html, bool]:
    decimals = {c.name: decimals_for(rows[c.name]) for c in columns if c.dtype == "float64"}
    lines, has_gaps = [], False
    records: list[Any] = rows.to_dict("records")
    for row in records:
        cells = []
        searched = _searched(rows.attrs, row)
        for column in columns:
            text, key = _cell(column, row[column.name], decimals.get(column.name, 0), searched)
            has_gaps = has_gaps or text == ""
            class_ = "n" if column.dtype in _NUMBERS else None
            cells.append(element("td", text, class_=class_, data_v=key))
        lines.append(element("tr", *cells))
    return joined(*lines), has_gaps


def _cell(
    column: Column, value: Any, decimals: int, searched: float | None
) -> tuple[str, str | None]:
    """A cell's text, and what it is sorted by where that is not the text."""
    if column.dtype == "bool":
        return ("yes" if value else "no"), None
    if column.dtype == "int64":
        return signed(str(value)), str(value)
    if column.dtype != "float64":
        return str(value), None
    if math.isnan(value):
        return "", None
    if math.isinf(value):
        key = "Infinity" if value > 0 else "-Infinity"
        return _infinite(column, MINUS if value < 0 else "", searched), key
    return fixed(value, decimals), f"{value:.9g}"


def _infinite(column: Column, sign: str, searched: float | None) -> str:
    """What an infinite value says: of a boundary, that it is beyond the range searched."""
    if "boundary" not in column.name and column.name != "coefficient":
        return f"{sign}\N{INFINITY}"
    return f"beyond {sign}{'the searched range' if searched is None else f'{searched:.4g}'}"


def _searched(attrs: Mapping[Any, Any], row: Mapping[Any, Any]) -> float | None:
    """How far the search went in this row, in residual units, where the table says so."""
    searched = attrs.get("searched")
    if isinstance(searched, Mapping):
        searched = searched.get(row.get("hook_name"))
    return float(searched) if isinstance(searched, (int, float)) else None


def _meanings(columns: tuple[Column, ...]) -> Html:
    parts = []
    for column in columns:
        unit = [element("span", f" ({column.unit})", class_="unit")] if column.unit else []
        parts.append(element("dt", element("code", column.name), *unit))
        parts.append(element("dd", column.meaning))
    return element("details", element("summary", "What the columns mean"), element("dl", *parts))


def generations(table: pd.DataFrame, cells: pd.DataFrame | None) -> Html:
    """A grid of texts: a row a prompt and hook, a column a coefficient.

    With the `cells` of a sweep each column says whether its cell is within the budget.
    """
    coherent: dict[tuple[Any, Any], str] = {}
    if cells is not None:
        coherent = {(c.hook_name, c.coefficient): str(c.coherent) for c in cells.itertuples()}
    rows = []
    groups: Any = table.groupby(["prompt", "hook_name"], sort=False)
    for (prompt, hook_name), group in groups:
        columns = [
            _text(row, coherent.get((hook_name, row.coefficient)))
            for row in group.sort_values("coefficient", kind="stable").itertuples()
        ]
        title = f"Prompt {prompt}, steered at layer {group.layer.iloc[0]}"
        grid = element("div", *columns, class_="texts", tabindex=0, role="group", aria_label=title)
        rows.append(element("div", element("h4", title), grid, class_="prompt"))
    note = element(
        "p",
        "Greedy continuations at several coefficients (c, residual units); c = 0 is the unsteered "
        "model. One greedy text per cell shows how it reads, not how often.",
        class_="note",
    )
    return joined(note, *rows)


def _text(row: Any, coherent: str | None) -> Html:
    budget = _BUDGET[coherent]
    unsteered = ", unsteered" if row.coefficient == 0 else ""
    return element(
        "div",
        element("h5", f"c = {short(row.coefficient)}{unsteered}"),
        element("p", f"{budget}{_ENDS.get(row.end, row.end)}", class_="note"),
        element("p", row.text, class_="said", dir="auto"),
    )
