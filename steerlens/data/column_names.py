"""The plain names of columns, by what they are for."""

from collections.abc import Iterable, Mapping

from steerlens.files import packaged_rows

_NOUNS = ("prompt", "text", "sentence", "statement", "example", "response", "answer", "completion")


def _read_names() -> dict[tuple[str, str], tuple[str, ...]]:
    """Form ("" is any) and role -> names; a side stands before and behind the nouns too."""
    names = {}
    for line in packaged_rows("data", "columns.csv"):
        sides = line["sides"].split()
        sided = [name for s in sides for noun in _NOUNS for name in (f"{s}_{noun}", f"{noun}_{s}")]
        names[line["form"], line["role"]] = (*sides, *sided, *line["names"].split())
    return names


_NAMES = _read_names()
ROLES = {role: names for (form, role), names in _NAMES.items() if not form}
"""What a column is for -> the plain names of such a column, the plainest first."""
ALIKE = frozenset({("questions", "matching"), ("questions", "not_matching")}) | {
    ("choices", role) for role in ("choices", "label")
}
"""Of a form, roles for which the plainest column is taken where several would do."""


def column_of(
    role: str, keys: Iterable[str], columns: Mapping[str, str], form: str = ""
) -> str | None:
    """The column for a role: as named, or the first of its plain names that is there."""
    return columns.get(role) or next(iter(candidates(role, keys, form).values()), None)


def candidates(role: str, keys: Iterable[str], form: str = "") -> dict[str, str]:
    """Of the plain names of a role, those that are there, with their columns."""
    plainly = {str(key).strip().lower().replace(" ", "_").replace("-", "_"): key for key in keys}
    plainly |= {key: key for key in keys}
    names = _NAMES.get((form, role), ROLES[role])
    return {name: plainly[name] for name in names if name in plainly}
