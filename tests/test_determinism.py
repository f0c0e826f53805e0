"""Same seed and machine: the same bytes. Batch sizes and threads: the same but for rounding."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from model_calls import made

import steerlens as sl
from steerlens.tables import write_csv

# What float32 leaves of a sum in another order. The penalty's weight (10000) makes it larger.
ROUNDING = 1e-5
WEIGHTED = {"coherence_penalty": 1e-2, "loss": 1e-2}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return made(tmp_path_factory.mktemp("outputs"))


def swept(given: Any, *, batch_size: int = 4, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Every table of a sweep, with directions fitted anew."""
    differences = sl.collect_differences(given.model, given.pairs, batch_size=batch_size)
    directions = sl.fit_directions(differences, seed=seed)
    result = sl.sweep(
        *(given.model, given.pairs, directions),
        coefficients=[-2, 0, 1.5],
        layers=[0, 1],
        n_bootstrap=50,
        seed=seed,
        batch_size=batch_size,
    )
    return {"sweep": result.table, "layers": result.layers, "points": result.points}


def bounded(given: Any, *, batch_size: int = 4, seed: int = 0) -> dict[str, pd.DataFrame]:
    """The tables of a search for the boundary."""
    found = sl.find_boundary(
        *(given.model, given.pairs, given.directions),
        layers=[1],
        n_bootstrap=50,
        seed=seed,
        batch_size=batch_size,
    )
    return {"layers": found.layers, "curves": found.curves}


def written(tables: dict[str, pd.DataFrame], folder: Path) -> dict[str, bytes]:
    """The CSV files of tables."""
    for name, table in tables.items():
        write_csv(table, folder / f"{name}.csv")
    return {name: (folder / f"{name}.csv").read_bytes() for name in tables}


def distance(one: dict[str, pd.DataFrame], other: dict[str, pd.DataFrame]) -> float:
    """The largest difference of two numbers, over 1 or their size; inf where text differs."""
    largest = 0.0
    for name, table in one.items():
        second = other[name]
        for column in table:
            x, y = table[column], second[column]
            if x.dtype != "float64":
                largest = largest if x.equals(y) else np.inf
                continue
            allowed = WEIGHTED.get(str(column), ROUNDING) / ROUNDING
            same = ((x == y) | (x.isna() & y.isna())).to_numpy()
            gap = (x - y).abs().to_numpy() / np.maximum(1, x.abs().to_numpy()) / allowed
            largest = max(largest, float(np.where(same, 0, np.nan_to_num(gap, nan=np.inf)).max()))
    return largest


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Tables = Callable[..., dict[str, pd.DataFrame]]


@pytest.mark.parametrize("tables", [swept, bounded])
def test_the_same_seed_gives_the_same_bytes(
    given: SimpleNamespace, tables: Tables, tmp_path: Path
) -> None:
    first = written(tables(given), tmp_path)
    torch.rand(3)
    np.random.random(3)
    assert written(tables(given), tmp_path) == first
    assert written(tables(given, seed=1), tmp_path) != first


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_sizes_differ_by_rounding_alone(given: SimpleNamespace, batch_size: int) -> None:
    assert distance(swept(given), swept(given, batch_size=batch_size)) < ROUNDING


def test_the_distance_sees_what_is_more_than_rounding(given: SimpleNamespace) -> None:
    one, other = swept(given), swept(given)
    assert distance(one, other) == 0
    other["sweep"].loc[0, "projection"] *= 1 + 1e-4
    assert 1e-5 < distance(one, other) < 1
    other["sweep"].loc[0, "projection"] = np.nan
    assert distance(one, other) == np.inf
    assert distance(one, swept(given, seed=1)) > ROUNDING


@pytest.mark.real
def test_threads_of_the_real_model_differ_by_rounding_alone(real_model: Any) -> None:
    """A tiny model's operations are too small to be shared by threads."""
    pairs = sl.ContrastivePairs.load("sentiment", split="test")[:2]

    def layers() -> dict[str, pd.DataFrame]:
        differences = sl.collect_differences(real_model, pairs, layers=[12, 27])
        directions = sl.fit_directions(differences)
        return {"layers": sl.Study(real_model, pairs, directions).layers}

    with threads(1):
        one = layers()
    with threads(2):
        assert distance(one, layers()) < ROUNDING
