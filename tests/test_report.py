"""Run folders read back, text that stays text, numbers as a reader sees them."""

import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import (
    ATTRS,
    HOSTILE,
    WRITERS,
    geometry_tables,
    layers_table,
    points_table,
    sweep_table,
    write,
    write_boundary,
    write_circuits,
    write_compare,
    write_sweep,
)

import steerlens as sl
from steerlens.errors import FileError
from steerlens.runs.html_report.contents import COMMANDS, FIGURES, TABLES
from steerlens.runs.html_report.markup import Html, element, joined
from steerlens.runs.html_report.numbers import change, decimals_for, fixed, short
from steerlens.runs.html_report.summary import summarise
from steerlens.runs.record import RUN_FILES
from steerlens.tables import read_csv

VIEWS = [
    ("attention", "Unsteered"),
    ("attention", "Steered"),
    ("tokens", "layer 0, Unsteered"),
]

SHORT = sweep_table(1)

# Reading


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_reads_back_as_it_was_written(command: str, tmp_path: Path) -> None:
    folder = WRITERS[command](tmp_path / "run", warnings=["note: in-sample"])
    run = sl.read_run(folder)
    assert (run.name, run.command) == ("run", command)
    assert run.record == json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert run.record["warnings"] == ["note: in-sample"]
    assert sorted(run.tables) == sorted(path.stem for path in folder.glob("*.csv"))
    for name, table in run.tables.items():
        columns = TABLES[name].columns_of([str(column) for column in table.columns])
        plain = read_csv(folder / f"{name}.csv", columns)
        pd.testing.assert_frame_equal(table, plain, check_exact=True)
    titles = [(view.page, view.title) for view in run.views]
    assert titles[:3] == ([] if command != "circuits" else VIEWS)
    assert repr(run).startswith(f"Run('run', {command}, ")


def test_tables_have_the_attrs_that_they_were_written_with(tmp_path: Path) -> None:
    layers = layers_table()
    assert layers.attrs["searched"]["blocks.2.hook_resid_post"] == 56.0
    run = sl.read_run(write(tmp_path / "run", "sweep", {"layers": layers, "sweep": sweep_table()}))
    assert run.tables["layers"].attrs == layers.attrs
    assert run.tables["sweep"].attrs == ATTRS


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20))
def test_text_is_read_as_it_was(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Commas, quotes, line ends, and what pandas takes for a missing value."""
    folder = tmp_path_factory.mktemp("text") / "run"
    table = points_table((0,)).assign(pair=text)
    run = sl.read_run(write(folder, "sweep", {"sweep": SHORT, "points": table}))
    pd.testing.assert_frame_equal(run.tables["points"], table, check_exact=True)


@pytest.mark.parametrize("text", ["NA", "null", "", "nan", "None", '"', "a\r\nb", "a\rb", "1e5"])
def test_text_that_looks_like_something_else(text: str, tmp_path: Path) -> None:
    tables = {"sweep": SHORT, "points": points_table((0,)).assign(pair=text)}
    run = sl.read_run(write(tmp_path / "run", "sweep", tables))
    assert (run.tables["points"].pair == text).all()


def test_effects_have_a_column_for_every_method(tmp_path: Path) -> None:
    run = sl.read_run(write_compare(tmp_path / "run", ["mean_diff", "pca"]))
    assert list(run.tables["effects"].columns) == ["id", "mean_diff @ blocks.10.hook_resid_post"]
    assert run.tables["effects"].iloc[:, 1].tolist() == [0.5, 0.25]


def test_every_table_and_its_place_are_known() -> None:
    """A table that some command writes is one that a report can show, and the other way round."""
    assert {f"{name}.csv" for name in TABLES} == {n for n in RUN_FILES if n.endswith(".csv")}
    for content in TABLES.values():
        names = [column.name for column in content.columns]
        assert not content.by or content.by in names
    for figure in FIGURES:
        assert set(figure.tables) <= set(TABLES)
        assert set(figure.commands) <= set(COMMANDS)
    assert set(WRITERS) == set(COMMANDS)


# What cannot be read


def damaged(folder: Path, damage: Callable[[Path], None]) -> str:
    """The one-line message with which a sweep's folder is refused after some damage."""
    write_sweep(folder)
    sl.read_run(folder)
    damage(folder)
    with pytest.raises(FileError) as error:
        sl.read_run(folder)
    message = str(error.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def record_with(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | changes))

    return damage


def file_with(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(change((folder / name).read_text()))

    return damage


def cell(value: str) -> Callable[[str], str]:
    """A change of the first cell of row 2."""

    def change(text: str) -> str:
        head, first, second, *rest = text.split("\n")
        return "\n".join([head, first, ",".join([value, *second.split(",")[1:]]), *rest])

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "run.json").unlink(), ["holds no run.json", "give the --out folder"]),
        (lambda f: (f / "run.json").write_text("{"), ["run.json", "not a run record", "once more"]),
        (lambda f: (f / "run.json").write_bytes(b"\xff"), ["run.json", "not a run record"]),
        (lambda f: (f / "run.json").write_text("[]"), ["run.json", "'request' is missing"]),
        (record_with(tables=3), ["run.json", "'tables' is missing or of another kind"]),
        (record_with(seconds=None), ["run.json", "'seconds' is missing or of another kind"]),
        (record_with(request={}), ["run.json", "record of None", "sweep, boundary, compare"]),
        (record_with(request={"command": "fly"}), ["run.json", "'fly'", "newer"]),
        (record_with(tables={"wings": {"rows": 1, "attrs": {}}}), ["run.json", "'wings'"]),
        (record_with(tables={"sweep": {"rows": True, "attrs": {}}}), ["run.json", "'sweep'"]),
        (lambda f: (f / "sweep.csv").unlink(), ["sweep.csv", "is missing", "steerlens sweep"]),
        (lambda f: (f / "sweep.csv").write_bytes(b"\xff\xfe"), ["sweep.csv", "cannot be read"]),
        (lambda f: (f / "sweep.csv").write_text(""), ["sweep.csv", "lacks hook_name, layer"]),
        (file_with("sweep.csv", lambda t: t[: t.rindex("\nblocks") + 1]), ["209 rows", "says 210"]),
        (file_with("sweep.csv", lambda t: t[:-2]), ["sweep.csv"]),
        (
            file_with("sweep.csv", lambda t: t.replace(",loss,", ",lost,", 1)),
            ["lacks loss", "lost"],
        ),
        (
            file_with("sweep.csv", lambda t: t.replace("hook_name,layer", "layer,hook_name", 1)),
            ["another order", "expected the columns hook_name, layer"],
        ),
        (file_with("layers.csv", lambda t: t.replace(",0,", ",zero,", 1)), ["row 1", "'zero'"]),
        (file_with("layers.csv", lambda t: t.replace("\n", ",1\n", 2)), ["layers.csv"]),
        (
            file_with("layers.csv", lambda t: t.replace("True", "yes", 1)),
            ["True or False", "'yes'"],
        ),
        (
            file_with("points.csv", lambda t: t.replace(",p0,", ",p0,x", 1)),
            ["points.csv", "number"],
        ),
        (file_with("points.csv", cell('"')), ["points.csv"]),
        (
            file_with("layers.csv", lambda t: t.replace(",0,", ",99999999999999999999,", 1)),
            ["row 1, column layer", "a whole number", "'99999999999999999999'"],
        ),
        (record_with(pages=[["x"]]), ["run.json", "pages and warnings are texts"]),
        (record_with(pages=[{}]), ["run.json", "pages and warnings are texts"]),
        (record_with(tables={}), ["run.json", "a sweep has the table 'sweep'"]),
    ],
)
def test_what_is_damaged_is_named(
    damage: Callable[[Path], None], words: list[str], tmp_path: Path
) -> None:
    message = damaged(tmp_path / "run", damage)
    for word in words:
        assert word in message


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("other", COMMANDS)
def test_the_record_of_another_command_is_refused(command: str, other: str, tmp_path: Path) -> None:
    """A report of what was read never fails; what it would fail on cannot be read."""
    folder = WRITERS[command](tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record_with(request=record["request"] | {"command": other})(folder)
    if command == other:
        assert sl.report([sl.read_run(folder)])
        return
    with pytest.raises(FileError, match=f"not a whole run record: a {other} has"):
        sl.read_run(folder)


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("sweep", {"budget": None}, "'budget' in its request"),
        ("sweep", {"measured_on": {"n_pairs": 8}}, "name and n_pairs in its 'measured_on'"),
        ("sweep", {"fitted_on": {"name": "a"}}, "name and n_pairs in its 'fitted_on'"),
        ("boundary", {"budget": 3}, "'budget' in its request"),
        ("compare", {"on": None}, "'on' in its request"),
        ("compare", {"measured_on": None}, "'measured_on' in its request"),
        ("compare", {"chosen_on": {"name": "a"}}, "name and n_items in its 'chosen_on'"),
        ("circuits", {"coefficient": "far"}, "'coefficient' in its request"),
    ],
)
def test_a_request_that_lacks_something_is_refused(
    command: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = WRITERS[command](tmp_path / "run", **changes)
    with pytest.raises(FileError, match=words):
        sl.read_run(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such folder"):
        sl.read_run(tmp_path / "none")


def test_the_second_column_of_a_row_that_is_too_short(tmp_path: Path) -> None:
    message = damaged(
        tmp_path / "run", file_with("points.csv", lambda t: t.replace(",p1,", ",", 1))
    )
    assert "row 2: expected 6 cells, got 5" in message


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.unlink(), ["attention.html", "is missing", "steerlens circuits"]),
        (lambda p: p.write_text("<p>"), ["attention.html", "no views", "AttentionHeads"]),
        (
            lambda p: p.write_text(p.read_text().replace("AttentionHeads", "ColoredTokens")),
            ["attention.html", "not only AttentionHeads"],
        ),
        (
            lambda p: p.write_text(p.read_text().replace('"props"', '"prop"')),
            ["attention.html", "not a page of steerlens", "props"],
        ),
        (lambda p: p.write_bytes(b"\xff"), ["attention.html", "not a page of steerlens"]),
    ],
)
def test_a_damaged_page_is_named(
    damage: Callable[[Path], None], words: list[str], tmp_path: Path
) -> None:
    folder = write_circuits(tmp_path / "run")
    assert len(sl.read_run(folder).views) == 14
    damage(folder / "attention.html")
    with pytest.raises(FileError) as error:
        sl.read_run(folder)
    for word in (*words, str(folder)):
        assert word in str(error.value)


# Markup


class Seen(HTMLParser):
    """Elements with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@given(text=st.text(), attribute=st.text())
def test_text_stays_text(text: str, attribute: str) -> None:
    made = element("p", text, title=attribute)
    seen = Seen(made)
    clean = [value.replace("\r", "\n") for value in (text, attribute)]
    assert seen.elements == [("p", {"title": attribute})] or "\r" in attribute
    assert "".join(seen.words).replace("\r", "\n") == clean[0]


def test_what_is_html_already_is_not_escaped_again() -> None:
    made = element("p", element("b", "<"), "<", class_="a", data_v="1", hidden=True, title=None)
    assert made == '<p class="a" data-v="1" hidden><b>&lt;</b>&lt;</p>'
    assert isinstance(made, Html)
    assert joined("<", Html("<br>"), by=" ") == "&lt; <br>"
    assert element("br") == "<br>"


def test_the_check_of_hostile_text_can_fail() -> None:
    assert [tag for tag, _ in Seen(HOSTILE).elements] == ["script", "img", "b", "a"]
    assert Seen(element("p", HOSTILE)).elements == [("p", {})]


# Numbers


@pytest.mark.parametrize(
    ("values", "decimals"),
    [
        ([1.0, -2.0, math.nan, math.inf], 0),  # whole numbers
        ([0.5, 12.25, 200.0], 2),  # the middle one, 12.25
        ([0.001234], 6),
        ([0.0, 0.0], 0),
        ([], 0),
        ([1234.5], 0),
    ],
)
def test_decimals(values: list[float], decimals: int) -> None:
    assert decimals_for(values) == decimals


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (1.25, 3, "1.250"),
        (-1.25, 1, "−1.2"),  # noqa: RUF001 (a true minus)
        (0.0, 3, "0.000"),
        (-0.0, 1, "0.0"),
        (0.00012, 3, "1.20e-4".replace("-", "−")),  # noqa: RUF001
        (3e9, 2, "3.00e9"),
    ],
)
def test_fixed(value: float, decimals: int, text: str) -> None:
    assert fixed(value, decimals) == text


def test_numbers_in_running_text() -> None:
    assert [short(v) for v in (0.12345, 12.345, 1234.5, math.nan)] == [
        *("0.123", "12.3", "1234"),
        "undefined",
    ]
    assert [change(v) for v in (0.5, -0.5, 0.0)] == ["+0.5", "−0.5", "0"]  # noqa: RUF001
    assert short(-math.inf) == "−infinite"  # noqa: RUF001


def test_a_report_needs_a_run() -> None:
    with pytest.raises(FileError, match="one run or more"):
        sl.report([])


def test_hooks_of_one_layer_have_a_sentence_each(tmp_path: Path) -> None:
    tables = geometry_tables()
    shape = tables["shape"]
    other = shape.assign(hook_name="blocks.10.hook_mlp_out", boundary=math.inf)
    tables["shape"] = pd.concat([shape, other], ignore_index=True)
    tables["shape"].attrs.update(shape.attrs)
    said = summarise(sl.read_run(write(tmp_path / "run", "geometry", tables)))[-2:]
    assert "at layer 10 the boundary is found at 8 of 8 angles" in said[0]
    assert "at layer blocks.10.hook_mlp_out the boundary is found at 0 of 8 angles" in said[1]


def test_boundaries_are_read_with_their_infinities(tmp_path: Path) -> None:
    layers = sl.read_run(write_boundary(tmp_path / "run")).tables["layers"]
    assert layers.boundary_pos.iloc[2] == math.inf
    assert math.isnan(layers.reentry_pos.iloc[2])
