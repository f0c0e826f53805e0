"""The tutorials as committed: executed, small, without traces of the machine that ran them.

That they run is tested by `pytest --nbmake tutorials`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 500_000
TRACES = re.compile(r"/(root|home|work|tmp|Users)/|[a-z0-9-]+\.(local|internal)\b")


def read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def texts(cell: dict[str, Any]) -> Iterator[str]:
    """What a code cell's outputs show as text."""
    for output in cell["outputs"]:
        yield "".join(output.get("text", ""))
        for kind, data in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield "".join(data)


def faults(notebook: dict[str, Any]) -> list[str]:
    """What is wrong with a notebook as committed."""
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    found = []
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append("not run from top to bottom")
    outputs = [output for cell in code for output in cell["outputs"]]
    if not outputs:
        found.append("no outputs")
    if any(o["output_type"] == "error" or o.get("name") == "stderr" for o in outputs):
        found.append("an error or a warning")
    if any(TRACES.search(text) for cell in code for text in texts(cell)):
        found.append("a path or host of the machine")
    first, last = source(cells[0]), source(cells[-1])
    if not (cells[0]["cell_type"] == "markdown" and "Expect" in first and "minute" in first):
        found.append("does not say what to expect and how long")
    if "## Exercises" not in last:
        found.append("no exercises at the end")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_is_as_it_should_be(path: Path) -> None:
    assert faults(read(path)) == []
    assert path.stat().st_size < MAX_BYTES


def test_every_fault_is_seen() -> None:
    good = {
        "cells": [
            {"cell_type": "markdown", "source": ["Expect a minute."]},
            {
                "cell_type": "code",
                "source": ["1"],
                "execution_count": 1,
                "outputs": [{"output_type": "stream", "name": "stdout", "text": ["1"]}],
            },
            {"cell_type": "markdown", "source": ["## Exercises"]},
        ]
    }
    assert faults(good) == []

    def changed(cell: int, **change: Any) -> dict[str, Any]:
        cells = [dict(one) for one in good["cells"]]
        cells[cell] |= change
        return {"cells": cells}

    stream = {"output_type": "stream", "name": "stdout", "text": ["in /home/x"]}
    for broken, fault in (
        (changed(0, source=["Hello."]), "does not say"),
        (changed(1, execution_count=3), "not run"),
        (changed(1, outputs=[]), "no outputs"),
        (changed(1, outputs=[{"output_type": "error"}]), "an error"),
        (changed(1, outputs=[stream | {"name": "stderr", "text": ["x"]}]), "an error"),
        (changed(1, outputs=[stream]), "a path"),
        (changed(2, source=["The end."]), "no exercises"),
    ):
        (found,) = faults(broken)
        assert found.startswith(fault)


def test_the_index_lists_every_tutorial() -> None:
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[(\S+)\]", index, re.MULTILINE)) == [p.name for p in NOTEBOOKS]
