"""Rows of a plain shape: out of objects that wrap them, with what belongs together in one cell."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from steerlens.data.choices import (
    columns_of_choices,
    columns_of_values,
    ranked,
)
from steerlens.data.column_names import ROLES, candidates, column_of
from steerlens.data.forms import FORMS
from steerlens.data.labels import spelled
from steerlens.data.prompts import Message
from steerlens.data.reading import Row, Rows, plain
from steerlens.errors import InputError


def keys_of(rows: Rows) -> list[str]:
    """The columns of all rows, in the order in which they are met."""
    return list(
        dict.fromkeys(
            str(k) for row in rows.rows if isinstance(row.record, dict) for k in row.record
        )
    )


def unwrapped(rows: Rows) -> Rows:
    """Rows out of the object that wraps them; in rows that are lists, prompts get their names."""
    rows = _of_one_object(rows)
    records = [row.record for row in rows.rows]
    if records and all(map(_is_pair, records)):
        names = ("positive", "negative", "continuation")
        named = [dict(zip(names, record, strict=False)) for record in records]
        found = [row._replace(record=r) for row, r in zip(rows.rows, named, strict=True)]
        return Rows(rows.name, tuple(found))
    return rows


def _of_one_object(rows: Rows) -> Rows:
    """Rows that one object wraps: in a list beside others, by column or by id."""
    records = [row.record for row in rows.rows]
    if len(records) != 1 or not isinstance(records[0], dict) or not records[0]:
        return rows
    record = records[0]
    if _is_of_lists(record):
        # RepE's lists, in which the texts of one pair may also follow each other.
        texts, labels = iter(record["data"]), record["labels"]
        if len(record["data"]) != len(labels):
            texts = iter([[next(texts) for _ in of] for of in labels])
        rows_of = zip(texts, labels, strict=True)
        record = {"data": [{"choices": of, "labels": by} for of, by in rows_of]}
    cells = list(record.values())
    if None not in (column_of(role, record, {}) for role in FORMS["traits"].needs):
        return rows
    if _is_of_columns(record):
        by_row = zip(*cells, strict=True)
        cells = [[dict(zip(record, row, strict=True)) for row in by_row]]
    tables = [
        cell
        for cell in cells
        if isinstance(cell, list) and cell and (isinstance(cell[0], dict) or _is_pair(cell[0]))
    ]
    tables = [table for table in tables if not is_chat(table)]
    # As the hub's viewer sends them: a list of columns, and rows with their number.
    numbered = [table for table in tables if all(map(_is_numbered, table))]
    tables = [[row["row"] for row in table] for table in numbered] or tables
    if all(isinstance(cell, dict) and cell and cell.keys() == cells[0].keys() for cell in cells):
        by_id = any(candidates(role, cells[0]) for role in ROLES)
        by_column = [{key: record[key][index] for key in record} for index in cells[0]]
        tables = [cells if by_id else by_column]
    # A list beside it that has as many may say what its rows are.
    lengths = [len(cell) for cell in cells if isinstance(cell, list)]
    if len(tables) != 1 or lengths.count(len(tables[0])) > 1:
        return rows
    where = f"{rows.rows[0].where}: record"
    found = [Row(f"{where} {i}", str(i), plain(r)) for i, r in enumerate(tables[0], start=1)]
    return Rows(rows.name, tuple(found))


def _is_numbered(row: Any) -> bool:
    return isinstance(row, dict) and "row_idx" in row and isinstance(row.get("row"), dict)


def _is_of_lists(record: Mapping[str, Any]) -> bool:
    """Whether an object has texts as `data`, and as `labels` a list of labels for each few."""
    data, labels = record.get("data"), record.get("labels")
    if not isinstance(data, list) or not isinstance(labels, list) or not labels:
        return False
    are_nested = all(isinstance(of, list) for of in labels)
    return are_nested and len(data) in (len(labels), sum(map(len, labels)))


def _is_of_columns(record: Mapping[str, Any]) -> bool:
    """Whether an object has the columns of a table, of a form of rows, as lists."""
    cells = list(record.values())
    are_lists = all(isinstance(cell, list) and not is_chat(cell) for cell in cells)
    has_form = any(
        all(column_of(role, record, {}) for role in form.needs)
        for name, form in FORMS.items()
        if not form.of_lists
        and name != "choices"
        and (name != "pairs" or len(record) > len(form.needs))
    )
    return are_lists and has_form and len({*map(len, cells)}) == 1


def _is_pair(record: Any) -> bool:
    """Whether it is a list of two or three prompts, and no chat."""
    is_list = isinstance(record, list | tuple) and not isinstance(record, Message)
    return (
        is_list
        and len(record) in (2, 3)
        and not isinstance(record[0], Message)
        and all(isinstance(side, str | list | tuple) for side in record[:2])
    )


def is_chat(cell: Any) -> bool:
    """Whether a cell is a list of messages."""
    first = cell[0] if isinstance(cell, list | tuple) and cell else None
    return isinstance(first, Message) or (
        isinstance(first, dict) and bool({"role", "from"} & {*first})
    )


def gathered(
    rows: Rows, keys: Sequence[str], columns: Mapping[str, str]
) -> tuple[Rows, dict[str, str]] | None:
    """Rows whose choices, which have a column each, are in one cell; and what columns are for.

    None where there are no such columns, or nothing tells the right one: a column with its name, or
    a score or rank for each. Raises `InputError` where these do not agree.
    """
    each, form = columns_of_choices(keys), FORMS["choices"]
    named, label = columns.get("label"), column_of("label", keys, columns, "choices")
    values = columns_of_values(keys, each, named)
    is_told = bool(values) or (label in keys and label not in each.values())
    is_named = bool({*columns} - {*form.may} or {*columns.values()} & {*each.values()})
    if not each or not is_told or is_named or "choices" in keys:
        return None
    if len(values) > 1:
        firsts = [min(of.values()) for of in values.values()]
        raise InputError(
            f"{rows.name}: choices may be ranked by {' or '.join(firsts)}; name one: --columns "
            f"label={firsts[0]}"
        )
    texts = [row.record.get(column) for row in rows.rows for column in each.values()]
    if any(isinstance(cell, int | float) for cell in texts):
        return None
    used = {*each.values(), *(column for of in values.values() for column in of.values())}
    used |= {str(label)} if values else set()
    found, marks = [], []
    for row in rows.rows:
        cell: dict[str, Any] = {name: row.record.get(column) for name, column in each.items()}
        for by, of in values.items():
            cell = {"text": [*cell.values()], by: [row.record.get(of[name]) for name in each]}
            marks.append(ranked(cell[by], by, where=row.where))
        others = {key: value for key, value in row.record.items() if key not in used}
        found.append(row._replace(record={**others, "choices": cell}))
    if values and named is None and label in keys:
        said = [spelled(row.record.get(label)) for row in rows.rows]
        bests = {(s, m.index(True)) for s, m in zip(said, marks, strict=True) if True in m}
        _check_agree(rows.name, str(label), [*each], bests)
    roles = {role: column for role, column in columns.items() if role != "label" or not values}
    return replace(rows, rows=tuple(found)), {**roles, "choices": "choices"}


def _check_agree(name: str, label: str, names: Sequence[str], bests: set[tuple[str, int]]) -> None:
    """Raise `InputError` where one label goes with several best choices, or names another one."""
    # Numbers from 0 may say of the first choice whether it is right.
    are_names = names[0] != "0" and "0" not in dict(bests)
    meant = {
        (said, place)
        for said, _ in bests
        for place, name in enumerate(names)
        if are_names and f"_{said}".endswith(f"_{name}")
    }
    if len({said for said, _ in bests}) < len(bests | meant):
        raise InputError(
            f"{name}: {label} does not tell the choice that is scored highest; name what to go by: "
            f"--columns label={label}"
        )


def lifted(rows: Rows, keys: Sequence[str]) -> Iterator[tuple[Rows, list[str]]]:
    """For each column of objects: rows with their keys in its place, and these keys."""
    for key in keys:
        cells = [row.record.get(key) for row in rows.rows]
        if not all(isinstance(cell, dict) for cell in cells) or any(map(_is_said, cells)):
            continue
        inside = list(dict.fromkeys(name for cell in cells for name in cell))
        named = {name: f"{key}.{name}" if name in keys and name != key else name for name in inside}
        found = []
        for row, cell in zip(rows.rows, cells, strict=True):
            others = {name: value for name, value in row.record.items() if name != key}
            lifted_cells = {named[name]: value for name, value in cell.items()}
            found.append(row._replace(record={**others, **lifted_cells}))
        yield replace(rows, rows=tuple(found)), [named[name] for name in inside]


def _is_said(cell: Mapping[str, Any]) -> bool:
    """Whether an object is a message or has a chat."""
    return bool({"role", "from", "messages", "conversations"} & {*cell})
