"""What a report shows of a run, as data: the tables of each command and the figures of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import pandas as pd

from steerlens import plots
from steerlens.measure.plane import LossGeometry
from steerlens.plots import Figure
from steerlens.tables import (
    BOUNDARY_COLUMNS,
    CIRCUIT_COLUMNS,
    CLAIM_COLUMNS,
    COMPARISON_COLUMNS,
    CONTOUR_COLUMNS,
    EDGE_COLUMNS,
    FAITHFULNESS_COLUMNS,
    GENERATION_COLUMNS,
    GEOMETRY_COLUMNS,
    LAYER_COLUMNS,
    POINT_COLUMNS,
    READER_COLUMNS,
    SHAPE_COLUMNS,
    SUMMARY_COLUMNS,
    SWEEP_COLUMNS,
    TOKEN_COLUMNS,
    WRITER_COLUMNS,
    WRITER_POSITION_COLUMNS,
    Column,
)

COMMANDS = ("sweep", "boundary", "compare", "circuits", "geometry")
"""The commands that write a run folder."""


@dataclass(frozen=True)
class Needed:
    """What the summary of a command reads: tables by file name, and keys of the request."""

    tables: tuple[str, ...]
    request: Mapping[str, type | tuple[type, ...]]


NEEDED: Mapping[str, Needed] = MappingProxyType(
    {
        "sweep": Needed(("sweep",), MappingProxyType({"budget": str})),
        "boundary": Needed(("layers",), MappingProxyType({"budget": str, "on": str})),
        "compare": Needed(
            ("comparison", "summary"),
            MappingProxyType({"budget": str, "on": str, "measured_on": dict}),
        ),
        "circuits": Needed(
            ("writers", "readers", "claims"), MappingProxyType({"coefficient": (int, float)})
        ),
        "geometry": Needed(("shape",), MappingProxyType({})),
    }
)

MAX_ROWS = 600
"""Rows of a table that a report shows; of a longer table, the largest by `TableContent.by`."""


@dataclass(frozen=True)
class TableContent:
    """A table of some command: its title, what a row is, and its columns.

    `rest` is what further columns are, where their names depend on the run. `by` is the column
    whose largest values, in size, are shown of a table with more than `MAX_ROWS` rows.
    """

    title: str
    row: str
    columns: tuple[Column, ...]
    rest: Column | None = None
    by: str = ""

    def columns_of(self, names: Sequence[str]) -> tuple[Column, ...]:
        """The columns of a file whose first line is `names`."""
        if self.rest is None:
            return self.columns
        kept = {column.name for column in self.columns}
        rest = self.rest
        return (
            *self.columns,
            *(Column(n, rest.dtype, rest.unit, rest.meaning) for n in names if n not in kept),
        )


TABLES: Mapping[str, TableContent] = MappingProxyType(
    {
        "summary": TableContent(
            "Methods at their chosen layer", "a method, best first", SUMMARY_COLUMNS
        ),
        "comparison": TableContent(
            "Every method and layer", "a method and layer, at equal damage", COMPARISON_COLUMNS
        ),
        "effects": TableContent(
            "Effects item by item",
            "a held-out item",
            (Column("id", "str", "", "the item"),),
            rest=Column(
                "", "float64", "nats per token", "change of the gap by this method and hook"
            ),
        ),
        "layers": TableContent("Layer by layer, unsteered", "a hook", LAYER_COLUMNS),
        "sweep": TableContent(
            "Every cell", "a cell: one hook and coefficient", SWEEP_COLUMNS, by="projection_shift"
        ),
        "geometry": TableContent(
            "Pairs in the plane", "a hook and pair", GEOMETRY_COLUMNS, by="separation"
        ),
        "contours": TableContent(
            "Loss in the plane", "a push in the plane of a hook", CONTOUR_COLUMNS, by="loss"
        ),
        "shape": TableContent("Boundary in a plane", "an angle", SHAPE_COLUMNS),
        "boundary": TableContent(
            "Evaluations of the search",
            "an evaluation of the boundary search",
            BOUNDARY_COLUMNS,
            by="loss_nats",
        ),
        "writers": TableContent(
            "Who writes the direction",
            "a component that can have written it",
            WRITER_COLUMNS,
            by="contribution",
        ),
        "readers": TableContent(
            "Who reads it", "a component behind the steered hook", READER_COLUMNS, by="effect"
        ),
        "claims": TableContent("What carries the effect", "a test", CLAIM_COLUMNS),
        "circuits": TableContent(
            "Same circuit or another", "a pair of models, level and size", CIRCUIT_COLUMNS
        ),
        "edges": TableContent("The largest edges", "an edge of a model's circuit", EDGE_COLUMNS),
        "faithfulness": TableContent(
            "Faithfulness", "a circuit, the model it is run in, and its size", FAITHFULNESS_COLUMNS
        ),
        "positions": TableContent(
            "Where it is written",
            "a component and token position",
            WRITER_POSITION_COLUMNS,
            by="contribution",
        ),
        "points": TableContent(
            "Pairs on the direction", "a hook and pair", POINT_COLUMNS, by="separation"
        ),
        "generations": TableContent("Texts", "a prompt and coefficient", GENERATION_COLUMNS),
        "tokens": TableContent(
            "Every token",
            "a token of a prompt, at one hook and coefficient",
            TOKEN_COLUMNS,
            by="damage_nats",
        ),
    }
)
"""Every table that a command writes, by file name, in the order in which they are shown."""


@dataclass(frozen=True)
class PageContent:
    """A page of a run whose views a report shows: its title, what they show, and which they are.

    `view` is the component of circuitsvis that draws them.
    """

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


@dataclass(frozen=True)
class FigureContent:
    """A figure: the commands it belongs to, the tables it is drawn from, and what draws it."""

    commands: tuple[str, ...]
    tables: tuple[str, ...]
    draw: Callable[..., Figure]

    def of(self, command: str, tables: Mapping[str, pd.DataFrame]) -> Figure | None:
        """The figure of a run's tables; none where the run has not all of them, or no rows."""
        if command not in self.commands or not all(name in tables for name in self.tables):
            return None
        given = [tables[name] for name in self.tables]
        return None if any(table.empty for table in given) else self.draw(*given)


def _loss_geometry(points: pd.DataFrame, contours: pd.DataFrame, shape: pd.DataFrame) -> Figure:
    return plots.loss_geometry(LossGeometry(points, contours, shape))


FIGURES: tuple[FigureContent, ...] = (
    FigureContent(("sweep",), ("sweep",), plots.tradeoff),
    FigureContent(("sweep",), ("sweep",), plots.heat_maps),
    FigureContent(("sweep",), ("sweep",), plots.dose_response),
    FigureContent(("boundary",), ("layers",), plots.boundary),
    FigureContent(("compare",), ("comparison",), plots.comparison),
    FigureContent(("circuits",), ("writers", "readers"), plots.components),
    FigureContent(("circuits",), ("edges",), plots.circuit_graph),
    FigureContent(("geometry",), ("geometry", "contours", "shape"), _loss_geometry),
    FigureContent(("sweep", "boundary"), ("layers",), plots.layer_profile),
    FigureContent(("sweep",), ("points",), plots.differences),
)
"""Every figure, in the order in which they are shown."""
