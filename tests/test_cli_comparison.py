"""`steerlens compare`, `reliability` and `methods`."""

import json
from pathlib import Path

import pytest
from commands import Main, assert_error, content, record, table, write_pairs

from steerlens.directions.methods import METHODS
from steerlens.tables import COLUMNS

pytestmark = pytest.mark.usefixtures("loaded_once", "few_texts")
WORDS = "walk sun rain soup bread night day kind rude it you a".split()


@pytest.fixture(scope="module")
def items_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    lines = [
        json.dumps({"prompt": f"the {word} was", "positive": " good day", "negative": " so bad"})
        for word in WORDS
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def compare(run: Main, model_folder: Path, pairs_file: Path, items_file: Path) -> Main:
    """`steerlens compare` on one layer of the small model; a later option overrides these."""
    return lambda *arguments: run(
        *("compare", "--model", model_folder, "--pairs", pairs_file, "--items", items_file),
        *("--layers", "1", "--methods", "mean_diff,random", "--null", "2"),
        *("--budget", "kl=0.05", "--off-target", "none"),
        *arguments,
    )


def test_a_comparison_writes_its_tables(compare: Main, tmp_path: Path) -> None:
    outcome = compare("--out", tmp_path)
    assert outcome.code == 0
    assert set(content(tmp_path)) == {
        "comparison.csv",
        "summary.csv",
        "effects.csv",
        "methods.csv",
        "directions-mean_diff.safetensors",
        "directions-random.safetensors",
        "run.json",
    }
    found = table(tmp_path, "comparison.csv")
    assert list(found.columns) == [column.name for column in COLUMNS["comparison"]]
    assert found.method.tolist() == ["mean_diff", "random"]
    # Seven tenths of twelve items are held out, the others choose the layer.
    assert found.n_items.tolist() == [8, 8]
    assert found.train_effect.notna().all()
    summary = table(tmp_path, "summary.csv")
    assert list(summary.columns) == [column.name for column in COLUMNS["summary"]]
    assert len(table(tmp_path, "effects.csv")) == 8
    request = record(tmp_path)["request"]
    assert request["methods"] == ["mean_diff", "random"]
    assert request["measured_on"]["n_items"] == 8
    assert (request["on"], request["own_tokens"]) == ("own", 32)
    assert "Effect at equal damage" in outcome.out
    assert {"own", "spent"} <= {*outcome.out.split()}
    assert ("spent neg above 2:" in outcome.out) == (found.spent_neg > 2).any()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--methods", "mean_diff,best", "no method 'best'"),
        ("--budget", "kl=0", "budget"),
        ("--items", "nowhere.jsonl", "neither a file nor a shipped dataset"),
        ("--items", "pairs.jsonl", "a comparison needs items"),
        ("--off-target", "humour", "'humour' is neither a file nor a shipped dataset"),
        ("--max-items", "1", "at least 2 items"),
        ("--on", "negative", "own, neutral or positive"),
        ("--null", "1", "n_null"),
        ("--methods", ",", "at least one method"),
    ],
)
def test_a_wrong_option_is_one_line(
    option: str,
    value: str,
    words: str,
    compare: Main,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(pairs_file.parent)
    assert_error(compare("--out", tmp_path, "--quiet", option, value), words)


def test_reliability_is_printed_and_written(run: Main, model_folder: Path, tmp_path: Path) -> None:
    out, pairs = tmp_path / "reliability.csv", write_pairs(tmp_path / "pairs.jsonl", WORDS)
    outcome = run("reliability", "--model", model_folder, "--pairs", pairs, "--out", out)
    assert outcome.code == 0
    assert {"split", "half", "cosine"} <= {*outcome.out.split()}
    found = table(tmp_path, "reliability.csv")
    assert list(found.columns) == [column.name for column in COLUMNS["reliability"]]
    assert found.layer.is_monotonic_increasing
    few = write_pairs(tmp_path / "few.jsonl", WORDS[:5])
    outcome = run("reliability", "--model", model_folder, "--pairs", few, "--quiet")
    assert_error(outcome, "at least 8 pairs")


def test_methods_are_listed(run: Main) -> None:
    outcome = run("methods")
    assert outcome.code == 0
    for name in METHODS:
        assert f"{name} (" in outcome.out


def test_a_gradient_method_is_fitted_before_the_last_token(sweep: Main, tmp_path: Path) -> None:
    options = ("--layers", "1", "--quiet", "--method", "gradient_mean")
    assert sweep(*options, "--out", tmp_path / "a").code == 0
    assert record(tmp_path / "a")["request"]["position"] == -2
    outcome = sweep(*options, "--position", "-1", "--out", tmp_path / "b")
    assert_error(outcome, "no label comes after position -1")
