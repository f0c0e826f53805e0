"""How results show themselves: a line of text, and in a notebook a small table.

Names of models, datasets and hooks come from files and from users, so all text is escaped here.
"""

import html
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import pandas as pd

from steerlens.progress import printable

MAX_ROWS = 30
MAX_COLUMNS = 10
"""Columns of a table beside its labels."""
MAX_NAME = 40
"""Characters of a name, of a model say."""
MAX_LINE = 150
"""Characters of a `repr`."""

T = TypeVar("T")


def shortened(text: object, size: int = MAX_NAME) -> str:
    """The text on one line of at most `size` characters, control characters as question marks."""
    line = printable(str(text))
    return line if len(line) <= size else line[: size - 1] + "…"


def hook_label(hook_name: str) -> str:
    """The layer's number for a block's output, another hook's whole name."""
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", hook_name)
    return hook_name if match is None else match[1]


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
    return [f"{what} {shortened(name)}" for what, name in named.items() if name is not None]


def fragment(
    caption: Sequence[str], table: pd.DataFrame, *, n_labels: int = 1, note: str = ""
) -> str:
    """A table as an HTML fragment: its caption's parts in a line, its columns' names, its rows.

    The first `n_labels` columns are labels, the others numbers, or text that stands for some. Of
    more than 30 rows, or 10 columns beside the labels, as many are shown, evenly spaced, with the
    first and the last; a line below says so, after `note`. Colours are those of the page.
    """
    rows = _evenly(range(len(table)), MAX_ROWS)
    columns = [
        *range(n_labels),
        *_evenly(range(n_labels, table.shape[1]), MAX_COLUMNS),
    ]
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
