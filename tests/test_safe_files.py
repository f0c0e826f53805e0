"""No network, no pickles, no file outside of the folders that are given."""

import getpass
import json
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_calls import CALLS, made
from surprises import watched

import steerlens as sl

PACKAGE = Path(sl.__file__).parent
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return made(tmp_path_factory.mktemp("outputs"))


def run_python(code: str, home: Path, *, ok: bool = True) -> str:
    """Run code in a process of its own, with `home` as home, and tests/ to import from."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "TMPDIR": str(home),
        "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}",  # two conftest.py: that of the tests
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=home,
        env=environment,
        check=False,
    )
    assert (done.returncode == 0) is ok, done.stderr
    return done.stdout + done.stderr


IMPORTS = """
import os, random, sys, warnings
import numpy as np, torch, pandas
def state():
    return (dict(os.environ), os.getcwd(), [*map(str, warnings.filters)], random.getstate(),
            str(np.random.get_state()), torch.get_rng_state().tolist(), torch.get_num_threads(),
            torch.is_grad_enabled(), torch.get_default_dtype(), sys.excepthook, sys.stdout)
def hear(event, args):
    if event.startswith("socket.") and event != "socket.__new__":
        raise PermissionError(f"refused: {event}")
sys.addaudithook(hear)
before = state()
MORE
import importlib
from pathlib import Path
import steerlens
package = Path(steerlens.__file__).parent
paths = [path.relative_to(package.parent).with_suffix("") for path in package.rglob("*.py")]
names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
commands = [name for name in names if name.startswith("steerlens.cli")]
# Inspect, which is not installed here, asks for the module that serves it.
served = "steerlens.steering.export.inspect_provider"
for name in {*names} - {*commands} - {"steerlens.__main__", served}:
    importlib.import_module(name)
assert state() == before, "changed"
for name in commands:  # a process of its own: what it imports to print draws random numbers
    importlib.import_module(name)
print(len(names), len(commands))
"""


def test_importing_every_module_changes_nothing_and_asks_no_network(tmp_path: Path) -> None:
    n_modules, n_commands = run_python(IMPORTS.replace("MORE", ""), tmp_path).split()
    assert int(n_modules) > 2 * int(n_commands) > 2
    assert list(tmp_path.iterdir()) == []
    network = "import socket; socket.getaddrinfo('localhost', 80)"
    assert "refused" in run_python(IMPORTS.replace("MORE", network), tmp_path, ok=False)
    change = "random.random()"
    assert "changed" in run_python(IMPORTS.replace("MORE", change), tmp_path, ok=False)


def test_the_watch_sees_network_pickles_and_files(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    content = pickle.dumps([1])
    with watched(inside) as seen:
        (inside / "a").write_text("a")
        (inside / "a").rename(inside / "b")
        os.listdir(tmp_path)
        assert seen == []
        with pytest.raises(PermissionError, match="refused"):
            socket.create_connection(("127.0.0.1", 9))
        with socket.socket() as one, pytest.raises(PermissionError, match="refused"):
            one.connect(("127.0.0.1", 9))
        with pytest.raises(PermissionError, match="refused"):
            pickle.loads(content)
        with pytest.raises(PermissionError, match="refused"):
            torch.load("none.pt")
        with pytest.raises(PermissionError, match="refused"):
            subprocess.run(["true"], check=False)
        assert len(seen) == 5
        outside.mkdir()
        (outside / "a").write_text("a")
        (inside / "link").symlink_to(outside)
        (inside / "link" / "b").write_text("b")
        (inside / "b").rename(outside / "c")
    assert [line.rsplit("/", 1)[-1] for line in seen[5:]] == ["out", "a", "b", "c"]
    assert pickle.loads(content) == [1]


EVERYTHING = """
import json, random, socket
from pathlib import Path
from surprises import changes, snapshot, watched
import model_calls as tests
outputs = Path("outputs")
outputs.mkdir()
given = tests.made(outputs)
found = {}

def look(name, call):
    before = snapshot(given.model)
    with watched(outputs) as seen:
        try:
            call()
        except PermissionError as error:
            seen.append(str(error))
    found[name] = seen + changes(before, snapshot(given.model))

for name, call in tests.CALLS.items():
    look(name, lambda: call(given))
look("random numbers", random.random)
look("a folder", lambda: Path("left").mkdir())
look("the network", lambda: socket.getaddrinfo("localhost", 80))
print(json.dumps(found))
"""
"""The calls where nothing checks types at run time, as a user's are; and three controls."""


def test_no_call_draws_random_numbers_or_writes_elsewhere(tmp_path: Path) -> None:
    (line,) = (told for told in run_python(EVERYTHING, tmp_path).splitlines() if told[:1] == "{")
    found = json.loads(line)
    assert found.pop("random numbers") == ["python rng"]
    for control, told in (("a folder", "os.mkdir"), ("the network", "refused")):
        assert told in str(found.pop(control))
    assert found == {name: [] for name in CALLS}


UNSAFE = re.compile(
    r"\b(?:pickle|dill|joblib|shelve|marshal|cloudpickle)\.\w|torch\.load\(|allow_pickle"
    r"|\b(?:eval|exec|compile|__import__)\(|os\.system|shell=True|yaml\.load"
    r"|\b(?:urllib|requests|httpx|socket|http\.client)\b[.( ]"
)


def unsafe(source: str) -> list[str]:
    kept = re.sub(r"(?:re|torch)\.compile\(|\.eval\(\)", "", source)
    return UNSAFE.findall(kept)


KNOWN = {
    # Between a run and its own workers, as executors do anyway: no file, no bytes of others.
    "workers": ["pickle.d", "pickle.l"],
    # A judge is asked where a user names one; its answers are text.
    "endpoint": ["http.client.", "requests ", "urllib."],
    "judge": ["requests "],  # the word
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_no_unsafe_loading_and_no_network_in_the_source(path: Path) -> None:
    found = unsafe(path.read_text(encoding="utf-8"))
    assert sorted(set(found)) == KNOWN.get(path.stem, [])


@pytest.mark.parametrize(
    "line",
    [
        "x = pickle.loads(y)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "joblib.load(x)",
        "import socket ",
        "requests.get(url)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_the_search_for_unsafe_loading_can_fail(line: str) -> None:
    assert unsafe(line)
    assert not unsafe("model.eval()\nre.compile(x)\nsafetensors.load(path)")


COMMANDS = """
import sys
from pathlib import Path
from surprises import watched
from steerlens.cli import main
folder = Path("work")
with watched(folder, folder.parent / "cache", *map(Path, ALLOWED)) as seen:
    for line in LINES:
        try:
            sys.argv = ["steerlens", *line.split()]
            main()
        except SystemExit as stop:
            assert not stop.code, (line, stop.code)
    print("SEEN", seen)
    Path("left").mkdir()
    print("CONTROL", seen)
"""
"""Commands in a process of its own, and what they wrote outside of their folders."""


def test_commands_write_into_their_folders_alone(given: SimpleNamespace, tmp_path: Path) -> None:
    model = tmp_path / "model"
    given.model.original_model.config.architectures = ["LlamaForCausalLM"]
    sl.export.bake(given.model, given.vector, 2.0, model)  # any checkpoint
    (tmp_path / "work").mkdir()
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(
            f'{{"positive": "cheerful {w} day", "negative": "gloomy {w} day"}}'
            for w in ("a", "the", "so", "what")
        )
    )
    common = "--model model --pairs pairs.jsonl --quiet"
    lines = [
        f"sweep {common} --layers 0,1 --coefficients=-1,0,1 --out work/sweep",
        f"extract {common} --layers 1 --out work/v.safetensors",
        "export work/v.safetensors work/v.gguf",
        "vectors show work/v.safetensors",
        "report work/sweep",
        "datasets",
    ]
    allowed = ["/dev/null", f"torchinductor_{getpass.getuser()}"]  # an empty folder of PyTorch's
    code = COMMANDS.replace("LINES", repr(lines)).replace("ALLOWED", repr(allowed))
    told = run_python(code, tmp_path)
    assert "SEEN []" in told
    assert "os.mkdir" in told.partition("CONTROL")[2]
    assert (tmp_path / "work" / "sweep" / "sweep.csv").is_file()
    known = {"model", "pairs.jsonl", "work", "left", allowed[1]}
    assert {path.name for path in tmp_path.iterdir()} <= known
    assert not [p for p in (tmp_path / allowed[1]).rglob("*") if p.is_file()]
