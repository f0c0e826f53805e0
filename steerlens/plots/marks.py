"""What a figure is made of, as data: marks in panels, panels in frames. Nothing is drawn here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Numbers: TypeAlias = tuple[float | int, ...]
Texts: TypeAlias = tuple[str, ...]

# Okabe and Ito's colours, which people with any common colour blindness can tell apart.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, YELLOW, SKY = "#CC79A7", "#E69F00", "#56B4E9"
GREY, PALE = "#767676", "#b8b8b8"
CATEGORIES = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, GREY)

Dash: TypeAlias = Literal["solid", "dash", "dot"]
Symbol: TypeAlias = Literal["circle", "circle-open", "x", "diamond", "triangle-up", "triangle-down"]
Scale: TypeAlias = Literal["sequential", "diverging"]


@dataclass(frozen=True)
class Line:
    """A line through points, in order; NaN leaves a gap. A name puts it in the legend."""

    x: Numbers
    y: Numbers
    name: str = ""
    color: str = BLUE
    dash: Dash = "solid"
    width: float | int = 1.6
    hover: Texts = ()


@dataclass(frozen=True)
class Band:
    """The area between two curves: an interval along x. It goes with the line of its name."""

    x: Numbers
    low: Numbers
    high: Numbers
    color: str = BLUE
    name: str = ""


@dataclass(frozen=True)
class Points:
    """Single points, with an interval along one axis where `low` and `high` are given.

    Texts are places on an axis of labels: those of the panel's heat map, or the points' own.
    """

    x: Numbers | Texts
    y: Numbers | Texts
    name: str = ""
    color: str = BLUE
    symbol: Symbol = "circle"
    size: float | int = 6
    low: Numbers = ()
    high: Numbers = ()
    interval: Literal["x", "y"] = "y"
    bar: float | int = 1.2
    labels: Texts = ()
    hover: Texts = ()


@dataclass(frozen=True)
class Arrows:
    """Arrows from (x, y) to (x + dx, y + dy), in the units of the axes."""

    x: Numbers
    y: Numbers
    dx: Numbers
    dy: Numbers
    name: str = ""
    color: str = BLUE
    hover: Texts = ()


@dataclass(frozen=True)
class HeatMap:
    """A colour for every cell: `z[row][column]` at `y[row]`, `x[column]`; NaN stays empty.

    A diverging scale is centred on 0. Values beyond `reach` (low, high) get the colour of its end.
    """

    x: Texts
    y: Texts
    z: tuple[Numbers, ...]
    unit: str
    scale: Scale = "sequential"
    reach: tuple[float | int, float | int] | None = None


@dataclass(frozen=True)
class Contours:
    """Lines of equal height over a regular grid: `z[row][column]` at `y[row]`, `x[column]`.

    NaN stays empty. `levels` are the heights, evenly spaced.
    """

    x: Numbers
    y: Numbers
    z: tuple[Numbers, ...]
    levels: Numbers
    unit: str


@dataclass(frozen=True)
class Rule:
    """A straight line right across the panel, at one value of an axis."""

    at: float | int
    axis: Literal["x", "y"]
    name: str = ""
    color: str = GREY
    dash: Dash = "dot"


Mark: TypeAlias = Line | Band | Points | Arrows | HeatMap | Contours | Rule


@dataclass(frozen=True)
class Axis:
    """An axis: what it counts, the part of it that is shown (all by default), ticks at integers."""

    title: str
    reach: tuple[float | int, float | int] | None = None
    shown: bool = True
    whole: bool = False


@dataclass(frozen=True)
class Panel:
    """Marks on one pair of axes; `square` gives both axes the same scale."""

    marks: Sequence[Mark]
    x: Axis
    y: Axis
    title: str = ""
    square: bool = False


@dataclass(frozen=True)
class Frame:
    """One state of a figure, by which a slider is labelled; every frame has as many panels."""

    label: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Layout:
    """How panels are laid out: columns, the size of one panel in pixels, the slider's name."""

    columns: int = 1
    width: int = 720
    height: int = 420
    slider: str = ""
