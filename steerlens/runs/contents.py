"""What a run folder holds, as data: commands, their tables, and pages with views."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType

from steerlens import tables
from steerlens.tables import Column

Kind = type | tuple[type, ...]


@dataclass(frozen=True)
class Needed:
    """What the summary of a command reads: tables by file name, and keys of the request."""

    tables: tuple[str, ...]
    request: Mapping[str, Kind]


NEEDED: Mapping[str, Needed] = MappingProxyType(
    {
        "sweep": Needed(("sweep",), {"budget": str}),
        "boundary": Needed(("layers",), {"budget": str, "on": str}),
        "compare": Needed(
            ("comparison", "summary"), {"budget": str, "on": str, "measured_on": dict}
        ),
        "circuits": Needed(("writers", "readers", "claims"), {"coefficient": (int, float, str)}),
        "geometry": Needed(("shape",), {}),
        "behave": Needed(("behaviour",), {"samples": int, "prompts": list}),
        "recommend": Needed(("recommendation", "candidates"), {"budget": str}),
    }
)
COMMANDS = tuple(NEEDED)
"""The commands that write a run folder."""


def text_name(prompt: int, sample: int, strength: str) -> str:
    """What the table of tokens calls a text of `behave`: prompts from 1, samples from 0."""
    return f"{prompt}, text {sample + 1} at {strength}"


@dataclass(frozen=True)
class TableContent:
    """A table of some command: its title, what a row is, and its columns.

    `by` is the column whose largest values, in size, a report shows of a long table; `rest` is what
    further columns are, where their names depend on the run; `main` are the columns that a report
    shows at first, the first of them all where it names none.
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
        rest = self.rest
        return (
            *self.columns,
            *(Column(n, rest.dtype, rest.unit, rest.meaning) for n in names if n not in declared),
        )


_AN_EFFECT = Column("", "float64", "nats per token", "change of the gap by this method and hook")
_COLUMNS: Mapping[str, tuple[Column, ...]] = {  # until `tables` has them by file name
    "effects": (Column("id", "str", "", "the item"),),
    "summary": tables.SUMMARY_COLUMNS,
    "comparison": tables.COMPARISON_COLUMNS,
    "methods": tables.METHOD_COLUMNS,
    "layers": tables.LAYER_COLUMNS,
    "sweep": tables.SWEEP_COLUMNS,
    "geometry": tables.GEOMETRY_COLUMNS,
    "contours": tables.CONTOUR_COLUMNS,
    "shape": tables.SHAPE_COLUMNS,
    "boundary": tables.BOUNDARY_COLUMNS,
    "writers": tables.WRITER_COLUMNS,
    "readers": tables.READER_COLUMNS,
    "claims": tables.CLAIM_COLUMNS,
    "circuits": tables.CIRCUIT_COLUMNS,
    "edges": tables.EDGE_COLUMNS,
    "faithfulness": tables.FAITHFULNESS_COLUMNS,
    "positions": tables.WRITER_POSITION_COLUMNS,
    "points": tables.POINT_COLUMNS,
    "generations": tables.GENERATION_COLUMNS,
    "tokens": tables.TOKEN_COLUMNS,
    "segments": tables.SEGMENT_COLUMNS,
    "joint": tables.JOINT_COLUMNS,
    "behaviour": tables.BEHAVIOUR_COLUMNS,
    "recommendation": tables.RECOMMENDATION_COLUMNS,
    "candidates": tables.CANDIDATE_COLUMNS,
}


def _read_tables() -> dict[str, TableContent]:
    text = files("steerlens.runs").joinpath("tables.csv").read_text(encoding="utf-8")
    contents = {}
    for line in csv.DictReader(text.splitlines(), restval=""):
        name, rest = line["name"], _AN_EFFECT if line["name"] == "effects" else None
        columns, main = _COLUMNS[name], tuple(line["main"].split())
        contents[name] = TableContent(line["title"], line["row"], columns, line["by"], rest, main)
    return contents


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
