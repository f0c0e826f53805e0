"""Which form rows have, by their columns; what an unknown one looks like, and the flag for it."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steerlens.data.entries import in_short
from steerlens.data.forms import FORMS, Form, Made, Sheet, in_order
from steerlens.data.labels import negated, spelled
from steerlens.data.prompts import Message
from steerlens.data.reading import Row, Rows, plain
from steerlens.errors import InputError

_NOUNS = ("prompt", "text", "sentence", "statement", "example", "response", "answer", "completion")
_PROMPTS = ("prompt", "question", "instruction", "input", "query", "conversations")


def _sided(*sides: str) -> tuple[str, ...]:
    orders = ("{0}_{1}", "{1}_{0}")
    return *sides, *(order.format(s, noun) for s in sides for noun in _NOUNS for order in orders)


ROLES: dict[str, tuple[str, ...]] = {
    "positive": _sided("positive", "pos", "good"),
    "negative": _sided("negative", "neg", "bad"),
    "prompt": ("prompt",),
    "input": ("input",),
    "system": ("system", "system_prompt"),
    "continuation": ("continuation",),
    "position": ("position",),
    "group": ("group",),
    "id": ("id",),
    "chosen": (*_sided("chosen"), "preferred_output"),
    "rejected": (*_sided("rejected"), "non_preferred_output"),
    "question": ("question", "prompt"),
    "matching": (
        *("answer_matching_behavior", "answer_matching_behaviour", "matching", "best_answer"),
    ),
    "not_matching": (
        *("answer_not_matching_behavior", "answer_not_matching_behaviour", "not_matching"),
        *("best_incorrect_answer", "incorrect_answers"),
    ),
    "text": ("statement", "text", "sentence", "claim", *_PROMPTS, "messages", "content", "goal"),
    "label": ("label", "labels"),
    "choices": ("mc1_targets", "choices", "mc2_targets", "options"),
    "completion": ("completion", "response", "answer", "output"),
    "suffixes": ("suffixes", "suffix_list"),
    "positive_personas": ("positive_personas",),
    "negative_personas": ("negative_personas",),
    "template": ("template",),
    "instructions": ("instruction", "instructions"),
    "questions": ("questions",),
}
"""What a column is for -> the plain names of such a column, the plainest first."""
_OF_FORM: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "preferences": {"prompt": _PROMPTS},
    "choices": {"label": ("label", "labels", "answer", "answerkey", "answer_idx")},
}
"""Of a form, the names of a role in place of those of `ROLES`."""


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
    column, _, positive = columns.get("label", "").partition("=")
    if positive and columns["label"] not in keys:
        columns = {**columns, "label": column}
    name = _recognised(rows, keys, columns) if form is None else _form_of(form)
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
        column = _column("text", keys, columns)
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
    if None not in (_column(role, record, {}) for role in FORMS["traits"].needs):
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
    if all(isinstance(cell, dict) and cell and cell.keys() == cells[0].keys() for cell in cells):
        by_id = any(_candidates(role, cells[0]) for role in ROLES)
        by_column = [{key: record[key][index] for key in record} for index in cells[0]]
        tables = [cells if by_id else by_column]
    # A list beside it that has as many may say what its rows are.
    lengths = [len(cell) for cell in cells if isinstance(cell, list)]
    if len(tables) != 1 or lengths.count(len(tables[0])) > 1:
        return rows
    where = f"{rows.rows[0].where}: record"
    found = [Row(f"{where} {i}", str(i), plain(r)) for i, r in enumerate(tables[0], start=1)]
    return Rows(rows.name, tuple(found))


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
        all(_column(role, record, {}) for role in form.needs)
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


def _column(
    role: str, keys: Iterable[str], columns: Mapping[str, str], form: str = ""
) -> str | None:
    """The column for a role: as named, or the first of its plain names that is there."""
    return columns.get(role) or next(iter(_candidates(role, keys, form).values()), None)


def _candidates(role: str, keys: Iterable[str], form: str = "") -> dict[str, str]:
    """Of the plain names of a role, those that are there, with their columns."""
    plainly = {str(key).strip().lower().replace(" ", "_").replace("-", "_"): key for key in keys}
    plainly |= {key: key for key in keys}
    names = _OF_FORM.get(form, {}).get(role, ROLES[role])
    return {name: plainly[name] for name in names if name in plainly}


def _recognised(rows: Rows, keys: list[str], columns: Mapping[str, str]) -> str:
    for name, form in FORMS.items():
        found = [_column(role, keys, columns) for role in form.needs]
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
    has_side = any(_column(side, keys, columns) in keys for side in ("positive", "negative"))
    if has_side or not rows.rows or (rows.rows and not keys and not _are_texts(rows)):
        return "pairs"  # whose rows say what they lack
    raise InputError(f"{rows.name}: {_seen(rows, keys)}")


def _have_choices(rows: Rows, column: str) -> bool:
    cells = [row.record.get(column) for row in rows.rows]
    return all(isinstance(cell, dict | list) and not _is_chat(cell) for cell in cells)


def _are_texts(rows: Rows) -> bool:
    return all(isinstance(row.record, str) or _is_chat(row.record) for row in rows.rows)


def _seen(rows: Rows, keys: Sequence[str]) -> str:
    """What an unknown form looks like, and which flags would read it."""
    near = {
        role: close[0]
        for role in ("positive", "negative")
        for close in [difflib.get_close_matches(role, keys, n=1, cutoff=0.7)]
        if close
    }
    sides = None if near else negated(keys)
    if sides is not None:
        near = dict(zip(("positive", "negative"), sides, strict=True))
    of_two = [column for column in keys if _has_two(rows, column)]
    has_text = _column("text", keys, {}) is not None
    is_two = len(keys) == 2 and not has_text and not of_two and _column("label", keys, {}) is None
    two = dict(zip(("positive", "negative"), keys, strict=False)) if is_two else {}
    named = near or two or {"positive": "COLUMN", "negative": "COLUMN"}
    flag = ",".join(f"{role}={column:.80}" for role, column in named.items())
    one_side = ""
    if not keys or ((has_text or of_two) and not near):
        label, text = next(iter(of_two), "COLUMN"), ""
        if keys and not has_text:
            others = [column for column in keys if column not in of_two]
            text = f"text={others[0] if len(others) == 1 else 'COLUMN':.80},"
        one_side = (
            "; it looks like texts of one side: give both as POSITIVE_FILE,NEGATIVE_FILE, or a "
            f"column of labels 0 and 1: --columns {text}label={label:.80}"
        )
    if not keys:
        one_side += (
            f"; suffixes that two personas share: an object of {', '.join(FORMS['personas'].needs)}"
        )
    columns = f"the columns {in_short(keys)}" if keys else "no columns"
    return (
        f"{len(rows.rows)} rows with {columns} are of no known form ({', '.join(FORMS)})"
        f"{one_side}; name the two sides: --columns {flag}"
    )


def _has_two(rows: Rows, column: str) -> bool:
    """Whether a column has two values, each in more rows than one."""
    counts = Counter(spelled(row.record.get(column)) for row in rows.rows)
    return len(counts) == 2 and min(counts.values()) > 1


def _sheet(
    rows: Rows, keys: Sequence[str], name: str, columns: Mapping[str, str], needed: Sequence[str]
) -> Sheet:
    """The rows by role. Of pairs each has to have what is needed; other forms count what lacks."""
    form = FORMS[name]
    if name == "pairs" and _column("prompt", keys, columns) in keys:
        form = form._replace(needs=tuple(needed))
    found = {role: _column(role, keys, columns, name) for role in (*form.needs, *form.may)}
    at = {role: column for role, column in found.items() if column is not None}
    prompts = _candidates("prompt", keys, "preferences").values()
    # A role by its name alone, where another has that column or it goes with no other column.
    has_no_use = {
        "id": at.get("id") in columns.values(),
        "input": str(at.get("prompt")).lower() != "instruction",
        "completion": at.get("text") not in prompts,
    }
    at = {role: c for role, c in at.items() if role in columns or not has_no_use.get(role)}
    for role in (role for role in at if role not in columns):
        able = _candidates(role, {*keys} - {at.get("input")} - {*columns.values()}, name)
        if len(able) > 1 and ROLES[role][0] not in able:
            raise InputError(
                f"{rows.name}: the form {name}: {' and '.join(able.values())} may both be "
                f"{role}; name one: --columns {role}=COLUMN"
            )
    is_strict = name == "pairs" and not rows.is_table
    for role, column in columns.items():
        if keys and column not in keys and not (is_strict and role in (*form.needs, "group")):
            raise InputError(f"{rows.name}: no column {column!r}; there are {in_short(keys)}")
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
        if not isinstance(row.record, dict):
            keys_needed = ", ".join(form.needs)
            raise InputError(f"{row.where}: expected an object with the keys {keys_needed}")
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
