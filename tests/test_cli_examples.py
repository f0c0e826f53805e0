"""What `steerlens sweep` shows of a few prompts: generations.csv and tokens.csv."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commands import Main, assert_error, content, record

import steerlens as sl
from steerlens.models.hooks import resid_post
from steerlens.plots.pages import token_page
from steerlens.runs.record import RUN_FILES
from steerlens.tables import read_csv

pytestmark = pytest.mark.usefixtures("loaded_once")
BOTH = {"generations.csv", "tokens.csv"}


@pytest.fixture
def sweep(run: Main, model_folder: Path, pairs_file: Path) -> Main:
    """`steerlens sweep` with its examples on the small model; a later option overrides these."""
    given = ("--model", model_folder, "--pairs", pairs_file, "--coefficients=-2,0,3")
    return lambda *arguments: run("sweep", *given, *arguments)


def examples(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    return (
        read_csv(folder / "generations.csv", "generations"),
        read_csv(folder / "tokens.csv", "tokens"),
    )


def test_a_sweep_shows_two_prompts(
    sweep: Main, tmp_path: Path, loaded: Any, pairs_file: Path
) -> None:
    outcome = sweep("--out", tmp_path, "--layers", "0:3")
    assert outcome.code == 0
    assert f"Examples: 2 prompts at {resid_post(1)}" in outcome.words
    assert BOTH <= set(content(tmp_path)) <= set(RUN_FILES)
    generations, tokens = examples(tmp_path)
    assert set(generations.hook_name) == set(tokens.hook_name) == {resid_post(1)}
    assert generations.prompt.to_list() == ["1"] * 3 + ["2"] * 3
    assert generations.coefficient.to_list() == [-2, 0, 3] * 2
    assert generations.n_tokens.max() == 40
    assert tokens.coefficient.drop_duplicates().to_list() == [-2, 3]
    assert set(tokens.side) == {"positive"}
    request = record(tmp_path)["request"]
    assert request["examples"] == 2
    assert "illustration" in request["examples_at"]
    pairs = sl.ContrastivePairs.load(pairs_file)
    directions = sl.fit_directions(sl.collect_differences(loaded, pairs, layers="0:3"))
    prompts: list[Any] = [pair.positive for pair in pairs][:2]
    options: dict[str, Any] = {"layer": 1}
    pd.testing.assert_frame_equal(
        generations,
        sl.measure.generation_table(
            loaded, prompts, directions, coefficients=[-2, 0, 3], **options
        ),
    )
    pd.testing.assert_frame_equal(
        tokens, sl.token_damage(loaded, prompts, directions, coefficients=[-2, 3], **options)
    )
    assert token_page(tokens).html.count("<h2>") == 4


def test_without_examples(sweep: Main, tmp_path: Path) -> None:
    outcome = sweep("--out", tmp_path, "--layers", "1", "--examples", "0")
    assert outcome.code == 0
    assert not BOTH & set(content(tmp_path))
    assert "Examples" not in outcome.words
    assert_error(sweep("--out", tmp_path / "b", "--examples", "-1", "--quiet"), "--examples")


def test_the_examples_change_no_cell_and_are_the_same_bytes(sweep: Main, tmp_path: Path) -> None:
    options = ("--layers", "1", "--coefficients=0,3", "--quiet")
    for name, n_examples in (("a", "9"), ("b", "9"), ("c", "0")):
        assert sweep(*options, "--out", tmp_path / name, "--examples", n_examples).code == 0
    a, b, c = (content(tmp_path / name) for name in "abc")
    for name in c:
        if name.endswith(".csv"):
            assert a[name] == b[name] == c[name]
    for name in BOTH:
        assert a[name] == b[name]
    assert examples(tmp_path / "a")[0].prompt.nunique() == 4, "as many as there are"


def test_a_cell_that_overflows_leaves_a_gap(sweep: Main, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="left undefined"):
        outcome = sweep("--out", tmp_path, "--coefficients=-2,1e39", "--layers", "1", "--quiet")
    assert outcome.code == 0
    generations, tokens = examples(tmp_path)
    assert generations.end.to_list() == ["length", "overflow"] * 2
    assert (generations.text == "").to_list() == [False, True] * 2
    overflown = tokens.coefficient > 1
    assert tokens.damage_nats[overflown].isna().all()
    assert tokens.damage_nats[~overflown & (tokens.position > 0)].notna().all()


@pytest.mark.parametrize("room", [9, 0])
def test_a_prompt_near_the_context_limit_is_noted(room: int, sweep: Main, tmp_path: Path) -> None:
    """The context has 64 tokens; BOS and four words stand around the others."""
    n_words = 64 - room - 5
    lines = [
        {"id": f"long{i}", "positive": f"you are {word} {'so ' * n_words}good", "negative": "you"}
        for i, word in enumerate(("kind", "warm"))
    ]
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    outcome = sweep("--out", tmp_path / "run", "--test-pairs", path, "--layers", "1")
    assert outcome.code == 0
    generations, _ = examples(tmp_path / "run")
    assert generations.end.to_list() == ["context"] * 6
    assert generations.n_tokens.to_list() == [room] * 6
    note = f"{room} of 40 new tokens fit the model's context after prompt 'long0'"
    assert note in outcome.words
    assert any(note in kept for kept in record(tmp_path / "run")["warnings"])
