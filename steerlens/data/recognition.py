"""Which form rows have, by their columns; what an unknown one looks like, and the flag for it."""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from steerlens.data.choices import columns_of_choices
from steerlens.data.column_names import ALIKE, ROLES, candidates, column_of
from steerlens.data.entries import in_short
from steerlens.data.forms import FORMS, Form, Made, Sheet, in_order
from steerlens.data.labels import negated, spelled, two_labels
from steerlens.data.prompts import Message
from steerlens.data.reading import Row, Rows, plain
from steerlens.errors import InputError


def make(
    rows: Rows,
    *,
    form: str | None,
    columns: Mapping[str, str],
    group: str,
    needed: Sequence[str],
) -> Made:
    """What the form of the rows makes of them: that which is named, or else recognised.

    `needed` are the parts of an entry. Raises `InputError` that says which columns came, and which
    flag reads them.
    """
    _check_roles(rows.name, columns)
    if group not in ("group", "auto"):
        columns = {**columns, "group": group}
    rows = _unwrapped(rows)
    keys = _keys(rows)
    are_texts = form is None and not keys and _are_texts(rows)
    for row in rows.rows:
        if not isinstance(row.record, dict) and not are_texts:
            raise InputError(
                f"{row.where}: expected an object with the keys {', '.join(needed)}, got "
                f"{row.record!r:.60}"
            )
    column, _, positive = columns.get("label", "").partition("=")
    if positive and columns["label"] not in keys:
        columns = {**columns, "label": column}
    name = _recognised(rows, keys, columns) if form is None else _form_of(form)
    gathered = _gathered(rows, keys, columns)
    takes_choices = name in (None, "labelled") if form is None else name == "choices"
    if gathered is not None and takes_choices:
        name, rows, columns = "choices", gathered, {**columns, "choices": "choices"}
        keys = _keys(rows)
    if name is None:
        raise InputError(f"{rows.name}: {_seen(rows, keys)}")
    sheet = _sheet(rows, keys, name, columns, needed)._replace(positive=positive)
    made = FORMS[name].read(sheet)
    used = {*sheet.columns.values(), made.by}
    # Of lists of one length the pairs are counted, of two without pairs the texts, else what is
    # crossed.
    made.n_rows = made.n_rows or (len(made.entries) if FORMS[name].of_lists else len(rows.rows))
    made.form, made.not_used = name, tuple(key for key in keys if key not in used)
    return made


def make_lists(sides: Sequence[Rows], columns: Mapping[str, str]) -> Made:
    """What two sources make, one a side: lists of texts or chats, without pairs."""
    lists = []
    for rows in map(_unwrapped, sides):
        _check_roles(rows.name, columns)
        keys = _keys(rows)
        column = column_of("text", keys, columns)
        if keys and column not in keys:
            raise InputError(
                f"{rows.name}: no column of texts among {in_short(keys)}; name it: "
                "--columns text=COLUMN"
            )
        records = [
            row.record.get(column) if isinstance(row.record, dict) else row.record
            for row in rows.rows
        ]
        lists.append(
            [row._replace(record={"text": r}) for row, r in zip(rows.rows, records, strict=True)]
        )
    return in_order(lists, ("text", "text"))


def _check_roles(name: str, columns: Mapping[str, str]) -> None:
    for role in columns:
        if role not in ROLES:
            raise InputError(
                f"{name}: --columns: nothing is called {role!r}; there are {', '.join(ROLES)}"
            )


def _form_of(given: str) -> str:
    names = {other: name for name, form in FORMS.items() for other in (name, *form.other_names)}
    known = given.strip().lower().replace("-", "_")
    if known not in names:
        raise InputError(f"no form is called {given!r}; there are {', '.join(FORMS)}")
    return names[known]


def _keys(rows: Rows) -> list[str]:
    return list(
        dict.fromkeys(
            str(k) for row in rows.rows if isinstance(row.record, dict) for k in row.record
        )
    )


def _unwrapped(rows: Rows) -> Rows:
    """Rows of two or three prompts with the names of these."""
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
    tables = [table for table in tables if not _is_chat(table)]
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
    are_lists = all(isinstance(cell, list) and not _is_chat(cell) for cell in cells)
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


def _is_chat(cell: Any) -> bool:
    first = cell[0] if isinstance(cell, list | tuple) and cell else None
    return isinstance(first, Message) or (
        isinstance(first, dict) and bool({"role", "from"} & {*first})
    )


def _gathered(rows: Rows, keys: Sequence[str], columns: Mapping[str, str]) -> Rows | None:
    """Rows with choices that have a column each in one cell, where a column has the right one."""
    each, form = columns_of_choices(keys), FORMS["choices"]
    label = column_of("label", keys, columns, "choices")
    is_named = bool({*columns} - {*form.may} or {*columns.values()} & {*each.values()})
    if not each or label not in keys or label in each.values() or is_named or "choices" in keys:
        return None
    cells = [row.record.get(column) for row in rows.rows for column in each.values()]
    if any(isinstance(cell, int | float) for cell in cells):
        return None
    found = []
    for row in rows.rows:
        choices = {name: row.record.get(column) for name, column in each.items()}
        others = {key: cell for key, cell in row.record.items() if key not in each.values()}
        found.append(row._replace(record={**others, "choices": choices}))
    return replace(rows, rows=tuple(found))


def _recognised(rows: Rows, keys: list[str], columns: Mapping[str, str]) -> str | None:
    """The first form that fits; none where there is none."""
    for name, form in FORMS.items():
        found = [column_of(role, keys, columns) for role in form.needs]
        if {*columns} <= {*form.needs, *form.may} and {*found} <= {*keys}:
            is_list = len(rows.rows) == 1 and all(
                isinstance(cell := rows.rows[0].record.get(column), list) and not _is_chat(cell)
                for role, column in zip(form.needs, found, strict=True)
                if role != "template"
            )
            is_crossed = form.of_lists and name != "lists" and len(rows.rows) > 1
            if name == "choices" and not _have_choices(rows, str(found[0])):
                continue
            if is_list == form.of_lists or is_crossed:
                return name
    has_side = any(column_of(side, keys, columns) in keys for side in ("positive", "negative"))
    if has_side or not rows.rows or (not keys and not _are_texts(rows)):
        return "pairs"  # whose rows say what they lack
    return None


def _have_choices(rows: Rows, column: str) -> bool:
    cells = [row.record.get(column) for row in rows.rows]
    return all(isinstance(cell, dict | list) and not _is_chat(cell) for cell in cells)


def _are_texts(rows: Rows) -> bool:
    return all(isinstance(row.record, str) or _is_chat(row.record) for row in rows.rows)


def _seen(rows: Rows, all_keys: Sequence[str]) -> str:
    """What an unknown form looks like, and which flags would read it."""
    keys = [key for key in all_keys if any(_is_said(row.record.get(key)) for row in rows.rows)]
    near = {
        role: close[0]
        for role in ("positive", "negative")
        for close in [difflib.get_close_matches(role, keys, n=1, cutoff=0.7)]
        if close
    }
    sides = None if near else negated(keys)
    if sides is not None:
        near = dict(zip(("positive", "negative"), sides, strict=True))
    labels = {column: _two_of(rows, column) for column in all_keys}
    of_two = [column for column, values in labels.items() if values]
    of_two.sort(key=lambda c: (two_labels(labels[c]) is None, "label" not in c.lower(), c in keys))
    has_text = column_of("text", keys, {}) is not None
    is_two = len(keys) == 2 and not has_text and not of_two and column_of("label", keys, {}) is None
    two = dict(zip(("positive", "negative"), keys, strict=False)) if is_two else {}
    named = near or two or {"positive": "COLUMN", "negative": "COLUMN"}
    flag = ",".join(f"{role}={column:.80}" for role, column in named.items())
    hint = ""
    if columns_of_choices(keys) and not near:
        hint = "; it looks like choices: name what tells the right one: --columns label=COLUMN"
    elif not all_keys or ((has_text or of_two) and not near):
        label, text = next(iter(of_two), "COLUMN"), ""
        if keys and not has_text:
            others = [c for c in keys if c not in of_two and c not in ROLES["id"]]
            text = f"text={others[0] if len(others) == 1 else 'COLUMN':.80},"
        hint = (
            "; it looks like texts of one side: give both as POSITIVE_FILE,NEGATIVE_FILE, or a "
            f"column of labels 0 and 1: --columns {text}label={label:.80}"
        )
    lists = _lists_in(rows.rows[0].record) if len(rows.rows) == 1 else []
    if len(lists) > 1 and not near:
        hint = f"; one object with {in_short(lists)}: keep the list that is meant, as JSON"
    if not all_keys:
        hint += (
            f"; suffixes that two personas share: an object of {', '.join(FORMS['personas'].needs)}"
        )
    columns = f"the columns {in_short(all_keys)}" if all_keys else "no columns"
    return (
        f"{len(rows.rows)} rows with {columns} are of no known form ({', '.join(FORMS)})"
        f"{hint}; name the two sides: --columns {flag}"
    )


def _lists_in(record: Any, path: str = "") -> list[str]:
    """The lists of objects in an object, with their lengths."""
    if isinstance(record, dict):
        return [name for key in record for name in _lists_in(record[key], f"{path}.{key}")]
    is_table = isinstance(record, list) and record and isinstance(record[0], dict)
    return [f"{path[1:]} ({len(record)})"] if is_table else []


def _is_said(cell: Any) -> bool:
    """Whether a cell may hold a prompt: text that is no number, messages, or a list of texts."""
    return isinstance(cell, list) or (isinstance(cell, str) and not cell.isdigit())


def _two_of(rows: Rows, column: str) -> set[str]:
    """The values of a column that has two, each in more rows than one; else none."""
    counts = Counter(spelled(row.record.get(column)) for row in rows.rows)
    return {*counts} if len(counts) == 2 and min(counts.values()) > 1 else set()


def _sheet(
    rows: Rows, keys: Sequence[str], name: str, columns: Mapping[str, str], needed: Sequence[str]
) -> Sheet:
    """The rows by role. Of pairs each has to have what is needed; other forms count what lacks."""
    form = FORMS[name]
    if name == "pairs" and column_of("prompt", keys, columns) in keys:
        form = form._replace(needs=tuple(needed))
    found = {role: column_of(role, keys, columns, name) for role in (*form.needs, *form.may)}
    at = {role: column for role, column in found.items() if column is not None}
    prompts = candidates("prompt", keys, "preferences").values()
    # A role by its name alone, where another has that column or it goes with no other column.
    has_no_use = {
        "id": at.get("id") in columns.values(),
        "input": str(at.get("prompt")).lower() != "instruction",
        "completion": at.get("text") not in prompts,
    }
    at = {role: c for role, c in at.items() if role in columns or not has_no_use.get(role)}
    for role in (role for role in at if role not in columns):
        able = candidates(role, {*keys} - {at.get("input")} - {*columns.values()}, name)
        if len(able) > 1 and ROLES[role][0] not in able and (name, role) not in ALIKE:
            raise InputError(
                f"{rows.name}: the form {name}: {' and '.join(able.values())} may both be "
                f"{role}; name one: --columns {role}=COLUMN"
            )
    is_strict = name == "pairs" and not rows.is_table
    for role, column in columns.items():
        if keys and column not in keys and not (is_strict and role in (*form.needs, "group")):
            raise InputError(f"{rows.name}: no column {column!r}; there are {in_short(keys)}")
    beside = [key for key in keys if key not in at.values()]
    asked = candidates("text", beside).values() if name == "choices" else ()
    if "question" not in at and asked:
        raise InputError(
            f"{rows.name}: the form choices: name what is asked: --columns "
            f"question={next(iter(asked)):.80}"
        )
    missing = [role for role in form.needs if role not in at]
    if missing and rows.rows and not is_strict:
        flag = ",".join(f"{role}=COLUMN" for role in missing)
        raise InputError(
            f"{rows.name}: the form {name} needs {', '.join(form.needs)}; got the columns "
            f"{in_short(keys)}; name them: --columns {flag}"
        )
    strict_on = [*form.needs, *(["group"] if "group" in columns else [])] if is_strict else []
    by_role = []
    for row in rows.rows:
        for role in strict_on:
            if at.get(role, role) not in row.record:
                raise InputError(f"{row.where}: {_lacks(at.get(role, role), row, form, at)}")
        cells = {role: row.record[c] for role, c in at.items() if row.record.get(c) is not None}
        others = {key: cell for key, cell in row.record.items() if key not in at.values()}
        by_role.append(row._replace(record={**cells, "": others}))
    if form.of_lists and len(by_role) != 1:
        raise InputError(
            f"{rows.name}: the form {name} is one object of lists, got {len(by_role)} rows"
        )
    return Sheet(rows.name, tuple(by_role), at, rows.is_table)


def _lacks(key: str, row: Row, form: Form, at: Mapping[str, str]) -> str:
    others = [str(other) for other in row.record if other not in at.values()]
    near = difflib.get_close_matches(key, others, n=1, cutoff=0.7)
    hint = f"; did you mean {near[0]!r}? --columns {key}={near[0]}" if near else ""
    got = in_short(sorted(map(str, row.record)))
    return (
        f"missing key {key!r}; expected the keys {', '.join(form.needs)} and optionally "
        f"{', '.join(form.may)}; got {got}{hint}"
    )
