"""Which form rows have, by their columns; what an unknown one looks like, and the flag for it."""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from steerlens.data.choices import columns_of_choices
from steerlens.data.column_names import ALIKE, ROLES, candidates, column_of
from steerlens.data.entries import in_short
from steerlens.data.forms import FORMS, Form, Made, Sheet, in_order
from steerlens.data.labels import negated, spelled, two_labels
from steerlens.data.reading import Row, Rows
from steerlens.data.unwrapping import (
    gathered,
    is_chat,
    keys_of,
    lifted,
    unwrapped,
)
from steerlens.errors import InputError

FEW_WORDS = 3
"""From so many on, a text may be what is asked."""


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
    rows = unwrapped(rows)
    keys = keys_of(rows)
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
    name = None if form is None else _form_of(form)
    name, rows = _lifted_to(name, rows, keys, columns)
    keys = keys_of(rows)
    if name in (None, "labelled") if form is None else name == "choices":
        of_choices = gathered(rows, keys, columns)
        if of_choices is not None:
            name, (rows, columns) = "choices", of_choices
            keys = keys_of(rows)
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


def _lifted_to(
    form: str | None, rows: Rows, keys: list[str], columns: Mapping[str, str]
) -> tuple[str | None, Rows]:
    """The form, and the rows that have it: as they are, or with one column's objects lifted."""
    name = form or _recognised(rows, keys, columns)
    if not keys or (name is not None and (form is None or _has(name, keys, columns))):
        return name, rows
    found = []
    for others, inside in lifted(rows, keys):
        fitting = form or _recognised(others, inside, columns)
        if fitting is not None and _has(fitting, inside, columns):
            found.append((fitting, others))
    return found[0] if len(found) == 1 else (name, rows)


def _has(form: str, keys: Sequence[str], columns: Mapping[str, str]) -> bool:
    return {column_of(role, keys, columns) for role in FORMS[form].needs} <= {*keys}


def make_lists(sides: Sequence[Rows], columns: Mapping[str, str]) -> Made:
    """What two sources make, one a side: lists of texts or chats, without pairs."""
    lists = []
    for rows in map(unwrapped, sides):
        _check_roles(rows.name, columns)
        keys = keys_of(rows)
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


def _recognised(rows: Rows, keys: list[str], columns: Mapping[str, str]) -> str | None:
    """The first form that fits; none where there is none."""
    for name, form in FORMS.items():
        found = [column_of(role, keys, columns) for role in form.needs]
        if {*columns} <= {*form.needs, *form.may} and {*found} <= {*keys}:
            is_list = len(rows.rows) == 1 and all(
                isinstance(cell := rows.rows[0].record.get(column), list) and not is_chat(cell)
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
    return all(isinstance(cell, dict | list) and not is_chat(cell) for cell in cells)


def _are_texts(rows: Rows) -> bool:
    return all(isinstance(row.record, str) or is_chat(row.record) for row in rows.rows)


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


def _is_inside(rows: Rows, choices: str | None, label: str | None) -> bool:
    """Whether the label that is named is a part of each choice."""
    cells = [row.record.get(choices) for row in rows.rows] if choices and label else []
    parts = [part for cell in cells for part in (cell if isinstance(cell, list) else [cell])]
    return bool(parts) and all(isinstance(part, dict) and label in part for part in parts)


def _is_prose(rows: Rows, column: str) -> bool:
    """Whether every cell of a column is, or has, text of a few words."""
    cells = [row.record.get(column) for row in rows.rows]
    parts = [[*cell.values()] if isinstance(cell, dict) else [cell] for cell in cells]
    return bool(parts) and all(
        any(isinstance(part, str) and len(part.split()) >= FEW_WORDS for part in of) for of in parts
    )


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
    apart = (*form.needs, "group") if is_strict else ()
    apart = ("label",) if _is_inside(rows, at.get("choices"), columns.get("label")) else apart
    for role, column in columns.items():
        if keys and column not in keys and role not in apart:
            raise InputError(f"{rows.name}: no column {column!r}; there are {in_short(keys)}")
    contexts = [row.record.get(at["context"]) for row in rows.rows] if "context" in at else [None]
    if name == "choices" and "question" not in at and all(map(is_chat, contexts)):
        at["question"] = at.pop("context")
    beside = [key for key in keys if key not in at.values()]
    if name == "choices" and "question" not in at:
        texts = [*candidates("text", beside).values(), *(k for k in beside if _is_prose(rows, k))]
        if texts:
            raise InputError(
                f"{rows.name}: the form choices: name what is asked: --columns "
                f"question={texts[0]:.80}"
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
    empty = [role for role in form.needs if form.of_lists and role not in by_role[0].record]
    if empty:
        raise InputError(f"{rows.name}: the form {name}: {at[empty[0]]} is empty; fill it")
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
