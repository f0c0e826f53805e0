"""Pages that ask no network for anything: the scripts travel inside, compressed."""

import base64
import gzip
import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Script:
    """A script that a package ships; `NAME.js` beside this module runs once it is there."""

    name: str
    read: Callable[[], bytes]


@cache
def _vega() -> bytes:
    """Vega, Vega-Lite and vega-embed, with the interpreter that needs no `eval`."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).encode()


@cache
def _circuitsvis() -> bytes:
    return files("circuitsvis").joinpath("dist/cdn/iife.js").read_bytes()


VEGA = Script("vega", _vega)
CIRCUITSVIS = Script("circuitsvis", _circuitsvis)

WITHOUT_SCRIPTS = "A script inside this page draws this figure; scripts are off here."
"""What stands in place of a figure until it is drawn."""

FIGURE_STYLE = """
.scroll-x, .view { max-width: 100%; overflow-x: auto }
.chart svg { display: block }
.chart details summary { opacity: 1 }
@media screen and (prefers-color-scheme: dark) {
  /* Light and dark change places, hues stay. */
  .chart svg.marks { filter: invert(0.9) hue-rotate(180deg) }
}
@media print {
  .chart svg { max-width: 100%; height: auto }
  .chart details { display: none }
}
"""
"""How the elements of figures look: charts on a dark page and on paper too."""

_STYLE = (
    FIGURE_STYLE
    + """:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fdfdfc }
@media (prefers-color-scheme: dark) { :root { --ink: #d8d8d8; --paper: #161616 } }
body { font-family: system-ui, sans-serif; line-height: 1.45; margin: 1.2rem auto; max-width: 75rem;
  padding: 0 1rem; color: var(--ink); background: var(--paper) }
.frames { display: flex; flex-wrap: wrap; gap: 0.5rem; align-items: center; max-width: 40rem }
.frames input { flex: 1 1 12rem; accent-color: currentcolor }
"""
)


@cache
def _packed(script: Script) -> str:
    packed = gzip.compress(script.read(), 9, mtime=0)
    # Its tenth byte names the system, in which Pythons differ: the same page has the same bytes.
    return base64.b64encode(packed[:9] + b"\x03" + packed[10:]).decode()


@cache
def _loader(script: Script) -> str:
    """Inflates the compressed script and runs it as if it had stood in the page, then draws."""
    here = files("steerlens.plots")
    loader, then = (
        here.joinpath(name).read_text(encoding="utf-8")
        for name in ("loader.js", f"{script.name}.js")
    )
    return loader.replace("NAME", script.name).replace("THEN", then)


def script_tags(script: Script) -> str:
    """The elements that bring a script into a page, compressed; once a page, before `</body>`."""
    # The page is complete when modules run, so the figures may come after this.
    return (
        f'<script type="text/plain" id="packed-{script.name}">{_packed(script)}</script>\n'
        f'<script type="module">{_loader(script)}</script>'
    )


def drawn_element(script: Script, name: str, look: str, given: Any) -> str:
    """An element of that id, drawn from what is `given` once the script is there.

    No text of it may end the element or begin another.
    """
    data = json.dumps(given, allow_nan=False).replace("<", "\\u003c")
    return (
        f'<div id="{name}" class="figure {look}"><p>{WITHOUT_SCRIPTS}</p></div>\n'
        f'<script type="application/json" class="{script.name}-data" data-for="{name}">'
        f"{data}</script>"
    )


def policy(scripts: Sequence[Script], own: Sequence[str] = ()) -> str:
    """The element of a page's head by which a browser runs these and `own` scripts alone."""
    texts = [text for script in scripts for text in (script.read(), _loader(script).encode())]
    digests = (sha256(text).digest() for text in [*texts, *(text.encode() for text in own)])
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'\">"
    )


def page(title: str, body: str, scripts: Sequence[Script]) -> str:
    """An HTML page around a body; its policy runs these scripts alone and fetches nothing."""
    tags = "\n".join(map(script_tags, scripts))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n{policy(scripts)}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body><main><h1>{html.escape(title)}</h1>\n{body}\n</main>\n{tags}\n</body></html>\n"
    )
