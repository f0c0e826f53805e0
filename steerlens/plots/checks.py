"""What every figure asks of its tables, and how their rows are told apart."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from steerlens.errors import InputError
from steerlens.tables import COLUMNS, Column, hook_label

TEXTS = {c.name for columns in COLUMNS.values() for c in columns if c.dtype == "str"}
"""Columns of text; the others of a figure's tables are numbers."""

Tabular: TypeAlias = pd.DataFrame | Any
"""A table, or a result that has it, such as a `SweepResult`."""


def checked_table(
    given: Tabular,
    needed: Sequence[str | Column],
    kind: str,
    *,
    of: str = "",
    finite: Sequence[str] = (),
) -> pd.DataFrame:
    """A table as it is, or that which a result has as `of`, such as `layers`.

    Raises `InputError` where it lacks columns or rows, or has text where numbers belong: `kind` is
    which table it should be, in words; `finite` may hold neither NaN nor inf.
    """
    table = given if isinstance(given, pd.DataFrame) else getattr(given, of, given)
    names = [name if isinstance(name, str) else name.name for name in needed]
    if not isinstance(table, pd.DataFrame):
        raise InputError(
            f"expected {kind}, a DataFrame such as result.table, got {type(table).__name__}"
        )
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise InputError(f"expected {kind}; this table has no column {', '.join(missing)}")
    if table.empty:
        raise InputError(f"expected {kind}; this table has no rows")
    texts = [n for n in names if n not in TEXTS and not is_numeric_dtype(table[n])]
    if texts:
        raise InputError(f"expected {kind}; {', '.join(texts)} hold text, not numbers")
    for name in finite:
        if not np.isfinite(table[name].to_numpy(dtype=float)).all():
            raise InputError(f"expected {kind}; {name} holds values that are not finite")
    return table


def check_distinct(table: pd.DataFrame, names: Sequence[str], remedy: str) -> None:
    """Raise `InputError` when two rows have the same values in the columns."""
    repeated = table[table.duplicated(list(names))]
    if not repeated.empty:
        row = ", ".join(f"{name} {repeated[name].iloc[0]}" for name in names)
        raise InputError(f"expected one row for {row}, got several; {remedy}")


def by_hook(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Label of each hook -> its rows, in the table's order."""
    return {hook_label(str(name)): rows for name, rows in table.groupby("hook_name", sort=False)}


def by_kind(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Kind of hook (its name after the block's) -> its rows, from the first layer to the last."""
    kinds = table.hook_name.astype(str).str.replace(r"^blocks\.\d+\.", "", regex=True)
    rows = table.sort_values("layer", kind="stable")
    return {str(kind): of_kind for kind, of_kind in rows.groupby(kinds, sort=False)}
