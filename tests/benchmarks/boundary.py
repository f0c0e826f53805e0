"""The boundary search against curves of 40 points: how near, and for how much.

    python tests/benchmarks/boundary.py --out build/bench [--layers all] [--n-pairs 32]

The curves are run outward, eight coefficients at a time, until two groups lie beyond the budget;
they cost some ten times the search. Writes `OUT/boundary.md` and `OUT/boundary.csv`.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from report import header

import steerlens as sl
from steerlens.directions.directions import Directions
from steerlens.engine.engine import Engine
from steerlens.engine.plain_loop import run_baseline
from steerlens.engine.plan import make_plan, run_cells
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.engine.workload import Job
from steerlens.loss import Budget
from steerlens.measure.search import first_crossings
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import hook_layer, readout_hook

BUDGET = "relative=0.01"
N_POINTS = 40
GROUP = 8
REACH = 2e-3
"""The first point of a curve, as a share of the search range; the points are spaced by ratio."""


@dataclass(frozen=True)
class BruteForce:
    """Hook name and sign -> the first crossing of the curve, and what all curves cost."""

    boundaries: dict[tuple[str, int], float]
    forward_equivalents: float
    seconds: float


def main() -> None:
    """Search, run the curves, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--layers", default="all")
    parser.add_argument("--n-pairs", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = sl.load_model()
    train = sl.ContrastivePairs.load("sentiment", split="train")
    pairs = sl.ContrastivePairs.load("sentiment", split="test")[: args.n_pairs]
    directions = sl.fit_directions(sl.collect_differences(model, train, layers=args.layers))
    started = time.perf_counter()
    found = sl.find_boundary(model, pairs, directions, budget=BUDGET, labels="all").layers
    seconds = time.perf_counter() - started
    curves = brute_force(model, pairs, directions, found.attrs["searched"])
    table = compare(found, curves)
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / "boundary.csv", index=False)
    text = report(table, found, seconds, curves)
    (args.out / "boundary.md").write_text(
        f"{header_text(args.threads)}\n\n{text}", encoding="utf-8"
    )
    print(text)


def brute_force(
    model: HookedModel,
    pairs: sl.ContrastivePairs,
    directions: Directions,
    searched: dict[str, float],
) -> BruteForce:
    """First crossings, linear between the points of each curve."""
    started, engine = time.perf_counter(), Engine(model)
    tokens = tokenize_pairs(model, pairs)
    workload = engine.workload(tokens, position=-1, steered_positions="all")
    workload = replace(workload, negative=())
    readouts = {n: readout_hook(n, engine.n_layers) for n in directions.hook_names}
    baseline = run_baseline(engine, workload, tuple(dict.fromkeys(readouts.values())))
    logprob = float(baseline.logprob.double().mean())
    allowance = np.array([Budget.parse(BUDGET).allowance(logprob)])
    jobs = [Job(n, directions[n], (1.0,), readouts[n]) for n in directions.hook_names]
    plan = make_plan(engine, workload, baseline, jobs)
    boundaries = {}
    for job in jobs:
        limit = searched[job.hook_name]
        grid = np.geomspace(REACH * limit, limit, N_POINTS)
        for sign in (1, -1):
            losses: list[float] = []
            n_beyond = 0
            while len(losses) < N_POINTS and n_beyond < 2:
                part = grid[len(losses) : len(losses) + GROUP]
                steered = Job(
                    job.hook_name, job.direction, tuple(float(sign * c) for c in part), job.readout
                )
                (cells,) = run_cells(plan, [steered])
                losses += [logprob - float(cell.logprob.double().mean()) for cell in cells]
                n_beyond += max(losses) > allowance[0]
            run = np.array([[0.0, *losses]])
            points = np.array([0.0, *grid[: len(losses)]])
            boundaries[job.hook_name, sign] = float(first_crossings(points, run, allowance)[0])
    spent = engine.forward_equivalents(workload)
    return BruteForce(boundaries, spent, time.perf_counter() - started)


def compare(found: pd.DataFrame, curves: BruteForce) -> pd.DataFrame:
    """One row a hook and sign: found, brute force, predicted, and their ratios."""
    rows = []
    for row in found.to_dict("records"):
        for side, sign in (("pos", 1), ("neg", -1)):
            expected = curves.boundaries[row["hook_name"], sign]
            boundary = sign * row[f"boundary_{side}"]
            predicted = sign * row[f"predicted_boundary_{side}"]
            rows.append(
                {
                    "layer": hook_layer(row["hook_name"]),
                    "sign": sign,
                    "brute_force": expected,
                    "found": boundary,
                    "error": abs(boundary / expected - 1),
                    "predicted_over_measured": predicted / expected,
                }
            )
    return pd.DataFrame(rows)


def report(table: pd.DataFrame, found: pd.DataFrame, seconds: float, curves: BruteForce) -> str:
    """The comparison in Markdown."""
    spent = found.attrs["forward_equivalents"]
    by_layer = table.groupby("layer").error.max()
    lines = [
        f"Search: {len(table)} boundaries in {spent:.1f} forward-equivalents ({seconds:.0f} s); "
        f"curves of {N_POINTS} points: {curves.forward_equivalents:.0f} ({curves.seconds:.0f} s).",
        f"Error against the curves, the worse sign of a layer: median {by_layer.median():.2%}, "
        f"largest {by_layer.max():.2%} (layer {by_layer.idxmax()}).",
        "",
        "| layer | c > 0: curve | found | predicted / curve | c < 0: curve | found "
        "| predicted / curve |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for layer, rows in table.groupby("layer"):
        cells = [
            f"{row.brute_force:.2f} | {row.found:.2f} | {row.predicted_over_measured:.2f}"
            for row in rows.itertuples()
        ]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def header_text(threads: int) -> str:
    """Machine, date and versions in one line."""
    where = header(threads, {}, quick=False)
    return (
        f"{where['date']}, {where['cpu']}, {threads} of {where['cores']} cores, "
        f"Python {where['python']}, steerlens {where['steerlens']}"
    )


if __name__ == "__main__":
    main()
