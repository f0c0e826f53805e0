"""How often `recommend` says to steer where labels mean nothing: a part of docs/simulations.md.

A tiny model with a planted direction; each seed parts the groups anew.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import bridge
from planted import PROMPTS, item_records, pair_records, planted_weights

import steerlens as sl
from steerlens.directions.contrast_methods import coin_flips
from steerlens.measure import recommendation

N_GROUPS = 24


def recommended(model: Any, seed: int, *, is_shuffled: bool) -> sl.measure.Recommendation:
    """With the labels as they are, or those of whole groups exchanged by a coin each."""
    flips = coin_flips(range(N_GROUPS), seed) if is_shuffled else [1.0] * N_GROUPS
    pairs = pair_records(N_GROUPS, turned=lambda group: bool(flips[group] < 0))
    return sl.recommend(model, pairs, items=item_records(), prompts=PROMPTS, seed=seed)


def main() -> None:
    """Print the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=40)
    n = parser.parse_args().seeds
    recommendation.OWN_TOKENS, recommendation.NEW_TOKENS = 6, 3
    warnings.simplefilter("ignore")
    model = bridge(planted_weights())
    rows = []
    for what, is_shuffled in (("exchanged by coin, group by group", True), ("as they are", False)):
        found = [recommended(model, seed, is_shuffled=is_shuffled) for seed in range(n)]
        n_signs = [sum(map(bool, one.signs.values())) for one in found]
        at = sorted({sign.layer for one in found for sign in one.signs.values() if sign})
        steered = sum(map(bool, n_signs))
        rows.append(f"| {what} | {n} | {steered} | {n_signs.count(2)} | {at or 'none'} |")
    print(
        f"""
## Recommendations

`steerlens recommend` on a random 4-layer model into which a direction is planted, with items and
{N_GROUPS} groups of two pairs, parted anew each seed. At layers 0 and 1 a push along it does the
opposite.

| labels | seeds | "steer" | of both signs | at layers |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}"""
    )


if __name__ == "__main__":
    main()
