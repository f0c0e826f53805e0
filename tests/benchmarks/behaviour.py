"""Is the cheap number a guide to what is written? `python tests/benchmarks/behaviour.py FOLDER`.

For the three shipped concepts, some layers, methods and coefficients on the default model: what
the forward passes say (projection shift, change of the preference gap, degradation) and what the
texts say (shift of `concept` and of `logprob`), and their rank correlations over cells, with 95%
intervals over resampled settings (concept, method and layer). Into FOLDER go cells.csv and
correlations.csv; the table is printed in Markdown.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
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
SHARES = (-1.5, -0.75, 0.75, 1.5)
N_PROMPTS, SAMPLES, NEW_TOKENS = 8, 2, 30
CHEAP = ("projection_shift", "gap_change", "degradation_nats")
WRITTEN = ("concept", "logprob")


def cells(model: Any, concept: str, method: str) -> pd.DataFrame:
    """Every cell of one concept and method: the cheap numbers beside what was written."""
    train, test = (sl.ContrastivePairs.load(concept, split=split) for split in ("train", "test"))
    items = sl.PreferenceItems.load(concept, split="test")[:32]
    directions = sl.fit(model, train, method=method, layers=list(LAYERS))
    study = sl.Study(model, test[:16], directions, layers=list(LAYERS), labels="own")
    boundaries = study.boundary().layers.set_index("hook_name")
    prompts = [(Message("user", question),) for question in open_questions("choice")[:N_PROMPTS]]
    rows = []
    for hook_name in study.hook_names:
        ends = boundaries.loc[hook_name]
        limits = [ends.boundary_neg, ends.boundary_pos]
        coefficients = [float(abs(s) * limits[int(s > 0)]) for s in SHARES]
        if not np.isfinite(coefficients).all():
            continue
        here = sl.Study(model, test[:16], directions, layers=[hook_name], labels="own")
        swept = here.sweep(coefficients).table.set_index("coefficient")
        job = Job(
            hook_name,
            directions[hook_name],
            tuple(coefficients),
            readout_hook(hook_name, model.cfg.n_layers),
        )
        unsteered, (steered,) = preference_gaps(Engine(model), items, [job])
        written = sl.behaviour(
            model,
            {hook_name: directions[hook_name]},
            prompts,
            coefficients=coefficients,
            scorers=["logprob", "concept"],
            pairs=test,
            samples=SAMPLES,
            max_new_tokens=NEW_TOKENS,
        ).table
        shifts = written.pivot_table(index="coefficient", columns="scorer", values="shift")
        for coefficient, gaps in zip(coefficients, steered, strict=True):
            cell = swept.loc[coefficient]
            rows.append(
                {
                    "concept_set": concept,
                    "method": method,
                    "layer": int(cell.layer),
                    "coefficient": coefficient,
                    "projection_shift": float(cell.projection_shift),
                    "degradation_nats": float(cell.degradation_nats),
                    "gap_change": float((gaps - unsteered).mean()),
                    **{name: float(shifts.loc[coefficient, name]) for name in WRITTEN},
                }
            )
    return pd.DataFrame(rows)


def correlation(table: pd.DataFrame, cheap: str, written: str) -> dict[str, Any]:
    """Spearman's rank correlation over cells; its interval by resampled settings."""
    settings = [rows for _, rows in table.groupby(["concept_set", "method", "layer"])]
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(1000):
        drawn = pd.concat(
            [settings[i] for i in generator.integers(len(settings), size=len(settings))]
        )
        draws.append(spearmanr(drawn[cheap], drawn[written]).statistic)
    low, high = np.nanquantile(draws, [0.025, 0.975])
    value = spearmanr(table[cheap], table[written]).statistic
    return {"cheap": cheap, "written": written, "spearman": value, "low": low, "high": high}


def main() -> None:
    """Measure, write, print."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    concepts = sys.argv[2:] or ["sentiment", "formality", "honesty"]
    model = sl.load_model()
    table = pd.concat([cells(model, c, m) for c in concepts for m in METHODS], ignore_index=True)
    table.to_csv(folder / "cells.csv", index=False)
    print("| cells | cheap | written | rank correlation | 95% |\n| --- | --- | --- | --- | --- |")
    rows = []
    for name, part in [("all", table), *table.groupby("method"), *table.groupby("concept_set")]:
        for cheap in CHEAP:
            for written in WRITTEN:
                found = {"cells": f"{name} ({len(part)})", **correlation(part, cheap, written)}
                rows.append(found)
                print(
                    f"| {found['cells']} | {cheap} | {written} | {found['spearman']:.2f} | "
                    f"{found['low']:.2f} to {found['high']:.2f} |"
                )
    pd.DataFrame(rows).to_csv(folder / "correlations.csv", index=False)


if __name__ == "__main__":
    main()
