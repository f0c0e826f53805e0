"""HTML by elements: whatever is not already HTML is escaped."""

import html


class Html(str):
    """Text that is HTML already, and is not escaped again."""

    __slots__ = ()


VOID = ("input", "meta", "br")


def element(name: str, *content: str, **attributes: str | int | bool | None) -> Html:
    """An element with its content and attributes, in which plain text is escaped.

    An underscore in a name is written as a hyphen, one at its end not at all. True is an attribute
    without a value; False and None leave it out.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{joined(*content)}</{name}>")


def joined(*content: str, by: str = "") -> Html:
    """Pieces of content one after another, plain text escaped; `by` between them."""
    return Html(by.join(c if isinstance(c, Html) else html.escape(c) for c in content))
