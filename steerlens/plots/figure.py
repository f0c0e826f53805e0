"""A figure: what it shows as data, and the ways to look at it."""

import base64
import html
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steerlens.errors import FileError, InputError
from steerlens.plots.marks import Frame, Layout
from steerlens.plots.scripts import PLOTLY, WITHOUT_SCRIPTS, page

PLOTLY_MIME = "application/vnd.plotly.v1+json"
SUFFIXES = (".png", ".svg", ".html")


@dataclass(frozen=True)
class Figure:
    """A picture of some tables: panels of marks, in several frames where a slider moves.

    `caption` says in a sentence what is drawn and in which units. Figures show themselves in
    notebooks: interactive where plotly's renderer is there, as a PNG elsewhere.

    Examples:
        >>> figure = sl.plots.layer_profile(sl.measure_layers(model, pairs, directions))
        >>> figure
        Figure('Layer by layer, unsteered', 4 panels)
        >>> figure.save(folder / "profile.html")
        >>> figure.to_plotly().layout.title.text
        'Layer by layer, unsteered'
    """

    title: str
    caption: str
    frames: tuple[Frame, ...] = field(repr=False)
    layout: Layout = field(default_factory=Layout, repr=False)

    def __post_init__(self) -> None:
        if not self.frames or len({len(frame.panels) for frame in self.frames}) != 1:
            raise InputError("a figure has one frame or more, each with as many panels")

    def __repr__(self) -> str:
        frames = "" if len(self.frames) == 1 else f", {len(self.frames)} frames"
        return f"Figure({self.title!r}, {len(self.frames[0].panels)} panels{frames})"

    def at(self, label: str | int) -> "Figure":
        """The figure with the frame of that label alone. Raises `InputError` on another label."""
        found = [frame for frame in self.frames if frame.label == str(label)]
        if not found:
            labels = ", ".join(frame.label for frame in self.frames)
            raise InputError(f"the figure has no frame {label!r}; it has {labels}")
        return replace(self, frames=(found[0],))

    def to_plotly(self) -> Any:
        """As a `plotly.graph_objects.Figure`, with a slider where there are several frames."""
        from steerlens.plots.interactive import draw

        return draw(self.title, self.frames, self.layout)

    def to_bytes(self, kind: str) -> bytes:
        """As the bytes of a PNG or SVG file (`kind` "png" or "svg"): the first frame, no browser.

        Raises `InputError` on another kind.
        """
        if kind not in ("png", "svg"):
            raise InputError(f"expected the kind png or svg, got {kind!r}")
        from steerlens.plots.static import draw

        return draw(self.title, self.frames[0].panels, self.layout, kind=kind)

    def to_html(self) -> str:
        """As one HTML page, interactive, that asks no network for anything (about 2 MB)."""
        caption = f"<p>{html.escape(self.caption)}</p>"
        return page(self.title, f"{caption}\n{plotly_element(self, 'figure')}", [PLOTLY])

    def save(self, path: str | Path) -> None:
        """Write a .png, .svg (the first frame; see `at`) or .html file, by the name's end.

        Raises `InputError` on another ending and `FileError` where it cannot be written.
        """
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise InputError(f"expected a name that ends in {', '.join(SUFFIXES)}, got {path.name}")
        made = self.to_html().encode() if path.suffix == ".html" else self.to_bytes(path.suffix[1:])
        try:
            path.write_bytes(made)
        except OSError as error:
            raise FileError(f"cannot write {str(path)!r}: {error.strerror}") from error

    def _repr_mimebundle_(self, **_: Any) -> Mapping[str, Any]:
        return {
            PLOTLY_MIME: self.to_plotly().to_plotly_json(),
            "image/png": base64.b64encode(self.to_bytes("png")).decode(),
            "text/plain": repr(self),
        }


def plotly_element(figure: Figure, name: str) -> str:
    """An HTML element with the figure, drawn once the page's plotly script is there.

    `name` is the element's id, and must be one. Text in the figure ends no script.
    """
    from plotly.io import to_json

    data = to_json(figure.to_plotly(), validate=False).replace("<", "\\u003c")
    height = int(figure.to_plotly().layout.height)
    # The figure may be wider than its place, which then scrolls, by keyboard too.
    return (
        f'<div class="scroll-x" tabindex="0" role="group" aria-label="{html.escape(figure.title)}">'
        f'<div id="{name}" class="figure" style="min-height:{height}px">'
        f"<p>{WITHOUT_SCRIPTS}</p></div></div>\n"
        f'<script type="application/json" class="plotly-data" data-for="{name}">{data}</script>'
    )
