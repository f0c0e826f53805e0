"""What a run folder holds, as data: commands, their tables, and pages with views."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from steerlens.files import packaged_rows
from steerlens.tables import COLUMNS, Column

Kind = type | tuple[type, ...]


NEEDED: Mapping[str, tuple[tuple[str, ...], Mapping[str, Kind]]] = MappingProxyType(
    {
        "sweep": (("sweep",), {"budget": str}),
        "boundary": (("layers",), {"budget": str, "on": str}),
        "compare": (("comparison", "summary"), {"budget": str, "on": str, "measured_on": dict}),
        "circuits": (("writers", "readers", "claims"), {"coefficient": (int, float, str)}),
        "geometry": (("shape",), {}),
        "behave": (("behaviour",), {"samples": int, "prompts": list}),
        "recommend": (("recommendation", "candidates"), {"budget": str}),
    }
)
"""What the summary of a command reads: tables by file name, and keys of the request."""
COMMANDS = tuple(NEEDED)
"""The commands that write a run folder."""


def text_name(prompt: int, sample: int, strength: str) -> str:
    """What the table of tokens calls a text of `behave`: prompts from 1, samples from 0."""
    return f"{prompt}, text {sample + 1} at {strength}"


@dataclass(frozen=True)
class TableContent:
    """A table of some command: its title, what a row is, and its columns.

    Of a long table a report shows the rows with the largest sizes of `by`, and at first the `main`
    columns (the first few, if there are none). `rest` is of columns whose names depend on the run.
    """

    title: str
    row: str
    columns: tuple[Column, ...]
    by: str = ""
    rest: Column | None = None
    main: tuple[str, ...] = ()

    def columns_of(self, names: Sequence[str]) -> tuple[Column, ...]:
        """The columns of a file whose first line is `names`."""
        if self.rest is None:
            return self.columns
        declared = {column.name for column in self.columns}
        rest = [replace(self.rest, name=name) for name in names if name not in declared]
        return *self.columns, *rest


def _read_tables() -> dict[str, TableContent]:
    effects = (Column("id", "str", "", "the item"),)
    rest = Column("", "float64", "nats per token", "change of the gap by this method and hook")
    return {
        line["name"]: TableContent(
            line["title"],
            line["row"],
            COLUMNS.get(line["name"], effects),
            line["by"],
            None if line["name"] in COLUMNS else rest,
            tuple(line["main"].split()),
        )
        for line in packaged_rows("runs", "tables.csv")
    }


TABLES: Mapping[str, TableContent] = MappingProxyType(_read_tables())
"""Every table that a command writes, by file name, in the order in which they are shown."""


@dataclass(frozen=True)
class PageContent:
    """A page whose views a report shows: title, what they show, their component of circuitsvis."""

    title: str
    meaning: str
    view: str


PAGES: Mapping[str, PageContent] = MappingProxyType(
    {
        "attention": PageContent(
            "Attention of the top heads",
            "Share of a token's attention (rows, from 0 to 1 at full shade) that goes to each "
            "token up to it (columns).",
            "AttentionHeads",
        ),
        "tokens": PageContent(
            "Projection on the direction, token by token",
            "Residual units: purple above 0, green below, full shade at the layer's largest, the "
            "first token not counted.",
            "ColoredTokens",
        ),
    }
)
"""The pages whose views are shown; what the others show is drawn from the tables."""
