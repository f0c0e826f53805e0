"""Which statement of one label goes with which of the other: by a column, or by a template."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from steerlens.data.labels import FALSE, TRUE
from steerlens.data.reading import Row

LONGEST_GAP = 4
"""The most words in which statements of one template differ."""
MOST_WORDS = 200_000
"""Beyond so many in all, templates are not looked for."""
NEARLY_ALL = 0.9
"""The share of statements that have a partner where all are of templates."""


def value_of(row: Row, column: str) -> Any:
    """The cell of a column, which may be the group's."""
    return row.record.get("group") if column == "group" else row.record[""].get(column)


def by_column(sides: Mapping[bool, Sequence[Row]], column: str) -> list[tuple[Row, Row]]:
    """Statements of the two labels that have one value, the first with the first."""
    by_value: dict[str, tuple[list[Row], list[Row]]] = {}
    for is_true, rows in sides.items():
        for row in rows:
            by_value.setdefault(str(value_of(row, column)), ([], []))[not is_true].append(row)
    return [pair for both in by_value.values() for pair in zip(*both, strict=False)]


def pairing_column(sides: Mapping[bool, Sequence[Row]]) -> str | None:
    """The finest further column whose values, two or more, each have statements of both labels."""
    columns = dict.fromkeys(
        column for rows in sides.values() for row in rows for column in row.record[""]
    )
    n_values = {}
    for column in columns:
        true, false = ({str(row.record[""].get(column)) for row in rows} for rows in sides.values())
        # A column of yes and no is another label, no topic.
        if true == false and len(true) > 1 and not {*map(str.lower, true)} <= TRUE | FALSE:
            n_values[column] = len(true)
    return max(n_values, key=lambda column: n_values[column], default=None)


def of_template(sides: Mapping[bool, Sequence[Row]]) -> list[tuple[Row, Row]]:
    """Statements that share half their words and differ in a few in a row, where nearly all do."""
    texts = {row.where: str(row.record["text"]).split() for rows in sides.values() for row in rows}
    if sum(map(len, texts.values())) > MOST_WORDS:
        return []
    places: dict[int, tuple[list[Row], list[Row]]] = {}
    order: dict[int, tuple[int, int]] = {}
    for is_true, rows in sides.items():
        for row in rows:
            words = texts[row.where]
            for start, length in product(range(len(words)), range(1, LONGEST_GAP + 1)):
                n_kept = len(words) - length
                if start <= n_kept and 2 * n_kept >= len(words):
                    gap = hash((*words[:start], None, *words[start + length :]))
                    places.setdefault(gap, ([], []))[not is_true].append(row)
                    order[gap] = (-n_kept, -start)
    found: dict[str, tuple[Row, Row]] = {}
    taken: set[str] = set()
    for gap in sorted(order, key=lambda gap: order[gap]):
        free = [[row for row in rows if row.where not in taken] for rows in places[gap]]
        for pair in zip(*free, strict=False):
            found[pair[0].where] = (pair[0], pair[1])
            taken.update(row.where for row in pair)
    n_least = max(map(len, sides.values())) * NEARLY_ALL
    return [found[row.where] for row in sides[True] if row.where in found and len(found) >= n_least]
