"""The command line: what it writes, prints and refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import build_llama, build_tokenizer

import steerlens as sl
from steerlens.cli import main
from steerlens.data import shipped
from steerlens.models.packaged import DEFAULT_MODEL, PACKAGED_MODELS, cache_folder
from steerlens.runs.record import RUN_FILES
from steerlens.tables import LAYER_COLUMNS, SWEEP_COLUMNS, write_csv

N_LAYERS = 4
OPENINGS = ["the river was", "how was the day today", "I said", "the soup is so warm and good"]
HELD_OUT = ["what a night by the river", "tomorrow the sun is", "you felt"]
Main = Callable[..., "Outcome"]


class Outcome:
    """How a command ended: its exit code and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def words(self) -> str:
        """All that was printed on stderr as one line: rich wraps long ones, inside words too."""
        return "".join(self.err.splitlines())


def write_pairs(path: Path, openings: list[str], *, negative: str = "gloomy") -> Path:
    lines = (
        json.dumps(
            {
                "positive": f"you are cheerful {opening}",
                "negative": f"you are very {negative} {opening}",
            }
        )
        for opening in openings
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_llama(n_layers=N_LAYERS).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", OPENINGS)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Main:
    """Run a command in this process."""

    def run_main(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        assert isinstance(stop.value.code, int)
        return Outcome(stop.value.code, *capsys.readouterr())

    return run_main


@pytest.fixture
def sweep(run: Main, model_folder: Path, pairs_file: Path) -> Main:
    """`steerlens sweep` on the small model; a later option overrides these."""
    return lambda *arguments: run(
        *("sweep", "--model", model_folder, "--pairs", pairs_file, "--coefficients=-2,0,2"),
        *("--examples", "0"),
        *arguments,
    )


@pytest.fixture
def layers(run: Main, model_folder: Path, pairs_file: Path) -> Main:
    return lambda *arguments: run(
        "layers", "--model", model_folder, "--pairs", pairs_file, *arguments
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def table(folder: Path, name: str = "sweep.csv") -> pd.DataFrame:
    return pd.read_csv(folder / name, float_precision="round_trip")


def record(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return loaded


def assert_error(outcome: Outcome, *words: str) -> None:
    """Exit code 2, nothing on stdout, exactly one line on stderr."""
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("steerlens: ")
    assert outcome.err.count("\n") == 1
    assert outcome.err.endswith("\n")
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


# sweep


def test_a_sweep_writes_five_files(sweep: Main, tmp_path: Path) -> None:
    out = tmp_path / "new" / "run"
    outcome = sweep("--out", out)
    assert outcome.code == 0
    assert set(content(out)) == {
        *("sweep.csv", "sweep.parquet", "layers.csv", "points.csv"),
        *("directions.safetensors", "run.json"),
    }
    assert set(content(out)) <= set(RUN_FILES)
    cells = table(out)
    assert list(cells.columns) == [column.name for column in SWEEP_COLUMNS]
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
    assert list(zip(cells.hook_name, cells.coefficient, strict=True)) == [
        (hook, coefficient) for hook in hooks for coefficient in (-2.0, 0.0, 2.0)
    ]
    assert (cells.n_pairs == len(OPENINGS)).all()
    per_layer = table(out, "layers.csv")
    assert list(per_layer.columns) == [column.name for column in LAYER_COLUMNS]
    assert per_layer.hook_name.to_list() == hooks
    for word in ("Per layer", "separation", "Projection", "c = -2", "baseline logprob"):
        assert word in outcome.out
    assert "12 cells" in outcome.words
    assert str(out) in outcome.words


def test_a_sweep_writes_what_the_library_gives(
    sweep: Main, tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    options = ("--layers", "1:3", "--method", "pca", "--position", "-2", "--batch-size", "2")
    outcome = sweep(*options, "--budget", "nats=0.5", "--seed", "7", "--out", tmp_path / "run")
    assert outcome.code == 0
    model = sl.load_model(str(model_folder), progress=False)
    pairs = sl.ContrastivePairs.from_jsonl(pairs_file)
    differences = sl.collect_differences(model, pairs, layers="1:3", position=-2, batch_size=2)
    expected = sl.sweep(
        model,
        pairs,
        sl.fit_directions(differences, method="pca", seed=7),
        coefficients=[-2, 0, 2],
        budget="nats=0.5",
        seed=7,
        batch_size=2,
    )
    write_csv(expected.table, tmp_path / "sweep.csv")
    write_csv(expected.layers, tmp_path / "layers.csv")
    for name in ("sweep.csv", "layers.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (
            ["--layers", "0,-1"],
            "hook_names",
            ["blocks.0.hook_resid_post", "blocks.3.hook_resid_post"],
        ),
        (["--layers", "blocks.1.hook_mlp_out"], "hook_names", ["blocks.1.hook_mlp_out"]),
        (["--coefficients=3,-0.5"], "coefficients", [3.0, -0.5]),
        (["--method", "pca"], "method", "pca"),
        (["--position", "-2"], "position", -2),
        (["--budget", "relative=0"], "budget", "relative=0"),
        (["--seed", "5"], "seed", 5),
    ],
)
def test_every_option_changes_the_numbers_and_the_record(
    options: list[str], key: str, value: Any, sweep: Main, tmp_path: Path
) -> None:
    assert sweep("--out", tmp_path / "default").code == 0
    assert sweep(*options, "--out", tmp_path / "changed").code == 0
    requests = [record(tmp_path / name)["request"] for name in ("default", "changed")]
    assert requests[1] == requests[0] | {key: value}
    assert requests[0][key] != value
    assert not table(tmp_path / "default").equals(table(tmp_path / "changed"))


def test_the_batch_size_changes_no_number_beyond_rounding(sweep: Main, tmp_path: Path) -> None:
    for size in ("1", "3"):
        assert sweep("--batch-size", size, "--out", tmp_path / size).code == 0
        assert record(tmp_path / size)["request"]["batch_size"] == int(size)
    one, three = (table(tmp_path / size) for size in ("1", "3"))
    # The penalty multiplies squared logprobs by 10000, and their rounding with them.
    scaled = ["coherence_penalty", "loss"]
    numbers = one.select_dtypes("number").columns.drop(scaled)
    np.testing.assert_allclose(one[numbers], three[numbers], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(one[scaled], three[scaled], rtol=1e-3, atol=0.02)


def test_the_same_command_gives_the_same_bytes(sweep: Main, tmp_path: Path) -> None:
    for name, options in {"a": [], "b": [], "c": ["--coefficients=-2,0,3"]}.items():
        assert sweep(*options, "--out", tmp_path / name).code == 0
    a, b, c = (content(tmp_path / name) for name in "abc")
    for name in ("sweep.csv", "layers.csv", "sweep.parquet"):
        assert a[name] == b[name]
    assert a["sweep.csv"] != c["sweep.csv"]
    # Again into the same folder.
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
        (["--max-pairs", "3"], "n_pairs (4, now 3)"),
    ],
)
def test_another_request_into_the_same_folder_is_refused(
    options: list[str], named: str, sweep: Main, tmp_path: Path
) -> None:
    assert sweep("--out", tmp_path).code == 0
    before = content(tmp_path)
    assert_error(sweep(*options, "--quiet", "--out", tmp_path), f"{named};", str(tmp_path))
    assert content(tmp_path) == before


def test_other_pairs_in_a_file_of_the_same_name_are_refused(sweep: Main, tmp_path: Path) -> None:
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "run"
    write_pairs(pairs, OPENINGS)
    assert sweep("--pairs", pairs, "--out", out).code == 0
    before = content(out)
    write_pairs(pairs, OPENINGS, negative="rude")
    outcome = sweep("--pairs", pairs, "--quiet", "--out", out)
    assert_error(outcome, "other fitted_on.fingerprint (", ", measured_on.fingerprint (")
    assert content(out) == before


def test_pairs_to_fit_and_to_measure_on(
    sweep: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mood = tmp_path / "shipped" / "mood"
    mood.mkdir(parents=True)
    write_pairs(mood / "train.jsonl", OPENINGS)
    held_out = write_pairs(mood / "test.jsonl", HELD_OUT)
    options = ("--test-pairs", held_out, "--max-pairs", "2")
    assert sweep(*options, "--out", tmp_path / "file").code == 0
    request = record(tmp_path / "file")["request"]
    measured = sl.ContrastivePairs.from_jsonl(held_out)[:2]
    assert request["fitted_on"]["n_pairs"] == len(OPENINGS)
    assert request["measured_on"] == {
        "name": str(held_out),
        "n_pairs": 2,
        "fingerprint": measured.fingerprint,
    }
    assert (table(tmp_path / "file").n_pairs == 2).all()
    # A shipped dataset is fitted on its training part and measured on its test part.
    monkeypatch.setattr(shipped, "shipped_folder", lambda: mood.parent)
    assert sweep("--pairs", "mood", "--out", tmp_path / "mood").code == 0
    request = record(tmp_path / "mood")["request"]
    parts = [request[part]["name"] for part in ("fitted_on", "measured_on")]
    assert parts == ["mood/train", "mood/test"]
    assert (table(tmp_path / "mood").n_pairs == len(HELD_OUT)).all()


def test_quiet_prints_nothing(sweep: Main, layers: Main, tmp_path: Path) -> None:
    for i, command in enumerate((sweep, layers)):
        out = tmp_path / f"{i}.csv"
        loud = command("--out", out)
        assert (loud.code, loud.out != "", loud.err != "") == (0, True, True)
        quiet = command("--quiet", "--out", out)
        assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


@pytest.mark.parametrize("name", ["run[a]", "run[/x]", "run:smile:"])
def test_the_folders_name_is_printed_as_it_is(name: str, sweep: Main, tmp_path: Path) -> None:
    outcome = sweep("--out", tmp_path / name)
    assert outcome.code == 0
    assert str(tmp_path / name) in outcome.words


def test_a_cell_that_overflows_is_empty_in_the_table(sweep: Main, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="NaN or inf at coefficient 1e\\+39"):
        outcome = sweep("--layers", "0", "--coefficients=0,1e39", "--out", tmp_path)
    assert outcome.code == 0
    cells = table(tmp_path)
    assert cells.projection.isna().to_list() == [False, True]
    assert cells.coherent.to_list() == [True, False]


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
        (["--coefficients=nan"], ["finite", "nan"]),
        (["--coefficients=0,inf"], ["finite", "inf"]),
        (["--coefficients=-inf"], ["finite", "-inf"]),
        (["--coefficients=1,two"], ["'1,two'"]),
        (["--coefficients="], ["at least one coefficient"]),
        (["--budget", "relative=1"], ["relative=0.01", "'relative=1'"]),
        (["--budget", "nats=-1"], ["'nats=-1'"]),
        (["--budget", "much"], ["'much'"]),
        (["--position", "-9"], ["position -9 is outside", "pair '"]),
        (["--position", "7"], ["position 7 is outside", "pair '"]),
        (["--position", "1.5"], ["--position", "integer"]),
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


def test_what_stands_where_the_folder_should_be_is_kept(sweep: Main, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for taken in (file, file / "deeper"):
        assert_error(sweep("--quiet", "--out", taken), str(file), "--out")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "sweep.csv").write_text("mine")
    assert_error(sweep("--quiet", "--out", folder), "sweep.csv", "no run.json")
    assert (content(folder), file.read_text()) == ({"sweep.csv": b"mine"}, "mine")


def test_debug_shows_the_traceback(sweep: Main, run: Main, tmp_path: Path) -> None:
    assert_error(sweep("--quiet", "--layers", "99", "--out", tmp_path), "99")
    outcome = sweep("--quiet", "--layers", "99", "--out", tmp_path, "--debug")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Traceback (most recent call last):\n  File ")
    assert "HookError: layer 99 does not exist" in outcome.err
    assert sweep("--debug", "--out", tmp_path).code == 0


def test_an_unexpected_error_says_so_and_points_to_debug(
    layers: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("first line\nsecond [line]")

    monkeypatch.setattr("steerlens.cli.command.load_model", fail)
    outcome = layers("--quiet")
    assert_error(outcome, "unexpected RuntimeError", "first line second [line]", "--debug")
    assert "RuntimeError: first line\nsecond [line]\n" in layers("--quiet", "--debug").err


def test_an_interrupt_is_exit_code_130_and_leaves_no_files(
    layers: Main, sweep: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("steerlens.cli.command.load_model", interrupt)
        outcome = layers("--quiet")
        assert outcome.code == 130
        assert "Traceback" not in outcome.err
    with monkeypatch.context() as patch:
        patch.setattr("steerlens.cli.command.fit", interrupt)
        outcome = sweep("--out", tmp_path)
        assert outcome.code == 130
        assert "before anything was finished" in outcome.words
    assert content(tmp_path) == {}
    assert sweep("--out", tmp_path).code == 0


# layers


def test_layers_prints_and_writes_the_table(
    layers: Main, sweep: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert sweep("--out", tmp_path / "run").code == 0
    assert out.read_bytes() == (tmp_path / "run" / "layers.csv").read_bytes()
    written = table(out.parent, "layers.csv")
    assert list(written.columns) == [column.name for column in LAYER_COLUMNS]
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


# models, datasets, help


def test_models_and_datasets_are_listed(run: Main) -> None:
    models, datasets = run("models"), run("datasets")
    assert (models.code, models.err, datasets.code, datasets.err) == (0, "", 0, "")
    printed = " ".join(models.out.split())
    assert DEFAULT_MODEL in printed
    assert PACKAGED_MODELS[DEFAULT_MODEL].requirement in printed
    assert str(cache_folder()) in models.out.replace("\n", "")
    lines = datasets.out.splitlines()
    for name in sl.data.dataset_names():
        sizes = [len(sl.ContrastivePairs.load(name, split=split)) for split in ("train", "test")]
        assert f"{name}: {sizes[0]} train, {sizes[1]} test pairs" in lines
    assert any(line.startswith(f"neutral: {len(sl.data.neutral_texts())} ") for line in lines)


@pytest.mark.parametrize("name", ["sentiment", "honesty", "neutral"])
def test_datasets_shows_a_card(name: str, run: Main) -> None:
    outcome = run("datasets", name)
    assert (outcome.code, outcome.err) == (0, "")
    card = (shipped.shipped_folder() / name / "card.md").read_text(encoding="utf-8")
    assert outcome.out.split() == card.split()


def test_every_command_is_in_the_help_and_has_one(run: Main) -> None:
    shown = run()
    printed = (shown.out + shown.err).splitlines()
    commands = "sweep boundary geometry compare reliability layers circuits report extract generate"
    for command in f"{commands} export bake vectors models methods datasets".split():
        assert sum(line.strip().startswith(f"{command} ") for line in printed) == 1
        outcome = run(command, *(["show"] if command == "vectors" else []), "--help")
        assert (outcome.code, outcome.err) == (0, "")
        assert command in outcome.out
        assert "--debug" in outcome.out


def test_python_m_steerlens() -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "steerlens", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )

    shown = call("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    for command in ("sweep", "layers", "generate", "models", "datasets"):
        assert f" {command} " in shown.stdout
    failed = call("no-such-command")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.splitlines() == ["steerlens: No such command 'no-such-command'."]
