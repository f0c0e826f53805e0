"""Pages that ask no network for anything: the scripts travel inside, compressed."""

import base64
import gzip
import html
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Script:
    """A script that a package ships: the package, the file in it, and what runs once it is there.

    `then` is JavaScript.
    """

    package: str
    path: str
    then: str


PLOTLY = Script(
    "plotly",
    "package_data/plotly.min.js",
    """
const dark = matchMedia("(prefers-color-scheme: dark)");
function tinted() {
  const ink = dark.matches ? "#d8d8d8" : "#222", grid = dark.matches ? "#3a3a3a" : "#e4e4e4";
  const clear = "rgba(0,0,0,0)", change = {paper_bgcolor: clear, plot_bgcolor: clear,
    "font.color": ink, "legend.bgcolor": clear};
  return [ink, grid, change];
}
function recolour(element) {
  const [ink, grid, change] = tinted();
  for (const key of Object.keys(element.layout))
    if (/^[xy]axis/.test(key)) {
      change[key + ".gridcolor"] = grid; change[key + ".zerolinecolor"] = grid;
      change[key + ".linecolor"] = ink;
    }
  return Plotly.relayout(element, change);
}
for (const data of document.querySelectorAll("script.plotly-data")) {
  const element = document.getElementById(data.dataset.for), given = JSON.parse(data.textContent);
  delete given.layout.width;
  element.style.minHeight = "";
  Plotly.newPlot(element, given.data, {...given.layout, autosize: true},
    {responsive: true, displaylogo: false}).then(() => recolour(element));
  dark.addEventListener("change", () => recolour(element));
}
""",
)
CIRCUITSVIS = Script(
    "circuitsvis",
    "dist/cdn/iife.js",
    """
for (const data of document.querySelectorAll("script.circuitsvis-data")) {
  const given = JSON.parse(data.textContent);
  CircuitsVis.render(data.dataset.for, CircuitsVis[given.view], given.props);
}
""",
)

# The compressed script is text of a type that no browser runs; it is inflated, then run as if it
# had stood in the page.
_LOADER = """
(async () => {
  const packed = document.getElementById("packed-NAME").textContent;
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  THEN
})().catch((error) => {
  for (const element of document.querySelectorAll(".figure"))
    element.textContent = "This browser cannot show the figure: " + error;
});
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fdfdfc }
@media (prefers-color-scheme: dark) { :root { --ink: #d8d8d8; --paper: #161616 } }
body { font-family: system-ui, sans-serif; line-height: 1.45; margin: 1.2rem auto; max-width: 75rem;
  padding: 0 1rem; color: var(--ink); background: var(--paper) }
.figure { max-width: 100%; overflow-x: auto }
"""


@cache
def _packed(script: Script) -> str:
    source = files(script.package).joinpath(script.path).read_bytes()
    return base64.b64encode(gzip.compress(source, 9, mtime=0)).decode()


def script_tags(script: Script) -> str:
    """The elements that bring a script into a page, compressed; once a page, before `</body>`.

    What the script draws are the elements made by `plotly_element` and `circuitsvis_element`. A
    browser without `DecompressionStream` says so in place of the figures.
    """
    name = script.package
    # The page is complete when modules run, so the figures may come after this.
    loader = _LOADER.replace("NAME", name).replace("THEN", script.then)
    return (
        f'<script type="text/plain" id="packed-{name}">{_packed(script)}</script>\n'
        f'<script type="module">{loader}</script>'
    )


def page(title: str, body: str) -> str:
    """An HTML page around a body. The title is text; the body is HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body><main><h1>{html.escape(title)}</h1>\n{body}\n</main></body></html>\n"
    )
