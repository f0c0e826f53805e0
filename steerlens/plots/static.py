"""Figures with matplotlib: PNG and SVG without a browser."""

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from steerlens.plots.interactive import _reach as heat_map_reach
from steerlens.plots.marks import (
    Arrows,
    Band,
    Contours,
    HeatMap,
    Layout,
    Line,
    Mark,
    Panel,
    Points,
    Rule,
)

DASHES = {"solid": "-", "dash": "--", "dot": ":"}
MARKERS = {
    "circle": "o",
    "circle-open": "o",
    "x": "x",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
}
SCALES = {"sequential": "cividis", "diverging": "RdBu_r"}
DPI = 100
MOST_LEGEND = 12
STYLE = {
    "svg.hashsalt": "steerlens",  # else every file has other ids
    "text.parse_math": False,  # text may come from prompts, and hold dollar signs
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
}


def draw(title: str, panels: Sequence[Panel], layout: Layout, *, kind: str) -> bytes:
    """The bytes of a PNG or SVG file; the same panels give the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / layout.columns)
    inches = (layout.width * layout.columns / DPI, (layout.height * rows + 40) / DPI)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=inches, dpi=DPI, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        grid = figure.subplots(rows, layout.columns, squeeze=False).flatten()
        for axes, panel in zip(grid, panels, strict=False):
            _panel(figure, axes, panel)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        out = io.BytesIO()
        figure.savefig(out, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def _panel(figure: Any, axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x.title)
    axes.set_ylabel(panel.y.title)
    seen: set[str] = set()
    marks = _placed(panel.marks)
    for mark in marks:
        name = getattr(mark, "name", "")
        is_new = bool(name) and name not in seen and not isinstance(mark, Rule | Band)
        _mark(figure, axes, mark, name if is_new else None)
        seen |= {name} if is_new else set()
    for is_whole, axis in ((panel.x.whole, axes.xaxis), (panel.y.whole, axes.yaxis)):
        if is_whole:
            axis.get_major_locator().set_params(integer=True)
    # After the marks: each of them would widen the axes again.
    if panel.x.reach is not None:
        axes.set_xlim(*panel.x.reach)
    if panel.y.reach is not None:
        axes.set_ylim(*panel.y.reach)
    if panel.square:
        axes.set_aspect("equal", adjustable="box" if panel.x.reach else "datalim")
    for shown, axis in ((panel.x.shown, axes.xaxis), (panel.y.shown, axes.yaxis)):
        axis.set_visible(shown)
    handles, labels = axes.get_legend_handles_labels()
    if 0 < len(labels) <= MOST_LEGEND:
        axes.legend(handles, labels, fontsize=7, frameon=False)
    elif labels:
        # As many lines as layers: the first and the last say which way the colours run.
        few = [0, len(labels) // 2, len(labels) - 1]
        axes.legend([handles[i] for i in few], [labels[i] for i in few], fontsize=7, frameon=False)


def _mark(figure: Any, axes: Any, mark: Mark, label: str | None) -> None:
    if isinstance(mark, Line):
        style = {"color": mark.color, "linestyle": DASHES[mark.dash], "linewidth": mark.width}
        axes.plot(mark.x, mark.y, label=label, **style)
    elif isinstance(mark, Band):
        area = {"color": mark.color, "alpha": 0.18, "linewidth": 0}
        axes.fill_between(mark.x, mark.low, mark.high, label=label, **area)
    elif isinstance(mark, Points):
        _points(axes, mark, label)
    elif isinstance(mark, Arrows):
        for x, y, dx, dy in zip(mark.x, mark.y, mark.dx, mark.dy, strict=True):
            line = {"arrowstyle": "-|>", "color": mark.color, "linewidth": 1, "shrinkA": 0}
            axes.annotate(
                "", (x + dx, y + dy), (x, y), arrowprops={**line, "shrinkB": 0, "mutation_scale": 8}
            )
        axes.plot([], [], color=mark.color, label=label)
        axes.update_datalim(
            [
                *zip(mark.x, mark.y, strict=True),
                *(
                    (x + dx, y + dy)
                    for x, y, dx, dy in zip(mark.x, mark.y, mark.dx, mark.dy, strict=True)
                ),
            ]
        )
        axes.autoscale_view()
    elif isinstance(mark, HeatMap):
        _heat_map(figure, axes, mark)
    elif isinstance(mark, Contours):
        _contours(figure, axes, mark)
    else:
        _rule(axes, mark)


def _placed(marks: Sequence[Mark]) -> list[Mark]:
    """Points on a heat map's labels as points at its rows and columns."""
    maps = [mark for mark in marks if isinstance(mark, HeatMap)]
    if not maps:
        return list(marks)
    columns, rows = maps[0].x, maps[0].y
    return [
        replace(
            mark,
            x=tuple(float(columns.index(str(x))) for x in mark.x),
            y=tuple(float(rows.index(str(y))) for y in mark.y),
        )
        if isinstance(mark, Points)
        else mark
        for mark in marks
    ]


def _points(axes: Any, mark: Points, label: str | None) -> None:
    is_open = mark.symbol == "circle-open"
    style = {
        "color": mark.color,
        "marker": MARKERS[mark.symbol],
        "markersize": mark.size * 0.75,
        "markerfacecolor": "none" if is_open else mark.color,
        "linestyle": "none",
    }
    if mark.low:
        centre: Sequence[Any] = mark.x if mark.interval == "x" else mark.y
        reach = [
            [float(c) - low for c, low in zip(centre, mark.low, strict=True)],
            [high - float(c) for c, high in zip(centre, mark.high, strict=True)],
        ]
        error = {f"{mark.interval}err": reach, "capsize": 2, "elinewidth": mark.bar}
        axes.errorbar(mark.x, mark.y, label=label, **error, **style)
    else:
        axes.plot(mark.x, mark.y, label=label, **style)
    for x, y, text in zip(mark.x, mark.y, mark.labels or (), strict=False):
        axes.annotate(text, (x, y), (0, 4), textcoords="offset points", ha="center", size=6)


def _heat_map(figure: Any, axes: Any, mark: HeatMap) -> None:
    low, high = mark.reach or heat_map_reach(mark)
    image = axes.imshow(
        mark.z, aspect="auto", origin="lower", cmap=SCALES[mark.scale], vmin=low, vmax=high
    )
    axes.grid(visible=False)
    for labels, axis in ((mark.x, axes.xaxis), (mark.y, axes.yaxis)):
        step = math.ceil(len(labels) / 16)
        axis.set_ticks(range(0, len(labels), step), list(labels[::step]))
    figure.colorbar(image, ax=axes, label=mark.unit, pad=0.02)


def _contours(figure: Any, axes: Any, mark: Contours) -> None:
    levels = list(mark.levels)
    filled = axes.contourf(
        mark.x, mark.y, mark.z, levels=levels, cmap=SCALES["sequential"], extend="both", alpha=0.75
    )
    axes.contour(
        mark.x, mark.y, mark.z, levels=levels, colors="white", linewidths=0.5, linestyles="solid"
    )
    axes.grid(visible=False)
    figure.colorbar(filled, ax=axes, label=mark.unit, pad=0.02)


def _rule(axes: Any, mark: Rule) -> None:
    style = {"color": mark.color, "linestyle": DASHES[mark.dash], "linewidth": 1}
    if mark.axis == "x":
        axes.axvline(mark.at, **style)
        place = {"xy": (mark.at, 1), "xycoords": ("data", "axes fraction")}
        offset = {"xytext": (2, -2), "ha": "left", "va": "top"}
    else:
        axes.axhline(mark.at, **style)
        place = {"xy": (1, mark.at), "xycoords": ("axes fraction", "data")}
        offset = {"xytext": (-2, 2), "ha": "right", "va": "bottom"}
    if mark.name:
        text = {"color": mark.color, "size": 7, "textcoords": "offset points"}
        axes.annotate(mark.name, **place, **offset, **text)
