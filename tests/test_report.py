"""Run folders read back as they were written; text that stays text; numbers as they are read."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from commands import record as record_of
from hypothesis import given
from hypothesis import strategies as st
from outline import Outline
from run_folders import (
    CONTENTS,
    HOSTILE,
    WRITERS,
    behave_texts,
    seal,
    sweep_table,
    write,
    write_circuits,
    write_sweep,
)

import steerlens as sl
from steerlens.errors import FileError
from steerlens.runs.contents import COMMANDS, TABLES
from steerlens.runs.html_report.figures import FIGURES
from steerlens.runs.html_report.markup import Html, element, joined
from steerlens.runs.html_report.numbers import change, decimals_for, fixed, short
from steerlens.runs.record import check_run_folder, sealed
from steerlens.tables import read_csv

SHORT = sweep_table(1)

# Reading


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_reads_back_as_it_was_written(command: str, tmp_path: Path) -> None:
    """Its tables with attrs, NaN and infinities, its record and, of circuits, its views."""
    folder = WRITERS[command](tmp_path / "run", warnings=["note: in-sample"])
    run, written = sl.read_run(folder), CONTENTS[command]()
    assert (run.name, run.command) == ("run", command)
    assert run.record == json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert run.record["warnings"] == ["note: in-sample"]
    assert list(run.tables) == list(written)
    for name, table in run.tables.items():
        pd.testing.assert_frame_equal(table, written[name], check_exact=True)
        assert table.attrs == written[name].attrs
    views = [("attention", "Unsteered"), ("attention", "Steered"), ("tokens", "layer 0, Unsteered")]
    titles = [(view.page, view.title) for view in run.views]
    assert titles[:3] == (views if command == "circuits" else [])
    assert repr(run).startswith(f"Run('run', {command}, ")


def test_every_table_and_its_place_are_known() -> None:
    for content in TABLES.values():
        names = [column.name for column in content.columns]
        assert not content.by or content.by in names
    for figure in FIGURES:
        assert set(figure.tables) <= set(TABLES)
        assert set(figure.commands) <= set(COMMANDS)
    assert set(WRITERS) == set(COMMANDS)


# What is not as it was written


def refused(folder: Path) -> str:
    """The one-line message with which a folder is refused."""
    with pytest.raises(FileError) as error:
        sl.read_run(folder)
    message = str(error.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def record_with(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        changed = sealed(record_of(folder) | changes)
        (folder / "run.json").write_text(json.dumps(changed))

    return damage


def test_no_flipped_bit_of_a_table_is_read(tmp_path: Path) -> None:
    """Of these sixty flips pandas alone reads a third or more as other values."""
    folder = write(tmp_path / "run", "sweep", {"sweep": SHORT})
    path = folder / "sweep.csv"
    good = path.read_bytes()
    before = sl.read_run(folder).tables["sweep"]
    others = 0
    for bit in np.random.default_rng(0).choice(8 * len(good), size=60, replace=False).tolist():
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert "sweep.csv' was changed" in refused(folder)
        try:
            others += not read_csv(path, TABLES["sweep"].columns).equals(before)
        except ValueError:
            continue
    assert others >= 20
    path.write_bytes(good)
    pd.testing.assert_frame_equal(sl.read_run(folder).tables["sweep"], before, check_exact=True)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "is missing, and the run wrote it"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes: cut off or changed"),
        (lambda path: path.write_bytes(b""), "has 0 of "),
        (lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), "was changed since"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\n"), "was changed since"),
    ],
)
def test_every_file_is_held_against_the_record(
    damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    """Also those that only others read: directions, pages drawn from the tables."""
    folder = write_circuits(tmp_path / "run")
    names = set(record_of(folder)["files"])
    assert names | {"run.json"} == {path.name for path in folder.iterdir()}
    assert {"writers.csv", "attention.html", "graph.html"} < names
    for name in names:
        good = (folder / name).read_bytes()
        damage(folder / name)
        message = refused(folder)
        (folder / name).write_bytes(good)
        for word in (str(folder / name), words, "run `steerlens circuits` once more"):
            assert word in message
    sl.read_run(folder)


def shuffled(folder: Path) -> None:
    """The same rows of the sweep in another order: no number differs."""
    head, *rows = (folder / "sweep.csv").read_text().splitlines(keepends=True)
    (folder / "sweep.csv").write_text("".join([head, *reversed(rows)]))


def edited(*keys: str, to: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        record = inner = record_of(folder)
        for key in keys[:-1]:
            inner = inner[key]
        assert inner[keys[-1]] != to
        inner[keys[-1]] = to
        (folder / "run.json").write_text(json.dumps(record))

    return edit


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (shuffled, "sweep.csv"),
        (edited("request", "seed", to=1), "run.json"),
        (edited("request", "model", "name", to="other"), "run.json"),
        (edited("tables", "sweep", "attrs", "settings", "budget", to="nats=9"), "run.json"),
        (edited("warnings", to=["none"]), "run.json"),
        (edited("seconds", to=1.0), "run.json"),
    ],
)
def test_an_edit_that_fits_is_noticed_too(
    edit: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    """When it is read, shown, or written to again; laid out otherwise it is still the record."""
    folder = write_sweep(tmp_path / "run")
    request = record_of(folder)["request"]
    (folder / "run.json").write_text(json.dumps(record_of(folder), indent=4, sort_keys=True))
    sl.read_run(folder)
    check_run_folder(folder, request)
    edit(folder)
    assert f"{str(folder / name)!r} was changed since" in refused(folder)
    if name == "run.json":
        with pytest.raises(FileError, match="it was changed"):
            check_run_folder(folder, record_of(folder)["request"])


def test_a_sweep_says_how_it_is_run_again(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "run")
    record_with(options={"seed": 0})(folder)
    path = folder / "sweep.csv"
    path.write_text(path.read_text().replace(",", ";"))
    message = refused(folder)
    assert "edit a copy elsewhere" in message
    assert f"`steerlens sweep --from {folder / 'run.json'} --out NEW`" in message


def test_a_run_of_an_older_version_is_refused_with_how_to_run_it_again(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "run")
    record = {k: v for k, v in record_of(folder).items() if k not in ("format", "files")}
    (folder / "run.json").write_text(json.dumps(record))
    assert "0.1.0" in (message := refused(folder))
    assert "run `steerlens sweep` once more" in message
    (folder / "run.json").write_text(json.dumps(record | {"options": {}}))
    assert f"`steerlens sweep --from {folder / 'run.json'} --out NEW`" in refused(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "run.json").unlink(), ["holds no run.json", "give the --out folder"]),
        (record_with(request={}), ["it is of None", "sweep, boundary, compare"]),
        (record_with(request={"command": "fly"}), ["'fly'", "newer"]),
        (record_with(tables={"wings": {"rows": 1, "attrs": {}}}), ["'wings'"]),
        (record_with(tables={"sweep": {"rows": 3, "attrs": {}}}), ["210 rows", "says 3"]),
        (record_with(tables={}), ["a sweep has the table 'sweep'"]),
    ],
)
def test_what_is_wrong_with_a_record_is_named(
    damage: Callable[[Path], None], words: list[str], tmp_path: Path
) -> None:
    """Beside those in tests/files/hostile."""
    folder = write_sweep(tmp_path / "run")
    sl.read_run(folder)
    damage(folder)
    for word in ["run.json", *words]:
        assert word in refused(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace(",loss,", ",lost,", 1), ["lack loss and have lost besides"]),
        (
            lambda text: text.replace("n_pairs,n_groups", "n_groups,n_pairs", 1),
            ["another order than hook_name, layer"],
        ),
        (lambda text: text.replace(",0,", ",zero,", 1), ["cannot be read as CSV", "zero"]),
        (lambda text: text.replace("\n", ",1\n", 3), ["sweep.csv"]),
        (lambda text: text + '"', ["cannot be read as CSV"]),
        (lambda text: "", ["cannot be read as CSV"]),
    ],
)
def test_a_table_of_another_steerlens_is_named(
    change: Callable[[str], str], words: list[str], tmp_path: Path
) -> None:
    """Whose record fits it, and that has not the columns or the types that are known here."""
    folder = write(tmp_path / "run", "sweep", {"sweep": SHORT})
    (folder / "sweep.csv").write_text(change((folder / "sweep.csv").read_text()))
    seal(folder)
    for word in ["sweep.csv", *words]:
        assert word in refused(folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_record_of_another_command_is_refused(command: str, tmp_path: Path) -> None:
    """A report of what was read never fails; what it would fail on cannot be read."""
    folder = WRITERS[command](tmp_path / "run")
    request = record_of(folder)["request"]
    for other in set(COMMANDS) - {command}:
        record_with(request=request | {"command": other})(folder)
        assert f"not a whole run record: a {other} has" in refused(folder)
    record_with(request=request)(folder)
    assert sl.report([sl.read_run(folder)])


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
        ("circuits", {"coefficient": [1]}, "'coefficient' in its request"),
    ],
)
def test_a_request_that_lacks_something_is_refused(
    command: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in refused(WRITERS[command](tmp_path / "run", **changes))


@pytest.mark.parametrize("changes", [{"sample": "1"}, {"strength": "much"}, {"scores": None}])
def test_texts_of_another_kind_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    texts = [text | changes for text in behave_texts()]
    assert "no texts of behave" in refused(WRITERS["behave"](tmp_path / "run", written=texts))
    assert len(sl.read_run(WRITERS["behave"](tmp_path / "good")).texts) == len(texts)


def test_no_folder_and_no_run(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "none")
    with pytest.raises(FileError, match="one run or more"):
        sl.report([])


# Markup


@given(text=st.text(), attribute=st.text())
def test_text_stays_text(text: str, attribute: str) -> None:
    made = element("p", text, title=attribute)
    seen = Outline(made)
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
    assert Outline(HOSTILE).tags == ["script", "img", "b", "a"]
    assert Outline(element("p", HOSTILE)).elements == [("p", {})]


# Numbers


def test_decimals_are_those_of_the_middle_value() -> None:
    for values, decimals in (
        ([1.0, -2.0, math.nan, math.inf], 0),  # whole numbers
        ([0.5, 12.25, 200.0], 2),
        ([0.001234], 6),
        ([0.0, 0.0], 0),
        ([], 0),
        ([1234.5], 0),
    ):
        assert decimals_for(values) == decimals


def test_numbers_in_tables_and_in_running_text() -> None:
    assert [fixed(v, n) for v, n in ((1.25, 3), (-1.25, 1), (0.0, 3), (-0.0, 1), (3e9, 2))] == [
        *("1.250", "−1.2", "0.000", "0.0", "3.00e9")  # noqa: RUF001 (a true minus)
    ]
    assert fixed(0.00012, 3) == "1.20e−4"  # noqa: RUF001
    assert [short(v) for v in (0.12345, 12.345, 1234.5, math.nan, -math.inf)] == [
        *("0.123", "12.3", "1234", "undefined", "−infinite")  # noqa: RUF001
    ]
    assert [change(v) for v in (0.5, -0.5, 0.0)] == ["+0.5", "−0.5", "0"]  # noqa: RUF001
