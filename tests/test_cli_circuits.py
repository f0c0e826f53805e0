"""`steerlens circuits`, and the pages it writes."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from test_cli import (  # noqa: F401 (fixtures)
    Main,
    assert_error,
    content,
    model_folder,
    pairs_file,
    run,
    table,
)

import steerlens as sl
from steerlens.circuits import Component, Intervention, make_prompts
from steerlens.circuits.pictures import attention_page, heat_map_page, tokens_page
from steerlens.hooks import resid_post
from steerlens.tables import CIRCUIT_COLUMNS, READER_COLUMNS, WRITER_COLUMNS
from steerlens.tokens import TokenizedPrompt


@pytest.fixture
def circuits(run: Main, model_folder: Path, pairs_file: Path) -> Main:  # noqa: F811
    """`steerlens circuits` on the small model; a later option overrides these."""
    return lambda *arguments: run(
        *("circuits", "--model", model_folder, "--pairs", pairs_file, "--layer", "1"),
        *("--coefficient", "5"),
        *arguments,
    )


def test_a_run_holds_tables_pages_and_record(circuits: Main, tmp_path: Path) -> None:
    outcome = circuits("--out", tmp_path / "a")
    assert outcome.code == 0
    assert set(content(tmp_path / "a")) == {
        *("writers.csv", "positions.csv", "readers.csv", "claims.csv", "circuits.csv"),
        *("faithfulness.csv", "directions.safetensors", "run.json"),
        *("components.html", "attention.html", "tokens.html", "graph.html"),
    }
    for name, columns in (
        ("writers.csv", WRITER_COLUMNS),
        ("readers.csv", READER_COLUMNS),
        ("circuits.csv", CIRCUIT_COLUMNS),
    ):
        found = table(tmp_path / "a", name)
        assert list(found.columns) == [column.name for column in columns]
        assert len(found)
    assert "correlation" in outcome.err
    assert "What carries it" in outcome.out
    # Again, elsewhere: the same bytes in every table.
    assert circuits("--out", tmp_path / "b", "--quiet").code == 0
    first, second = content(tmp_path / "a"), content(tmp_path / "b")
    for name in first:
        if name.endswith(".csv"):
            assert first[name] == second[name]


def test_without_the_comparison(circuits: Main, tmp_path: Path) -> None:
    assert circuits("--out", tmp_path, "--no-compare", "--quiet", "--ig-steps", "2").code == 0
    assert "circuits.csv" not in content(tmp_path)
    assert "graph.html" not in content(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["request"]["ig_steps"] == 2
    assert record["forward_equivalents"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layer", "99"], ["layer 99"]),
        (["--layer", "1,2"], ["names 2 hooks"]),
        (["--layer", "3"], ["the last one"]),
        (["--coefficient", "0"], ["coefficient 0"]),
        (["--method", "none"], ["none"]),
        (["--ig-steps", "0"], ["--ig-steps"]),
    ],
)
def test_circuits_refuses(
    options: list[str], words: list[str], circuits: Main, tmp_path: Path
) -> None:
    assert_error(circuits("--quiet", "--out", tmp_path, *options), *words)
    assert not list(tmp_path.glob("*.csv"))


# Pages


@pytest.fixture
def hostile(llama: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose tokens would end a script element and begin another."""
    text = "</script><script>alert(1)</script><!--"
    monkeypatch.setattr(llama.tokenizer, "decode", lambda ids, **named: text)
    return llama


def test_pages_hold_their_data_and_ask_nobody(hostile: Any, directions: sl.Directions) -> None:
    prompts = make_prompts(hostile, [TokenizedPrompt((1, 7, 9, 11), (), "prompt")])
    vector = sl.SteeringVector.from_directions(hostile, directions, layers=[1])
    pushed = Intervention(vector, 3.0)
    attention = attention_page(hostile, prompts, pushed, [Component(2, 1), Component(3, 0)])
    tokens = tokens_page(hostile, prompts, directions, pushed)
    for page in (attention, tokens):
        assert page.count("</script>") == 3, "the library and two views"
        views = page[page.index("</script>") :]
        assert views.count("<script>") == 2
        assert "alert(1)" in views
        assert not re.search(r"<(script|link|img)[^>]*(src|href)=", views)
    tokens_ids = prompts.tokens
    with torch.no_grad():
        _, cache = hostile.run_with_cache(tokens_ids)
    pattern = cache["blocks.2.attn.hook_pattern"][0, 1]
    shown = json.loads(re.findall(r"AttentionPatterns, (\{.*?\})\);</script>", attention)[0])
    torch.testing.assert_close(torch.tensor(shown["attention"][0]), pattern)
    assert shown["headLabels"] == ["L2H1", "L3H0"]
    values = json.loads(re.findall(r"ColoredTokensMulti, (\{.*?\})\);</script>", tokens)[0])
    name = resid_post(1)
    row = values["labels"].index("layer 1")
    torch.testing.assert_close(
        torch.tensor(values["values"])[:, row], cache[name][0] @ directions[name]
    )


def test_the_heat_map_holds_every_component() -> None:
    writers = pd.DataFrame(
        {
            "component": ["embed", "head", "head", "mlp"],
            "layer": [-1, 0, 0, 0],
            "head": [-1, 0, 1, -1],
            "contribution": [9.0, 0.125, -0.25, 0.5],
        }
    )
    page = heat_map_page(writers, writers.rename(columns={"contribution": "effect"}))
    assert page.count("cdn.plot.ly") <= page.count("plotly.js v")
    assert "Who writes the direction" in page
    assert "H1" in page
    assert "MLP" in page
