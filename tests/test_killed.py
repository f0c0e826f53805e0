"""Commands that are killed again and again end as those that were not."""

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

NAMES = ("sweep", *LONG)
KILLS, SEED = (os.environ.get(f"STEERLENS_{n}", d) for n, d in (("KILLS", "1"), ("SEED", "3")))


@pytest.fixture(scope="module")
def stopped(long_command: Callable[..., list[str | Path]], tmp_path_factory: Any) -> Any:
    """Folder and exit code of every case: stopped `STEERLENS_KILLS` times (`killed.py`)."""
    folders = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    cases = [
        [SEED, KILLS, *(folder / n for n in ("log", "whole", "run")), *long_command(name)]
        for name, folder in folders.items()
    ]
    script = str(Path(__file__).parent / "killed.py")
    words = [sys.executable, script, json.dumps(cases, default=str)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    return {name: (folders[name], code) for name, code in zip(NAMES, codes, strict=True)}


@pytest.mark.parametrize("name", NAMES)
def test_every_long_command_goes_on_after_a_kill(name: str, stopped: Any) -> None:
    """At moments spread over all that the command does."""
    folder, code = stopped[name]
    assert code == 0, (folder / "log.err").read_text(encoding="utf-8")
    n_ended, between = 0, False
    for of_run in (folder / "log").read_text(encoding="utf-8").split("begun\n")[1:]:
        lines = of_run.splitlines()
        kept = [i for i, line in enumerate(lines) if line.startswith("kept ")]
        ended = [i for i, line in enumerate(lines) if line == "ended -9"]
        n_ended += len(ended)
        between = between or any(kept[0] < i < kept[-1] for i in ended)
        for i in kept:  # it is not run again
            assert lines[i].replace("kept", "ran") not in lines[i:]
    assert between
    assert n_ended == int(KILLS)
    for run in folder.glob("run-*"):
        assert_same_run(run, content(folder / "whole"))
