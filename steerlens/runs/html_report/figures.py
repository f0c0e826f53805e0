"""Figures and views of a run as elements of a page, and the scripts that draw them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from steerlens import plots
from steerlens.measure.plane import LossGeometry
from steerlens.plots import Figure
from steerlens.plots.figure import figure_element
from steerlens.plots.pages import circuitsvis_element
from steerlens.plots.scripts import CIRCUITSVIS, VEGA, policy, script_tags
from steerlens.runs.contents import PAGES
from steerlens.runs.html_report.markup import Html, element, joined
from steerlens.runs.reading import Run, View

MAX_OPEN = 4
"""Views of a page that are shown at once; more are folded away."""


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
        drawn_from = [tables[name] for name in self.tables]
        return None if any(table.empty for table in drawn_from) else self.draw(*drawn_from)


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


def figures(run: Run, ident: str) -> Html:
    """Every figure of a run with its title and caption; `ident` begins the ids of the elements."""
    drawn = [content.of(run.command, run.tables) for content in FIGURES]
    shown = (figure for figure in drawn if figure is not None)
    return joined(*(_figure(figure, f"{ident}-figure{n}") for n, figure in enumerate(shown, 1)))


def _figure(figure: Figure, name: str) -> Html:
    drawn = Html(figure_element(figure, name))
    caption = element("figcaption", figure.caption)
    return element("figure", element("h4", figure.title), drawn, caption)


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


def scripts_and_policy(runs: Sequence[Run], own: str) -> tuple[Html, Html]:
    """The elements with the scripts that draw these runs, and the policy: they and `own` alone."""
    scripts = [VEGA, CIRCUITSVIS] if any(run.views for run in runs) else [VEGA]
    tags = joined(*(Html(script_tags(script)) for script in scripts), by="\n")
    return tags, Html(policy(scripts, [own]))
