"""The page: a section a run, with summary, warnings, figures, texts and tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from steerlens.errors import FileError
from steerlens.files import packaged
from steerlens.plots import token_table_html
from steerlens.plots.scripts import CIRCUITSVIS, VEGA, document
from steerlens.runs.contents import TABLES
from steerlens.runs.html_report.facts import facts
from steerlens.runs.html_report.figures import figures, views
from steerlens.runs.html_report.listings import listing
from steerlens.runs.html_report.markup import Html, element, joined
from steerlens.runs.html_report.numbers import minus
from steerlens.runs.html_report.summary import summarise
from steerlens.runs.html_report.texts import generations, written
from steerlens.runs.reading import Run

TITLE = "steerlens report"
_FOOT = (
    "Made by steerlens from the files of the runs alone. The page holds all that it shows and asks "
    "no network for anything."
)


def report(runs: Sequence[Run]) -> str:
    """The HTML page of some runs, a section each.

    It holds the scripts and data that it needs, compressed, and asks no network for anything.
    Without scripts the tables and texts are there all the same.

    Args:
        runs: what `read_run` read, in the order in which they are shown.

    Returns:
        The page, to be written as UTF-8.

    Raises:
        FileError: `runs` is not a list of runs, or is empty.

    Examples:
        >>> page = sl.report([sl.read_run(run_folder)])
        >>> size = (folder / "report.html").write_text(page, encoding="utf-8")
    """
    unchecked: Any = runs  # what the annotation promises is what is checked here
    is_list = isinstance(unchecked, Sequence) and not isinstance(unchecked, str)
    if not is_list or not all(isinstance(run, Run) for run in unchecked):
        raise FileError(
            f"expected a list of runs, as [read_run(folder)], got {type(unchecked).__name__}"
        )
    if not runs:
        raise FileError("a report is of one run or more, got none")
    named = [(f"run{number}", run) for number, run in enumerate(runs, start=1)]
    entries = (element("li", element("a", _name(run), href=f"#{name}")) for name, run in named)
    body = joined(
        element("a", "Skip to the first run", href="#run1", class_="skip"),
        element(
            "header",
            element("h1", TITLE),
            element("nav", element("ul", *entries), aria_label="Runs"),
        ),
        element("main", *(_section(run, name) for name, run in named)),
        element("footer", element("p", _FOOT)),
        by="\n",
    )
    return document(
        f"{TITLE}: {', '.join(run.name for run in runs)}",
        body,
        [VEGA, CIRCUITSVIS] if any(run.views for run in runs) else [VEGA],
        style=packaged("runs.html_report", "page.css"),
        # Nobody could ask for the other columns.
        head="<noscript><style>th, td { display: table-cell !important }</style></noscript>",
        own=[packaged("runs.html_report", "page.js")],
    )


def _name(run: Run) -> str:
    return f"{run.command}: {run.name}"


def _section(run: Run, ident: str) -> Html:
    parts = []
    for title, content in _contents(run, ident):
        name = f"{ident}-{title.lower().replace(' ', '-')}"
        heading = element("h3", title, id=name)
        parts += [element("section", heading, content, aria_labelledby=name)] if content else []
    heading = element("h2", _name(run), id=f"{ident}-title")
    return element(
        "section", heading, *parts, id=ident, data_run=True, aria_labelledby=f"{ident}-title"
    )


def _contents(run: Run, ident: str) -> list[tuple[str, Html]]:
    """The parts of a run's section by title; a part without content is left out."""
    tables = run.tables
    sentences = [element("li", sentence) for sentence in summarise(run)]
    texts, damage = tables.get("generations"), tables.get("tokens")
    said = Html("") if texts is None else generations(texts, tables.get("sweep"))
    if run.texts:  # whose tokens are shaded where they stand
        said, damage = written(run.texts, damage, run.request.get("prompts", ())), None
    listed = [
        listing(name, tables[name], content, f"{ident}-table-{name}")
        for name, content in TABLES.items()
        if name in tables
    ]
    return [
        ("Answer", _answer(run)),
        ("Summary", element("ul", *sentences, class_="summary") if sentences else Html("")),
        ("Warnings", joined(*map(_warning, run.record["warnings"]))),
        ("What was run", facts(run)),
        ("Figures", figures(run, ident)),
        ("Views", views(run, ident)),
        ("Generations", said),
        ("Token damage", Html("") if damage is None else Html(token_table_html(damage))),
        ("Tables", joined(*listed)),
    ]


def _warning(text: str) -> Html:
    content = text.removeprefix("note: ")
    return element("p", element("b", "Warning"), ": ", content, class_="warning")


def _answer(run: Run) -> Html:
    """On top of a recommendation: steer or do not, sign by sign; nothing of other commands."""
    told = run.tables["recommendation"].attrs.get("told") if run.command == "recommend" else None
    if not isinstance(told, Mapping):
        return Html("")
    cards = []
    for sign, of_sign in told.items():
        verdict = "steer" if of_sign["steer"] else "do not steer"
        heading = element("h4", f"{sign.capitalize()} coefficient: {verdict}")
        told_of = (text.removeprefix(f"{sign}: ") for text in of_sign["sentences"])
        sentences = (element("p", minus(text[:1].upper() + text[1:])) for text in told_of)
        cards.append(element("div", heading, *sentences, class_="sign"))
    return element("div", joined(*cards), class_="answer")
