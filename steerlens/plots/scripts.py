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

from steerlens.files import packaged


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


@cache
def _packed(script: Script) -> str:
    packed = gzip.compress(script.read(), 9, mtime=0)
    # Its tenth byte names the system, in which Pythons differ: the same page has the same bytes.
    return base64.b64encode(packed[:9] + b"\x03" + packed[10:]).decode()


@cache
def _loader(script: Script) -> str:
    """Inflates the compressed script and runs it as if it had stood in the page, then draws."""
    loader, then = packaged("plots", "loader.js"), packaged("plots", f"{script.name}.js")
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
    main = f"<main><h1>{html.escape(title)}</h1>\n{body}\n</main>"
    return document(title, main, scripts, style=packaged("plots", "page.css"))


def document(
    title: str,
    body: str,
    scripts: Sequence[Script],
    *,
    style: str,
    head: str = "",
    own: Sequence[str] = (),
) -> str:
    """A whole page, with `own` scripts behind the others; these are all that its policy runs."""
    tags = [*map(script_tags, scripts), *(f'<script type="module">{text}</script>' for text in own)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n{policy(scripts, own)}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n"
        f"<style>\n{packaged('plots', 'figure.css')}{style}</style>{head}</head>\n"
    ) + "\n".join((f"<body>{body}", *tags, "</body></html>\n"))
