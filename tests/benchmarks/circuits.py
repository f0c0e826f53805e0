"""What circuits cost on the default model, batched against TransformerLens example by example.

    python tests/benchmarks/circuits.py [--pairs 32]

Prints seconds and peak memory of all component scores of both questions (who writes, who reads) on
so many pairs, and the time and largest difference of the same estimates from `attribution_patch`,
which runs one prompt at a time.
"""

import argparse
import os
import platform
import resource
import time
from typing import Any

import torch
from transformer_lens.tools.analysis import attribution_patch

import steerlens as sl
from steerlens.circuits import contrast_answers, find_readers, find_writers, make_prompts
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.models.hooks import resid_post

LAYER, COEFFICIENT = 12, 20.0


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--one-by-one", type=int, default=8)
    options = parser.parse_args()
    model = sl.load_model(progress=False)
    train = sl.ContrastivePairs.load("sentiment")
    test = sl.ContrastivePairs.load("sentiment", split="test")[: options.pairs]
    directions = sl.fit_directions(sl.collect_differences(model, train, layers=[LAYER]))
    vector = sl.SteeringVector.from_directions(model, directions)
    answers = contrast_answers(model, train)
    prompts = make_prompts(model, tokenize_pairs(model, test).positive)
    first_prompts = prompts.part(slice(0, options.one_by_one))
    estimates_only: dict[str, Any] = {"top": 0, "n_draws": 0, "n_claimed": 0}
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    base = megabytes()

    started = time.perf_counter()
    writers = find_writers(model, test, directions, layer=LAYER)
    first = time.perf_counter() - started
    started = time.perf_counter()
    find_readers(model, prompts, answers, vector, COEFFICIENT, **estimates_only)
    second = time.perf_counter() - started
    print(
        f"{len(test)} pairs: writers {first:.1f} s, readers {second:.1f} s (estimates), "
        f"peak {megabytes() - base:.0f} MB above the loaded model and fitting"
    )
    print(f"writers' residual {writers.table.attrs['residual']:.2g} of the projection")

    started = time.perf_counter()
    batched = find_readers(
        model, first_prompts, answers, vector, COEFFICIENT, **estimates_only
    ).table
    together = time.perf_counter() - started
    started = time.perf_counter()
    scores = one_by_one(model, first_prompts, answers, vector)
    apart = time.perf_counter() - started
    difference = max(abs(row.effect - scores[row.layer, row.head]) for row in batched.itertuples())
    print(
        f"{len(first_prompts)} prompts: {together:.1f} s batched, {apart:.1f} s by "
        f"attribution_patch example by example, {apart / together:.1f} times; largest difference "
        f"{difference:.2g} logits of {batched.effect.abs().max():.3g}"
    )


def one_by_one(
    model: Any, prompts: Any, answers: Any, vector: sl.SteeringVector
) -> dict[tuple[int, int], float]:
    """TransformerLens's estimates: clean and corrupt run in turn, every other one steered."""
    totals: dict[tuple[int, int], float] = {}
    name = resid_post(LAYER)
    step = COEFFICIENT * vector[name]
    for i in range(len(prompts)):
        tokens = prompts.tokens[i : i + 1, : int(prompts.last[i]) + 1]
        turns: list[int] = []

        def every_other(activation: Any, hook: Any, turns: list[int] = turns) -> Any:
            turns.append(1)
            return activation + step if len(turns) % 2 else activation

        with model.hooks(fwd_hooks=[(name, every_other)]):
            found = attribution_patch(
                model, tokens, tokens, lambda logits: answers.logit_difference(logits[:, -1]).sum()
            )
        for node, score in found.node_scores.items():
            place = (
                -1 if node.layer is None else node.layer,
                -1 if node.head is None else node.head,
            )
            totals[place] = totals.get(place, 0.0) + score / len(prompts)
    return totals


if __name__ == "__main__":
    main()
