"""The forms in which contrastive data are published: what makes entries of the rows of each."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

from steerlens.data.choices import choices_of, ranks, right_and_wrong
from steerlens.data.entries import OPENING, Entry, joined, turns
from steerlens.data.labels import FALSE, TRUE, spelled, two_labels
from steerlens.data.partners import by_column, of_template, pairing_column, value_of
from steerlens.data.prompts import Message, Prompt, checked_prompt
from steerlens.data.reading import Row
from steerlens.errors import InputError, told
from steerlens.files import packaged_rows

ALONE = "no partner in the shorter list"
"""Why a text of two lists without pairs is not measured; it is fitted on all the same."""
ONE_OF_SEVERAL = "; of several answers the first"
"""What a card says where one side has a list of answers."""
SIDES = ("positive", "negative")
_AS_TURNS = "questions are the user's turn, answers the assistant's"


class Sheet(NamedTuple):
    """Rows by what their columns are for (a role); `columns` has the column of each role.

    A row's record has the roles that are not empty, and under "" what has no role. `positive` is
    the label that was named as the positive one.
    """

    name: str
    rows: tuple[Row, ...]
    columns: Mapping[str, str]
    is_table: bool = False
    positive: str = ""


@dataclass
class Made:
    """What a form makes of rows; `by` is the column that pairs, `unpaired` has both whole lists."""

    entries: list[Entry] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    how: str = ""
    by: str | None = None
    form: str = "lists"
    n_rows: int = 0
    not_used: tuple[str, ...] = ()
    unpaired: tuple[tuple[Prompt, ...], tuple[Prompt, ...]] | None = None


class Form(NamedTuple):
    """A form: the roles that it needs and may have, and what makes entries of its rows."""

    needs: tuple[str, ...]
    may: tuple[str, ...]
    read: Callable[[Sheet], Made]
    other_names: tuple[str, ...] = ()
    of_lists: bool = False
    """Whether it is one object whose cells are lists."""


def _pairs(sheet: Sheet) -> Made:
    """Both sides as they are given, and what stands before both where a prompt is given."""
    sides = [[row for row in sheet.rows if side in row.record] for side in SIDES]
    n_each = [len(rows) for rows in sides]
    # Two columns of unequal length are no pairs; a gap inside one is an error of that row.
    is_short = all(list(sheet.rows[:n]) == rows for n, rows in zip(n_each, sides, strict=True))
    if sheet.is_table and n_each[0] != n_each[1] and is_short:
        return in_order(sides, SIDES)
    filled = [_of_subject(row) for row in sheet.rows]
    # Of all rows, as some prompts have {} for other reasons.
    are_of_subjects = all(new is not row for new, row in zip(filled, sheet.rows, strict=True))
    rows = filled if are_of_subjects else sheet.rows
    made = Made([_entry(row, "positive", "negative") for row in rows])
    if rows and are_of_subjects:
        made.how = "{} in a prompt is its subject, and answers follow after a space"
    return made


def _of_subject(row: Row) -> Row:
    """A row whose prompt has a gap for its subject, filled: what follows is another word."""
    prompt, subject = row.record.get("prompt"), row.record.get("subject")
    if not isinstance(prompt, str) or "{}" not in prompt or not isinstance(subject, str):
        return row
    sides = {side: _prompt(row, side) for side in SIDES if side in row.record}
    apart = {s: f" {t}" for s, t in sides.items() if isinstance(t, str) and not t[:1].isspace()}
    filled = {"prompt": prompt.replace("{}", subject), **sides, **apart}
    return row._replace(record={**row.record, **filled})


def _preferences(sheet: Sheet) -> Made:
    """A chosen and a rejected answer to a prompt, or two whole texts or chats."""
    made = Made()
    rows = _whole_rows(sheet, ("chosen", "rejected"), made)
    rows = [_on_lines(row, ("prompt", "input"), "prompt") for row in rows]
    is_text = all(
        isinstance(row.record[side], str)
        and (
            row.record[side][:1].isspace()
            or str(row.record.get("prompt"))[-1:].isspace()
            or str(row.record.get("prompt")).endswith(OPENING)
        )
        for row in rows
        for side in ("chosen", "rejected")
    )
    for row in rows:
        if row.record["chosen"] == row.record["rejected"]:
            made.left_out["both sides are equal"] += 1
            continue
        entry = _entry(row, "chosen", "rejected")
        if entry.prompt is not None and not is_text:
            entry = entry._replace(prompt=turns(entry.prompt))
        made.entries.append(entry)
    if "prompt" in sheet.columns:
        made.how = "answers follow the prompt " + (
            "as text" if is_text else "as the assistant's turn"
        )
    return made


def _on_lines(row: Row, parts: tuple[str, str], role: str) -> Row:
    """A row in which that role is two parts on lines of their own, where both are text."""
    texts = [row.record.get(part) for part in parts]
    if not all(isinstance(text, str) and text for text in texts):
        return row
    return row._replace(record={**row.record, role: "\n".join(texts)})


def _questions(sheet: Sheet) -> Made:
    """A question as the user's turn, its two answers as the assistant's."""
    made = Made(how=_AS_TURNS)
    for row in _whole_rows(sheet, ("question", "matching", "not_matching"), made):
        sides = {}
        for side in ("matching", "not_matching"):
            answer = row.record[side]
            are_joined = sheet.columns[side].strip().lower().endswith("answers")
            if isinstance(answer, str) and are_joined:
                answer = answer.split(";")  # as one cell of a table
            if isinstance(answer, list) and answer:
                made.how += ONE_OF_SEVERAL if ONE_OF_SEVERAL not in made.how else ""
                answer = answer[0]
            if not isinstance(answer, str) or answer.startswith(("['", '["')):
                raise InputError(
                    f"{row.where}: {side}: expected an answer as text, or a list of these, "
                    f"got {answer!r:.60}"
                )
            sides[side] = answer.strip()
        row = _on_lines(row, ("context", "question"), "question")
        record = {**row.record, **sides, "prompt": row.record["question"]}
        entry = _entry(row._replace(record=record), "matching", "not_matching")
        if isinstance(entry.prompt, str) and entry.prompt.rstrip().endswith(OPENING):
            made.how = made.how.replace(_AS_TURNS, "answers follow the dialogue as text")
        else:
            entry = entry._replace(prompt=turns(entry.prompt))
        made.entries.append(entry)
    return made


def _choices(sheet: Sheet) -> Made:
    """Choices: the first that is right and the first that is not, or the best and the worst."""
    made = Made()
    rows = _whole_rows(sheet, ("choices",), made)
    column = sheet.columns.get("label", "label")
    answers = [row.record.get("label") for row in rows]
    if ranks(column) and not sheet.positive:  # one for each choice, or of the whole row
        answers = [answer if isinstance(answer, list) else None for answer in answers]
    choices = [
        choices_of(row.record["choices"], answer, where=row.where, by=column)
        for row, answer in zip(rows, answers, strict=True)
    ]
    both, made.how = right_and_wrong(choices, answers, column=column, first=sheet.positive)
    if rows and not any(map(all, both)):
        raise InputError(
            f"{sheet.name}: the form choices needs a label for each choice, or the name, number or "
            f"text of the right one, got {told(answers[0])}; name it: --columns label=COLUMN"
        )
    named = []
    for row, (right, wrong) in zip(rows, both, strict=True):
        if right and wrong:
            sides = {"matching": right[0], "not_matching": wrong[0]}
            named.append(row._replace(record={**row.record, **sides}))
        else:
            made.left_out["no right or no wrong choice"] += 1
    if "question" in sheet.columns:
        columns = {**sheet.columns, "matching": "choices", "not_matching": "choices"}
        asked = _questions(sheet._replace(rows=tuple(named), columns=columns))
        left_out = asked.left_out + made.left_out
        return replace(asked, left_out=left_out, how=f"{asked.how}; {made.how}")
    made.entries = [_entry(row, "matching", "not_matching") for row in named]
    return made


def _labelled(sheet: Sheet) -> Made:
    """Statements of two labels: paired by group, another column or template, or in order."""
    made = Made()
    labels = {spelled(row.record["label"]) for row in sheet.rows if "label" in row.record}
    of_sides = two_labels(labels, sheet.positive)
    positive, negative = of_sides or (TRUE, FALSE)
    sides: dict[bool, list[Row]] = {True: [], False: []}
    others = set()
    answer = [role for role in ("completion",) if role in sheet.columns]
    for row in _whole_rows(sheet, ("text", *answer), made):
        row = _answered(row, sheet.columns["text"]) if answer else row
        label = spelled(row.record.get("label"))
        if label in positive or label in negative:
            sides[label in positive].append(row)
        else:
            others.add(label)
            made.left_out["a label that is neither 0 nor 1"] += 1
    if not all(sides.values()) or (sheet.positive and of_sides is None):
        column = sheet.columns.get("label", "label")
        raise InputError(
            f"{sheet.name}: the form labelled has statements of two labels, 0 and 1 (or true and "
            f"false); got {len(sides[True])} of 1, {len(sides[False])} of 0 and "
            f"{made.left_out.total()} others {[label[:40] for label in sorted(others)[:3]]}; name "
            "the columns: --columns text=COLUMN,label=COLUMN; of two other labels name the "
            f"positive one: --columns label={column}={min(others, default='VALUE'):.40}"
        )
    made.by = "group" if "group" in sheet.columns else pairing_column(sides)
    told_label = "" if positive is TRUE else f"; the label {min(positive)} is positive"
    partners = of_template(sides) if made.by is None else by_column(sides, made.by)
    if not partners:
        unpaired = in_order(list(sides.values()), ("text", "text"))
        unpaired.left_out.update(made.left_out)
        unpaired.how += told_label
        return unpaired
    for pos, neg in partners:
        rest = {} if made.by is None else {"group": str(value_of(pos, made.by))}
        texts = (_prompt(pos, "text"), _prompt(neg, "text"))
        made.entries.append(Entry(pos.where, f"{pos.id}-{neg.id}", None, *texts, rest))
    n_alone = sum(map(len, sides.values())) - 2 * len(partners)
    made.left_out += Counter({"no partner of the other label": n_alone})
    by = "template" if made.by is None else sheet.columns.get("group", made.by)
    made.how = f"paired by {by}{told_label}"
    return made


def _answered(row: Row, column: str) -> Row:
    """A labelled answer after its prompt, which may pair it."""
    chat = joined(turns(_prompt(row, "text")), _prompt(row, "completion"))
    others = {column: row.record["text"], **row.record[""]}
    return row._replace(record={**row.record, "text": chat, "": others})


def in_order(sides: Sequence[Sequence[Row]], roles: Sequence[str]) -> Made:
    """Two lists without pairs: the first with the first, and so on; both are kept whole."""
    positive, negative = (
        tuple(_prompt(row, role) for row in rows) for rows, role in zip(sides, roles, strict=True)
    )
    made = Made(unpaired=(positive, negative), n_rows=len(positive) + len(negative))
    for row, pos, neg in zip(sides[0], positive, negative, strict=False):
        made.entries.append(Entry(row.where, row.id, None, pos, neg, {}))
    n_alone = abs(len(positive) - len(negative))
    made.left_out = +Counter({ALONE: n_alone})
    n_each = f"{len(positive)} and {len(negative)}"
    made.how = (
        f"two lists without pairs, of {n_each}: taken in order; the mean difference is that of the "
        "whole lists"
    )
    return made


def _lists(sheet: Sheet) -> Made:
    """One object with a list a side: pairs where they are of one length."""
    [row] = sheet.rows
    sides = [
        [
            Row(f"{row.where}: {side} {number}", str(number), {side: text})
            for number, text in enumerate(row.record[side], start=1)
        ]
        for side in SIDES
    ]
    made = in_order(sides, SIDES)
    return made if len(sides[0]) != len(sides[1]) else Made(made.entries)


def _personas(sheet: Sheet) -> Made:
    """Two personas in a template, crossed with suffixes that the assistant's turn begins with."""
    [row] = sheet.rows
    sides = [_texts(row, f"{side}_personas") for side in SIDES]
    if len(sides[0]) != len(sides[1]):
        raise InputError(
            f"{row.where}: expected as many positive_personas as negative_personas, got "
            f"{len(sides[0])} and {len(sides[1])}"
        )
    template = row.record["template"]
    if "{persona}" not in str(template):
        raise InputError(f"{row.where}: template: expected {{persona}} in it, got {template!r:.80}")
    personas = list(zip(*sides, strict=True))
    made = Made(how=f"{len(personas)} pairs of personas, which are the groups")
    for (i, suffix), (j, both) in product(
        enumerate(_texts(row, "suffixes"), start=1), enumerate(personas, start=1)
    ):
        positive, negative = (_filled(template, persona, suffix, row.where) for persona in both)
        rest = {"group": " / ".join(both)}
        made.entries.append(Entry(row.where, f"{i}-{j}", None, positive, negative, rest))
    return made


def _filled(template: Any, persona: str, suffix: str, where: str) -> Prompt:
    def fill(text: str) -> str:
        return text.replace("{persona}", persona).replace("{suffix}", suffix)

    if isinstance(template, str) and "{suffix}" in template:
        return fill(template)
    chat = turns(checked_prompt(template, where=f"{where}: template"))
    filled = tuple(Message(turn.role, fill(turn.content)) for turn in chat)
    has_suffix = any("{suffix}" in turn.content for turn in chat)
    return filled if has_suffix else (*filled, Message("assistant", suffix))


def _traits(sheet: Sheet) -> Made:
    """Instructions for and against as the system's turn, crossed with questions as the user's."""
    [row] = sheet.rows
    instructions = row.record["instructions"]
    made = Made(how=f"{len(instructions)} pairs of instructions, which are the groups")
    for (i, pair), (j, question) in product(
        enumerate(instructions, start=1), enumerate(_texts(row, "questions"), start=1)
    ):
        where = f"{row.where}: instruction {i}"
        said = pair if isinstance(pair, dict) else {}
        sides = []
        for names in (("pos", "positive"), ("neg", "negative")):
            text = next((said[name] for name in names if name in said), None)
            if not isinstance(text, str) or not text:
                raise InputError(f"{where}: expected an object with the texts pos and neg")
            sides.append((Message("system", text), Message("user", question)))
        rest = {"group": f"instruction {i}"}
        made.entries.append(Entry(where, f"{i}-{j}", None, sides[0], sides[1], rest))
    return made


def _whole_rows(sheet: Sheet, needed: Sequence[str], made: Made) -> list[Row]:
    """The rows that have all that is needed; the others are counted."""
    whole = []
    for row in sheet.rows:
        lacking = [role for role in needed if role not in row.record]
        if lacking:
            made.left_out[f"no {sheet.columns.get(lacking[0], lacking[0])}"] += 1
        else:
            whole.append(row)
    return whole


def _entry(row: Row, positive: str, negative: str) -> Entry:
    """A row with two sides, and what a system and a prompt say before both."""
    prompt = _prompt(row, "prompt") if "prompt" in row.record else None
    if row.record.get("system"):
        prompt = (Message("system", str(_prompt(row, "system"))), *turns(prompt))
    others = ("continuation", "position", "group", "id")
    rest = {key: row.record[key] for key in others if key in row.record}
    sides = (_prompt(row, positive), _prompt(row, negative))
    return Entry(row.where, row.id, prompt, *sides, rest)


def _prompt(row: Row, role: str) -> Prompt:
    return checked_prompt(row.record.get(role), where=f"{row.where}: {role}")


def _texts(row: Row, role: str) -> list[str]:
    texts = row.record[role]
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"{row.where}: {role}: expected a list of texts that are not empty")
    return texts


def _read_forms() -> dict[str, Form]:
    readers = {
        read.__name__.removeprefix("_"): read
        for read in (
            *(_traits, _personas, _lists, _questions),
            *(_preferences, _pairs, _choices, _labelled),
        )
    }
    forms = {}
    for line in packaged_rows("data", "forms.csv"):
        needs, may, others = (tuple(line[n].split()) for n in ("needs", "may", "other_names"))
        name, of_lists = line["form"], line["of_lists"] == "yes"
        forms[name] = Form(needs, may, readers[name], others, of_lists)
    return forms


FORMS = _read_forms()
"""Name -> form, in the order in which they are tried."""
