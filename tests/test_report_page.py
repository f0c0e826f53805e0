"""The page of a report: what it says of each command's run, and that all text stays text."""

import html
import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from outline import Outline
from run_folders import (
    HOSTILE,
    MODEL,
    WRITERS,
    behave_tables,
    behave_texts,
    circuits_pages,
    compare_tables,
    generations_table,
    hook,
    layers_table,
    points_table,
    sweep_table,
    sweep_tables,
    table,
    tokens_table,
    write,
    write_circuits,
    write_compare,
    write_sweep,
)

import steerlens as sl
from steerlens.runs.contents import COMMANDS, TABLES
from steerlens.runs.html_report.listings import MAX_COLUMNS, MAX_ROWS, listing, with_intervals


def page_of(*folders: Path) -> str:
    return sl.report([sl.read_run(folder) for folder in folders])


# Every command


@pytest.mark.parametrize("command", COMMANDS)
def test_a_page_of_every_command(command: str, tmp_path: Path) -> None:
    folder = WRITERS[command](tmp_path / "run", warnings=["note: in-sample"])
    page = page_of(folder)
    assert page_of(folder) == page
    outline = Outline(page)
    assert outline.is_whole
    assert len(page.encode()) < 5_000_000
    assert f"{command}: run" in outline.text
    for word in ("in-sample", MODEL["name"], "sentiment/test", "12 s", "torch", "x86_64"):
        assert word in outline.text
    for name in sl.read_run(folder).tables:
        assert TABLES[name].title in outline.text
        assert f"{name}.csv" in outline.text
    assert outline.all("table")
    figures = re.findall(r'class="vega-data" data-for="([^"]*)"', page)
    assert figures or command == "recommend"
    ids = [attrs["id"] for _, attrs in outline.elements if "id" in attrs]
    assert len(ids) == len({*ids})
    assert {*figures} <= {*ids}
    for _, attrs in outline.elements:
        for named in (attrs.get("aria-labelledby"), (attrs.get("href") or "#")[1:]):
            assert not named or named in ids


def test_several_runs_have_a_section_each(tmp_path: Path) -> None:
    """Their scripts travel once, and headings go down a level at a time."""
    folders = [WRITERS[command](tmp_path / command) for command in COMMANDS]
    page = page_of(*folders)
    outline = Outline(page)
    assert len(page.encode()) < 5_000_000
    assert page.count('id="packed-vega"') == 1
    headings = [attrs.get("id") for attrs in outline.all("h2")]
    assert headings == [f"run{n}-title" for n in range(1, 1 + len(COMMANDS))]
    links = [attrs["href"] for attrs in outline.all("a")]
    assert links == ["#run1", *(f"#run{n}" for n in range(1, 1 + len(COMMANDS)))]
    ids = [attrs["id"] for _, attrs in outline.elements if "id" in attrs]
    assert len(ids) == len({*ids})
    levels = [int(tag[1]) for tag in outline.tags if re.fullmatch(r"h[1-6]", tag)]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert all(b <= a + 1 for a, b in pairwise(levels))
    landmarks = ("header", "nav", "main", "footer")
    assert [tag for tag in outline.tags if tag in landmarks] == [*landmarks]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["blocks.12.hook_resid_post"], "blocks.12.hook_resid_post"),
        (
            [f"blocks.{i}.hook_resid_post" for i in (0, 1, 2, 5, 7, 8)],
            "block outputs (hook_resid_post) of layers 0–2, 5, 7, 8",  # noqa: RUF001
        ),
        (["hook_embed", "a", "b"], "hook_embed, a, b"),
        (["blocks.0.hook_mlp_out"] * 3, ", ".join(["blocks.0.hook_mlp_out"] * 3)),
    ],
)
def test_hooks_in_a_line(names: list[str], told: str, tmp_path: Path) -> None:
    few = {"sweep": sweep_table(1)}
    text = Outline(page_of(write(tmp_path / "run", "sweep", few, hook_names=names))).text
    assert f"hooks{told}fitted on" in text


# Tables


def shown(name: str, rows: pd.DataFrame) -> tuple[str, list[list[str]]]:
    """The text of a table's notes, and its cells."""
    made = listing(name, rows, TABLES[name], "x")
    lines = re.findall(r"<tr[^>]*>(.*?)</tr>", made)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in lines]
    note = re.findall(r'<p class="note">(.*?)</p>', made)[0]
    return html.unescape(re.sub("<[^>]*>", "", note)), [
        [html.unescape(re.sub("<[^>]*>", "", text)) for text in line] for line in cells
    ]


def test_what_is_undefined_is_empty_and_what_is_infinite_is_beyond() -> None:
    layers = layers_table()
    layers.loc[3, "boundary_pos"] = math.nan
    note, (head, *rows) = shown("layers", layers)
    column = next(i for i, name in enumerate(head) if name.startswith("boundary pos"))
    whole = ["5 (4 to 6)", "6 (5 to 7)", "beyond 56 (6 to beyond 56)", ""]
    assert [row[column] for row in rows[:4]] == whole
    assert "An empty cell is undefined." in note
    assert "An empty cell" not in shown("points", points_table())[0]
    # A negative infinity has its sign, an unknown range no number.
    layers.attrs = {}
    layers.loc[2, "boundary_neg"] = -math.inf
    _, (head, *rows) = shown("layers", layers)
    at = {name: i for i, name in enumerate(head)}
    names = [next(n for n in at if n.startswith(f"boundary {sign}")) for sign in ("pos", "neg")]
    assert [rows[2][at[name]].split(" (")[0] for name in names] == [
        "beyond the searched range",
        "beyond −the searched range",  # noqa: RUF001
    ]


def test_the_main_columns_are_shown_and_no_interval_stands_alone() -> None:
    made = listing("comparison", compare_tables()["comparison"], TABLES["comparison"], "x")
    heads = re.findall(r'<th [^>]*data-names="([^"]*)"( hidden)?', made)
    at_first = [names.split()[0] for names, hidden in heads if not hidden]
    assert at_first[:3] == ["method", "layer", "effect"]
    assert len(at_first) <= MAX_COLUMNS < len(heads)
    assert ("effect effect_ci_low effect_ci_high", "") in heads
    effects = compare_tables()["effects"]
    assert ">mean_diff, layer 10</abbr>" in listing("effects", effects, TABLES["effects"], "x")
    # Where a table names none, they are its first ones.
    nameless = replace(TABLES["comparison"], main=())
    made = listing("comparison", compare_tables()["comparison"], nameless, "x")
    assert made.count('scope="col"') - len(re.findall("<th [^>]*hidden", made)) == MAX_COLUMNS
    for content in TABLES.values():
        assert set(content.main) <= {column.name for column in content.columns}
        ends = {end for column in with_intervals(content.columns) for end in column.ends}
        assert (
            ends == {c.name for c in content.columns if c.name.endswith(("_low", "_high"))} - LONE
        )


LONE = {
    f"{name}_{end}"
    for name in ("null", "iou_null", "rank_null", "area_ci")
    for end in ("low", "high")
}
"""Ends of ranges of nulls, which are of no other column, and of one by another name."""
INTERNAL = (
    r"(?i)(head|layer) [-\u2212]1\b|\bnan\b|\binf(inity|inite)?\b|\de[-\u2212](9|[1-9]\d)|null none"
    r"|[-\u2212][\d.]+ nats per token lost"
)


def test_nothing_internal_reaches_a_reader(tmp_path: Path) -> None:
    """Neither where a run is as usual, nor where numbers are undefined, infinite or all but 0."""
    told = ["head -1", "layer \u22121", "nan", "inf to inf", "1.05e-15", "null none"]
    for text in [*told, "-0.021 nats per token lost"]:
        assert re.search(INTERNAL, text), text
    for command in COMMANDS:
        folder = WRITERS[command](tmp_path / command, null=None)
        outline = Outline(page_of(folder))
        assert not re.search(INTERNAL, outline.text)
        for name, rows in sl.read_run(folder).tables.items():
            content = TABLES[name]
            spoilt = pd.concat([rows] * 4, ignore_index=True)
            for at, value in enumerate((math.nan, math.inf, 1.05e-15)):
                for column in spoilt.select_dtypes("float"):
                    spoilt.loc[at, column] = value
            spoilt.attrs = rows.attrs
            for column in {"layer", "head"} & {*spoilt.columns}:
                spoilt[column] = -1
            text = Outline(listing(name, spoilt, content, "x")).text
            text = text[: text.index("What the columns mean")]
            assert not re.search(INTERNAL, text), name


def test_a_gain_is_not_a_negative_loss(tmp_path: Path) -> None:
    gained = tokens_table().assign(damage_nats=-0.021)
    text = Outline(
        page_of(write(tmp_path / "run", "sweep", sweep_tables() | {"tokens": gained}))
    ).text
    assert "0.021 nats per token gained" in text
    assert "nats per token lost" not in text
    assert "nats per token lost" in Outline(page_of(write_sweep(tmp_path / "lost"))).text


def test_columns_that_say_nothing_are_told_in_a_line() -> None:
    note, (head, *rows) = shown("sweep", sweep_table().assign(loss=math.nan))
    assert "210 rows, from sweep.csv" in note
    assert "n pairs 8;" in note
    assert "baseline logprob nats −2.5" in note  # noqa: RUF001
    assert "Without a value in this run: loss." in note
    assert "block outputs, blocks.N.hook_resid_post" in note
    assert head[:2] == ["layer", "coefficientresidual units"]
    assert len(rows) == 210
    assert not any("n groups" in name or "hook name" in name for name in head)


def test_hooks_that_are_not_block_outputs_are_named() -> None:
    rows = [{**hook(i), "pair": "p"} for i in range(2)]
    rows[1]["hook_name"] = "blocks.1.hook_mlp_out"
    _, (head, *cells) = shown("points", table("points", rows))
    assert head[0] == "hook name"
    assert [line[0] for line in cells] == ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]


def test_of_a_long_table_the_largest_rows_are_shown() -> None:
    places = [{**hook(i), "coefficient": 1.0, "loss_nats": float(i)} for i in range(MAX_ROWS + 5)]
    note, (_, *rows) = shown("boundary", table("boundary", places))
    assert len(rows) == MAX_ROWS
    assert f"the {MAX_ROWS} largest by loss_nats of {MAX_ROWS + 5} rows" in note
    assert [row[0] for row in rows] == [str(i) for i in range(5, MAX_ROWS + 5)]


def test_columns_have_unit_and_meaning_and_an_empty_table_no_grid() -> None:
    made = listing("points", points_table(), TABLES["points"], "x")
    outline = Outline(made)
    column = next(c for c in TABLES["points"].columns if c.name == "along")
    assert {"title": column.meaning} in outline.all("abbr")
    assert "along (residual units)" in outline.text
    assert column.meaning in outline.text
    assert "<table" in made
    empty = listing("points", table("points", []), TABLES["points"], "x")
    assert "0 rows" in empty
    assert "<table" not in empty


# Hostile text


def hostile_run(folder: Path) -> Path:
    """A sweep with text of another's making in every place that has some."""
    cells = sweep_table(4)
    cells.loc[:6, "hook_name"] = HOSTILE
    points = points_table(range(2))
    points["pair"] = HOSTILE
    cells.attrs = {"settings": {HOSTILE: HOSTILE}}
    tables = {
        "sweep": cells,
        "layers": layers_table(4),
        "points": points,
        "generations": generations_table(HOSTILE, HOSTILE),
        "tokens": tokens_table(HOSTILE, HOSTILE),
    }
    return write(
        folder,
        "sweep",
        tables,
        warnings=[HOSTILE],
        model=MODEL | {"name": HOSTILE},
        measured_on={"name": HOSTILE, "n_pairs": 8, "fingerprint": HOSTILE},
        method=HOSTILE,
        texts=[HOSTILE],
    )


def assert_harmless(page: str) -> None:
    """No element comes from `HOSTILE`, in the page or in the JSON inside its scripts."""
    outline = Outline(page)
    assert outline.is_whole
    assert not outline.all("img")
    assert not any(key.startswith("on") for _, attrs in outline.elements for key in attrs)
    for attrs in outline.all("a"):
        assert (attrs["href"] or "").startswith("#")
    for attrs in outline.all("script"):
        assert attrs.get("type") in ("module", "text/plain", "application/json")
        assert "src" not in attrs
    assert page.count("</script>") == len(outline.all("script"))
    for found in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page):
        assert "<" not in found
        json.loads(found)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    tables = behave_tables()
    tables["tokens"]["token"] = HOSTILE
    asked: Any = {"written": behave_texts(HOSTILE), "prompts": [HOSTILE]}
    folders = [hostile_run(tmp_path / "<b>run"), tmp_path / "behave"]
    page = page_of(folders[0], WRITERS["behave"](folders[1], tables=tables, **asked))
    assert_harmless(page)
    text = Outline(page).text
    assert "sweep: <b>run" in text
    assert text.count(" ".join(HOSTILE.split())) > 10
    # What the check sees when something is not escaped.
    with pytest.raises(AssertionError):
        assert_harmless(page.replace("</main>", HOSTILE + "</main>"))


def test_hostile_methods_stay_text(tmp_path: Path) -> None:
    page = page_of(write_compare(tmp_path / "run", names=[HOSTILE, "pca"]))
    assert_harmless(page)
    data: Any = json.loads(re.findall(r'class="vega-data"[^>]*>(.*?)</script>', page)[0])
    # Vega draws text as text, and its tooltips escape it.
    assert HOSTILE in {row["method"] for row in data["datasets"]["methods"]}


def test_hostile_tokens_stay_text_in_views(tmp_path: Path) -> None:
    """circuitsvis sets tokens as HTML: behind each `<` and `&` goes a character without width."""
    page = page_of(write_circuits(tmp_path / "run", pages=circuits_pages(HOSTILE)))
    assert_harmless(page)
    found = re.findall(r'class="circuitsvis-data"[^>]*>(.*?)</script>', page)
    assert len(found) == 14
    for text in found:
        token = json.loads(text)["props"]["tokens"][2]
        assert token.replace("\u2060", "") == HOSTILE
        assert not re.search("[<&](?!\u2060)", token)


def test_views_are_rounded_and_their_script_travels_only_with_them(tmp_path: Path) -> None:
    page = page_of(write_circuits(tmp_path / "run"))
    assert page.count('id="packed-circuitsvis"') == 1
    views = " ".join(re.findall(r'class="circuitsvis-data"[^>]*>(.*?)</script>', page))
    assert "0.3333]" in views
    assert "0.33333" not in views
    assert "0.33333" in circuits_pages()["attention"]
    assert "packed-circuitsvis" not in page_of(write_sweep(tmp_path / "sweep"))


UNDECIDED = "within budget or not: undecided"


def test_texts_are_side_by_side_and_say_whether_they_are_coherent(tmp_path: Path) -> None:
    text = Outline(page_of(write_sweep(tmp_path / "run"))).text
    part = text[text.index("Greedy continuations") : text.index("Token damage")]
    columns = [f"c = {c}" for c in ("−20", "−10", "0, unsteered", "10", "20")]  # noqa: RUF001
    places = [part.index(f"{column}within budget") for column in columns]
    assert places == sorted(places)
    assert part.count("The weather is fine.") == 10
    assert "beyond the budget" not in part
    assert UNDECIDED not in part
    for coherent, words in {"no": "beyond the budget", "undecided": UNDECIDED}.items():
        cells = sweep_table().assign(coherent=coherent)
        tables = {"sweep": cells, "generations": generations_table()}
        page = page_of(write(tmp_path / coherent, "sweep", tables))
        assert f"c = 20{words}" in Outline(page).text


def test_samples_stand_side_by_side_under_their_prompt(tmp_path: Path) -> None:
    """By coefficient, personas last, nulls nowhere; shaded where the tokens are known."""
    page = page_of(WRITERS["behave"](tmp_path / "run"))
    part = page[page.index('class="samples"') : page.index("What the columns mean")]
    text = Outline(part).text
    titles = ["1. How are you?", "Steered at layer 15", "c = −8", "c = 0, unsteered"]  # noqa: RUF001
    titles += ["c = 8", "positive prompt, unsteered", "1 more prompt:", "2. And now?"]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    assert "null 1" not in text
    assert text.count("concept +0.25, cut at the asked-for length") == 16
    # Of the first sample at 8 the third token has -4 nats, half of full shade; others are likely.
    shades = re.findall(r'<i style="--by:(\d+)"[^>]*>([^<]*)</i>', part)
    assert shades == [("35", " fine")] * 2
    assert "steered 8, 1.0" not in text
    assert "unsteered 0, 1.0" not in text
    assert "positive prompt 0, 1.0: The weather is fine." in text
    assert "steered 8, 1.1: The weather is fine." in text
    assert "Token damage" not in page
    assert "Token damage" in page_of(WRITERS["behave"](tmp_path / "none", written=()))


def test_figures_are_left_out_where_their_table_is_empty(tmp_path: Path) -> None:
    tables = {"sweep": sweep_table(), "points": points_table(())}
    page = page_of(write(tmp_path / "run", "sweep", tables))
    assert page.count('class="vega-data"') == 3
    tables["points"] = points_table()
    assert page_of(write(tmp_path / "more", "sweep", tables)).count('class="vega-data"') == 4
    assert compare_tables()["effects"].shape == (2, 2)
