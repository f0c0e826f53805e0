"""Tables as HTML: units and meanings in the head, value and interval in one cell."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from steerlens.models.hooks import resid_post
from steerlens.runs.contents import TableContent
from steerlens.runs.html_report.markup import Html, element, joined
from steerlens.runs.html_report.numbers import MINUS, decimals_for, fixed, in_words, signed
from steerlens.tables import Column, hook_label

MAX_COLUMNS = 8
"""Columns that are shown at first where a table names none."""
MAX_ROWS = 600
"""Rows of a table that are shown; of a longer one, the largest by `TableContent.by`."""
_NUMBERS = ("float64", "int64")


@dataclass(frozen=True)
class Shown:
    """A column of the page: a value, and the columns of its interval's ends where it has one."""

    value: Column
    ends: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The value's."""
        return self.value.name

    @property
    def names(self) -> list[str]:
        """Of all that a cell holds."""
        return [self.name, *self.ends]

    @property
    def class_(self) -> str | None:
        """Numbers stand to the right."""
        return "n" if self.value.dtype in _NUMBERS else None


def with_intervals(columns: Sequence[Column]) -> list[Shown]:
    """The columns, those of an interval's ends joined to that of the value which they are of."""
    named = {column.name: column for column in columns}
    ends: dict[str, tuple[str, ...]] = {}
    for at, column in enumerate(columns):
        name = column.name
        kinds = (f"{name.removesuffix('_nats')}_ci", f"{name}_ci", name)
        if name == "ci_low":  # of the nearest column before it that has its unit
            of = next((c.name for c in columns[at - 1 :: -1] if c.unit == column.unit), None)
            ends |= {of: ("ci_low", "ci_high")} if of else {}
        for kind in kinds:
            if {f"{kind}_low", f"{kind}_high"} <= named.keys():
                ends[name] = (f"{kind}_low", f"{kind}_high")
    joined_ends = {end for pair in ends.values() for end in pair}
    return [Shown(c, ends.get(c.name, ())) for c in columns if c.name not in joined_ends]


def listing(name: str, table: pd.DataFrame, content: TableContent, ident: str) -> Html:
    """One table with its title, notes and columns' meanings; at first its main columns alone.

    `name` is its file's, `ident` begins the ids of its elements.
    """
    rows = _largest(table, content)
    columns = content.columns_of([str(n) for n in table.columns])
    empty, same, shown = _split(rows, with_intervals(columns))
    notes = [_about(name, table, rows, content)]
    if len(rows) > 1 and _are_block_outputs(rows):
        shown = [column for column in shown if column.name != "hook_name"]
        name_of = element("code", "blocks.N.hook_resid_post")
        notes.append(joined("Hooks are block outputs, ", name_of, " of layer N."))
    if same:
        values = joined(*(_the_same(column, rows) for column in same), by="; ")
        notes.append(joined("The same in every row: ", values, "."))
    if empty:
        unknown = joined(*map(_named, empty), by=", ")
        notes.append(joined("Without a value in this run: ", unknown, "."))
    names = [column.name for column in shown]
    main = {name for name in names if name in content.main} or {*names[:MAX_COLUMNS]}
    body, has_gaps = _body(rows, shown, main)
    if any(column.ends for column in shown):
        notes.append(joined("In parentheses: from the lower to the upper end of the interval."))
    if has_gaps:
        notes.append(joined("An empty cell is undefined."))
    headings = (_heading(column, is_hidden=column.name not in main) for column in shown)
    head = element("thead", element("tr", *headings))
    title = f"{ident}-title"
    of_title: dict[str, Any] = {"aria_labelledby": title}
    cells = (head, element("tbody", body))
    grid = element("table", *cells, class_="sortable", data_file=name, **of_title)
    grid = element("div", grid, class_="scroll", tabindex=0, role="region", **of_title)
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
    # Of what is steered nowhere both are empty.
    names = rows["layer"].map(lambda layer: "" if layer < 0 else resid_post(layer))
    return bool((rows["hook_name"] == names).all())


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
    rows: pd.DataFrame, columns: Sequence[Shown]
) -> tuple[list[Shown], list[Shown], list[Shown]]:
    """The columns without a value, those with one value in every row, and the others."""
    empty, same, shown = [], [], []
    for column in columns:
        values = rows[column.names]
        if column.value.dtype == "float64" and values.isna().all(axis=None):
            empty.append(column)
        elif len(rows) > 1 and len(values.drop_duplicates()) == 1:
            same.append(column)
        else:
            shown.append(column)
    return empty, same, shown


def _the_same(column: Shown, rows: pd.DataFrame) -> Html:
    first = rows.head(1)
    records: list[Any] = first.to_dict("records")
    decimals = _decimals(first, column)
    text, _ = _cell(column, records[0], decimals, _searched(rows.attrs, records[0]))
    # A number of pairs needs no "pairs" behind it.
    has_unit = column.class_ and column.value.unit and column.value.unit not in column.name
    unit = f" {column.value.unit}" if has_unit else ""
    return joined(_named(column), " ", text or "undefined", unit)


def _named(column: Shown) -> Html:
    """A column's name in words, with what it means under the pointer."""
    method, is_at, hook_name = column.name.partition(" @ ")
    words = f"{method}, layer {hook_label(hook_name)}" if is_at else method.replace("_", " ")
    return element("abbr", words, title=in_words(column.value.meaning))


def _heading(column: Shown, *, is_hidden: bool) -> Html:
    unit = [element("small", column.value.unit, class_="unit")] if column.value.unit else []
    named: dict[str, Any] = {"data_names": " ".join(column.names), "hidden": is_hidden}
    return element("th", _named(column), *unit, scope="col", class_=column.class_, **named)


def _decimals(rows: pd.DataFrame, column: Shown) -> int:
    is_float = column.value.dtype == "float64"
    return decimals_for(rows[column.names].to_numpy(dtype=float).ravel()) if is_float else 0


def _body(rows: pd.DataFrame, columns: Sequence[Shown], main: set[str]) -> tuple[Html, bool]:
    decimals = {column.name: _decimals(rows, column) for column in columns}
    lines, has_gaps = [], False
    records: list[Any] = rows.to_dict("records")
    for row in records:
        cells = []
        searched = _searched(rows.attrs, row)
        for column in columns:
            text, key = _cell(column, row, decimals[column.name], searched)
            has_gaps = has_gaps or text == ""
            ends = " ".join(f"{row[end]:.9g}" for end in column.ends) or None
            at: dict[str, Any] = {"class_": column.class_, "data_v": key, "data_ends": ends}
            cells.append(element("td", text, **at, hidden=column.name not in main))
        layer = hook_label(str(row["hook_name"])) if "hook_name" in row else None
        lines.append(element("tr", *cells, data_layer=layer))
    return joined(*lines), has_gaps


def _cell(
    column: Shown, row: Mapping[Any, Any], decimals: int, searched: float | None
) -> tuple[str, str | None]:
    """A cell's text, its interval in parentheses, and what it is sorted by if that is a number."""
    value, key = _value(column.value, row[column.name], decimals, searched)
    ends = [_value(column.value, row[end], decimals, searched)[0] for end in column.ends]
    if not value or not any(ends) or {*ends} == {value}:
        return value, key
    low, high = (end or "undefined" for end in ends)
    return f"{value} ({low} to {high})", key


def _value(
    column: Column, value: Any, decimals: int, searched: float | None
) -> tuple[str, str | None]:
    if column.dtype == "bool":
        return ("yes" if value else "no"), None
    if column.dtype == "int64":
        # What is of no layer or head, as the embedding, has -1 there.
        is_none = value < 0 and column.name.rpartition("_")[2] in ("layer", "head")
        return ("", None) if is_none else (signed(str(value)), str(value))
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
        parts.append(element("dd", in_words(column.meaning)))
    return element("details", element("summary", "What the columns mean"), element("dl", *parts))
