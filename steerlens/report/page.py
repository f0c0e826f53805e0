"""The page: a section a run, with summary, warnings, figures, texts and tables."""

import html
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from steerlens.errors import ReportError
from steerlens.plots import token_table_html
from steerlens.plots.figure import Figure, figure_element
from steerlens.plots.pages import circuitsvis_element
from steerlens.plots.scripts import CIRCUITSVIS, FIGURE_STYLE, VEGA, policy, script_tags
from steerlens.report.contents import FIGURES, PAGES, TABLES
from steerlens.report.facts import facts
from steerlens.report.listings import listing
from steerlens.report.markup import Html, element, joined
from steerlens.report.reading import Run
from steerlens.report.summary import summarise
from steerlens.report.texts import generations

TITLE = "steerlens report"
MAX_OPEN = 4
"""Views of a page that are shown at once; more are folded away."""

_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{policy}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def report(runs: Sequence[Run]) -> str:
    """The HTML page of some runs, a section each, in the order given.

    It holds the scripts and data that it needs, compressed, and asks no network for anything.
    Without scripts the tables and texts are there all the same. Raises `ReportError` on what is not
    a list of runs, or an empty one.

    Examples:
        >>> page = sl.report([sl.read_run(run_folder)])
        >>> size = (folder / "report.html").write_text(page, encoding="utf-8")
    """
    given: Any = runs  # what the annotation promises is what is checked here
    is_list = isinstance(given, Sequence) and not isinstance(given, str)
    if not is_list or not all(isinstance(run, Run) for run in given):
        raise ReportError(
            f"expected a list of runs, as [read_run(folder)], got {type(given).__name__}"
        )
    if not runs:
        raise ReportError("a report is of one run or more, got none")
    sections = [_section(run, f"run{number}") for number, run in enumerate(runs, start=1)]
    scripts = [VEGA, CIRCUITSVIS] if any(run.views for run in runs) else [VEGA]
    contents = element(
        "nav",
        element("ul", *(_entry(run, f"run{n}") for n, run in enumerate(runs, start=1))),
        aria_label="Runs",
    )
    body = joined(
        element("a", "Skip to the first run", href="#run1", class_="skip"),
        element("header", element("h1", TITLE), contents),
        element("main", *sections),
        element("footer", element("p", _FOOT)),
        *(Html(script_tags(script)) for script in scripts),
        Html(f'<script type="module">{_resource("page.js")}</script>'),
        by="\n",
    )
    title = f"{TITLE}: {', '.join(run.name for run in runs)}"
    return _FRAME.format(
        policy=policy(scripts, [_resource("page.js")]),
        title=html.escape(title),
        style=FIGURE_STYLE + _resource("page.css"),
        body=body,
    )


def _resource(name: str) -> str:
    return files("steerlens.report").joinpath(name).read_text(encoding="utf-8")


_FOOT = (
    "Made by steerlens from the files of the runs alone. The page holds all that it shows and asks "
    "no network for anything."
)


def _section(run: Run, ident: str) -> Html:
    parts = [_part(ident, title, content) for title, content in _contents(run, ident) if content]
    heading = element("h2", _name(run), id=f"{ident}-title")
    return element("section", heading, *parts, id=ident, aria_labelledby=f"{ident}-title")


def _contents(run: Run, ident: str) -> list[tuple[str, Html]]:
    """The parts of a run's section by title; a part without content is left out."""
    tables = run.tables
    said = [element("li", sentence) for sentence in summarise(run)]
    figures = [figure for of in FIGURES if (figure := of.of(run.command, tables)) is not None]
    drawn = [
        _figure(figure, f"{ident}-figure{number}") for number, figure in enumerate(figures, start=1)
    ]
    texts = tables.get("generations")
    damage = tables.get("tokens")
    listed = [
        listing(name, tables[name], content, f"{ident}-table-{name}")
        for name, content in TABLES.items()
        if name in tables
    ]
    return [
        ("Summary", element("ul", *said, class_="summary") if said else Html("")),
        ("Warnings", joined(*(_warning(str(text)) for text in run.record["warnings"]))),
        ("What was run", facts(run)),
        ("Figures", joined(*drawn)),
        ("Views", _views(run, ident)),
        ("Generations", Html("") if texts is None else generations(texts, tables.get("sweep"))),
        ("Token damage", Html("") if damage is None else Html(token_table_html(damage))),
        ("Tables", joined(*listed)),
    ]


def _part(ident: str, title: str, content: Html) -> Html:
    name = f"{ident}-{title.lower().replace(' ', '-')}"
    return element("section", element("h3", title, id=name), content, aria_labelledby=name)


def _warning(text: str) -> Html:
    return element(
        "p", element("b", "Warning"), ": ", text.removeprefix("note: "), class_="warning"
    )


def _figure(figure: Figure, name: str) -> Html:
    drawn = Html(figure_element(figure, name))
    caption = element("figcaption", figure.caption)
    return element("figure", element("h4", figure.title), drawn, caption)


def _views(run: Run, ident: str) -> Html:
    """The views of each page; many of them are folded away until they are asked for."""
    parts = []
    for page, content in PAGES.items():
        views = [view for view in run.views if view.page == page]
        shown = joined(
            *(
                joined(
                    element("p", view.title, class_="note"),
                    Html(
                        circuitsvis_element(
                            f"{ident}-{page}{number}", content.view, _rounded(view.props)
                        )
                    ),
                )
                for number, view in enumerate(views)
            )
        )
        if len(views) > MAX_OPEN:
            shown = element("details", element("summary", f"{len(views)} views"), shown)
        if views:
            note = element("p", content.meaning, class_="note")
            parts.append(joined(element("h4", content.title), note, shown))
    return joined(*parts)


def _rounded(value: Any) -> Any:
    """Numbers with four digits, which is what can be seen of them."""
    if isinstance(value, Mapping):
        return {name: _rounded(of) for name, of in value.items()}
    if isinstance(value, list):
        return [_rounded(of) for of in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _name(run: Run) -> str:
    return f"{run.command}: {run.name}"


def _entry(run: Run, ident: str) -> Html:
    return element("li", element("a", _name(run), href=f"#{ident}"))
