"""A figure: a chart in Vega-Lite, what it shows in words, and the ways to look at it."""

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steerlens.errors import InputError
from steerlens.files import write_bytes
from steerlens.plots.paper import DPI, on_paper, with_layers
from steerlens.plots.scripts import VEGA, drawn_element, page
from steerlens.plots.style import CONFIG, Spec

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.1.0.json"
VEGA_LITE_MIME = "application/vnd.vegalite.v6+json"
PICTURES = ("png", "svg", "pdf")
SUFFIXES = (*(f".{kind}" for kind in PICTURES), ".html")
SCALE = 1.5
"""Pixels of a PNG for each pixel of a chart."""


@dataclass(frozen=True)
class Figure:
    """A picture of some tables, in several frames where a slider moves.

    `caption` says in a sentence what is drawn and in which units; `spec` is the chart in Vega-Lite,
    with the rows that are drawn under `datasets`. Figures show themselves in notebooks: interactive
    where Vega-Lite's renderer is there, as a PNG elsewhere.

    Examples:
        >>> figure = sl.plots.layer_profile(sl.Study(model, pairs, directions).layers)
        >>> figure
        Figure('Layer by layer, unsteered', 4 panels)
        >>> figure.save(folder / "profile.html")
        >>> figure.chart.configure_axis(grid=False).save(folder / "mine.svg")
    """

    title: str
    caption: str
    spec: Spec = field(repr=False)
    frames: tuple[str, ...] = ()

    def __repr__(self) -> str:
        frames = f", {len(self.frames)} frames" if len(self.frames) > 1 else ""
        return f"Figure({self.title!r}, {len(self.spec.get('concat', ' '))} panels{frames})"

    @property
    def chart(self) -> Any:
        """As an Altair chart, to restyle and to combine with others.

        It is without the package's style, since Altair combines no charts that have one.
        """
        import altair as alt

        whole = ("$schema", "config", "datasets")
        spec = {key: of for key, of in self.spec.items() if key not in whole}
        # The rows are put in last: Altair tries every kind of chart on what it is given.
        return _filled(alt.Chart.from_dict(spec), self.spec["datasets"])

    def at(self, label: str | int) -> "Figure":
        """The figure with the frame of that label alone. Raises `InputError` on another label."""
        started = self.starting_at(label)
        datasets = {
            name: [row for row in rows if row.get("frame", str(label)) == str(label)]
            for name, rows in self.spec["datasets"].items()
        }
        params = [
            {key: of for key, of in param.items() if param["name"] != "frame" or key != "bind"}
            for param in started.spec["params"]
        ]
        spec = {**self.spec, "params": params, "datasets": datasets}
        return replace(self, spec=spec, frames=(str(label),))

    def starting_at(self, label: str | int) -> "Figure":
        """The figure whose slider starts at that frame. Raises `InputError` on another label."""
        if str(label) not in self.frames:
            labels = ", ".join(self.frames) or "none"
            raise InputError(f"the figure has no frame {str(label)!r}; it has {labels}")
        params = [
            {**param, "value": str(label)} if param["name"] == "frame" else param
            for param in self.spec["params"]
        ]
        return replace(self, spec={**self.spec, "params": params})

    def layers(self, labels: Sequence[str | int]) -> "Figure":
        """The figure with these layers alone, all of which stand out; of one, with intervals.

        Args:
            labels: Layers, or the names of other hooks, as the figure shows them.

        Raises:
            InputError: The figure has no such layer.
        """
        return replace(self, spec=with_layers(self.spec, [str(label) for label in labels]))

    def to_bytes(self, kind: str, *, width: str | None = None, dpi: int = DPI) -> bytes:
        """As the bytes of a PNG, SVG or PDF file, as in `save`: the frame shown first.

        The same figure gives the same PNG and SVG; a PDF has its parts in another order each time.
        Raises `InputError` on a `kind` other than "png", "svg" and "pdf".
        """
        if kind not in PICTURES:
            raise InputError(f"expected the kind {', '.join(PICTURES)}, got {kind!r}")
        import vl_convert

        spec = _still(self.spec)
        scale, ppi = SCALE, None
        if width is not None:
            spec, scale, ppi = on_paper(spec, width), 1.0, dpi
        if kind == "png":
            return bytes(vl_convert.vegalite_to_png(spec, scale=scale, ppi=ppi))
        if kind == "pdf":
            return bytes(vl_convert.vegalite_to_pdf(spec))
        svg = _numbered(vl_convert.vegalite_to_svg(spec))
        if width is not None:  # an SVG's own unit is a pixel; this was laid out in points
            svg = re.sub(r'\b(width|height)="([\d.]+)"', r'\1="\2pt"', svg, count=2)
        return svg.encode()

    def to_html(self) -> str:
        """As one HTML page, interactive, that asks no network for anything (about 0.5 MB)."""
        caption = f"<p>{html.escape(self.caption)}</p>"
        return page(self.title, f"{caption}\n{figure_element(self, 'figure')}", [VEGA])

    def save(self, path: str | Path, *, width: str | None = None, dpi: int = DPI) -> None:
        """Write a .png, .svg, .pdf (the first frame; see `at`) or .html file, by the name's end.

        Args:
            path: The file.
            width: "column" (3.3 inches) or "page" (6.8 inches) of a paper: panels, type and lines
                for that width, without the title, which belongs to the caption; by default as on
                a screen. Not for .html.
            dpi: Dots per inch of a PNG of a `width`.

        Raises:
            InputError: Another ending or width.
            FileError: It cannot be written.
        """
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise InputError(f"expected a name that ends in {', '.join(SUFFIXES)}, got {path.name}")
        if width is not None and path.suffix == ".html":
            raise InputError(f"a page fits its window: give no width, got {width!r}")
        if path.suffix == ".html":
            made = self.to_html().encode()
        else:
            made = self.to_bytes(path.suffix[1:], width=width, dpi=dpi)
        write_bytes(path, made)

    def _repr_mimebundle_(self, **_: Any) -> Mapping[str, Any]:
        return {
            VEGA_LITE_MIME: self.spec,
            "image/png": base64.b64encode(self.to_bytes("png")).decode(),
            "text/plain": repr(self),
        }


def make_figure(
    title: str,
    caption: str,
    tables: Mapping[str, pd.DataFrame],
    panels: Sequence[Spec],
    *,
    columns: int = 1,
    slider: str = "",
    is_one_legend: bool = False,
) -> Figure:
    """A figure of panels, side by side up to so many `columns`.

    Of `tables` with a column `frame` the rows of one of its values are shown at a time, which the
    `slider` names. With one legend, colours mean the same in all panels.
    """
    framed = {name: table.frame for name, table in tables.items() if "frame" in table}
    frames = tuple(dict.fromkeys(str(label) for labels in framed.values() for label in labels))
    for layer in (layer for panel in panels for layer in panel["layer"]):
        if layer["data"].get("name") in framed:
            layer["transform"].insert(0, {"filter": "datum.frame === frame"})
    colours = "shared" if is_one_legend else "independent"
    spec: Spec = {
        "$schema": SCHEMA,
        "config": CONFIG,
        "title": {"text": title, "fontSize": 16},
        "description": caption,
        "datasets": {name: records(table) for name, table in tables.items()},
    }
    params = [param for panel in panels for param in panel.pop("params")]
    if frames:
        bind = {"input": "select", "options": list(frames), "name": f"{slider} "}
        choice = {"bind": bind} if len(frames) > 1 else {}
        params.append({"name": "frame", "value": frames[0], **choice})
    if params:
        spec["params"] = params
    if len(panels) == 1:
        spec = {**panels[0], **spec}
    else:
        scales = dict.fromkeys(("color", "fill", "shape"), colours)
        spec |= {"concat": list(panels), "columns": columns, "resolve": {"scale": scales}}
    return Figure(title, caption, spec, frames)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as JSON has them: undefined is null, numbers have the five figures that are seen."""
    rows = table.to_dict("records")
    return [{str(name): _short(value) for name, value in row.items()} for row in rows]


def _short(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_short(number) for number in value.tolist()]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def figure_element(figure: Figure, name: str) -> str:
    """An HTML element of that id, drawn once Vega's script is there. Its text ends no script."""
    # The page has the title.
    spec = {key: value for key, value in figure.spec.items() if key != "title"}
    # The figure may be wider than its place, which then scrolls, by keyboard too.
    return (
        f'<div class="scroll-x" tabindex="0" role="group" aria-label="{html.escape(figure.title)}">'
        f"{drawn_element(VEGA, name, 'chart', spec)}</div>"
    )


def _filled(chart: Any, datasets: Mapping[str, Any]) -> Any:
    """The Altair chart with the rows themselves in place of their names."""
    import altair as alt

    if chart.data is not alt.Undefined:
        name = chart.data.to_dict().get("name")
        chart.data = alt.InlineData(values=datasets[name]) if name in datasets else chart.data
    for kind in ("concat", "layer"):
        for part in getattr(chart, kind, ()):
            _filled(part, datasets)
    return chart


def _still(piece: Any) -> Any:
    """The specification without zoom, which would clip every curve: slow to draw as a picture."""
    if isinstance(piece, list):
        return [
            _still(part)
            for part in piece
            if not isinstance(part, dict) or part.get("bind") != "scales"
        ]
    if isinstance(piece, dict):
        return {key: of if key == "datasets" else _still(of) for key, of in piece.items()}
    return piece


def _numbered(svg: str) -> str:
    """The SVG with the ids that Vega counts up from file to file counted from 1."""
    ids = dict.fromkeys(re.findall(r' id="((?:clip|gradient_)\d+)"', svg))
    names = {name: re.sub(r"\d+", str(n), name) for n, name in enumerate(ids, start=1)}
    return re.sub(
        r'( id="|url\(#)((?:clip|gradient_)\d+)(["\)])',
        lambda match: match[1] + names.get(match[2], match[2]) + match[3],
        svg,
    )
