"""`steerlens boundary`: what it writes, prints and refuses."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pandas as pd
import pytest
from commands import Main, assert_error, content, finish, record, table

import steerlens as sl
import steerlens.measure.texts
from steerlens.tables import COLUMNS

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
    assert list(layers.columns) == [column.name for column in COLUMNS["layers"]]
    assert list(table(tmp_path, "boundary.csv").columns) == [c.name for c in COLUMNS["boundary"]]
    pairs = sl.ContrastivePairs.load(pairs_file)
    directions = sl.fit_directions(sl.collect_differences(loaded, pairs, layers=[1]))
    study = sl.Study(loaded, pairs, directions, layers=[1], budget="nats=0.1")
    result = study.boundary(with_projection=True)
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
    for words in ("Coherence boundary on positive text, nats=0.1", "predicted", "projection there"):
        assert {*words.split()} <= {*outcome.out.split()}  # headings may take two lines
    assert "2 boundaries" in outcome.words
    assert "forward-equivalents" in outcome.words
    assert "boundary: pushes settled" in outcome.words


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
    assert list(shape.columns) == [column.name for column in COLUMNS["shape"]]
    assert shape.angle.tolist() == [0, 60, 120, 180, 240, 300]
    assert shape.boundary[0] == pytest.approx(layers.boundary_pos[0], rel=0.03)
    assert shape.boundary[3] == pytest.approx(-layers.boundary_neg[0], rel=0.03)
    both, alone = (record(folder)["forward_equivalents"] for folder in (tmp_path, found))
    assert both > alone > 5


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


@pytest.fixture
def vector_file(loaded: Any, pairs_file: Path, tmp_path: Path) -> Path:
    """A vector of two hooks, fitted on the pairs of the file."""
    pairs = sl.ContrastivePairs.from_jsonl(pairs_file)
    fitted = sl.fit(loaded, pairs, layers=[1, 2])
    path = tmp_path / "both.safetensors"
    sl.SteeringVector.from_directions(loaded, fitted, layers=[1, 2]).save(path)
    return path


def test_a_vector_is_measured_in_place_of_directions(
    run: Main,
    loaded: Any,
    model_folder: Path,
    pairs_file: Path,
    vector_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vector, pairs = sl.SteeringVector.load(vector_file), sl.ContrastivePairs.from_jsonl(pairs_file)
    study = sl.Study(loaded, pairs, vector, budget="nats=0.1")
    data = ("--quiet", "--model", model_folder, "--pairs", pairs_file, "--vector", vector_file)
    wanted = ("boundary", *data, "--budget", "nats=0.1", "--shape", "4")
    outcome = run(*(word for word in wanted if word != "--quiet"), "--out", tmp_path / "a")
    assert outcome.code == 0, outcome.err
    assert "Joint boundary of the two hooks" in outcome.out
    expected = study.boundary(with_projection=True).layers
    layers = table(tmp_path / "a", "layers.csv")
    pd.testing.assert_frame_equal(layers, expected, check_exact=True)
    joint = study.joint_boundary(n_angles=4)
    pd.testing.assert_frame_equal(table(tmp_path / "a", "joint.csv"), joint, check_exact=True)
    # The vector is in the folder, its file's hash and its pairs in the record.
    assert sl.SteeringVector.load(tmp_path / "a" / "vector.safetensors") == vector
    assert "directions.safetensors" not in content(tmp_path / "a")
    request = record(tmp_path / "a")["request"]
    sha256 = hashlib.sha256(vector_file.read_bytes()).hexdigest()
    assert request["vector"] == {"file": str(vector_file), "sha256": sha256}
    assert request["method"] == "mean_diff"
    assert (request["n_pairs_fitted_on"], "fitted_on" in request) == (len(pairs), False)
    # From the record the same comes out; of another file by that name it is said.
    again = ("boundary", "--from", tmp_path / "a" / "run.json")
    assert run(*again, "--quiet", "--out", tmp_path / "b").code == 0
    assert content(tmp_path / "b")["layers.csv"] == content(tmp_path / "a")["layers.csv"]
    # Interrupted and gone on with.
    with monkeypatch.context() as patch:
        patch.setattr(sl.Study, "joint_boundary", Mock(side_effect=KeyboardInterrupt))
        assert run(*wanted, "--out", tmp_path / "e").code == 130
    assert run("boundary", "--quiet", "--resume", tmp_path / "e").code == 0
    for name in ("layers.csv", "joint.csv"):
        assert content(tmp_path / "e")[name] == content(tmp_path / "a")[name]
    (2 * vector).save(vector_file)
    outcome = run(*again, "--out", tmp_path / "c")
    assert "not as recorded: vector.sha256" in outcome.words
    half = table(tmp_path / "c", "layers.csv").boundary_pos[0] / layers.boundary_pos[0]
    assert half == pytest.approx(0.5, rel=0.02)
    assert_error(run(*wanted, "--out", tmp_path / "a"), "other vector.sha256")
    # A sweep of it, with its operator's own coefficients.
    replace(vector.at(1), operator=sl.Ablate()).save(vector_file)
    outcome = run("sweep", *data, "--coefficients", "0,1", "--out", tmp_path / "d")
    assert outcome.code == 0
    of_one = sl.sweep(loaded, pairs, sl.SteeringVector.load(vector_file), coefficients=[0, 1])
    pd.testing.assert_frame_equal(table(tmp_path / "d"), of_one.table, check_exact=True)
    assert {"vector.safetensors", "generations.csv", "tokens.csv"} <= {*content(tmp_path / "d")}
    assert run("report", tmp_path / "a", tmp_path / "d").code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "1"], ["as a whole", "--layers"]),
        (["--method", "pca", "--position", "-1"], ["leave out --method, --position"]),
        (["--shape", "2"], ["n_angles"]),
        (["--vector", "missing.safetensors"], ["missing.safetensors"]),
    ],
)
def test_what_does_not_go_with_a_vector(
    run: Main,
    model_folder: Path,
    pairs_file: Path,
    vector_file: Path,
    tmp_path: Path,
    options: list[str],
    words: list[str],
) -> None:
    data = ("--quiet", "--model", model_folder, "--pairs", pairs_file, "--vector", vector_file)
    assert_error(run("boundary", *data, "--out", tmp_path / "run", *options), *words)
    assert content(tmp_path / "run") == {}
