"""Names that the examples in docstrings use: a tiny model, pairs, and what is fitted on them.

Run them with `pytest --doctest-modules steerlens`.
"""

import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable
from functools import cache, partial, wraps
from pathlib import Path
from types import CodeType
from typing import Any

import jaxtyping
import pytest
from _pytest.doctest import DoctestItem

ROOT = Path(__file__).resolve().parent

# What serves Inspect imports it, and it is not installed for the tests.
collect_ignore = ["steerlens/steering/export/inspect_provider.py"]

# A checker of types takes milliseconds to make, and jaxtyping makes one whenever a function inside
# a function is defined: a hook, for instance. Here those of the same code share one.
jaxtyped = jaxtyping.jaxtyped
checkers: dict[CodeType, Callable[..., Any]] = {}
defined = threading.local()  # `.functions`: those that a checker is about to call


def jaxtyped_once(function: Any = None, **options: Any) -> Any:
    """As `jaxtyped`."""
    if function is None:
        return partial(jaxtyped_once, **options)
    if inspect.isclass(function) and getattr(function.__init__, "__globals__", None) is globals():
        return function  # as `jaxtyped`, where `__init__` is checked already
    if not inspect.isfunction(function) or "<locals>" not in function.__qualname__:
        return jaxtyped(function, **options)
    if function.__code__ not in checkers:
        checkers[function.__code__] = jaxtyped(last_defined(function), **options)
    checker = checkers[function.__code__]

    @wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        vars(defined).setdefault("functions", []).append(function)
        try:
            return checker(*args, **options)
        finally:
            defined.functions.pop()

    return checked


def last_defined(function: Any) -> Any:
    """Calls the last of `defined`; to look at, it is `function`, which it does not keep alive."""
    functions = defined

    def call(*args: Any, **options: Any) -> Any:
        return functions.functions[-1](*args, **options)

    same = type(call)(call.__code__, function.__globals__, closure=call.__closure__)
    for name in ("__name__", "__qualname__", "__module__"):
        setattr(same, name, getattr(function, name))
    same.__signature__ = inspect.signature(function)
    return same


jaxtyping.jaxtyped = jaxtyped_once


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
            sl.PreferenceItem(f"the {noun} was", " warm and good", " so cold", noun)
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
