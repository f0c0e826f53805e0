"""The tables of the default model that both generations of TransformerLens have to give alike.

`python tests/tl3/tables.py FOLDER` writes them as CSV, by the TransformerLens that is installed.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import steerlens as sl
from steerlens.engine.tokenization import fingerprint, tokenize_pairs
from steerlens.tables import COLUMNS, Column, read_csv, write_csv

COLUMNS: dict[str, tuple[Column, ...]] = {
    "sweep": COLUMNS["sweep"],
    "layers": COLUMNS["layers"],
    "boundary": COLUMNS["layers"],
}
LAYERS = [15, 26]
TOLERANCE = 1e-3
"""In nats, cosines and shares; of the largest number of its column for all others."""


def measure(model: Any) -> dict[str, pd.DataFrame]:
    """Sweep, layers and boundary on a few pairs that no direction was fitted on."""
    fit_on = sl.ContrastivePairs.load("sentiment")[:4]
    measure_on = sl.ContrastivePairs.load("sentiment", split="test")[:4]
    directions = sl.fit_directions(sl.collect_differences(model, fit_on, layers=LAYERS))
    cells = sl.sweep(model, measure_on, directions, coefficients=[-20, 0, 10], n_bootstrap=200)
    boundary = sl.find_boundary(model, measure_on, directions, layers=[26], n_bootstrap=200)
    return {"sweep": cells.table, "layers": cells.layers, "boundary": boundary.layers}


def token_ids(model: Any) -> str:
    """What both have to read: the fingerprint of the prompts' token ids."""
    tokenized = tokenize_pairs(model, sl.ContrastivePairs.load("sentiment", split="test")[:4])
    return fingerprint((*tokenized.positive, *tokenized.negative))


def read(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables that `main` wrote."""
    return {name: read_csv(folder / f"{name}.csv", columns) for name, columns in COLUMNS.items()}


def differences(
    found: pd.DataFrame, expected: pd.DataFrame, columns: tuple[Column, ...]
) -> Mapping[str, float]:
    """Column -> the largest difference of a cell, in units of what is allowed.

    Infinite where text, truth, a missing or an infinite number is not the same.
    """
    worst: dict[str, float] = {}
    for column in columns:
        ours, theirs = found[column.name], expected[column.name]
        if column.dtype != "float64":
            worst[column.name] = 0.0 if list(ours) == list(theirs) else float("inf")
            continue
        a, b = (torch.tensor(values.to_numpy(dtype="float64")) for values in (ours, theirs))
        rest = ~(a.isfinite() & b.isfinite())
        if not torch.equal(a[rest].nan_to_num(nan=7e77), b[rest].nan_to_num(nan=7e77)):
            worst[column.name] = float("inf")
            continue
        is_absolute = column.unit.startswith(("nats", "cosine", "share"))
        largest = 1.0 if is_absolute else float(b[~rest].abs().max() if bool((~rest).any()) else 1)
        gap = float((a - b)[~rest].abs().max()) if bool((~rest).any()) else 0.0
        worst[column.name] = gap / (TOLERANCE * largest) if gap else 0.0
    return worst


def main(folder: Path) -> None:
    """Write the tables, and the fingerprint of what was read."""
    model = sl.load_model(progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in measure(model).items():
        write_csv(table, folder / f"{name}.csv")
    (folder / "tokens.txt").write_text(token_ids(model), encoding="utf-8")
    (folder / "model_class.txt").write_text(
        sl.models.provenance(model).model_class, encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
