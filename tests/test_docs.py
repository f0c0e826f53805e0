"""The site: it builds without warnings or a network, every name is told, every link goes somewhere.

Python on its pages is run: `pycon` blocks as doctests, `python` blocks on a stand-in for the
default model, page by page; only the call of `compare`, half an hour on a CPU, is checked by its
signature.
"""

import ast
import doctest
import importlib
import inspect
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pytest
from _pytest.doctest import _get_checker, get_optionflags
from conftest import bridge, build_llama, build_tokenizer

import steerlens as sl
from steerlens.cli import app

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [*DOCS.glob("*.md"), *DOCS.glob("how-to/*.md")]

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


def test_notebooks_changelog_and_contributing_are_pages(site: Path) -> None:
    listed = (site / "tutorials" / "index.html").read_text(encoding="utf-8")
    for path in (ROOT / "tutorials").glob("*.ipynb"):
        assert f'href="{path.stem}.html"' in listed
        assert (site / "tutorials" / f"{path.stem}.html").is_file()
    assert (site / "changelog.html").is_file()
    assert (site / "contributing.html").is_file()


# Every public callable has an example

# Without one of its own: why.
EXEMPT = {
    **dict.fromkeys(("export.to_repeng", "export.to_steering_vectors"), "needs another package"),
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


# Examples on the pages


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks, also those set in by a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [inspect.cleandoc(f"\n{body}") for _, body in found]


def with_blocks(language: str) -> list[Any]:
    return [
        pytest.param(path, id=str(path.relative_to(DOCS)))
        for path in PAGES
        if blocks(path.read_text(encoding="utf-8"), language)
    ]


def test_blocks_are_found_where_they_are() -> None:
    text = "```python\na\n```\n1. b\n\n    ```python\n    c\n      d\n    ```\n```sh\ne\n```\n"
    assert blocks(text, "python") == ["a", "c\n  d"]


@pytest.mark.parametrize("path", with_blocks("pycon"))
def test_formulas_hold_as_written(path: Path, pytestconfig: pytest.Config) -> None:
    session = "\n".join(blocks(path.read_text(encoding="utf-8"), "pycon"))
    test = doctest.DocTestParser().get_doctest(session, {}, path.name, str(path), 0)
    told: list[str] = []
    runner = doctest.DocTestRunner(_get_checker(), optionflags=get_optionflags(pytestconfig))
    assert runner.run(test, out=told.append).failed == 0, "".join(told)
    assert len(test.examples) > 3


def strings(value: Any) -> Iterator[str]:
    """All text in plain values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def stand_in() -> Any:
    """A random-init model of the default model's depth that knows the shipped data's words."""
    lines = [
        json.loads(line)
        for path in ROOT.glob("data/sentiment/*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    texts = [*strings(lines), *sl.data.neutral_texts(), "The weather today is"]
    words = dict.fromkeys(word for text in texts for word in text.split())
    tokenizer = build_tokenizer(words=list(words))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    return bridge(build_llama(n_layers=30, **sizes), tokenizer)


@pytest.fixture(scope="module")
def default_model() -> Any:
    return stand_in()


@pytest.mark.parametrize("path", with_blocks("python"))
def test_python_on_a_page_runs(
    path: Path, default_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sl, "load_model", lambda name: default_model)
    # Fewer pairs and texts than ship, to be quick.
    load = sl.ContrastivePairs.load

    def load_few(source: Any, **of: Any) -> sl.ContrastivePairs:
        pairs = load(source, **of)
        return pairs if len(pairs) < 8 else pairs[:8]

    monkeypatch.setattr(sl.ContrastivePairs, "load", load_few)
    few = sl.data.neutral_texts()[:8]
    monkeypatch.setattr("steerlens.measure.texts.neutral_texts", lambda: few)
    namespace: dict[str, Any] = {}
    for block in blocks(path.read_text(encoding="utf-8"), "python"):
        calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
        compared = [call for call in calls if ast.unparse(call.func) == "sl.compare"]
        for call in compared:
            named = {str(keyword.arg): keyword.value for keyword in call.keywords}
            inspect.signature(sl.compare).bind(*call.args, **named)
        if not compared:
            exec(compile(block, str(path), "exec"), namespace)


# Commands on the pages


def commands() -> dict[str, Any]:
    """Every command by its words."""
    from typer.main import get_command

    found: dict[str, Any] = {}
    for name, command in get_command(app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {n}": c for n, c in inner.items()} if inner else {name: command}
    return found


def command_lines(text: str) -> list[list[str]]:
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").split("\n")
    words = [shlex.split(line, comments=True) for line in lines]
    return [some[1:] for some in words if some[:1] == ["steerlens"]]


def check_command(words: list[str]) -> str:
    """The command that the words begin with; its options are parsed, nothing is run."""
    known = commands()
    name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
    rest = words[len(name.split()) :]
    known[name].make_context(name, rest)
    return name


@pytest.mark.parametrize("path", with_blocks("sh"))
def test_commands_on_a_page_are_commands(path: Path) -> None:
    for words in command_lines(path.read_text(encoding="utf-8")):
        check_command(words)


def test_every_command_has_an_example_and_a_wrong_one_is_seen() -> None:
    text = (DOCS / "how-to" / "command-line.md").read_text(encoding="utf-8")
    assert {check_command(words) for words in command_lines(text)} == set(commands())
    for words in (["sweep", "--out", "a", "--coefficent", "1"], ["bake", "v"], ["sweeep"]):
        with pytest.raises(Exception, match=r"No such option|Missing|sweeep"):
            check_command(words)
