"""What every figure asks of its tables, and how their rows are told apart."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from steerlens.errors import InputError
from steerlens.tables import Column, hook_label

TEXTS = (
    *("hook_name", "readout_hook", "pair", "prompt", "side", "part", "token", "raw_token"),
    *("method", "verdict", "coherent", "asked", "component", "model", "writer", "reader"),
    *("subject", "strength", "scorer", "lens"),
)
"""Columns of text; the others of a figure's tables are numbers."""


Tabular: TypeAlias = pd.DataFrame | Any
"""A table, or a result that has it, such as a `SweepResult`."""


def table_of(given: Tabular, name: str) -> pd.DataFrame:
    """The table of that name of a result, such as `layers`; a table as it is."""
    return given if isinstance(given, pd.DataFrame) else getattr(given, name, given)  # type: ignore[return-value]


def check_columns(
    table: pd.DataFrame, needed: Sequence[str | Column], kind: str, *, finite: Sequence[str] = ()
) -> None:
    """Raise `InputError` when a table lacks columns or rows, or has text where numbers belong.

    `kind` is which table it should be, in words; `finite` may hold neither NaN nor inf.
    """
    names = [name if isinstance(name, str) else name.name for name in needed]
    candidate: Any = table  # what the annotation promises is what is checked here
    if not isinstance(candidate, pd.DataFrame):
        raise InputError(
            f"expected {kind}, a DataFrame such as result.table, got {type(candidate).__name__}"
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
