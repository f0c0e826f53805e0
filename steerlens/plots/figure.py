"""A figure: a chart in Vega-Lite, what it shows in words, and the ways to look at it."""

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steerlens.errors import FileError, InputError
from steerlens.files import write_whole
from steerlens.plots.scripts import VEGA, WITHOUT_SCRIPTS, page
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
        label = str(label)
        if label not in self.frames:
            labels = ", ".join(self.frames) or "none"
            raise InputError(f"the figure has no frame {label!r}; it has {labels}")
        datasets = {
            name: [row for row in rows if row.get("frame", label) == label]
            for name, rows in self.spec["datasets"].items()
        }
        params = [
            {"name": "frame", "value": label} if param["name"] == "frame" else param
            for param in self.spec["params"]
        ]
        return replace(
            self, spec={**self.spec, "params": params, "datasets": datasets}, frames=(label,)
        )

    def to_bytes(self, kind: str) -> bytes:
        """As the bytes of a PNG, SVG or PDF file: the first frame, without a browser.

        The same figure gives the same PNG and SVG; a PDF has its parts in another order each time.
        Raises `InputError` on a `kind` other than "png", "svg" and "pdf".
        """
        if kind not in PICTURES:
            raise InputError(f"expected the kind {', '.join(PICTURES)}, got {kind!r}")
        import vl_convert

        spec = _still(self.spec)
        if kind == "png":
            return bytes(vl_convert.vegalite_to_png(spec, scale=SCALE))
        if kind == "pdf":
            return bytes(vl_convert.vegalite_to_pdf(spec))
        return _numbered(vl_convert.vegalite_to_svg(spec)).encode()

    def to_html(self) -> str:
        """As one HTML page, interactive, that asks no network for anything (about 0.5 MB)."""
        caption = f"<p>{html.escape(self.caption)}</p>"
        return page(self.title, f"{caption}\n{figure_element(self, 'figure')}", [VEGA])

    def save(self, path: str | Path) -> None:
        """Write a .png, .svg, .pdf (the first frame; see `at`) or .html file, by the name's end.

        Raises `InputError` on another ending and `FileError` where it cannot be written.
        """
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise InputError(f"expected a name that ends in {', '.join(SUFFIXES)}, got {path.name}")
        made = self.to_html().encode() if path.suffix == ".html" else self.to_bytes(path.suffix[1:])
        try:
            write_whole(path, lambda part: part.write_bytes(made))
        except OSError as error:
            raise FileError(f"cannot write {str(path)!r}: {error.strerror}") from error

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

    `tables` are what is drawn, by name. Where they have a column `frame`, the rows of one of its
    values are shown at a time, at first of the first; `slider` says what the values are. With one
    legend, colours mean the same in all panels.
    """
    framed = {name for name, table in tables.items() if "frame" in table}
    frames = tuple(
        dict.fromkeys(
            str(label) for name in tables if name in framed for label in tables[name].frame
        )
    )
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
    return [
        {str(name): _short(value) for name, value in row.items()}
        for row in table.to_dict("records")
    ]


def _short(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_short(number) for number in value.tolist()]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def figure_element(figure: Figure, name: str) -> str:
    """An HTML element with the figure, drawn once the page's script of Vega is there.

    `name` is the element's id, and must be one. Text in the figure ends no script.
    """
    # The page has the title.
    spec = {key: value for key, value in figure.spec.items() if key != "title"}
    data = json.dumps(spec, allow_nan=False).replace("<", "\\u003c")
    # The figure may be wider than its place, which then scrolls, by keyboard too.
    return (
        f'<div class="scroll-x" tabindex="0" role="group" aria-label="{html.escape(figure.title)}">'
        f'<div id="{name}" class="figure chart"><p>{WITHOUT_SCRIPTS}</p></div></div>\n'
        f'<script type="application/json" class="vega-data" data-for="{name}">{data}</script>'
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
