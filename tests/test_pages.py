"""Pages: what they show, that text stays text, and that they ask nobody."""

import base64
import gzip
import html
import json
import math
import re
import socket
from importlib.resources import files
from pathlib import Path
from typing import Any

import circuitsvis
import numpy as np
import pandas as pd
import pytest
from outline import Outline

from steerlens.errors import FileError, InputError
from steerlens.plots.pages import (
    Page,
    attention_page,
    circuitsvis_element,
    projection_page,
    token_page,
    token_table_html,
)
from steerlens.tables import to_frame

HOSTILE = "</script><img src=x onerror=alert(1)>"
JOINER = "\u2060"
TAGS = """html head meta title style body main h1 h2 p b div span ruby rt script noscript details
summary""".split()


def row(position: int, token: str, damage: float = math.nan, **given: Any) -> dict[str, Any]:
    return {
        "prompt": "a",
        "side": "positive",
        "hook_name": "blocks.1.hook_resid_post",
        "layer": 1,
        "coefficient": 4.0,
        "readout_hook": "blocks.2.hook_resid_post",
        "position": position,
        "token_id": position,
        "token": token,
        "raw_token": f"raw{position}",
        "is_read": False,
        "is_steered": True,
        "is_label": position > 0,
        "projection": 1.5 * position,
        "steered_projection": -3.0 * position,
        "logprob_nats": -1.0,
        "steered_logprob_nats": -1.0 - damage,
        "damage_nats": damage,
        "kl_nats": abs(damage),
        **given,
    }


@pytest.fixture
def tokens() -> pd.DataFrame:
    """Five tokens: the first, one that lost most, one that gained, a little loss, read and raw."""
    rows = [
        row(0, "<s>", is_steered=False),
        row(1, " the", 2.0),
        row(2, "\n", -0.5),
        row(3, "x", 0.25),
        row(4, "\ufffd", 0.0, is_read=True, is_label=False),
    ]
    return to_frame(rows, "tokens", {})


def classes(seen: Outline) -> list[set[str]]:
    return [set((attrs["class"] or "").split()) for attrs, _ in seen.spans]


def views(page: str) -> list[Any]:
    return Outline(page).views


def test_tokens_are_marked(tokens: pd.DataFrame) -> None:
    seen = Outline(token_table_html(tokens))
    assert classes(seen) == [
        {"aside"},
        {"added", "lost"},
        {"added", "gained"},
        {"added", "lost"},
        {"added", "read", "aside"},
    ]
    # The largest are numbered: from a quarter of 2 nats on.
    assert [text for _, text in seen.spans][:3] == ["<s>", " the+2", "\u23ce\n-0.5"]
    assert [text for _, text in seen.spans][3] == "x"
    assert seen.spans[4][1].startswith("raw4")
    shades = [attrs.get("style") for attrs, _ in seen.spans]
    assert shades == [None, "--by:70", "--by:18", "--by:9", None]
    for words in ("Framed", "Underlined", "nats", "residual units", "blocks.2.hook_resid_post"):
        assert words in seen.text
    # 2, -0.5 and 0.25 nats over the three labels.
    assert "Prompt a, positive, coefficient +4" in seen.text
    assert "0.583 nats per token lost" in seen.text


def test_the_negative_side_is_pushed_the_other_way(tokens: pd.DataFrame) -> None:
    assert "coefficient -4" in token_table_html(tokens.assign(side="negative"))
    assert "coefficient +4" in token_table_html(tokens)


def test_a_notebook_view_is_a_few_kb(tokens: pd.DataFrame) -> None:
    longer = pd.concat([tokens] * 12)
    assert len(token_table_html(longer).encode()) < 10_000


def test_a_token_page_draws_every_value(tokens: pd.DataFrame) -> None:
    page = token_page(tokens)
    assert classes(Outline(page.html)) == classes(Outline(token_table_html(tokens)))
    unsteered, steered, damage = views(page.html)
    assert {view["view"] for view in views(page.html)} == {"ColoredTokens"}
    assert unsteered["props"]["values"] == [0, 1.5, 3, 4.5, 6]
    assert steered["props"]["values"] == [0, -3, -6, -9, -12]
    # The first token, which nothing predicts, is left blank.
    assert damage["props"]["values"] == [None, 2, -0.5, 0.25, 0]
    assert (steered["props"]["maxValue"], damage["props"]["maxValue"]) == (12, 2)
    words = ["<s>", " the", "\u23ce\n", "x", "raw4"]
    assert [t.replace(JOINER, "") for t in damage["props"]["tokens"]] == words


def test_several_prompts_and_coefficients(tokens: pd.DataFrame) -> None:
    more = pd.concat([tokens, tokens.assign(coefficient=-4.0), tokens.assign(prompt="b")])
    page = token_page(more)
    assert len(views(page.html)) == 9
    found = re.findall(r'<div id="([^"]*)"', page.html)
    assert len(set(found)) == 9
    assert page.html.count("<h2>") == 3


def test_undefined_values_are_blank(tokens: pd.DataFrame) -> None:
    undefined = tokens.assign(steered_projection=np.nan, damage_nats=np.nan)
    _, steered, damage = views(token_page(undefined).html)
    assert steered["props"]["values"] == damage["props"]["values"] == [None] * 5
    assert not any({"lost", "gained"} & of for of in classes(Outline(token_table_html(undefined))))


def test_what_is_no_table_of_tokens(tokens: pd.DataFrame) -> None:
    for table in (tokens.drop(columns="damage_nats"), tokens[:0]):
        for draw in (token_page, token_table_html):
            with pytest.raises(InputError, match="table of token_damage"):
                draw(table)


PATTERN = np.array([[[1.0, 0.0], [0.25, 0.75]]])


def test_attention_is_drawn_head_by_head() -> None:
    page = attention_page(["a", "b\n"], ["L1H2"], {"Unsteered": PATTERN, "Steered": PATTERN / 2})
    first, second = views(page.html)
    assert first["view"] == "AttentionHeads"
    assert first["props"]["attention"] == PATTERN.tolist()
    assert second["props"]["attention"] == (PATTERN / 2).tolist()
    assert first["props"]["attentionHeadNames"] == ["L1H2"]
    assert first["props"]["tokens"] == ["a", "b\u23ce\n"]
    assert "Unsteered: L1H2" in page.html
    with pytest.raises(InputError, match=r"shape \(1, 3, 3\), got \(1, 2, 2\)"):
        attention_page(["a", "b", "c"], ["L1H2"], {"Unsteered": PATTERN})


def test_projections_share_a_scale_within_a_layer() -> None:
    """The first token, far from all others in many models, does not set it."""
    low = np.array([[9.0, 1.0, -2.0], [0.0, 3.0, 1.0]])
    page = projection_page(["a", "b", "c"], ["layer 0", "layer 1"], {"Off": low, "On": low + 1})
    props = [view["props"] for view in views(page.html)]
    assert [of["values"] for of in props] == [[9, 1, -2], [10, 2, -1], [0, 3, 1], [1, 4, 2]]
    assert [of["maxValue"] for of in props] == [2, 2, 4, 4]
    assert "layer 1: full shade 4" in page.html
    with pytest.raises(InputError, match=r"shape \(1, 3\), got \(2, 3\)"):
        projection_page(["a", "b", "c"], ["layer 0"], {"Off": low})


# Text stays text


def hostile_pages(tokens: pd.DataFrame) -> dict[str, str]:
    texts = ["prompt", "side", "hook_name", "readout_hook", "token", "raw_token"]
    table = tokens.assign(**dict.fromkeys(texts, HOSTILE))
    names = [HOSTILE, HOSTILE]
    return {
        "tokens": token_page(table).html,
        "table": token_table_html(table),
        "attention": attention_page(names, [HOSTILE], {HOSTILE: PATTERN}).html,
        "projections": projection_page(names, [HOSTILE], {HOSTILE: PATTERN[0, :1]}).html,
    }


@pytest.mark.parametrize("name", ["tokens", "table", "attention", "projections"])
def test_a_hostile_token_stays_text(name: str, tokens: pd.DataFrame) -> None:
    page = hostile_pages(tokens)[name]
    seen = Outline(page)
    assert set(seen.tags) <= set(TAGS)
    assert seen.acting == []
    shown = seen.text + json.dumps(seen.views, ensure_ascii=False).replace(JOINER, "")
    assert HOSTILE in shown
    not_so = Outline(page + "<img src=x onerror=y>")
    assert not_so.tags[-1] == "img"
    assert not_so.acting == ["src", "onerror"]


@pytest.mark.parametrize("text", [HOSTILE, "<b", "</", "<!--", "&lt;", "&#60;b>", "a<b>&amp;<"])
def test_circuitsvis_is_given_no_tag_and_no_entity(text: str) -> None:
    """Its tokens are set as inner HTML: what a parser makes of them must be the text itself."""
    element = circuitsvis_element("view", "ColoredTokens", {"tokens": [text]})
    (token,) = views(element)[0]["props"]["tokens"]
    inside = Outline(token)
    assert inside.tags == []
    assert "".join(inside.words).replace(JOINER, "") == text
    as_it_is = Outline(f"<span>{text}x</span>")
    assert as_it_is.tags != ["span"] or "".join(as_it_is.words) != text + "x"


# One file, no network


def test_the_script_travels_inside(tokens: pd.DataFrame) -> None:
    page = token_page(tokens).html
    (packed,) = re.findall(
        r'<script type="text/plain" id="packed-circuitsvis">(.*?)</script>', page
    )
    source = files("circuitsvis").joinpath("dist/cdn/iife.js").read_bytes()
    assert gzip.decompress(base64.b64decode(packed)) == source
    assert "DecompressionStream" in page
    assert len(page.encode()) < 550_000 < len(source)


def test_a_page_shows_itself_in_a_frame_of_its_own(tokens: pd.DataFrame) -> None:
    page = token_page(tokens)
    frame = page._repr_html_()
    (held,) = re.findall(r'srcdoc="([^"]*)"', frame)
    assert html.unescape(held) == page.html
    assert 'sandbox="allow-scripts"' in frame
    assert repr(page) == f"Page('Tokens: read, steered, damaged', {len(page.html) / 1000:.0f} kB)"


def test_displaying_opens_no_socket(
    tokens: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def refuse(*given: Any, **named: Any) -> Any:
        asked.append(given)
        raise OSError("no network here")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    page = token_page(tokens)
    page._repr_html_()
    page.save(tmp_path / "tokens.html")
    token_table_html(tokens)
    assert asked == []
    # What circuitsvis does by itself, to see that a look at the network would be seen.
    circuitsvis.tokens.colored_tokens(["a"], [1.0])._repr_html_()
    assert asked != []


def test_a_page_is_saved_whole(tokens: pd.DataFrame, tmp_path: Path) -> None:
    page = Page("a", "<p>é</p>")
    page.save(tmp_path / "a.html")
    assert (tmp_path / "a.html").read_bytes() == "<p>é</p>".encode()
    with pytest.raises(InputError, match=r"ends in \.html"):
        page.save(tmp_path / "a.txt")
    with pytest.raises(FileError, match="cannot write"):
        page.save(tmp_path / "none" / "a.html")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
