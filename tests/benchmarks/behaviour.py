"""Is the cheap number a guide to what is written? `python tests/benchmarks/behaviour.py FOLDER`.

For the three shipped concepts, some layers, methods and shares of the coherence boundary on the
default model: what the forward passes say (projection shift, change of the preference gap,
degradation) and what the texts say (shift of `concept` and of `logprob`), and their rank
correlations over cells, with 95% intervals over resampled settings (concept, method and layer).
Into FOLDER go the cells of each concept and method, when they are finished (`formality-pca.csv`),
which a later call goes on with; then cells.csv, correlations.csv and behaviour.md, which is printed
too. Some 40 minutes on one core.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

import steerlens as sl
from steerlens.data import open_questions
from steerlens.data.prompts import Message
from steerlens.engine import Engine
from steerlens.engine.workload import Job
from steerlens.measure.effects import preference_gaps
from steerlens.models.hooks import readout_hook

LAYERS = (6, 12, 18, 24)
METHODS = ("mean_diff", "pca", "random")
SHARES = ("-150%", "-75%", "75%", "150%")
N_TRAIN, N_PAIRS, N_ITEMS, OWN_TOKENS = 64, 8, 8, 12
N_PROMPTS, SAMPLES, NEW_TOKENS = 6, 2, 20
N_DRAWS = 1000
CHEAP = ("projection_shift", "gap_change", "degradation_nats")
WRITTEN = ("concept", "logprob")


class InMemory(dict[tuple[str, str], Any]):
    """A checkpoint: the sweep takes the boundaries that were measured before."""

    def load(self, name: str, of: str) -> Any:
        """What was kept."""
        return self.get((name, of))

    def keep(self, name: str, of: str, kept: Any) -> None:
        """Keep it."""
        self[name, of] = kept


def cells(model: Any, concept: str, method: str) -> pd.DataFrame:
    """Every cell of one concept and method: the cheap numbers beside what was written."""
    train, test = (sl.ContrastivePairs.load(concept, split=split) for split in ("train", "test"))
    items = sl.PreferenceItems.load(concept, split="test")[:N_ITEMS]
    directions = sl.fit(model, train[:N_TRAIN], method=method, layers=list(LAYERS))
    settings: dict[str, Any] = {"labels": "own", "own_tokens": OWN_TOKENS, "checkpoint": InMemory()}
    pairs = test[:N_PAIRS]
    table = sl.Study(model, pairs, directions, layers=list(LAYERS), **settings).boundary().layers
    is_found = np.isfinite(table.boundary_neg) & np.isfinite(table.boundary_pos)
    layers = table.layer[is_found].tolist()
    swept = sl.Study(model, pairs, directions, layers=layers, **settings).sweep(SHARES).table
    swept = swept[swept.coefficient != 0].sort_values(["layer", "coefficient"])
    jobs = [
        Job(
            *(name, directions[name], tuple(of_hook.coefficient)),
            readout_hook(name, model.cfg.n_layers),
        )
        for name, of_hook in swept.groupby("hook_name", sort=False)
    ]
    unsteered, steered = preference_gaps(Engine(model), items, jobs)
    vector = sl.SteeringVector.from_directions(model, directions, layers=layers, layer_table=table)
    written = sl.behaviour(
        model,
        vector,
        [(Message("user", question),) for question in open_questions("choice")[:N_PROMPTS]],
        coefficients=SHARES,
        scorers=["logprob", "concept"],
        pairs=test,
        layers=layers,
        samples=SAMPLES,
        max_new_tokens=NEW_TOKENS,
    ).table
    steered_rows = written[(written.subject == "steered") & (written.coefficient != 0)]
    shifts = steered_rows.pivot(
        index=["layer", "coefficient"], columns="scorer", values="shift"
    ).sort_index()
    # By layer and coefficient, both: two roundings of one share must not be joined as numbers.
    return pd.DataFrame(
        {
            "concept_set": concept,
            "method": method,
            "layer": swept.layer.to_numpy(),
            "coefficient": swept.coefficient.to_numpy(),
            "projection_shift": swept.projection_shift.to_numpy(),
            "degradation_nats": swept.degradation_nats.to_numpy(),
            "gap_change": np.concatenate([(gaps - unsteered).mean(axis=1) for gaps in steered]),
            **{name: shifts[name].to_numpy() for name in WRITTEN},
        }
    )


def kept_cells(folder: Path, model: Any, concept: str, method: str) -> pd.DataFrame:
    """The cells that an earlier call left, else measured and left."""
    path = folder / f"{concept}-{method}.csv"
    if not path.exists():
        start = time.perf_counter()
        found = cells(model, concept, method)
        found.to_csv(path.with_suffix(".part"), index=False)
        path.with_suffix(".part").replace(path)
        taken = time.perf_counter() - start
        print(f"{path.name}: {len(found)} cells, {taken:.0f} s", file=sys.stderr, flush=True)
    return pd.read_csv(path)


def correlation(table: pd.DataFrame, cheap: str, written: str) -> dict[str, Any]:
    """Spearman's rank correlation over cells; its interval by resampled settings."""
    numbers = table[[cheap, written]].to_numpy()

    def of(rows: Any) -> float:
        return float(spearmanr(*numbers[rows].T, nan_policy="omit").statistic)

    settings = [*table.groupby(["concept_set", "method", "layer"]).indices.values()]
    generator, n = np.random.default_rng(0), len(settings)
    drawn = (generator.integers(n, size=n) for _ in range(N_DRAWS))
    draws = [of(np.concatenate([settings[i] for i in places])) for places in drawn]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    value = of(slice(None))
    return {"cheap": cheap, "written": written, "spearman": value, "low": low, "high": high}


def main() -> None:
    """Measure, write, print."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    concepts = sys.argv[2:] or ["sentiment", "formality", "honesty"]
    torch.set_num_threads(1)
    model = sl.load_model()
    parts = [kept_cells(folder, model, concept, m) for concept in concepts for m in METHODS]
    table = pd.concat(parts, ignore_index=True)
    table.to_csv(folder / "cells.csv", index=False)
    rows = [
        {"cells": f"{name} ({len(part)})", **correlation(part, cheap, written)}
        for name, part in [("all", table), *table.groupby("method"), *table.groupby("concept_set")]
        for cheap in CHEAP
        for written in WRITTEN
    ]
    pd.DataFrame(rows).to_csv(folder / "correlations.csv", index=False)
    lines = [
        "| cells | cheap | written | rank correlation | 95% |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['cells']} | {row['cheap']} | {row['written']} | {row['spearman']:.2f} | "
        f"{row['low']:.2f} to {row['high']:.2f} |"
        for row in rows
    ]
    (folder / "behaviour.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
