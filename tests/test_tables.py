"""Columns, frames and files."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from steerlens.tables import COLUMNS, Column, read_csv, to_frame, write_csv, write_parquet

ROOT = Path(__file__).resolve().parent.parent

# Copied from the design, so that a renamed or moved column shows here.
SWEEP_NAMES = (
    "hook_name layer coefficient asked readout_hook n_pairs n_groups projection projection_ci_low "
    "projection_ci_high projection_shift separation logprob_nats baseline_logprob_nats "
    "degradation_nats degradation_ci_low degradation_ci_high coherence_penalty loss coherent "
    "exact left_out_error"
).split()
LAYER_NAMES = (
    "hook_name layer separation projection projection_std agreement explained_variance "
    "resid_norm logprob_nats coherence_penalty loss boundary_pos boundary_neg "
    "predicted_boundary_pos predicted_boundary_neg projection_at_boundary"
).split()
WHOLE_NUMBERS = {"layer", "n_pairs", "n_groups"}
TEXTS = {"hook_name", "readout_hook", "coherent", "asked"}
ATTRS = {"settings": {"coefficients": [-2.0, 0.1], "seed": 3}, "method": "pca", "name": "é"}


def full_row(seed: int) -> dict[str, Any]:
    """A row with a value in every column; the floats have no short decimal form."""
    generator = np.random.default_rng(seed)
    row: dict[str, Any] = {name: float(generator.normal() / 3) for name in SWEEP_NAMES}
    row |= {"hook_name": f"blocks.{seed}.hook_resid_post", "readout_hook": "blocks.9.x"}
    row |= {"asked": "-0.1 norm", "exact": False}
    return row | {"layer": seed, "n_pairs": 8, "n_groups": 4, "coherent": "undecided"}


@pytest.fixture
def frame() -> pd.DataFrame:
    """Three rows: whole, with a value missing, with an infinite one."""
    rows = [full_row(0), full_row(1), full_row(2) | {"projection": math.inf}]
    del rows[1]["loss"]
    return to_frame(rows, "sweep", ATTRS)


@pytest.mark.parametrize(("table", "names"), [("sweep", SWEEP_NAMES), ("layers", LAYER_NAMES)])
def test_columns_are_those_of_the_design(table: str, names: list[str]) -> None:
    assert [column.name for column in COLUMNS[table]][: len(names)] == names


@pytest.mark.parametrize("table", COLUMNS)
def test_every_column_has_a_meaning_and_says_its_unit(table: str) -> None:
    columns = COLUMNS[table]
    assert len({column.name for column in columns}) == len(columns)
    for column in columns:
        assert column.meaning.strip(), column.name
        # A name that ends in its unit must not contradict it.
        assert not column.name.endswith("_nats") or "nats" in column.unit, column.name


@pytest.mark.parametrize("table", COLUMNS)
def test_the_docs_have_the_columns_of_every_table(table: str) -> None:
    rows = "".join(
        f"| `{c.name}` | {c.unit} | {c.meaning.replace('|', '&#124;')} |\n" for c in COLUMNS[table]
    )
    docs = (ROOT / "docs" / "columns.md").read_text(encoding="utf-8")
    assert f"| column | unit | meaning |\n| --- | --- | --- |\n{rows}\n" in docs


def test_the_columns_are_a_file_with_a_line_each_and_its_tables_together() -> None:
    lines = (ROOT / "steerlens" / "columns.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "table,name,type,unit,meaning"
    assert len(lines) - 1 == sum(map(len, COLUMNS.values()))


def test_a_frame_has_the_declared_types_and_order(frame: pd.DataFrame) -> None:
    assert list(frame.columns) == SWEEP_NAMES
    for name in SWEEP_NAMES:
        is_type = {
            name in TEXTS: pd.api.types.is_string_dtype,
            name in WHOLE_NUMBERS: pd.api.types.is_int64_dtype,
            name == "exact": pd.api.types.is_bool_dtype,
        }.get(True, lambda dtype: dtype == np.float64)
        assert is_type(frame[name].dtype), (name, frame[name].dtype)


def test_the_order_of_a_rows_keys_does_not_matter(frame: pd.DataFrame) -> None:
    row = full_row(0)
    turned = to_frame([dict(reversed(row.items()))], "sweep", ATTRS)
    pd.testing.assert_frame_equal(turned, to_frame([row], "sweep", ATTRS))


def test_no_rows_give_an_empty_frame_with_all_columns() -> None:
    empty = to_frame([], "sweep", {})
    assert (list(empty.columns), len(empty)) == (SWEEP_NAMES, 0)
    assert empty.projection.dtype == np.float64


def test_a_missing_number_is_nan(frame: pd.DataFrame) -> None:
    assert math.isnan(frame.loss[1])
    assert frame.loss[0] == full_row(0)["loss"]


@pytest.mark.parametrize("name", ["layer", "n_pairs", "coherent"])
def test_a_missing_value_that_cannot_be_nan_is_refused(name: str) -> None:
    """Whole numbers and texts have no NaN: a gap must not turn into 0 or a word."""
    row = full_row(0)
    assert to_frame([row], "sweep", {})[name].item() == row[name]
    del row[name]
    with pytest.raises((KeyError, ValueError)):
        to_frame([row], "sweep", {})


def test_an_unknown_key_is_refused() -> None:
    to_frame([full_row(0)], "sweep", {})
    with pytest.raises(KeyError, match="projektion"):
        to_frame([full_row(0), full_row(1) | {"projektion": 1.0}], "sweep", {})


def test_attrs_are_copied_and_must_be_json() -> None:
    attrs = {"settings": {"coefficients": (1.0, 2.0)}}
    frame = to_frame([full_row(0)], "sweep", attrs)
    assert frame.attrs == {"settings": {"coefficients": [1.0, 2.0]}}
    frame.attrs["settings"]["coefficients"].append(3.0)
    assert attrs == {"settings": {"coefficients": (1.0, 2.0)}}
    with pytest.raises(TypeError):
        to_frame([full_row(0)], "sweep", {"model": object()})


def test_parquet_keeps_values_types_and_attrs(frame: pd.DataFrame, tmp_path: Path) -> None:
    write_parquet(frame, tmp_path / "sweep.parquet")
    read = pd.read_parquet(tmp_path / "sweep.parquet")
    pd.testing.assert_frame_equal(read, frame, check_exact=True)
    assert read.attrs == json.loads(json.dumps(ATTRS))


def test_csv_keeps_every_digit(frame: pd.DataFrame, tmp_path: Path) -> None:
    write_csv(frame, tmp_path / "sweep.csv")
    read = pd.read_csv(tmp_path / "sweep.csv", float_precision="round_trip")
    # What is asked for is text that a spreadsheet would take for a formula.
    written = frame.assign(asked="'" + frame.asked)
    pd.testing.assert_frame_equal(read, written, check_exact=True)


def test_csv_is_the_same_bytes_each_time(frame: pd.DataFrame, tmp_path: Path) -> None:
    paths = [tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "c.csv"]
    for path, table in zip(paths, [frame, frame, frame[:2]], strict=True):
        write_csv(table, path)
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second != other
    assert b"\r" not in first
    header, *lines = first.decode().splitlines()
    assert header.split(",") == SWEEP_NAMES
    # NaN is an empty field, in the row where the loss is missing and only there.
    assert [",," in line for line in lines] == [False, True, False]


COLUMNS_OF_TEXT = (
    Column("text", "str", "", ""),
    Column("number", "float64", "", ""),
    Column("layer", "int64", "", ""),
)


def texts_table(texts: list[str]) -> pd.DataFrame:
    rows = [{"text": text, "number": -1.5, "layer": -2} for text in texts]
    return to_frame(rows, COLUMNS_OF_TEXT, {})


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r-1", "\n+1", "'=1", "''\t@", "\uff1d1", "-"]
PLAIN = ["a=1", "1-1", " =1", "'", "''a", "it's", "", "NA", "\ta", "次"]


def test_text_is_no_formula_in_a_csv_and_the_same_when_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    frame = texts_table([*FORMULAS, *PLAIN])
    write_csv(frame, path)
    with path.open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    # Numbers stay numbers, and other text stays as it is.
    assert rows == [[text, "-1.5", "-2"] for text in (*(f"'{t}" for t in FORMULAS), *PLAIN)]
    again = read_csv(path, COLUMNS_OF_TEXT)
    pd.testing.assert_frame_equal(again, frame)
    written = path.read_bytes()
    write_csv(again, path)
    assert path.read_bytes() == written


MISSING = ["NA", "null", "", "nan", "None"]
TEXT = st.text(st.sampled_from("'=-@\t\r\na,\""), max_size=6) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT, min_size=1))
@example(texts=[*MISSING, '"', "a\r\nb", "a\rb", "1e5", "True", " \u2028,"])
def test_any_text_comes_back_from_a_csv(texts: list[str], tmp_path: Path) -> None:
    """Commas, quotes, line ends, and what pandas takes for a missing value."""
    write_csv(texts_table(texts), tmp_path / "t.csv")
    assert read_csv(tmp_path / "t.csv", COLUMNS_OF_TEXT).text.tolist() == texts
    if texts[:5] == MISSING:
        assert pd.read_csv(tmp_path / "t.csv").text[:5].isna().all()
