"""`steerlens circuits`, and the pages it writes."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Main, assert_error, content, table

import steerlens as sl
from steerlens.circuits import (
    Component,
    Intervention,
    attention_patterns,
    make_prompts,
    token_projections,
)
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.models.hooks import resid_post
from steerlens.tables import COLUMNS

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture
def circuits(run: Main, model_folder: Path, pairs_file: Path) -> Main:
    """`steerlens circuits` on the small model; a later option overrides these."""
    return lambda *arguments: run(
        *("circuits", "--model", model_folder, "--pairs", pairs_file, "--layer", "1"),
        *("--coefficient", "5", "--null", "2"),
        *arguments,
    )


def test_a_run_holds_tables_pages_and_record(circuits_folder: Path) -> None:
    assert set(content(circuits_folder)) == {
        *("writers.csv", "positions.csv", "readers.csv", "claims.csv", "circuits.csv"),
        *("faithfulness.csv", "edges.csv", "directions.safetensors", "run.json"),
        *("components.html", "attention.html", "tokens.html", "graph.html"),
    }
    for name, columns in (
        ("writers.csv", COLUMNS["writers"]),
        ("readers.csv", COLUMNS["readers"]),
        ("circuits.csv", COLUMNS["circuits"]),
        ("faithfulness.csv", COLUMNS["faithfulness"]),
    ):
        found = table(circuits_folder, name)
        assert list(found.columns) == [column.name for column in columns]
        assert len(found)
    assert set(table(circuits_folder, "circuits.csv").n_null) == {2}
    attrs = json.loads((circuits_folder / "run.json").read_text())["tables"]["circuits"]["attrs"]
    assert attrs["chosen_on"]["n_groups"] == attrs["tested_on"]["n_groups"] == 2


def test_the_page_of_circuits_is_made_from_a_run(circuits_folder: Path) -> None:
    """What `make found-circuits` writes: the numbers of the tables, each beside its test."""
    script = runpy.run_path(str(ROOT / "docs" / "found_circuits.py"))
    run = sl.read_run(circuits_folder)
    page = script["page"](run)
    claims, overlaps = run.tables["claims"], run.tables["circuits"]
    named = claims.set_index("test").loc["named components"]
    assert f"| named components | {named.remaining:.2f} (" in page
    assert f"| {named.p_value:.2f} |" in page
    assert f"{overlaps.iou_p_family.iloc[-1]:.2f} |" in page
    assert "2 nulls of each kind can give is 0.333" in page
    assert "nan" not in page


def test_without_the_comparison(circuits: Main, tmp_path: Path) -> None:
    outcome = circuits("--out", tmp_path, "--no-compare", "--ig-steps", "2")
    assert outcome.code == 0
    assert "correlation" in outcome.err
    assert "What carries it" in outcome.out
    assert "circuits.csv" not in content(tmp_path)
    assert "graph.html" not in content(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["request"]["ig_steps"] == 2
    assert record["forward_equivalents"] is None
    for name, view in (("attention", "AttentionHeads"), ("tokens", "ColoredTokens")):
        page = (tmp_path / f"{name}.html").read_text(encoding="utf-8")
        assert f'"view": "{view}"' in page
        assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layer", "99"], ["layer 99"]),
        (["--layer", "1,2"], ["names 2 hooks"]),
        (["--layer", "3"], ["the last one"]),
        (["--coefficient", "0"], ["expected one --coefficient, not 0"]),
        (["--method", "none"], ["none"]),
        (["--ig-steps", "0"], ["--ig-steps"]),
        (["--null", "1"], ["--null"]),
        (["--max-pairs", "3"], ["4 groups or more; got 3"]),
        (["--position", "-4:"], ["writes are read at one token", "-4:"]),
    ],
)
def test_circuits_refuses(
    options: list[str], words: list[str], circuits: Main, tmp_path: Path
) -> None:
    assert_error(circuits("--quiet", "--out", tmp_path, *options), *words)
    assert not content(tmp_path)


# Pages


def test_patterns_and_projections_are_the_models(llama: Any, directions: sl.Directions) -> None:
    prompts = make_prompts(llama, [TokenizedPrompt((1, 7, 9, 11), (), "prompt")])
    vector = sl.SteeringVector.from_directions(llama, directions, layers=[1])
    pushed = Intervention(vector, 3.0)
    attention = attention_patterns(llama, prompts, pushed, [Component(2, 1), Component(3, 0)])
    tokens = token_projections(llama, prompts, directions, pushed)
    with torch.no_grad():
        _, unsteered = llama.run_with_cache(prompts.tokens)
        with sl.steer(llama, vector, 3.0):
            _, steered = llama.run_with_cache(prompts.tokens)
    assert attention.tokens == tokens.tokens == ("<s>", "walk", "is", "you")
    assert attention.heads == ("L2H1", "L3H0")
    assert tokens.layers == tuple(f"layer {layer}" for layer in range(5))
    name = resid_post(2)
    for of, cache in (("unsteered", unsteered), ("steered", steered)):
        patterns, values = getattr(attention, of), getattr(tokens, of)
        torch.testing.assert_close(patterns[1], cache["blocks.3.attn.hook_pattern"][0, 0])
        torch.testing.assert_close(values[2], cache[name][0] @ directions[name])
    assert not torch.equal(attention.unsteered, attention.steered)
    assert not torch.equal(tokens.unsteered, tokens.steered)
