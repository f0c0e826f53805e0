"""Columns as data, with unit and meaning; rows to pandas; tables to files and to HTML."""

import csv
import html
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

import pandas as pd

from steerlens.progress import printable

__all__ = [
    "Column",
    "read_csv",
    "to_frame",
    "write_csv",
    "write_parquet",
]

Row = Mapping[str, Any]
ColumnType = Literal["str", "int64", "float64", "bool"]
T = TypeVar("T")

MAX_ROWS = 30
MAX_COLUMNS = 10
"""Columns of a table beside its labels."""
MAX_NAME = 40
"""Characters of a name, of a model say."""
MAX_LINE = 150
"""Characters of a `repr`."""


@dataclass(frozen=True)
class Column:
    """A table column: its name, pandas dtype, unit and meaning."""

    name: str
    dtype: ColumnType
    unit: str
    meaning: str


def _read_columns() -> dict[str, tuple[Column, ...]]:
    types = {str(dtype): dtype for dtype in get_args(ColumnType)}
    text = files("steerlens").joinpath("columns.csv").read_text(encoding="utf-8")
    rows = list(csv.reader(text.splitlines()))[1:]
    return {
        table: tuple(
            Column(name, types[dtype], unit, meaning) for _, name, dtype, unit, meaning in of_table
        )
        for table, of_table in groupby(rows, key=lambda row: row[0])
    }


COLUMNS: Mapping[str, tuple[Column, ...]] = MappingProxyType(_read_columns())
"""Table name (the stem of the file that a run keeps it in) -> its columns, from `columns.csv`."""


Columns = str | Sequence[Column]
"""A table's columns, by its name in `columns.csv` or as they are."""


def columns_of(columns: Columns) -> Sequence[Column]:
    """The columns of a name."""
    return COLUMNS[columns] if isinstance(columns, str) else columns


def to_frame(rows: Sequence[Row], columns: Columns, attrs: Mapping[str, Any]) -> pd.DataFrame:
    """Rows as a DataFrame with exactly `columns`, in their order and types.

    Args:
        rows: Column name -> value; a measure (float64) that a row does not give is NaN.
        columns: The table's, or its name, such as "sweep".
        attrs: JSON-serialisable; they become `DataFrame.attrs`.

    Raises:
        KeyError: A row holds a key that is not a column, or lacks one whose type has no NaN.
    """
    columns = columns_of(columns)
    names = [column.name for column in columns]
    required = {column.name for column in columns if column.dtype != "float64"}
    for row in rows:
        if unknown := row.keys() - set(names):
            raise KeyError(f"row keys {sorted(unknown)} are not columns")
        if missing := required - row.keys():
            raise KeyError(f"the row lacks {sorted(missing)}")
    frame = pd.DataFrame.from_records([dict(row) for row in rows], columns=names).astype(
        {column.name: column.dtype for column in columns}
    )
    frame.attrs.update(json.loads(json.dumps(dict(attrs))))
    return frame


# What a spreadsheet takes for a formula, behind apostrophes that were there; full-width forms too.
_FORMULA = "('*[\t\r\n]*[-=+@\uff1d\uff0b\uff0d\uff20])"


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV: full float precision, NaN as an empty field, LF line ends.

    Text that a spreadsheet would take for a formula (it begins with =, +, - or @, or with these
    behind tabs or line ends) has an apostrophe in front, which `read_csv` takes away; numbers have
    none. Text is quoted where it must be; all of it in a table with a carriage return in some text.
    """
    texts = {
        str(name): frame[name].astype("str").str.replace(f"^{_FORMULA}", r"'\1", regex=True)
        for name in frame
        if pd.api.types.is_string_dtype(frame[name].dtype)
    }
    # Before Python 3.13 the csv module leaves a lone carriage return unquoted, and readers end the
    # row there.
    has_return = any(text.str.contains("\r", regex=False).any() for text in texts.values())
    frame.assign(**texts).to_csv(
        path,
        index=False,
        lineterminator="\n",
        quoting=csv.QUOTE_NONNUMERIC if has_return else csv.QUOTE_MINIMAL,
    )


def read_csv(path: Path, columns: Columns) -> pd.DataFrame:
    """Read a table that `write_csv` wrote, with the types of `columns`; no text becomes NaN."""
    columns = columns_of(columns)
    numbers = {column.name: [""] for column in columns if column.dtype == "float64"}
    frame = pd.read_csv(
        path,
        dtype={column.name: column.dtype for column in columns},
        keep_default_na=False,
        na_values=numbers,
        float_precision="round_trip",
    )
    texts = [column.name for column in columns if column.dtype == "str" and column.name in frame]
    plain = {name: frame[name].str.replace(f"^'{_FORMULA}", r"\1", regex=True) for name in texts}
    return frame.assign(**plain)


def write_parquet(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as Parquet; its attrs travel in the file's metadata."""
    frame.to_parquet(path, index=False, engine="pyarrow")


def shortened(text: object, size: int = MAX_NAME) -> str:
    """The text on one line of at most `size` characters, `printable`."""
    line = printable(str(text))
    return line if len(line) <= size else line[: size - 1] + "…"


def hook_label(hook_name: str) -> str:
    """The layer's number for a block's output, another hook's whole name; several joined by +."""
    parts = hook_name.split(" + ")
    found = [re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", part) for part in parts]
    return " + ".join(
        part if match is None else match[1] for part, match in zip(parts, found, strict=True)
    )


def measured(attrs: Mapping[Hashable, Any]) -> list[str]:
    """What a table's attrs say of where it comes from: model, method, pairs, text and budget."""
    model, settings = attrs.get("model", {}), attrs.get("settings", {})
    named = {
        "model": model.get("name"),
        "method": attrs.get("method"),
        "pairs": attrs.get("pairs"),
        "text": settings.get("on"),
        "budget": settings.get("budget"),
    }
    return [f"{role} {shortened(name)}" for role, name in named.items() if name is not None]


def fragment(
    caption: Sequence[str], table: pd.DataFrame, *, n_labels: int = 1, note: str = ""
) -> str:
    """A table as an HTML fragment: its caption's parts in a line, its columns' names, its rows.

    The first `n_labels` columns are labels, the others numbers, or text that stands for some. Of
    more than 30 rows, or 10 columns beside the labels, as many are shown, evenly spaced, with the
    first and the last; a line below says so, after `note`. Colours are those of the page.
    """
    rows = _evenly(range(len(table)), MAX_ROWS)
    columns = [*range(n_labels), *_evenly(range(n_labels, table.shape[1]), MAX_COLUMNS)]
    shown = table.iloc[list(rows), columns]
    heads = "".join(_cell("th", name, i < n_labels) for i, name in enumerate(shown.columns))
    body = "".join(
        "<tr>" + "".join(_cell("td", value, i < n_labels) for i, value in enumerate(row)) + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    )
    notes = [note] if note else []
    if len(rows) < len(table):
        notes.append(f"{len(rows)} of {len(table)} rows")
    if len(columns) < table.shape[1]:
        n_numbers = table.shape[1] - n_labels
        notes.append(f"{len(columns) - n_labels} of {n_numbers} columns")
    return (
        '<div style="color:inherit">'
        f"<div>{html.escape(', '.join(caption))}</div>"
        '<table style="color:inherit;border-collapse:collapse;text-align:right">'
        f'<thead style="border-bottom:1px solid currentColor"><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
        f"<div>{html.escape('; '.join(notes))}</div></div>"
    )


def _cell(tag: str, value: object, is_label: bool) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else shortened(value)
    side = "left" if is_label else "right" if tag == "th" else ""
    style = f' style="text-align:{side}"' if side else ""
    return f"<{tag}{style}>{html.escape(text)}</{tag}>"


def _evenly(places: Sequence[T], n: int) -> list[T]:
    """At most `n` of the places, evenly spaced, with the first and the last."""
    if len(places) <= n:
        return list(places)
    return [places[round(i * (len(places) - 1) / (n - 1))] for i in range(n)]
