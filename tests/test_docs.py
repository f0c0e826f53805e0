"""The site: it builds without warnings or a network, every name is told, links go somewhere."""

import base64
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pytest
from browser import Browser

import steerlens as sl

ROOT = Path(__file__).resolve().parent.parent

# mkdocs as a program that cannot open a connection.
OFFLINE = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("the build asked for the network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""
BUILD = f"{OFFLINE}\nfrom mkdocs.__main__ import cli\ncli()"


def mkdocs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BUILD, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = mkdocs("build", "--strict", "--site-dir", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


# The build


def test_a_connection_would_be_seen() -> None:
    program = f"{OFFLINE}\nimport urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "the build asked for the network" in done.stderr


@pytest.mark.parametrize(
    ("text", "broken"),
    [("[a](index.md#here)\n\n## Here", ()), ("[a](gone.md) [b](#lost)", ("'gone.md'", "'#lost'"))],
)
def test_the_strict_build_sees_broken_links(
    tmp_path: Path, text: str, broken: tuple[str, ...]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n{text}\n")
    (tmp_path / "mkdocs.yml").write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nhooks: []\nplugins: []\n"
        "extra_css: []\nnav: [index.md]\n"
    )
    arguments = ("-f", str(tmp_path / "mkdocs.yml"), "--site-dir", str(tmp_path / "site"))
    done = mkdocs("build", "--strict", *arguments)
    assert (done.returncode == 0) == (broken == ()), done.stderr
    assert all(link in done.stderr for link in broken)


# What a page holds


class Page(HTMLParser):
    """Ids, links, and what a browser loads by itself."""

    LOADED: ClassVar = {
        **dict.fromkeys(("script", "img", "iframe", "source", "audio"), ("src", "srcset")),
        **dict.fromkeys(("video", "embed", "track", "input"), ("src", "poster")),
        **dict.fromkeys(("image", "use"), ("href", "xlink:href")),
        "object": ("data",),
    }
    RELATIONS = frozenset(
        "stylesheet icon preload prefetch preconnect dns-prefetch modulepreload manifest".split()
    )

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        self._in_style = tag == "style"
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and self.RELATIONS & set(given.get("rel", "").split()):
            self.loaded.append(given.get("href", ""))
        for name in self.LOADED.get(tag, ()):
            self.loaded += [part.split()[0] for part in given.get(name, "").split(",") if part]
        self.loaded += styled(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.loaded += styled(data)

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False


def styled(css: str) -> list[str]:
    """What a style sheet loads: @import and url(...)."""
    found = re.findall(r"@import\s+[\"']([^\"']+)|url\(\s*[\"']?([^\"')]+)", css)
    return [one or other for one, other in found]


def is_foreign(url: str) -> bool:
    return url.startswith("//") or (":" in url and not url.startswith(("data:", "#")))


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    loaded = {url for page in pages.values() for url in page.loaded}
    sheets = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    loaded |= {url for sheet in sheets for url in styled(sheet)}
    assert [url for url in loaded if is_foreign(url)] == []
    # It does see what is loaded; and the theme's script fetches a library for such diagrams.
    assert any("bundle" in url for url in loaded)
    assert any(url.endswith(".css") for url in loaded)
    assert not any('class="mermaid"' in path.read_text(encoding="utf-8") for path in pages)


def test_the_search_needs_no_server(site: Path, pages: dict[Path, Page]) -> None:
    """A page in a folder may not fetch, but it may run a script: the index is one."""
    assert "find_boundary" in (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert "assets/iframe-worker.js" in pages[site / "index.html"].loaded
    assert (site / "assets" / "iframe-worker.js").is_file()


def test_what_a_browser_would_load_is_seen() -> None:
    text = """<link rel="stylesheet" href="https://a/1"><script src="//b/2"></script><img src=http://c/3>
    <style>@import "https://d/4"; p { background: url(https://e/5) }</style>
    <p style="background: url('https://f/6')"><link rel="preconnect" href="https://g/7">
    <img srcset="h/8 1x, https://i/9 2x"><a href="https://not/loaded">a</a><img src="data:x">"""
    assert [url.rpartition("/")[2] for url in Page(text).loaded if is_foreign(url)] == list(
        "1234567" + "9"
    )


def broken(pages: Mapping[Path, Page], root: Path) -> list[str]:
    """Links and files of the pages that lead nowhere inside `root`."""
    found = []
    for path, page in pages.items():
        for url in dict.fromkeys([*page.links, *page.loaded]):
            if is_foreign(url) or url.startswith("data:"):
                continue
            where, _, anchor = url.partition("#")
            where = where.partition("?")[0]
            base = root if where.startswith("/") else path.parent
            target = (base / where.lstrip("/")).resolve() if where else path
            target = target / "index.html" if target.is_dir() else target
            is_there = target.is_file() and target.is_relative_to(root)
            of = pages.get(target)
            if not is_there or (anchor and (of is None or anchor not in of.ids)):
                found.append(f"{path.name}: {url}")
    return found


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page], tmp_path: Path) -> None:
    assert broken(pages, site) == []
    # Links that do not are seen.
    texts = {
        "a.html": '<p id="x"><a href="b.html#y">1</a><a href="#x">2</a><a href="https://c">3</a>'
        '<a href="gone.html">4</a><a href="b.html#gone">5</a><img src="../out.png">',
        "b.html": '<p id="y">',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path.parent / "out.png").touch()
    found = broken({tmp_path / name: Page(text) for name, text in texts.items()}, tmp_path)
    assert found == [f"a.html: {url}" for url in ("gone.html", "b.html#gone", "../out.png")]


# Every public name is told


def public() -> Iterator[tuple[str, str]]:
    """Room (or "") and name of all that is exported, by the package or by one of its rooms."""
    yield from (("", name) for name in sl.__all__ if not inspect.ismodule(getattr(sl, name)))
    for found in pkgutil.iter_modules(sl.__path__):
        if found.name == "__main__":
            continue
        module = importlib.import_module(f"steerlens.{found.name}")
        for name in getattr(module, "__all__", ()):
            inner = getattr(module, name)
            names = inner.__all__ if inspect.ismodule(inner) else (name,)
            yield from ((found.name, one) for one in names)


def untold(names: Iterable[tuple[str, str]], ids: set[str]) -> list[str]:
    return [
        f"{room or 'steerlens'}: {name}"
        for room, name in names
        if not any(re.fullmatch(rf"steerlens\.{room}[\w.]*\.{name}", where) for where in ids)
    ]


def test_every_public_name_is_on_a_page(site: Path, pages: dict[Path, Page]) -> None:
    ids = {where for path in (site / "reference").glob("*.html") for where in pages[path].ids}
    assert ("", "sweep") in list(public())
    assert {("circuits", "find_readers"), ("measure", "Concept")} <= set(public())
    assert untold(public(), ids) == []
    assert untold([("", "sweep"), ("", "gone"), ("circuits", "sweep")], ids) == [
        "steerlens: gone",
        "circuits: sweep",
    ]


def test_readme_changelog_and_contributing_are_pages(pages: dict[Path, Page], site: Path) -> None:
    assert "how-to/layer-and-coefficient.html" in pages[site / "index.html"].links
    assert {site / "changelog.html", site / "contributing.html"} <= set(pages)


# The notebooks and what they showed


def shown(text: str) -> list[tuple[str, str]]:
    """Number and kind of what a notebook's page shows, in order: code, text, table or figure."""
    found = re.findall(r'class="filename">(In \[\d+\])|data-cell="(Out \[\d+\])"><(\w+)', text)
    return [(ran or out, kind) for ran, out, kind in found]


def kept(notebook: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The same of a notebook."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            yield f"In [{cell['execution_count']}]", ""
        for output in cell.get("outputs", ()):
            kinds = {"image/png": "figure", "text/html": "div"} if "data" in output else {}
            (kind, *_) = [tag for mime, tag in kinds.items() if mime in output["data"]] or ["pre"]
            yield f"Out [{cell['execution_count']}]", kind


def test_a_notebook_is_shown_with_its_outputs_in_order(site: Path) -> None:
    listed = (site / "tutorials" / "index.html").read_text(encoding="utf-8")
    n_pictures = 0
    for path in sorted((ROOT / "tutorials").glob("*.ipynb")):
        assert f'href="{path.stem}.html"' in listed
        notebook = json.loads(path.read_text(encoding="utf-8"))
        text = (site / "tutorials" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert shown(text) == list(kept(notebook))
        outputs = [out for cell in notebook["cells"] for out in cell.get("outputs", ())]
        stored = [out["data"]["image/png"] for out in outputs if "image/png" in out.get("data", {})]
        for n, picture in enumerate(stored, 1):
            name = f"{path.stem}-{n}.png"
            assert text.index(f'src="{name}"') < text.index(f"Figure {n}: ")
            assert (site / "tutorials" / name).read_bytes() == base64.b64decode(picture)
        n_pictures += len(stored)
    assert n_pictures > 3


def test_the_search_finds_which_layer(site: Path, browser: Browser) -> None:
    browser.open(site / "index.html")
    found = """(() => {
      const box = document.querySelector(".md-search__input");
      box.focus(); box.value = "which layer";
      for (const kind of ["keyup", "input"]) box.dispatchEvent(new Event(kind, {bubbles: true}));
      return document.querySelector(".md-search-result__item > a")?.href;
    })()"""
    browser.wait(found)
    assert "how-to/layer-and-coefficient.html" in browser.driver.execute_script(f"return {found}")


# Every public callable has an example

# Without one of its own: why.
EXEMPT = {
    **dict.fromkeys(("export.to_repeng", "export.to_steering_vectors"), "needs another package"),
    "export.push_checkpoint": "needs a hub",
    **{f"measure.{k}Settings": "in a result" for k in ("Boundary", "Plane", "Study", "Sweep")},
    "load_model": "fetches 90 MB",
    "SteerlensError": "raised, not called",
    "measure.On": "a type",
}
# A function whose example shows it -> what it makes, of its room where none is named.
MADE_BY = {
    "behaviour": "measure.BehaviourResult",
    "circuits.attention_patterns": "Patterns",
    "circuits.compare_circuits": "Circuits Scores",
    "circuits.edge_readers": "Reader",
    "circuits.find_readers": "Readers",
    "circuits.find_writers": "Writers",
    "circuits.make_contrast": "Contrast",
    "circuits.make_graph": "Graph attribute run_edges run_nodes",
    "circuits.make_prompts": "Prompts",
    "circuits.token_projections": "Projections",
    "Study": "measure.BoundaryShape",
    "compare": "measure.Comparison",
    "find_boundary": "measure.BoundaryResult",
    "loss_geometry": "measure.LossGeometry",
    "plots.token_page": "Page",
    "recommend": "measure.Recommendation",
    "sweep": "measure.SweepResult",
}


def callables() -> dict[str, Any]:
    """Those of the package by name, and of its rooms of many functions by `room.name`."""
    found = {name: getattr(sl, name) for name in sl.__all__}
    for room in ("circuits", "export", "measure", "plots"):
        module = getattr(sl, room)
        found |= {f"{room}.{name}": getattr(module, name) for name in module.__all__}
    return {name: thing for name, thing in found.items() if callable(thing)}


def without_example(things: Mapping[str, Any]) -> list[str]:
    return [name for name, thing in things.items() if ">>> " not in (thing.__doc__ or "")]


def test_every_public_callable_has_an_example() -> None:
    found = callables()
    made = [
        name if "." in name else f"{maker.partition('.')[0]}.{name}"
        for maker, names in MADE_BY.items()
        for name in names.split()
    ]
    assert sorted(without_example(found)) == sorted([*EXEMPT, *made])
    assert without_example({maker: found[maker] for maker in MADE_BY}) == []

    def told() -> None:
        """Something.

        >>> told()
        """

    assert without_example({"told": told, "untold": pytest.fixture}) == ["untold"]
