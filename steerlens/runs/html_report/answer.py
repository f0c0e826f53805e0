"""The card on top of a recommendation: what to do, sign by sign."""

from collections.abc import Mapping

from steerlens.runs.html_report.markup import Html, element, joined
from steerlens.runs.html_report.numbers import minus
from steerlens.runs.reading import Run


def answer(run: Run) -> Html:
    """Steer or do not, with the sentences of each sign; nothing of other commands."""
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
