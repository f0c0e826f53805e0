"""Texts that a model wrote, side by side: a row a prompt and hook, a column a coefficient."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from steerlens.plots.pages import shown_token
from steerlens.runs.contents import text_name
from steerlens.runs.html_report.markup import Html, element, joined
from steerlens.runs.html_report.numbers import change, short, signed
from steerlens.steering import parse_coefficient
from steerlens.tables import hook_label

MAX_TEXTS = 1000
"""Texts of `behave` that a page shows; the run folder has all of them."""
FULL, LEAST = 8.0, 1.0
"""Minus the unsteered logprob of a token, nats: at full shade, and from which on it is shaded."""
_BUDGET = {
    None: "",
    "yes": "within budget; ",
    "no": "beyond the budget; ",
    "undecided": "within budget or not: undecided; ",
}
_ENDS = {
    "stop": "ended by itself",
    "length": "cut at the asked-for length",
    "context": "cut: the context is full",
    "overflow": "no text: the model overflowed",
}
_SCORES = ("concept", "logprob")
"""Of a text's scores those that are shown below it."""


def generations(table: pd.DataFrame, cells: pd.DataFrame | None) -> Html:
    """The greedy texts of `sweep` and `recommend`; `cells` say which are within the budget."""
    coherent: dict[tuple[Any, Any], str] = {}
    if cells is not None:
        coherent = {(c.hook_name, c.coefficient): str(c.coherent) for c in cells.itertuples()}
    rows = []
    groups: Any = table.groupby(["prompt", "hook_name"], sort=False)
    for (prompt, hook_name), group in groups:
        columns = []
        for row in group.sort_values("coefficient", kind="stable").itertuples():
            c, budget = row.coefficient, _BUDGET[coherent.get((hook_name, row.coefficient))]
            end = element("p", budget, _ENDS.get(row.end, row.end), class_="note")
            heading = f"c = {short(c)}{', unsteered' if c == 0 else ''}"
            columns.append(_column(heading, end, _said(row.text)))
        title, layer = f"Prompt: {prompt}", f"Steered at layer {hook_label(str(hook_name))}"
        top = joined(element("h4", title), element("p", layer, class_="note"))
        grid = _grid(f"{title}: {layer}", columns)
        rows.append(element("div", top, grid, class_="prompt"))
    note = (
        "Greedy continuations at several coefficients (c, residual units); c = 0 is the unsteered "
        "model. One greedy text per cell shows how it reads, not how often."
    )
    return joined(element("p", note, class_="note"), *rows)


def written(
    texts: Sequence[Mapping[str, Any]], tokens: pd.DataFrame | None, prompts: Sequence[Any]
) -> Html:
    """The texts of `behave`: under each prompt its samples at every coefficient.

    Tokens in the table are shaded by how unlikely the unsteered model finds them.
    """
    by_prompt: dict[int, list[Mapping[str, Any]]] = {}
    for text in texts:
        if not text["subject"].startswith("null"):
            by_prompt.setdefault(text["prompt_number"], []).append(text)
    shaded = _shaded(tokens)
    parts: dict[bool, list[Html]] = {True: [], False: []}
    n_texts = n_prompts = 0
    for number, of_prompt in by_prompt.items():
        n_texts += len(of_prompt)
        if n_texts > MAX_TEXTS and n_prompts:
            break
        n_prompts += 1
        is_shaded = any(_name(text) in shaded for text in of_prompt)
        asked = _in_words(prompts[number - 1 : number]) or of_prompt[0]["prompt"]
        parts[is_shaded or tokens is None].append(_prompt(number, asked, of_prompt, shaded))
    note = (
        "Texts at several coefficients (c; in parentheses what that is in residual units). Where "
        "they were drawn, a sample has the same random numbers at all of them. Shaded: how "
        "unlikely the unsteered model finds a token after what stands before it, from "
        f"{LEAST:g} nat to full shade at {FULL:g} nats; under the pointer its "
        "logprob, unsteered and steered."
    )
    if n_prompts < len(by_prompt):
        note += (
            f" The first {n_prompts} of {len(by_prompt)} prompts; generations.jsonl has all texts."
        )
    folded = parts[False]
    if folded and parts[True]:
        more = f"{len(folded)} more prompt{'s' * (len(folded) > 1)}: texts without shades"
        folded = [element("details", element("summary", more), *folded)]
    return element(
        "div", element("p", note, class_="note"), *parts[True], *folded, class_="samples"
    )


def _prompt(
    number: int,
    asked: str,
    texts: Sequence[Mapping[str, Any]],
    shaded: Mapping[tuple[str, str], Html],
) -> Html:
    """A prompt's texts, a grid a hook."""
    hooks = [text["hook_name"] for text in texts if text["subject"] == "steered"]
    title = f"{number}. {asked}"
    grids = []
    for hook_name in dict.fromkeys(hooks or [""]):
        columns: dict[tuple[str, str], list[Html]] = {}
        headings = {}
        for text in sorted(texts, key=_order):
            if text["hook_name"] in ("", hook_name):
                key = (text["subject"], text["strength"])
                headings[key] = _heading(text)
                columns.setdefault(key, []).append(_sample(text, shaded))
        layer = f"Steered at layer {hook_label(hook_name)}" if hook_name else "Unsteered"
        grids.append(element("p", layer, class_="note"))
        cells = [_column(headings[key], *of_cell) for key, of_cell in columns.items()]
        grids.append(_grid(f"{title}: {layer}", cells))
    return element("div", element("h4", title), *grids, class_="prompt")


def _in_words(prompts: Sequence[Any]) -> str:
    """A prompt as a heading: of a chat what was said last; "" where there is none."""
    match prompts:
        case [str(text)] | [[*_, {"content": str(text)}]]:
            return text
    return ""


def _order(text: Mapping[str, Any]) -> tuple[bool, float]:
    """By coefficient, personas last."""
    is_persona = text["subject"] not in ("steered", "unsteered")
    return is_persona, parse_coefficient(text["strength"]).number


def _heading(text: Mapping[str, Any]) -> str:
    if text["subject"] != "steered":
        name = "c = 0" if text["subject"] == "unsteered" else text["subject"]
        return f"{name}, unsteered"
    strength, coefficient = text["strength"], text["coefficient"]
    is_plain = coefficient is None or parse_coefficient(strength).unit == "residual"
    return f"c = {signed(strength)}{'' if is_plain else f' ({short(coefficient)})'}"


def _sample(text: Mapping[str, Any], shaded: Mapping[tuple[str, str], Html]) -> Html:
    scores = {name: text["scores"].get(name) for name in _SCORES}
    told = [f"{name} {change(score)}" for name, score in scores.items() if isinstance(score, float)]
    told.append(_ENDS.get(text["end"], text["end"]))
    return element(
        "div",
        _said(shaded.get(_name(text), text["text"])),
        element("p", ", ".join(told), class_="note"),
        data_sample=text["sample"] + 1,
    )


def _name(text: Mapping[str, Any]) -> tuple[str, str]:
    """What its tokens are found by; unsteered ones are nobody's hook, a persona's are nowhere."""
    is_known = text["subject"] in ("steered", "unsteered")
    name = text_name(text["prompt_number"], text["sample"], text["strength"])
    return name if is_known else "", text["hook_name"]


def _shaded(tokens: pd.DataFrame | None) -> dict[tuple[str, str], Html]:
    """Each text of a table of tokens as HTML."""
    if tokens is None:
        return {}
    groups: Any = tokens[tokens.is_label].groupby(["prompt", "hook_name"], sort=False)
    return {
        (str(name), "" if (rows.coefficient == 0).all() else str(hook_name)): joined(
            *_spans(rows.to_dict("records"))
        )
        for (name, hook_name), rows in groups
    }


def _spans(rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for row in rows:
        lost, word = -row["logprob_nats"], shown_token(row)
        if math.isnan(lost) or lost < LEAST:
            yield word
            continue
        steered = row["steered_logprob_nats"]
        told = f"{signed(f'{-lost:.2f}')} nats unsteered, {signed(f'{steered:.2f}')} steered"
        # At most 70%: text has to be read on it, in light and in dark.
        by = f"--by:{70 * min(lost / FULL, 1):.0f}"
        yield Html(f'<i style="{by}" title="{html.escape(told)}">{html.escape(word)}</i>')


def _said(text: str) -> Html:
    return element("p", text, class_="said", dir="auto")


def _column(heading: str, *content: Html) -> Html:
    return element("div", element("h5", heading), *content)


def _grid(title: str, columns: Sequence[Html]) -> Html:
    return element("div", *columns, class_="texts", tabindex=0, role="group", aria_label=title)
