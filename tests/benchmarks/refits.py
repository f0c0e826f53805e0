"""How much a trained vector's effect moves when it is trained again on resampled groups of items.

    python tests/benchmarks/refits.py --comparison DIR --pairs sentiment --refits 20 --out FILE

`--comparison` is a run folder of `steerlens compare` on the same data: the trained method's chosen
layer and coefficient are read from it. Every refit is trained on as many groups of the training
items, drawn with replacement, and run on the held-out items at that coefficient.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

import steerlens as sl
from steerlens.data.items import PreferenceItems
from steerlens.directions.training import train_directions
from steerlens.engine.engine import Engine
from steerlens.engine.workload import Job
from steerlens.measure.effects import preference_gaps
from steerlens.models.hooks import resid_post
from steerlens.progress import silent
from steerlens.stats import TAIL, effective_groups, interval, refit_spread

METHOD = "optimised_preference"


def resampled(items: PreferenceItems, generator: np.random.Generator) -> PreferenceItems:
    """As many groups, drawn with replacement; copies keep their group, so that none is parted."""
    groups = np.array(items.groups)
    drawn = generator.integers(0, groups.max() + 1, groups.max() + 1)
    entries = [
        replace(items[int(i)], id=f"{items[int(i)].id} {n}", group=str(group))
        for n, group in enumerate(drawn)
        for i in np.flatnonzero(groups == group)
    ]
    return PreferenceItems(tuple(entries), f"{items.name} resampled")


def main() -> None:
    from scipy.stats import t

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comparison", type=Path, required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--refits", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    table = pd.read_csv(args.comparison / "comparison.csv")
    row = table[(table.method == METHOD) & table.is_chosen].iloc[0]
    hook_name, coefficient = str(row.hook_name), float(row.coefficient)
    model = sl.load_model()
    pairs = sl.ContrastivePairs.load(args.pairs)
    train, held_out = (PreferenceItems.load(args.pairs, split=part) for part in ("train", "test"))
    engine, generator = Engine(model, progress=silent), np.random.default_rng(0)
    means, cosines = [], []
    first = None
    started = time.perf_counter()
    for refit in range(args.refits + 1):
        items = train if refit == 0 else resampled(train, generator)
        directions = train_directions(
            *(model, pairs),
            layers=[hook_name],
            objective="preference",
            items=items,
            progress=silent,
        ).directions
        vector = directions[hook_name]
        first = vector if first is None else first
        job = Job(hook_name, vector, (coefficient,), resid_post(engine.n_layers - 1))
        unsteered, ((steered,),) = preference_gaps(engine, held_out, [job])
        means.append(float((steered - unsteered).mean()))
        cosines.append(float(vector @ first))
        if refit == 0:
            low, high = interval(steered - unsteered, groups=held_out.groups)
    (spread,), df = refit_spread(np.array([means[1:]]), effective_groups(train.groups))
    half = float(t.ppf(1 - TAIL, df) * spread)
    found = {
        "pairs": args.pairs,
        "method": METHOD,
        "hook_name": hook_name,
        "coefficient": coefficient,
        "refits": args.refits,
        "effect": means[0],
        "over_items": [low, high],
        "over_items_and_training_items": [
            means[0] - float(np.hypot(means[0] - low, half)),
            means[0] + float(np.hypot(high - means[0], half)),
        ],
        "spread_of_refits": float(spread),
        "degrees_of_freedom": df,
        "mean_of_refits": float(np.mean(means[1:])),
        "least_and_largest_of_refits": [min(means[1:]), max(means[1:])],
        "cosine_with_the_whole_sets_vector": [min(cosines[1:]), max(cosines[1:])],
        "seconds": round(time.perf_counter() - started, 1),
    }
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
