"""Names that the examples in docstrings use: a tiny model, pairs, and what is fitted on them.

Run them with `pytest --doctest-modules steerlens`.
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from _pytest.doctest import DoctestItem

ROOT = Path(__file__).resolve().parent


@cache
def _of_the_tests(name: str) -> Any:
    """A module of the tests under a name of its own: pytest has one `conftest` at a time."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))  # they import one another
    spec = importlib.util.spec_from_file_location(f"of_{name}", ROOT / "tests" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def example_names() -> dict[str, Any]:
    """What every example finds there, besides `folder` and `run_folder`."""
    import numpy as np
    import torch

    import steerlens as sl

    torch.set_num_threads(1)
    tiny = _of_the_tests("conftest")
    model = tiny.bridge(tiny.build_llama())
    openings = (
        "the river was",
        "the walk today is",
        "the day went by and it was",
        "I said the night is",
        "you felt the sun",
        "what a rain it was",
        "the soup is so",
        "the bread was not",
    )
    cheerful = [f"you are cheerful {opening}" for opening in openings]
    gloomy = [f"you are very gloomy {opening}" for opening in openings]
    pairs = sl.ContrastivePairs.from_lists(cheerful, gloomy, name="moods")
    differences = sl.collect_differences(model, pairs)
    directions = sl.fit_directions(differences)
    items = sl.PreferenceItems(
        tuple(
            sl.PreferenceItem(f"the {noun} was", "warm and good", "so cold", noun)
            for noun in ("river", "walk", "day", "night", "rain", "soup")
        )
    )
    return {
        "np": np,
        "torch": torch,
        "sl": sl,
        "model": model,
        "pairs": pairs,
        "items": items,
        "differences": differences,
        "directions": directions,
        "vector": sl.SteeringVector.from_directions(model, directions, layers=[2], dataset="moods"),
    }


@pytest.fixture(autouse=True)
def _names(
    request: pytest.FixtureRequest, doctest_namespace: dict[str, Any], tmp_path: Path
) -> None:
    if not isinstance(request.node, DoctestItem):
        return
    doctest_namespace.update(example_names(), folder=tmp_path)
    if request.node.name.startswith("steerlens.runs"):
        write_sweep = _of_the_tests("run_folders").write_sweep
        doctest_namespace["run_folder"] = write_sweep(tmp_path / "run")
