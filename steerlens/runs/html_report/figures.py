"""Figures and views of a run as elements of a page, and the scripts that draw them."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pandas as pd

from steerlens import plots
from steerlens.errors import FileError, InputError
from steerlens.plots import Figure
from steerlens.plots.figure import figure_element
from steerlens.plots.pages import circuitsvis_element
from steerlens.plots.paper import DPI, layers_of
from steerlens.plots.sweeps import furthest_cell
from steerlens.runs.contents import PAGES
from steerlens.runs.html_report.markup import Html, element, joined
from steerlens.runs.reading import Run, View, read_run
from steerlens.tables import hook_label

MAX_OPEN = 4
"""Views of a page that are shown at once; more are folded away."""


class FigureContent(NamedTuple):
    """A figure: the commands it belongs to, the tables it is drawn from, and what draws it."""

    commands: tuple[str, ...]
    tables: tuple[str, ...]
    draw: Callable[..., Figure]


def _loss_geometry(points: pd.DataFrame, contours: pd.DataFrame, shape: pd.DataFrame) -> Figure:
    return plots.loss_geometry(SimpleNamespace(points=points, contours=contours, shape=shape))


FIGURES: tuple[FigureContent, ...] = (
    FigureContent(("sweep",), ("sweep",), plots.tradeoff),
    FigureContent(("sweep",), ("sweep",), plots.heat_maps),
    FigureContent(("sweep",), ("sweep",), plots.dose_response),
    FigureContent(("behave",), ("behaviour",), plots.behaviour_by_coefficient),
    FigureContent(("boundary",), ("layers",), plots.boundary),
    FigureContent(("compare",), ("comparison",), plots.comparison),
    FigureContent(("circuits",), ("writers", "readers"), plots.components),
    FigureContent(("circuits",), ("edges",), plots.circuit_graph),
    FigureContent(("geometry",), ("geometry", "contours", "shape"), _loss_geometry),
    FigureContent(("sweep", "boundary"), ("layers",), plots.layer_profile),
    FigureContent(("sweep",), ("points",), plots.differences),
)
"""Every figure, in the order in which they are shown."""


def figures(run: Run, ident: str) -> Html:
    """Every figure of a run with its title and caption; `ident` begins the ids of the elements."""
    parts = []
    for n, figure in enumerate(figures_of(run), 1):
        drawn = Html(figure_element(figure, f"{ident}-figure{n}"))
        caption = element("figcaption", figure.caption)
        parts.append(element("figure", element("h4", figure.title), drawn, caption))
    return joined(*parts)


def figures_of(run: Run) -> list[Figure]:
    """Every figure whose tables a run has, with rows; sliders over layers start at its answer."""
    there = {name: table for name, table in run.tables.items() if len(table)}
    drawn = [
        content.draw(*(there[name] for name in content.tables))
        for content in FIGURES
        if run.command in content.commands and {*content.tables} <= there.keys()
    ]
    start = _answered(run.tables)
    return [figure.starting_at(start) if start in figure.frames else figure for figure in drawn]


def _answered(tables: Mapping[str, pd.DataFrame]) -> str | None:
    """Label of the hook that a run recommends, else of the furthest cell of its sweep."""
    if "recommendation" in tables and len(tables["recommendation"]):
        return hook_label(str(tables["recommendation"].hook_name.iloc[0]))
    cell = furthest_cell(tables["sweep"]) if "sweep" in tables else None
    return None if cell is None else hook_label(str(cell.hook_name))


def save_figures(
    run_folder: str | Path,
    out: str | Path,
    *,
    kind: str = "pdf",
    width: str | None = None,
    dpi: int = DPI,
    layers: Sequence[str | int] = (),
) -> list[Path]:
    """Write every figure of a run to a folder, a file each, named after its title.

    Args:
        run_folder: The `--out` folder of a command.
        out: The folder to write to; it is made where it is not there.
        kind: "pdf", "svg", "png" or "html".
        width: "column" or "page" of a paper; by default as on a screen (see `Figure.save`).
        dpi: Dots per inch of a PNG of a `width`.
        layers: The layers to show in figures that have them, and a file for each where a figure
            shows one at a time; by default all of them, and the frame shown first.

    Returns:
        The files.

    Raises:
        FileError: The run cannot be read, or a file not written.
        InputError: Another kind or width, or no figure has one of the layers.

    Examples:
        >>> [path.name for path in sl.runs.save_figures(run_folder, folder / "figures")][:2]
        ['projection-against-degradation.pdf', 'every-cell.pdf']
    """
    labels = [str(layer) for layer in layers]
    chosen = {
        re.sub(r"\W+", "-", f"{figure.title} {part}".strip().lower()): shown
        for figure in figures_of(read_run(run_folder))
        for part, shown in _of_layers(figure, labels)
    }
    out = Path(out)
    if not chosen:
        raise InputError(f"no figure of {str(run_folder)!r} has the layers {', '.join(labels)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write {str(out)!r}: {error.strerror}") from error
    for name, figure in chosen.items():
        figure.save(out / f"{name}.{kind}", width=width, dpi=dpi)
    return [out / f"{name}.{kind}" for name in chosen]


def _of_layers(figure: Figure, labels: Sequence[str]) -> list[tuple[str, Figure]]:
    """What is shown of a figure with these layers, by what its file's name ends in."""
    framed = [label for label in labels if label in figure.frames]
    if framed:
        return [(label, figure.at(label)) for label in framed]
    kept = [label for label in labels if label in layers_of(figure.spec)]
    return [("", figure.layers(kept) if kept else figure)] if kept or not labels else []


def views(run: Run, ident: str) -> Html:
    """The views of each page; many of them are folded away until they are asked for."""
    parts = []
    for page, content in PAGES.items():
        on_page = [view for view in run.views if view.page == page]
        if not on_page:
            continue
        shown = joined(*(_view(view, f"{ident}-{page}{n}") for n, view in enumerate(on_page)))
        if len(on_page) > MAX_OPEN:
            shown = element("details", element("summary", f"{len(on_page)} views"), shown)
        note = element("p", content.meaning, class_="note")
        parts.append(joined(element("h4", content.title), note, shown))
    return joined(*parts)


def _view(view: View, name: str) -> Html:
    drawn = Html(circuitsvis_element(name, PAGES[view.page].view, _rounded(view.props)))
    return joined(element("p", view.title, class_="note"), drawn)


def _rounded(value: Any) -> Any:
    """Numbers with four digits, which is what can be seen of them."""
    if isinstance(value, Mapping):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
