"""A page of HTML as a parser sees it: elements, text, and what its scripts hold."""

import json
from html.parser import HTMLParser
from typing import Any

VOID = ("meta", "br", "input", "link", "img")
Attributes = dict[str, str | None]


class Outline(HTMLParser):
    """Elements with their attributes and places, the text outside scripts, circuitsvis's data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, Attributes]] = []
        self.words: list[str] = []
        self.spans: list[tuple[Attributes, str]] = []
        self.views: list[Any] = []
        self.open: list[str] = []
        self.stray: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "span":
            self.spans.append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open[-1:] == [tag]:
            self.open.pop()
        else:
            self.stray.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            if self.elements[-1][1].get("class") == "circuitsvis-data":
                self.views.append(json.loads(data))
        elif "style" not in self.open:
            self.words.append(data)
            if self.spans:
                attrs, text = self.spans[-1]
                self.spans[-1] = (attrs, text + data)

    @property
    def is_whole(self) -> bool:
        """Every element is closed, in order."""
        return not self.open and not self.stray

    @property
    def text(self) -> str:
        """The text with single spaces."""
        return " ".join("".join(self.words).split())

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]

    @property
    def acting(self) -> list[str]:
        """Attributes that load or run something."""
        names = [name for _, attrs in self.elements for name in attrs]
        return [n for n in names if n.startswith("on") or n in ("src", "href", "srcdoc")]

    def all(self, tag: str) -> list[Attributes]:
        return [attrs for name, attrs in self.elements if name == tag]
