"""What the tests of commands share: how one ended, and what lies in the folder that it wrote."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.main import get_command

N_LAYERS = 4
OPENINGS = ["the river was", "how was the day today", "I said", "the soup is so warm and good"]
HELD_OUT = ["what a night by the river", "tomorrow the sun is", "you felt"]
NEUTRAL = tuple(f"the {word} was so" for word in "walk sun rain soup bread night".split())
Main = Callable[..., "Outcome"]


ESC = "a\x1b]0;b\x07\x9b2Jc\u202e\u2066[bold]d[red]\rä次"
SHOWN = r"a\x1b]0;b\x07\x9b2Jc\u202e\u2066[bold]d[red]\rä次"
"""What a terminal would obey, and how it is shown."""


class Outcome:
    """How a command ended: its exit code and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def words(self) -> str:
        """All that was printed on stderr as one line: rich wraps long ones, inside words too."""
        return "".join(self.err.splitlines())


def finish(*arguments: str | Path, code: int = 0) -> None:
    """Run a command in this process; it ends with that code."""
    from steerlens.cli import main

    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == code


def environment() -> dict[str, str]:
    """Of a process that is to import this package."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}


def known_commands() -> dict[str, Any]:
    """Every command by its words."""
    from steerlens.cli import app

    top: Any = get_command(app)
    found: dict[str, Any] = {}
    for name, command in top.commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {n}": c for n, c in inner.items()} if inner else {name: command}
    return found


def check_command(words: list[str]) -> str:
    """The name of the command that the words are of; its options are parsed, nothing is run."""
    known = known_commands()
    name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
    known[name].make_context(name, words[len(name.split()) :])
    return name


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


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def table(folder: Path, name: str = "sweep.csv") -> pd.DataFrame:
    return pd.read_csv(folder / name, float_precision="round_trip", dtype={"asked": str})


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


def assert_visible(outcome: Outcome, *texts: str, keep: str = "\n") -> None:
    """The texts are there, in one line whatever their width, and nothing that is not printable."""
    printed = outcome.out + outcome.err
    for text in texts:
        assert text in re.sub(r"\s", "", printed)
    assert not [c for c in printed if not c.isprintable() and c not in keep]
