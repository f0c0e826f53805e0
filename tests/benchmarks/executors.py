"""A sweep in one process and in several, one thread each, on the default model.

`python tests/benchmarks/executors.py [N]` prints the seconds of both, interleaved, and checks that
the tables have the same bytes. Workers are started and have loaded the model before the clock.
"""

import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

import steerlens as sl

LAYERS = list(range(0, 30, 3))
COEFFICIENTS = [-20.0, -10.0, 10.0, 20.0]
ROUNDS = 3


def main(n_workers: int) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    model = sl.load_model(progress=False)
    fit_on = sl.ContrastivePairs.load("sentiment")[:8]
    measure_on = sl.ContrastivePairs.load("sentiment", split="test")[:16]
    directions = sl.fit_directions(sl.collect_differences(model, fit_on))

    def swept(executor: Any, layers: list[int]) -> Any:
        return sl.sweep(
            model,
            measure_on,
            directions,
            layers=layers,
            coefficients=COEFFICIENTS,
            executor=executor,
        )

    seconds: dict[str, list[float]] = {"one process": [], f"{n_workers} workers": []}
    tables: dict[str, str] = {}
    with ProcessPoolExecutor(
        n_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        swept(pool, [0, 7, 14, 21, 28])  # every worker loads the model
        for _ in range(ROUNDS):
            for name, executor in zip(seconds, (None, pool), strict=True):
                start = time.perf_counter()
                tables[name] = swept(executor, LAYERS).table.to_csv()
                seconds[name].append(time.perf_counter() - start)
                print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    one, several = (statistics.median(times) for times in seconds.values())
    print(
        f"{len(LAYERS)} layers x {len(COEFFICIENTS)} coefficients x {len(measure_on)} pairs, "
        f"{os.cpu_count()} cores: {one:.1f} s in one process, {several:.1f} s with {n_workers} "
        f"workers of one thread: {one / several:.2f} times as fast, efficiency "
        f"{one / several / n_workers:.0%}; same bytes: {len(set(tables.values())) == 1}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
