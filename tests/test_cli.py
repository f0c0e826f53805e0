"""The command line: what it writes, prints and refuses."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import (
    HELD_OUT,
    N_LAYERS,
    OPENINGS,
    Main,
    assert_error,
    content,
    record,
    table,
    write_pairs,
)

import steerlens as sl
from steerlens.data import shipped
from steerlens.runs.record import RUN_FILES
from steerlens.tables import COLUMNS, write_csv

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture
def layers(run: Main, model_folder: Path, pairs_file: Path) -> Main:
    return lambda *arguments: run(
        "layers", "--model", model_folder, "--pairs", pairs_file, *arguments
    )


# sweep


def test_a_sweep_writes_five_files(sweep: Main, tmp_path: Path) -> None:
    out = tmp_path / "new" / "run[a][/x]:smile:"  # which is printed as it is
    outcome = sweep("--out", out)
    assert outcome.code == 0
    assert set(content(out)) == {
        *("sweep.csv", "sweep.parquet", "layers.csv", "points.csv"),
        *("directions.safetensors", "run.json"),
    }
    assert set(content(out)) <= set(RUN_FILES)
    cells = table(out)
    assert list(cells.columns) == [column.name for column in COLUMNS["sweep"]]
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
    assert list(zip(cells.hook_name, cells.coefficient, strict=True)) == [
        (hook, coefficient) for hook in hooks for coefficient in (-2.0, 0.0, 2.0)
    ]
    assert (cells.n_pairs == len(OPENINGS)).all()
    per_layer = table(out, "layers.csv")
    assert list(per_layer.columns) == [column.name for column in COLUMNS["layers"]]
    assert per_layer.hook_name.to_list() == hooks
    for word in ("Per layer", "separation", "Projection", "c = -2", "baseline logprob"):
        assert word in outcome.out
    assert "12 cells" in outcome.words
    assert str(out) in outcome.words


def test_a_sweep_writes_what_the_library_gives(
    sweep: Main, tmp_path: Path, loaded: Any, pairs_file: Path
) -> None:
    options = ("--layers", "1:3", "--method", "pca", "--position", "-2", "--batch-size", "2")
    outcome = sweep(*options, "--budget", "nats=0.5", "--seed", "7", "--out", tmp_path / "run")
    assert outcome.code == 0
    assert record(tmp_path / "run")["request"]["batch_size"] == 2
    pairs = sl.ContrastivePairs.load(pairs_file)
    differences = sl.collect_differences(loaded, pairs, layers="1:3", position=-2, batch_size=2)
    directions = sl.fit_directions(differences, method="pca", seed=7)
    more: dict[str, Any] = {"budget": "nats=0.5", "seed": 7, "batch_size": 2}
    expected = sl.sweep(loaded, pairs, directions, coefficients=[-2, 0, 2], **more)
    for name, frame in (("sweep.csv", expected.table), ("layers.csv", expected.layers)):
        write_csv(frame, tmp_path / name)
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (["--layers", "0,-1"], "hook_names", [f"blocks.{i}.hook_resid_post" for i in (0, 3)]),
        (["--layers", "blocks.1.hook_mlp_out"], "hook_names", ["blocks.1.hook_mlp_out"]),
        (["--coefficients=3,-0.5"], "coefficients", [3.0, -0.5]),
        (["--method", "pca"], "method", "pca"),
        (["--position", "-2"], "position", -2),
        (["--budget", "relative=0"], "budget", "relative=0"),
    ],
)
def test_every_option_changes_the_numbers_and_the_record(
    options: list[str], key: str, value: Any, sweep: Main, swept_folder: Path, tmp_path: Path
) -> None:
    assert sweep(*options, "--out", tmp_path).code == 0
    before, after = record(swept_folder)["request"], record(tmp_path)["request"]
    assert after == before | {key: value}
    assert before[key] != value
    assert not table(swept_folder).equals(table(tmp_path))


def test_intervals_go_by_the_group_that_is_named(sweep: Main, tmp_path: Path) -> None:
    """Seven personas, each with its own adjective in two pairs; the seed draws among them."""
    words = "kind good warm cold bad so very".split()
    lines = [
        json.dumps(
            {
                "positive": f"you are {word} the {opening}",
                "negative": f"you are rude the {opening}",
                "persona": word,
            }
        )
        for opening in ("river was", "night is")
        for word in words
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(lines))
    runs = {
        "plain": [],
        "persona": ["--group", "persona"],
        "auto": ["--group", "auto"],
        "seed": ["--group", "persona", "--seed", "5"],
    }
    cells = {}
    for name, options in runs.items():
        usual = ("--pairs", file, "--layers", "1", "--out", tmp_path / name)
        if name == "plain":
            assert sweep(*usual).code == 0
        else:
            with pytest.warns(UserWarning, match="7 independent groups of pairs"):
                outcome = sweep(*usual, *options)
            assert outcome.code == 0
            assert any("7 independent groups" in w for w in record(tmp_path / name)["warnings"])
        cells[name] = table(tmp_path / name).drop(columns="n_groups")
        request = record(tmp_path / name)["request"]
        n_groups = 14 if name == "plain" else 7
        assert request["fitted_on"]["n_groups"] == request["measured_on"]["n_groups"] == n_groups
        assert (table(tmp_path / name).n_groups == n_groups).all()
    assert cells["auto"].equals(cells["persona"])
    means = ["projection", "degradation_nats"]
    for other in ("plain", "seed"):
        assert cells[other][means].equals(cells["persona"][means])
        assert not cells[other].equals(cells["persona"])
    refused = sweep("--pairs", file, "--group", "tone", "--out", tmp_path / "none")
    assert_error(refused, "missing key 'tone'")


def test_the_same_command_gives_the_same_bytes(
    sweep: Main, swept_folder: Path, tmp_path: Path
) -> None:
    """`test_every_option_changes_the_numbers` is the control."""
    assert sweep("--out", tmp_path / "b").code == 0
    a, b = (content(folder) for folder in (swept_folder, tmp_path / "b"))
    for name in ("sweep.csv", "layers.csv", "sweep.parquet"):
        assert a[name] == b[name]
    # Again into the same folder.
    shutil.copytree(swept_folder, tmp_path / "a")
    (tmp_path / "a" / "sweep.csv").unlink()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    assert sweep("--out", tmp_path / "a").code == 0
    after = content(tmp_path / "a")
    assert (after["sweep.csv"], after["notes.txt"]) == (a["sweep.csv"], b"mine")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--coefficients=-2,0,4"], "coefficients ([-2.0, 0.0, 2.0], now [-2.0, 0.0, 4.0])"),
        (["--layers", "0", "--seed", "1"], "seed (0, now 1)"),
        (["--method", "pca"], "method ('mean_diff', now 'pca')"),
        (["--max-pairs", "3"], "n_pairs (4, now 3), n_pairs_fitted_on (4, now 3)"),
    ],
)
def test_another_request_into_the_same_folder_is_refused(
    options: list[str], named: str, sweep: Main, swept_folder: Path
) -> None:
    before = content(swept_folder)
    assert_error(sweep(*options, "--quiet", "--out", swept_folder), f"{named};", str(swept_folder))
    assert content(swept_folder) == before


def test_other_pairs_in_a_file_of_the_same_name_are_refused(sweep: Main, tmp_path: Path) -> None:
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "run"
    words = ("--layers", "1", "--pairs", pairs, "--quiet", "--out", out)
    write_pairs(pairs, OPENINGS)
    assert sweep(*words).code == 0
    before = content(out)
    write_pairs(pairs, OPENINGS, negative="rude")
    outcome = sweep(*words)
    assert_error(outcome, "other fitted_on.fingerprint (", ", measured_on.fingerprint (")
    assert content(out) == before


def test_pairs_to_fit_and_to_measure_on(
    sweep: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mood = tmp_path / "shipped" / "mood"
    mood.mkdir(parents=True)
    write_pairs(mood / "train.jsonl", OPENINGS)
    held_out = write_pairs(mood / "test.jsonl", HELD_OUT)
    options = ("--test-pairs", held_out, "--max-pairs", "2", "--layers", "1")
    assert sweep(*options, "--out", tmp_path / "file").code == 0
    request = record(tmp_path / "file")["request"]
    measured = sl.ContrastivePairs.load(held_out)[:2]
    assert request["fitted_on"]["n_pairs"] == len(OPENINGS)
    assert request["measured_on"] == {
        "name": str(held_out),
        "n_pairs": 2,
        "n_groups": 2,
        "fingerprint": measured.fingerprint,
        "read": asdict(sl.data.Card("pairs", 3, 3)) | {"not_used": []},
    }
    assert (table(tmp_path / "file").n_pairs == 2).all()
    # A shipped dataset is fitted on its training part and measured on its test part.
    monkeypatch.setattr(shipped, "shipped_folder", lambda: mood.parent)
    assert sweep("--pairs", "mood", "--layers", "1", "--out", tmp_path / "mood").code == 0
    request = record(tmp_path / "mood")["request"]
    parts = [request[part]["name"] for part in ("fitted_on", "measured_on")]
    assert parts == ["mood/train", "mood/test"]
    assert (table(tmp_path / "mood").n_pairs == len(HELD_OUT)).all()


def test_quiet_prints_nothing(
    sweep: Main, layers: Main, run: Main, model_folder: Path, tmp_path: Path
) -> None:
    vector = tmp_path / "v.safetensors"
    sl.SteeringVector.from_tensor(torch.ones(32), layer=1).save(vector)
    for i, (command, *words) in enumerate(
        (
            (sweep, "--layers", "1", "--out", tmp_path / "0.csv"),
            (layers, "--layers", "1", "--out", tmp_path / "1.csv"),
            (run, "pairs", "sentiment"),
            (run, "read", vector, "--model", model_folder),
            (run, "generate", "--vector", vector, "--model", model_folder, "--prompt", "you"),
        )
    ):
        loud = command(*words)
        assert (loud.code, loud.out != "", loud.err != "") == (0, True, True), (i, loud.err)
        quiet = command(*words, "--quiet")
        assert (quiet.code, quiet.out, quiet.err) == (0, "", ""), i


# Errors


def _bad_line(folder: Path) -> Path:
    path = write_pairs(folder / "bad.jsonl", OPENINGS)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:2], '{"positive": ', *lines[2:]]), encoding="utf-8")
    return path


def _one_pair(folder: Path) -> Path:
    return write_pairs(folder / "one.jsonl", OPENINGS[:1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pairs", "missing.jsonl"], ["missing.jsonl", "shipped dataset"]),
        (["--pairs", _bad_line], ["bad.jsonl:3:"]),
        (["--pairs", _one_pair], ["at least 2"]),
        (["--test-pairs", "missing.jsonl"], ["missing.jsonl"]),
        (["--max-pairs", "1"], ["at least 2"]),
        (["--max-pairs", "-1"], ["at least 2"]),
        (["--model", "./no-such-model"], ["no model at './no-such-model'"]),
        (["--layers", "99"], ["layer 99 does not exist", "4 layers"]),
        (["--layers", "blocks.0.hook_resid_pots"], ["nearest", "blocks.0.hook_resid_post"]),
        (["--layers", ""], ["names no hook"]),
        (["--method", "pcaa"], ["'pcaa'", "mean_diff, pca"]),
        (["--coefficients=nan"], ["cannot read", "'nan'"]),
        (["--coefficients=0,inf"], ["cannot read", "'inf'"]),
        (["--coefficients=1e400"], ["finite", "inf"]),
        (["--coefficients=1,two"], ["cannot read", "'two'"]),
        (["--coefficients="], ["coefficients joined by commas, got none"]),
        (["--dtype", "int8"], ["--dtype is float32, bfloat16", "'int8'"]),
        (["--device", "gpu"], ["--device", "'gpu'", "cuda"]),
        (["--revision", "main"], ["has no revision 'main'"]),
        (["--budget", "relative=1"], ["relative=0.01", "'relative=1'"]),
        (["--budget", "nats=-1"], ["'nats=-1'"]),
        (["--budget", "much"], ["'much'"]),
        (["--position", "-9"], ["position -9 is outside", "pair '"]),
        (["--position", "7"], ["position 7 is outside", "pair '"]),
        (["--position", "1.5"], ["position such as -1", "'1.5'"]),
        (["--batch-size", "0"], ["batch_size", "0"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_sweep_that_cannot_be_run(
    options: list[Any],
    words: list[str],
    sweep: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`test_a_sweep_writes_five_files` is the control: without these options it runs."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    given = [option(tmp_path) if callable(option) else option for option in options]
    assert_error(sweep("--quiet", "--out", out, *given), *words)
    assert content(out) == {}


def test_the_error_is_the_last_line_after_notes(sweep: Main, tmp_path: Path) -> None:
    outcome = sweep("--method", "pcaa", "--out", tmp_path)
    assert outcome.code == 2
    *notes, last = outcome.err.splitlines()
    assert last.startswith("steerlens: no method 'pcaa'")
    assert not any(note.startswith("steerlens:") for note in notes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep"], ["--out"]),
        (["sweep", "--out"], ["--out"]),
        (["no-such-command"], ["no-such-command"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["generate", "--layer", "1"], ["--prompt"]),
        (["generate", "--prompt", "hi"], ["--vector", "--layer"]),
        (["datasets", "no-such"], ["no-such", "sentiment"]),
        (["datasets", "../tests"], ["../tests"]),
        (["models", "stray"], ["stray"]),
    ],
)
def test_a_usage_error_is_one_line(arguments: list[str], words: list[str], run: Main) -> None:
    assert_error(run(*arguments), *words)


def test_debug_shows_the_traceback(sweep: Main, run: Main, tmp_path: Path) -> None:
    assert_error(sweep("--quiet", "--layers", "99", "--out", tmp_path), "99")
    outcome = sweep("--quiet", "--layers", "99", "--out", tmp_path, "--debug")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Traceback (most recent call last):\n  File ")
    assert "HookError: layer 99 does not exist" in outcome.err
    assert sweep("--debug", "--layers", "1", "--out", tmp_path).code == 0


def test_an_unexpected_error_says_so_and_points_to_debug(
    layers: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("first line\nsecond [line]")

    monkeypatch.setattr("steerlens.load_model", fail)
    outcome = layers("--quiet")
    assert_error(outcome, "unexpected RuntimeError", "first line second [line]", "--debug")
    assert "RuntimeError: first line\nsecond [line]\n" in layers("--quiet", "--debug").err


def test_an_interrupt_is_exit_code_130_and_leaves_no_files(
    layers: Main, sweep: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    for name, stopped in (
        ("load_model", lambda: layers("--quiet")),
        ("fit", lambda: sweep("--out", tmp_path)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"steerlens.{name}", interrupt)
            outcome = stopped()
        assert outcome.code == 130
        assert "Traceback" not in outcome.err
    assert "before anything was finished" in outcome.words
    assert content(tmp_path) == {}
    assert sweep("--layers", "1", "--out", tmp_path).code == 0


# layers


def test_layers_prints_and_writes_the_table(
    layers: Main, swept_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert layers().code == 0
    assert content(tmp_path) == {}, "without --out nothing is written"
    out = tmp_path / "new" / "layers.csv"
    outcome = layers("--out", out)
    assert outcome.code == 0
    for word in ("separation", "agreement", "baseline logprob"):
        assert word in outcome.out
    # The unsteered table of a sweep, with no cell run.
    assert out.read_bytes() == (swept_folder / "layers.csv").read_bytes()
    written = table(out.parent, "layers.csv")
    assert list(written.columns) == [column.name for column in COLUMNS["layers"]]
    assert len(written) == N_LAYERS
    assert written.boundary_pos.isna().all()
    assert written.separation.gt(0).all()


def test_layers_takes_the_same_options(layers: Main, tmp_path: Path) -> None:
    options = ("--layers", "1,2", "--method", "random", "--position", "-2", "--max-pairs", "2")
    tables = []
    for seed in ("1", "2", "1"):
        outcome = layers(*options, "--seed", seed, "--quiet", "--out", tmp_path / "layers.csv")
        assert outcome.code == 0
        tables.append(table(tmp_path, "layers.csv"))
    assert tables[0].layer.to_list() == [1, 2]
    assert tables[0].equals(tables[2])
    assert not tables[0].equals(tables[1])


def test_layers_refuses_a_folder_and_keeps_an_old_file_after_an_error(
    layers: Main, tmp_path: Path
) -> None:
    assert_error(layers("--quiet", "--out", tmp_path), str(tmp_path), "a file's name")
    out = tmp_path / "layers.csv"
    out.write_text("old")
    assert_error(layers("--quiet", "--layers", "99", "--out", out), "99")
    assert content(tmp_path) == {"layers.csv": b"old"}
    assert layers("--quiet", "--out", out).code == 0
    assert list(content(tmp_path)) == ["layers.csv"]
    assert out.read_text(encoding="utf-8").startswith("hook_name,")
