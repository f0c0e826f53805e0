"""Pages of tokens and attention: HTML that opens by itself, drawn with circuitsvis."""

import html
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from steerlens.errors import InputError
from steerlens.files import packaged, write_bytes
from steerlens.plots.checks import checked_table
from steerlens.plots.scripts import CIRCUITSVIS, drawn_element, page
from steerlens.tables import COLUMNS, hook_label

LOST, GAINED = "#d55e00", "#0072b2"  # as in tokens.css
HIGH, LOW = "#7b3294", "#1b7837"
NUMBERED = 0.25
"""Tokens are numbered from this share of the largest loss or gain on."""


@dataclass(frozen=True)
class Page:
    """A whole HTML page that asks no network for anything; it shows itself in notebooks."""

    title: str
    html: str

    def __repr__(self) -> str:
        return f"Page({self.title!r}, {len(self.html.encode()) / 1000:.0f} kB)"

    def save(self, path: str | Path) -> None:
        """Write an .html file, whole.

        Raises `InputError` on another ending and `FileError` where it cannot be written.
        """
        path = Path(path)
        if path.suffix != ".html":
            raise InputError(f"expected a name that ends in .html, got {path.name!r}")
        write_bytes(path, self.html.encode())

    def _repr_html_(self) -> str:
        """A frame that holds the page, and cannot reach the notebook around it."""
        return (
            f'<iframe title="{html.escape(self.title)}" sandbox="allow-scripts" '
            'style="width:100%;height:32rem;border:0;resize:vertical" '
            f'srcdoc="{html.escape(self.html)}"></iframe>'
        )


def token_page(tokens: pd.DataFrame) -> Page:
    """What `token_damage` found (columns `tokens`), token by token.

    For each prompt and coefficient the text as `token_table_html` marks it, then, to be hovered
    over, every token's projection unsteered and steered (residual units) and its damage (nats).
    Raises `InputError` when columns are missing or there is no row.

    Examples:
        >>> table = sl.token_damage(model, ["the river was so cold"], vector, coefficients=[4])
        >>> page = sl.plots.token_page(table)
        >>> page.save(folder / "tokens.html")
    """
    checked_table(tokens, COLUMNS["tokens"], "the table of token_damage")
    later = tokens[tokens.position > 0]
    reach = _reach(later[["projection", "steered_projection"]].to_numpy())
    damage = _reach(tokens.damage_nats.to_numpy())
    body = [_style("tokens.css"), _legend(tokens)]
    body.append(
        f"<p>Below each text, by value: projection on the direction (residual units; purple above "
        f"0, green below, full shade {reach:.3g}, the first token not counted), and damage (nats; "
        f"full shade {damage:.3g}). A token shows its value under the pointer.</p>"
    )
    for number, (heading, rows) in enumerate(_groups(tokens)):
        words = [shown_token(row) for row in rows]
        body += [f"<h2>{html.escape(heading)}</h2>", _text(rows, damage)]
        for name, what, full, colours in (
            ("projection", "Projection, unsteered (residual units)", reach, (HIGH, LOW)),
            ("steered_projection", "Projection, steered (residual units)", reach, (HIGH, LOW)),
            ("damage_nats", "Damage (nats)", damage, (LOST, GAINED)),
        ):
            props = _coloured(words, [row[name] for row in rows], full, colours)
            body += [f"<p>{what}</p>"]
            body += [circuitsvis_element(f"{name}-{number}", "ColoredTokens", props)]
    return _page("Tokens: read, steered, damaged", body)


def token_table_html(tokens: pd.DataFrame) -> str:
    """A few kB of HTML for a notebook or a report: each text with its tokens marked, no script.

    From columns `tokens`. Framed: where the direction is read; underlined: where it is added; red
    and blue: tokens that lost and gained logprob, the largest with their loss in nats above them.
    Raises `InputError` as `token_page`.

    Examples:
        >>> table = sl.token_damage(model, ["the river was so cold"], vector, coefficients=[4])
        >>> "river" in sl.plots.token_table_html(table)
        True
    """
    checked_table(tokens, COLUMNS["tokens"], "the table of token_damage")
    damage = _reach(tokens.damage_nats.to_numpy())
    parts = [_style("tokens.css"), _legend(tokens)]
    for heading, rows in _groups(tokens):
        parts += [f"<p><b>{html.escape(heading)}</b></p>", _text(rows, damage)]
    return f'<div class="steerlens-tokens">{"".join(parts)}</div>'


def attention_page(
    tokens: Sequence[str],
    heads: Sequence[str],
    patterns: Mapping[str, Float[np.ndarray, "head query key"]],
) -> Page:
    """Attention patterns of some heads on one text, one view for each of `patterns`.

    A pattern's rows sum to 1: how much each token (query) takes from every token up to it (key).
    `patterns` have a name each, such as unsteered and steered; `heads` name the heads. Raises
    `InputError` when there is none, or a pattern is not `[head, token, token]`.

    Examples:
        >>> patterns = {"unsteered": np.array([[[1.0, 0.0], [0.3, 0.7]]])}
        >>> sl.plots.attention_page(["the", "river"], ["L3H0"], patterns).title
        'Attention of the top heads'
    """
    drawn = _arrays("patterns", patterns, (len(heads), len(tokens), len(tokens)))
    body = [
        "<p>Share of a token's attention (rows, from 0 to 1 at full shade) that goes to each token "
        "up to it (columns).</p>",
    ]
    for number, (name, pattern) in enumerate(drawn.items()):
        props = {
            "tokens": [_visible(token) for token in tokens],
            "attention": pattern.tolist(),
            "attentionHeadNames": list(heads),
        }
        body.append(f"<h2>{html.escape(name)}: {html.escape(', '.join(heads))}</h2>")
        view = circuitsvis_element(f"attention-{number}", "AttentionHeads", props, title=name)
        body.append(view)
    return _page("Attention of the top heads", body)


def projection_page(
    tokens: Sequence[str],
    layers: Sequence[str],
    projections: Mapping[str, Float[np.ndarray, "layer token"]],
) -> Page:
    """One text's tokens by their projection on each layer's direction (residual units).

    Each of `projections`, such as unsteered and steered, is a line of a layer; their shades are the
    same within a layer. Raises `InputError` when there is none, or one is not `[layer, token]`.

    Examples:
        >>> projections = {"unsteered": np.array([[0.5, -2.0]])}
        >>> page = sl.plots.projection_page(["the", "river"], ["layer 2"], projections)
        >>> page.save(folder / "projections.html")
    """
    drawn = _arrays("projections", projections, (len(layers), len(tokens)))
    body = [
        "<p>Projection on the direction of each layer, residual units: purple above 0, green "
        "below, full shade at the layer's largest, the first token not counted. A token shows its "
        "value under the pointer.</p>",
    ]
    words = [_visible(token) for token in tokens]
    for row, layer in enumerate(layers):
        reach = _reach(np.stack([values[row, 1:] for values in drawn.values()]))
        is_last = " open" if row == len(layers) - 1 else ""
        body.append(
            f"<details{is_last}><summary>{html.escape(layer)}: full shade {reach:.3g}</summary>"
        )
        for number, (name, values) in enumerate(drawn.items()):
            props = _coloured(words, values[row].tolist(), reach, (HIGH, LOW))
            given = (f"layer-{row}-{number}", "ColoredTokens", props)
            shown = circuitsvis_element(*given, title=f"{layer}, {name}")
            body += [f"<p>{html.escape(name)}</p>", shown]
        body.append("</details>")
    return _page("Projection on the direction, token by token", body)


def reading_page(words: pd.DataFrame, texts: pd.DataFrame | None = None) -> Page:
    """What directions say: the tokens they promote and suppress, the texts they read, by token.

    Args:
        words: Of `sl.measure.vocabulary`.
        texts: Of `sl.measure.readings`, drawn as `projection_page` draws one text.

    Raises:
        InputError: Columns are missing or there is no row.

    Examples:
        >>> words = sl.measure.vocabulary(model, vector, n_tokens=3, n_random=19)
        >>> texts = sl.measure.readings(model, vector, ["the river", "I was cold"])
        >>> sl.plots.reading_page(words, texts).title
        'What the direction says'
    """
    checked_table(words, COLUMNS["vocabulary"], "a table of vocabulary")
    n_random = words.attrs.get("settings", {}).get("n_random", "some")
    body = [
        f"<p>Logits that a direction alone adds, beside the mean of the first token of {n_random} "
        "random directions; p is the rank of the first token among those, and over all hooks. A "
        "direction may steer and promote nothing.</p>",
        "<table><tr><th>hook<th>lens<th>side<th>tokens (logits)<th>random<th>p<th>p, hooks</tr>",
    ]
    for group in _groups_of(words, ["hook_name", "lens", "side"]):
        first = group[0]
        told = ", ".join(f"{shown_token(row)!r} {row['logit']:+.2f}" for row in group)
        cells = [hook_label(first["hook_name"]), first["lens"], first["side"], told]
        cells += [f"{first['random_logit']:+.2f}", f"{first['p_value']:.3g}"]
        cells += [f"{first['p_layers']:.3g}"]
        body.append("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells) + "</tr>")
    body.append("</table>")
    if texts is not None:
        body += _read_texts(texts)
    return _page("What the direction says", body)


def _read_texts(texts: pd.DataFrame) -> list[str]:
    """Each text of a table of readings, its tokens by their projection."""
    checked_table(texts, COLUMNS["readings"], "a table of readings")
    later = texts[texts.position > 0].groupby("hook_name")
    reach = {hook: _reach(rows.projection.to_numpy()) for hook, rows in later}
    body = [
        "<p>Texts by their mean projection (residual units; purple above 0, green below, full "
        "shade at the hook's largest, the first token not counted). A token shows its value under "
        "the pointer.</p>"
    ]
    for number, group in enumerate(_groups_of(texts, ["hook_name", "side", "rank"])):
        first = group[0]
        full = reach[first["hook_name"]]
        heading = (
            f"{hook_label(first['hook_name'])}, {first['side']} {first['rank']}: prompt "
            f"{first['prompt']}, mean {first['mean_projection']:+.3g}, full shade {full:.3g}"
        )
        values = [row["projection"] for row in group]
        props = _coloured([shown_token(row) for row in group], values, full, (HIGH, LOW))
        body.append(f"<p>{html.escape(heading)}</p>")
        body.append(circuitsvis_element(f"reading-{number}", "ColoredTokens", props, title=heading))
    return body


def _groups_of(table: pd.DataFrame, keys: list[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each group, in the order in which groups are met."""
    for _, group in table.groupby(keys, sort=False, dropna=False):
        yield [{**row} for _, row in group.iterrows()]


def _arrays(what: str, given: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Each of the given, by name, as an array of that shape; or an `InputError`."""
    if not isinstance(given, Mapping) or not given:
        raise InputError(f"expected one or more {what} by name, got {given!r:.80}")
    try:
        arrays = {name: np.asarray(values, dtype=float) for name, values in given.items()}
    except (TypeError, ValueError) as error:
        raise InputError(f"expected {what} of shape {shape} in numbers ({error})") from error
    for values in arrays.values():
        if values.shape != shape:
            raise InputError(f"expected {what} of shape {shape}, got {values.shape}")
    return arrays


def circuitsvis_element(name: str, view: str, props: Mapping[str, Any], *, title: str = "") -> str:
    """An element with the id `name` that circuitsvis draws once the page's script of it is there.

    `view` is a component of circuitsvis; the `title` is kept beside its `props`, for a report. NaN
    and inf are left blank. Text stays text, in the page and in what circuitsvis makes of it.
    """
    given = {"view": view, "title": title, "props": _inert(dict(props))}
    return drawn_element(CIRCUITSVIS, name, "view", given)


def _inert(value: Any) -> Any:
    """For circuitsvis, which sets tokens as HTML: a word joiner behind `<` and `&`, NaN as null."""
    if isinstance(value, dict):
        return {name: _inert(of) for name, of in value.items()}
    if isinstance(value, list):
        return [_inert(of) for of in value]
    if isinstance(value, str):
        return re.sub("([<&])(?!\u2060)", "\\1\u2060", value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _style(name: str) -> str:
    return f"<style>{packaged('plots', name).rstrip()}</style>"


def _page(title: str, body: Sequence[str]) -> Page:
    # circuitsvis draws for white paper.
    styled = "\n".join([_style("circuitsvis.css"), *body])
    return Page(title, page(title, styled, [CIRCUITSVIS]))


def _coloured(
    words: Sequence[str], values: Sequence[float], reach: float, colours: tuple[str, str]
) -> dict[str, Any]:
    """Props of `ColoredTokens`: colours of values above and below 0, full at `reach`."""
    props = {"tokens": list(words), "values": list(values), "maxValue": reach, "minValue": -reach}
    return props | {"positiveColor": colours[0], "negativeColor": colours[1]}


def _reach(values: Float[np.ndarray, "..."]) -> float:
    """The largest absolute value that is finite; 1 where there is none but 0."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def _groups(tokens: pd.DataFrame) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each text at each coefficient: a heading in words, and its rows."""
    keys = ["prompt", "side", "hook_name", "coefficient"]
    for rows in _groups_of(tokens, keys):
        first = rows[0]
        added = float(first["coefficient"]) * (-1 if first["side"] == "negative" else 1)
        damage = pd.Series([row["damage_nats"] for row in rows if row["is_label"]]).mean()
        verb = "gained" if damage < 0 else "lost"
        told = f"{abs(damage):.3f} nats per token {verb}" if math.isfinite(damage) else "undefined"
        where = f"{first['side']}, coefficient {added:+g} at {first['hook_name']}"
        yield f"Prompt {first['prompt']}, {where}: {told}", rows


def _legend(tokens: pd.DataFrame) -> str:
    damage = _reach(tokens.damage_nats.to_numpy())
    readouts = ", ".join(dict.fromkeys(map(str, tokens.readout_hook)))
    return (
        '<p class="legend">Framed: the token that the direction is read at. Underlined: where it '
        "is added, coefficients in residual units. Italic: not counted in the mean. Red: lost "
        f"logprob; blue: gained; full shade {damage:.3g} nats. A number above a token is its loss "
        f"in nats (a gain is negative), from {NUMBERED * damage:.2g} on. Projections are read at "
        f"{html.escape(readouts)}. What is undefined has no shade: the first token, which nothing "
        "predicts, and all of a text on which the steered model overflows.</p>"
    )


def _text(rows: Sequence[Mapping[str, Any]], reach: float) -> str:
    spans = [_span(row, reach) for row in rows]
    return f'<div class="steerlens-tokens"><div class="text">{"".join(spans)}</div></div>'


def _span(row: Mapping[str, Any], reach: float) -> str:
    """One token, marked."""
    damage = float(row["damage_nats"])
    marks = {"read": row["is_read"], "added": row["is_steered"], "aside": not row["is_label"]}
    marks |= {"lost": damage > 0, "gained": damage < 0}
    names = " ".join(name for name, is_set in marks.items() if is_set)
    # At most 70%: text has to be read on it, in light and in dark.
    by = 0.0 if math.isnan(damage) else 70 * min(abs(damage) / reach, 1)
    shade = f' style="--by:{by:.0f}"' if damage and not math.isnan(damage) else ""
    word = html.escape(shown_token(row))
    if abs(damage) >= NUMBERED * reach:
        word = f"<ruby>{word}<rt>{damage:+.2g}</rt></ruby>"
    told = (
        f"{row['raw_token']}: {row['logprob_nats']:.3g} to {row['steered_logprob_nats']:.3g} nats"
    )
    return f'<span class="{names}"{shade} title="{html.escape(told)}">{word}</span>'


def shown_token(row: Mapping[str, Any]) -> str:
    """A token's text; as the vocabulary spells it where the text shows nothing of it."""
    text = str(row["token"])
    seen = "".join(text.split())
    if not text or "\ufffd" in seen or not seen.isprintable():
        return str(row["raw_token"])
    return _visible(text)


def _visible(text: str) -> str:
    """A text with a sign at its line ends."""
    return text.replace("\r", "\u240d").replace("\n", "\u23ce\n")
