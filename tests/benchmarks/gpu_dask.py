"""A sweep through Dask with one worker a GPU, against one of the workers alone.

    python tests/benchmarks/gpu_dask.py --out build/gpu [--gpus 0,1] [--quick]

The random-init model is written to a temporary folder, from which the workers load it. All of them
have it before the clock runs: for the whole of `sweep`, with the checks and the statistics of the
process that calls it. Rounds are interleaved, and the tables must be the same bytes. `--quick` is
for a trial: a tiny model, on the CPU where `--gpus cpu,cpu` says so.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from distributed import Client
from gpu_shapes import make_pairs, save

import steerlens as sl

COEFFICIENTS = [-8.0, -4.0, -2.0, -1.0, 1.0, 2.0, 4.0, 8.0]


@contextmanager
def cluster(folder: Path, gpus: list[str]) -> Iterator[tuple[Client, list[str]]]:
    """A scheduler and a worker of one thread for every GPU: a client, the workers' addresses."""
    address = folder / "scheduler.json"
    options = ["--scheduler-file", str(address), "--no-dashboard"]
    command = [sys.executable, "-m"]
    started = [
        subprocess.Popen([*command, "distributed.cli.dask_scheduler", "--port", "0", *options])
    ]
    try:
        for gpu in gpus:
            seen = {} if gpu == "cpu" else {"CUDA_VISIBLE_DEVICES": gpu}
            seen["OMP_NUM_THREADS"] = str(share(gpus))
            worker = ["distributed.cli.dask_worker", "--nthreads", "1", "--memory-limit", "0"]
            started.append(
                subprocess.Popen(
                    [*command, *worker, *options],
                    env=dict(os.environ) | seen,
                )
            )
        with Client(scheduler_file=str(address), timeout=60) as client:
            client.wait_for_workers(len(gpus), timeout=120)
            yield client, list(client.scheduler_info()["workers"])
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(timeout=30)


def share(gpus: list[str]) -> int:
    """Threads for each worker and for this process: more in all than cores wait for each other."""
    return max(1, (os.cpu_count() or 1) // (len(gpus) + 1))


def main() -> None:
    """Start the workers, time them and print two lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", default="0,1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    gpus = args.gpus.split(",")
    torch.set_num_threads(share(gpus))
    device = "cpu" if gpus[0] == "cpu" else "cuda"
    with tempfile.TemporaryDirectory() as name, cluster(Path(name), gpus) as (client, workers):
        save("Llama 7B", Path(name) / "model", device=device, tiny=args.quick)
        model = sl.load_model(f"{name}/model", device=device, dtype=torch.bfloat16, progress=False)
        pairs = make_pairs(4, 12) if args.quick else make_pairs(args.pairs, 48)
        directions = sl.fit_directions(sl.collect_differences(model, pairs))

        def swept(executor: Any, layers: Any) -> Any:
            return sl.sweep(
                model,
                pairs,
                directions,
                layers=layers,
                coefficients=COEFFICIENTS,
                executor=executor,
            )

        ways = {
            "one": client.get_executor(workers=workers[:1]),
            "all": client.get_executor(),
            "no executor": None,
        }
        swept(client.get_executor(), [-2, -1])  # a task for each: they load the model together
        for worker in workers:
            swept(client.get_executor(workers=[worker]), [-1])
        print("ready", flush=True)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        tables: dict[str, str] = {}
        for i in range(args.rounds):
            for way, executor in ways.items():
                if way == "no executor" and i > 0:
                    continue
                started = perf_counter()
                tables[way] = swept(executor, "all").table.to_csv()
                seconds[way].append(perf_counter() - started)
                print(f"{way}: {seconds[way][-1]:.2f} s", flush=True)
    middle = {way: statistics.median(of) for way, of in seconds.items()}
    same = len(set(tables.values())) == 1
    found = {"seconds": seconds, "times": middle["one"] / middle["all"], "same_bytes": same}
    (args.out / "gpu_dask.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"{len(pairs)} pairs, {len(COEFFICIENTS)} coefficients; same bytes: {same}")
    print(
        f"one worker {middle['one']:.2f} s, {len(gpus)} workers {middle['all']:.2f} s: "
        f"{middle['one'] / middle['all']:.2f} times; no executor {middle['no executor']:.2f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
