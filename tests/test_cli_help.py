"""What holds of every command: its help, its examples, what it takes, what it prints."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from commands import (
    ESC,
    SHOWN,
    Main,
    Outcome,
    assert_visible,
    check_command,
    environment,
    record,
    table,
)
from typer.main import get_command

import steerlens as sl
from steerlens.cli import COMMANDS, app, options, printing
from steerlens.cli.command import Command, LoadCommand, option_names
from steerlens.cli.listing_commands import REPORT
from steerlens.cli.long_command import RECORD
from steerlens.cli.vector_commands import CompareVectors, Show
from steerlens.data import shipped
from steerlens.engine.labels import OWN_TOKENS
from steerlens.measure.rows import checked_coefficients
from steerlens.measure.settings import COEFFICIENTS
from steerlens.models.packaged import DEFAULT_MODEL, PACKAGED_MODELS, cache_folder
from steerlens.runs import record as runs

NAMES = {
    **{command.__name__.lower(): command for command in COMMANDS},
    "vectors show": Show,
    "vectors compare": CompareVectors,
}
HELP = """
import contextlib, io, json, os, sys
from steerlens.cli import main

def told(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(words)
    return out.getvalue()

found = {name: told(*name.split(), option) for option in ("--help", "-h") for name in NAMES}
found |= {"": told("-h"), "bare": told(), "version": told("--version"), "listed": told("models")}
os.environ |= {"_STEERLENS_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
os.environ["COMP_WORDS"] = "steerlens sw"
found["completed"] = told("sw")
light = "torch" not in sys.modules and "pandas" not in sys.modules
import steerlens
steerlens.fit
print(json.dumps([found, light, "torch" in sys.modules]))
"""


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    """What is printed without PyTorch, in a process of its own; the help of every command."""
    done = subprocess.run(
        [sys.executable, "-c", HELP.replace("NAMES", repr(list(NAMES)))],
        capture_output=True,
        text=True,
        check=True,
        env={**environment(), "COLUMNS": "80"},
    )
    found, is_light, has_torch_after = json.loads(done.stdout)
    assert is_light
    assert has_torch_after
    return dict(found)


def test_the_first_page_has_every_command_on_a_line_of_its_own(shown: dict[str, str]) -> None:
    lines = shown[""].splitlines()
    for name in {name.split()[0] for name in NAMES}:
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert "..." not in line, "the summary is cut off"
    for option in ("--version", "--install-completion", "--show-completion", "-h, --help"):
        assert sum(line.startswith(f"  {option}") for line in lines) == 1
    assert shown["version"] == f"steerlens {sl.__version__}\n"
    assert DEFAULT_MODEL in shown["listed"]
    assert shown["completed"].split() == ["sweep"]
    assert shown["bare"] == shown[""]


@pytest.mark.parametrize("name", NAMES)
def test_every_help_fits_and_has_examples_that_parse(name: str, shown: dict[str, str]) -> None:
    lines = shown[name].splitlines()
    assert max(map(len, lines)) <= 80
    for option in ("-h, --help", "--debug"):
        assert any(line.split("  ")[1].startswith(option) for line in lines if line[:2] == "  ")
    examples = [shlex.split(line) for line in lines if line.startswith("    steerlens ")]
    assert len(examples) == 2
    for words in examples:
        assert check_command(words[1:]) == name


def made(command: type[Command]) -> Command:
    """It with what it needs."""
    given: dict[str, Any] = {
        "context": get_command(app).make_context("steerlens", [], resilient_parsing=True),
        "out": Path("my runs/one"),
        "runs": [Path("r")],
        "vector": Path("a b.safetensors"),
        "vectors": [Path("v.gguf")],
        "source": Path("v.gguf"),
        "target": Path("w.gguf"),
        "prompt": "Hi",
        "coefficient": "1",
    }
    names = {field.name for field in command.__dataclass_fields__.values()}
    needed = {name: value for name, value in given.items() if name in names}
    if command in (NAMES["sweep"], NAMES["boundary"], NAMES["behave"]):
        del needed["vector"]
    if command is NAMES["pairs"]:
        needed["pairs"] = "mine.csv"
    return command(**needed)


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_next_is_a_command(name: str) -> None:
    program, *words = shlex.split(made(NAMES[name]).next)
    if program == "python":
        assert words[:2] == ["-m", "webbrowser"]
    else:
        assert check_command(words)


@pytest.mark.parametrize("name", [n for n, c in NAMES.items() if issubclass(c, LoadCommand)])
def test_where_a_model_is_loaded_how_can_be_said(name: str, shown: dict[str, str]) -> None:
    for option in ("--model", "--device", "--dtype", "--revision"):
        assert re.search(rf"^  {option} ", shown[name], re.MULTILINE)
    if "--max-pairs" in shown[name]:
        assert "--max-train-pairs" in shown[name]


def test_what_the_help_says_is_what_the_rooms_have() -> None:
    assert options.OWN_TOKENS == OWN_TOKENS
    assert (RECORD, REPORT) == (runs.RECORD, runs.REPORT)
    assert set(sl.data.FORMS) <= set(
        re.findall(r"\w+", options.declaration_of("sweep", "form").help)
    )
    default = NAMES["sweep"].__dataclass_fields__["coefficients"].default
    asked = options.strengths_of(str(default))
    assert checked_coefficients(asked) == checked_coefficients(COEFFICIENTS)


def test_every_option_is_declared_and_every_declaration_is_of_an_option() -> None:
    fields = {
        (command.__name__.lower(), name)
        for command in NAMES.values()
        for name in option_names(command)
        if name != "context"
    }
    assert all(options.declaration_of(*field) is not None for field in fields)
    shared = {("", name) for of, name in fields if (of, name) not in options._OPTIONS}
    assert {*options._OPTIONS} == {field for field in fields if field in options._OPTIONS} | shared


def test_how_a_model_is_loaded_is_recorded(
    run: Main, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: Any
) -> None:
    asked: dict[str, Any] = {}

    def load(name: str, **how: Any) -> Any:
        asked.update(how, name=name)
        return loaded

    monkeypatch.setattr("steerlens.load_model", load)
    words = ("--model", "owner/name", "--revision", "v1", "--dtype", "bfloat16", "--device", "cpu")
    outcome = run(
        *("sweep", *words, "--pairs", pairs_file, "--layers", "1", "--max-train-pairs", "3"),
        *("--coefficients=0,0.1norm,-50%", "--out", tmp_path / "run"),
    )
    assert outcome.code == 0, outcome.err
    assert (asked["name"], asked["revision"], asked["device"]) == ("owner/name", "v1", "cpu")
    assert asked["dtype"] == torch.bfloat16
    written = record(tmp_path / "run")
    request = written["request"]
    for kept in (request, written["options"]):
        assert (kept["revision"], kept["device"], kept["dtype"]) == ("v1", "cpu", "bfloat16")
    assert (request["fitted_on"]["n_pairs"], request["measured_on"]["n_pairs"]) == (3, 4)
    assert request["coefficients"] == [0.0, "0.1 norm", "-50%"]
    cells = sl.read_run(tmp_path / "run").tables["sweep"]
    assert cells.asked.tolist() == ["0", "0.1 norm", "-50%"]
    norm = table(tmp_path / "run", "layers.csv").resid_norm[0]
    assert cells.coefficient.iloc[1] == pytest.approx(0.1 * norm)
    assert outcome.err.splitlines()[-1] == f"next: steerlens report {tmp_path / 'run'}"


DATA = {"pairs": "m y.csv", "columns": "positive=a", "form": "pairs", "group": "auto"}
LOADING = {"device": "cpu", "dtype": "bfloat16", "revision": "v1"}
READ = "--pairs 'm y.csv' --group auto --columns positive=a --form pairs"
LOADED = "--device cpu --dtype bfloat16 --revision v1"
SAY = "generate --prompt 'How was your day?'"


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("pairs", DATA | LOADING, f"sweep --out runs/sweep {READ} {LOADED}"),
        ("pairs", {"pairs": "a", "model": "m"}, "sweep --model m --out runs/sweep --pairs a"),
        (
            "layers",
            DATA | {"layers": "1:3", "seed": 3, "position": "-2", "out": Path("a.csv")},
            f"boundary --layers 1:3 --position=-2 --out runs/boundary --seed 3 {READ}",
        ),
        (
            "reliability",
            {"straddle": "back"},
            "sweep --out runs/sweep --straddle back --pairs senti",
        ),
        (
            "generate",
            DATA | {"prompt": "x", "layer": "3", "method": "pca"},
            f"extract --out vector.safetensors --layers 3 --method pca {READ}",
        ),
        (
            "generate",
            LOADING | {"prompt": "x", "vector": Path("v"), "coefficients": "0,-80%,0"},
            f"bake v --out steered-model --coefficient=-80% {LOADED}",
        ),
        (
            "bake",
            LOADING | {"vector": Path("v"), "out": Path("o"), "coefficient": "8"},
            "layers --model o --device cpu --dtype bfloat16",
        ),
        (
            "read",
            LOADING | {"vector": Path("v"), "model": "m"},
            f"{SAY} --vector v --model m {LOADED}",
        ),
        ("vectors show", {"vector": Path("v")}, f"{SAY} --vector v"),
    ],
)
def test_the_next_command_asks_for_what_was_asked(
    name: str, given: dict[str, Any], expected: str
) -> None:
    shown = NAMES[name](**given).next
    assert shown.startswith(f"steerlens {expected}")
    check_command(shlex.split(shown)[1:])


# What is printed


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give both consoles a width, as those of a terminal."""

    def of(width: int) -> None:
        for name, is_error in (("_output", False), ("_notes", True)):
            made = printing._Console(
                stderr=is_error, width=width, force_terminal=True, color_system=None
            )
            monkeypatch.setattr(printing, name, made)

    return of


@pytest.mark.parametrize("width", [40, 80])
def test_nothing_is_broken_within_a_word(
    width: int, console: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console(width)
    text = "expected a number in residual units, a multiple of the mean residual norm, or a share"
    printing.note(f"steerlens: {text}")
    printing.say(text)
    columns = [
        "layer",
        "boundary_ci_low",
        "explained_variance",
        "projection_at_boundary",
        "verdict",
    ]
    rows = [(15, math.nan, 0.123456, math.inf, "no more than a null"), (-1, 1e-15, 2.0, -1.5, "-")]
    printed = {"title": "A title of several words", "columns": " ".join(columns)}
    monkeypatch.setitem(printing.PRINTED, "odd", printed)
    printing.print_rows(pd.DataFrame(rows, columns=columns), "odd")
    out, err = capsys.readouterr()
    assert max(map(len, (out + err).splitlines())) <= width
    assert " ".join(err.split()) == f"steerlens: {text}"
    shown = re.sub(r"[^\w.<>-]+", " ", out)
    for word in {*text.split(), *" ".join(columns).replace("_", " ").split(), "0.1235", "beyond"}:
        assert word.strip(",") in shown.split()
    assert "\u2026" not in out
    # Nothing internal is shown in the place of a number.
    for word in ("nan", "inf", "1e-15", "-1 "):
        assert word not in shown


@pytest.mark.parametrize("n", [2, 7])
def test_texts_stand_beside_each_other_while_there_is_room(
    n: int, console: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    console(80)
    texts = ["a considerable characterisation of what was asked for"] * n
    printing.print_texts("How was your day?", [f"c = {i}" for i in range(n)], texts)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    beside = {sum(f"c = {i} " in line for i in range(n)) for line in lines} - {0}
    assert beside == ({2} if n == 2 else {1})
    assert sum(line.count("characterisation") for line in lines) == n  # no word is broken


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    printing.note("word " * 60)
    printing.say("word " * 60)
    out, err = capsys.readouterr()
    assert (out, err) == (f"{'word ' * 60}\n",) * 2


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.0, 2.5, "1 to 2.5"),
        (math.inf, math.inf, "beyond"),
        (3.0, math.inf, "3 to beyond"),
        (math.nan, math.nan, "-"),
        (-1e-15, 2.0, "0 to 2"),
    ],
)
def test_intervals_in_words(low: float, high: float, expected: str) -> None:
    assert printing.between(low, high) == expected


# What a terminal would obey

SPEAK = """
import logging, os, sys, warnings
from tqdm import tqdm
import steerlens as sl
from steerlens.cli import main

def speak():
    warnings.warn(f"{ESC}1")
    logging.getLogger("a library").warning("%s2", ESC)
    print(f"{ESC}3")
    sys.stderr.writelines([f"{ESC}4\\n"])
    list(tqdm([0], desc=f"{ESC}5"))
    raise RuntimeError(f"{ESC}6")

sl.models.packaged.cache_folder = speak
for arguments in CALLS:  # a child each, so that the imports are paid for once
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open("-".join([*arguments, str(stream)]), os.O_CREAT | os.O_WRONLY), stream)
        main(arguments) if arguments else speak()
    os.waitpid(child, 0)
"""
"""Every way in which a library may write to the terminal, inside a command or by itself."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_what_libraries_write_is_not_obeyed(tmp_path: Path) -> None:
    calls, moved = [["models"], ["models", "--debug"], []], SHOWN.replace(r"\r", "")
    env = environment() | {"PYTHONUTF8": "1"}
    code = f"ESC, CALLS = {ESC!r}, {calls}\n{SPEAK}"
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=tmp_path)
    for arguments in calls:
        paths = [tmp_path / "-".join([*arguments, stream]) for stream in "12"]
        outcome = Outcome(2, *(path.read_bytes().decode() for path in paths))
        if not arguments:
            assert all((outcome.out + outcome.err).count(f"{ESC}{i}") for i in range(1, 7))
            continue
        assert ("Traceback" in outcome.err) is ("--debug" in arguments)
        # Streams keep carriage returns, by which bars move; an error has one line.
        whole = (1, 6) if "--debug" in arguments else (1,)
        texts = [f"{SHOWN}{i}" if i in whole else f"{moved}{i}" for i in range(1, 7)]
        assert_visible(outcome, *texts, keep="\n\r")


# models, datasets


def test_models_and_datasets_are_listed(run: Main) -> None:
    models, datasets = run("models"), run("datasets")
    assert (models.code, datasets.code) == (0, 0)
    printed = " ".join(models.out.split())
    assert DEFAULT_MODEL in printed
    assert PACKAGED_MODELS[DEFAULT_MODEL].requirement in printed
    assert str(cache_folder()) in models.out.replace("\n", "")
    lines = datasets.out.splitlines()
    for name in sl.data.dataset_names():
        sizes = [len(sl.ContrastivePairs.load(name, split=split)) for split in ("train", "test")]
        assert f"{name}: {sizes[0]} train, {sizes[1]} test pairs" in lines
    assert any(line.startswith(f"neutral: {len(sl.data.neutral_texts())} ") for line in lines)
    assert "questions: 30 choice, 30 confirmation open questions" in lines


@pytest.mark.parametrize("name", ["sentiment", "neutral", "questions"])
def test_datasets_shows_a_card(name: str, run: Main) -> None:
    outcome = run("datasets", name)
    assert outcome.code == 0
    card = (shipped.shipped_folder() / name / "card.md").read_text(encoding="utf-8")
    assert outcome.out.split() == card.split()
