"""`steerlens boundary`: what it writes, prints and refuses."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commands import Main, assert_error, content, finish, record, table

import steerlens as sl
import steerlens.measure.texts
from steerlens.tables import BOUNDARY_COLUMNS, LAYER_COLUMNS, SHAPE_COLUMNS

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture
def boundary(run: Main, model_folder: Path, pairs_file: Path) -> Main:
    """`steerlens boundary` on one layer of the small model; a later option overrides these."""
    return lambda *arguments: run(
        *("boundary", "--model", model_folder, "--pairs", pairs_file, "--layers", "1"),
        *("--budget", "nats=0.1"),
        *arguments,
    )


@pytest.fixture(scope="module")
def found(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a run."""
    out = tmp_path_factory.mktemp("found") / "run"
    data = ("--model", model_folder, "--pairs", pairs_file, "--layers", "1", "--budget", "nats=0.1")
    finish("boundary", *data, "--quiet", "--out", out)
    return out


def test_a_run_holds_tables_directions_and_record(
    boundary: Main, tmp_path: Path, loaded: Any, pairs_file: Path
) -> None:
    outcome = boundary("--out", tmp_path)
    assert outcome.code == 0
    assert set(content(tmp_path)) == {
        "boundary.csv",
        "layers.csv",
        "segments.csv",
        "directions.safetensors",
        "run.json",
    }
    layers = table(tmp_path, "layers.csv")
    assert list(layers.columns) == [column.name for column in LAYER_COLUMNS]
    assert list(table(tmp_path, "boundary.csv").columns) == [c.name for c in BOUNDARY_COLUMNS]
    pairs = sl.ContrastivePairs.from_jsonl(pairs_file)
    directions = sl.fit_directions(sl.collect_differences(loaded, pairs, layers=[1]))
    study = sl.Study(loaded, pairs, directions, layers=[1], budget="nats=0.1")
    result = study.boundary()
    expected, parts = result.layers, study.segments(result)
    pd.testing.assert_frame_equal(layers, expected, check_exact=True)
    assert layers.boundary_on.tolist() == ["positive"]
    found = record(tmp_path)
    spent = [table.attrs["forward_equivalents"] for table in (expected, parts)]
    assert found["forward_equivalents"] == sum(spent)
    assert min(spent) > 1
    parts_read = table(tmp_path, "segments.csv")
    pd.testing.assert_frame_equal(parts_read, parts, check_exact=True)
    assert found["request"]["on"] == "positive"
    assert found["request"]["budget"] == "nats=0.1"
    for word in ("Coherence boundary on positive text, nats=0.1", "predicted", "projection there"):
        assert word in outcome.out
    assert "2 boundaries" in outcome.words
    assert "forward-equivalents" in outcome.words
    assert "boundary on probes: pushes settled" in outcome.words


def test_on_names_the_text(boundary: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the river was warm\n\nhow was the day\n", encoding="utf-8")
    neutral = ("the soup was good", "it was not so")
    monkeypatch.setattr(steerlens.measure.texts, "neutral_texts", lambda: neutral)
    found = {}
    for on in ("negative", "neutral", str(texts)):
        out = tmp_path / Path(on).stem / "run"
        assert boundary("--quiet", "--on", on, "--out", out).code == 0
        found[on] = table(out, "layers.csv").iloc[0]
        assert record(out)["request"]["on"] == on
    assert [row.boundary_on for row in found.values()] == list(found)
    assert len({row.boundary_pos for row in found.values()}) == 3
    given = record(tmp_path / "texts" / "run")["request"]["texts"]
    assert given == ["the river was warm", "how was the day"]


def test_a_shape_is_written_beside_it(boundary: Main, found: Path, tmp_path: Path) -> None:
    assert boundary("--quiet", "--shape", "6", "--out", tmp_path).code == 0
    shape, layers = table(tmp_path, "shape.csv"), table(tmp_path, "layers.csv")
    assert list(shape.columns) == [column.name for column in SHAPE_COLUMNS]
    assert shape.angle.tolist() == [0, 60, 120, 180, 240, 300]
    assert shape.boundary[0] == pytest.approx(layers.boundary_pos[0], rel=0.03)
    assert shape.boundary[3] == pytest.approx(-layers.boundary_neg[0], rel=0.03)
    both, alone = (record(folder)["forward_equivalents"] for folder in (tmp_path, found))
    assert both > alone > 5


def test_another_request_does_not_overwrite(boundary: Main, found: Path) -> None:
    before = content(found)
    assert_error(boundary("--quiet", "--on", "negative", "--out", found), "other on", "--out")
    assert_error(boundary("--quiet", "--budget", "kl=0.1", "--out", found), "other budget")
    assert content(found) == before
    outcome = boundary("--quiet", "--out", found)
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert content(found)["layers.csv"] == before["layers.csv"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--on", "missing.txt"], ["missing.txt", "neutral nor a file"]),
        (["--on", "empty.txt"], ["no text"]),
        (["--budget", "kl"], ["kl_p95=1", "'kl'"]),
        (["--budget", "nats=0"], ["no room"]),
        (["--search-range", "0"], ["search_range"]),
        (["--shape", "2"], ["n_angles"]),
        (["--shape", "8", "--layers", "0,1"], ["one hook"]),
        (["--layers", "9"], ["layer 9"]),
        (["--method", "magic"], ["magic"]),
    ],
)
def test_errors_are_one_line_and_come_before_the_work(
    boundary: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    words: list[str],
) -> None:
    def too_late(*args: object, **kwargs: object) -> None:
        raise AssertionError("the search began")

    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    monkeypatch.setattr(sl.Study, "boundary", too_late)
    assert_error(boundary("--quiet", "--out", tmp_path / "run", *options), *words)
    assert content(tmp_path / "run") == {}
