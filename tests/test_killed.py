"""Commands that are killed or interrupted again and again end as those that were not."""

# ruff: noqa: F401, F811 (fixtures are imported, and named as parameters)

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import content, environment
from test_resume import LONG, assert_same_run, long_command

LOGGED = {"SIGKILL": "ended -9", "SIGINT": "ended 130"}
STOPPED = [("sweep", "SIGINT"), *((name, "SIGKILL") for name in ("sweep", *LONG))]
KILLS, SEED = (os.environ.get(f"STEERLENS_{n}", d) for n, d in (("KILLS", "1"), ("SEED", "3")))


@pytest.fixture(scope="module")
def stopped(long_command: Callable[..., list[str | Path]], tmp_path_factory: Any) -> Any:
    """Folder and exit code of every case: stopped `STEERLENS_KILLS` times (`killed.py`)."""
    folders = {key: tmp_path_factory.mktemp("-".join(key)) for key in STOPPED}
    cases = [
        [key[1], SEED, KILLS, *(folder / n for n in ("log", "whole", "run")), *long_command(key[0])]
        for key, folder in folders.items()
    ]
    script = str(Path(__file__).parent / "killed.py")
    words = [sys.executable, script, json.dumps(cases, default=str)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    return {key: (folders[key], code) for key, code in zip(STOPPED, codes, strict=True)}


@pytest.mark.parametrize(("name", "signal"), STOPPED)
def test_every_long_command_goes_on_after_a_signal(name: str, signal: str, stopped: Any) -> None:
    """At moments spread over all that the command does."""
    folder, code = stopped[name, signal]
    said = (folder / "log.err").read_text(encoding="utf-8")
    assert code == 0, said
    assert ("--resume" in said) is (signal == "SIGINT")
    n_ended, between = 0, False
    for of_run in (folder / "log").read_text(encoding="utf-8").split("begun\n")[1:]:
        lines = of_run.splitlines()
        kept = [i for i, line in enumerate(lines) if line.startswith("kept ")]
        ended = [i for i, line in enumerate(lines) if line == LOGGED[signal]]
        n_ended += len(ended)
        between = between or any(kept[0] < i < kept[-1] for i in ended)
        for i in kept:  # it is not run again
            assert lines[i].replace("kept", "ran") not in lines[i:]
    assert between
    assert n_ended == int(KILLS)
    for run in folder.glob("run-*"):
        assert_same_run(run, content(folder / "whole"))
