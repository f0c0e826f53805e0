"""Two GPUs, one process each, every one with its share of the layers, against one of them alone.

    python tests/benchmarks/gpu_pair.py --out build/gpu [--devices cuda:0,cuda:1] [--quick]

The processes build the same random-init model and say when they are ready; the clock runs from
telling them to begin until the last has answered. Rounds of one and of both are interleaved, and
both have to give the same numbers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from gpu_shapes import build, make_jobs, make_workload

from steerlens import bare
from steerlens.bare import BareModel
from steerlens.cells import Job
from steerlens.engine import make_plan, run_cells
from steerlens.plain import Cost, run_baseline

COEFFICIENTS = (-8.0, -4.0, -2.0, -1.0, 1.0, 2.0, 4.0, 8.0)


def shares(jobs: Sequence[Job], n_layers: int, n: int) -> list[list[Job]]:
    """Jobs in layer order for each of `n` workers, of about the same number of blocks."""
    given: list[list[Job]] = [[] for _ in range(n)]
    for job in sorted(jobs, key=lambda job: job.first_block):
        least = min(given, key=lambda some: sum(n_layers - one.first_block for one in some))
        least.append(job)
    return given


def work(device: str, index: int, n_workers: int, *, quick: bool, compiles: bool) -> None:
    """A worker: answers "one" with all jobs done and "share" with its own, a JSON line each."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if device == "cpu":
        bare.DEVICES.add("cpu")
    model = build("Llama 7B", device=device, dtype=torch.bfloat16, tiny=quick)
    n_layers = int(model.cfg.n_layers)
    workload = make_workload(model, *((4, 12) if quick else (32, 48)))
    jobs = make_jobs(model, range(0, n_layers, n_layers // 8), COEFFICIENTS)
    readouts = tuple(dict.fromkeys(name for job in jobs for name in (job.hook_name, job.readout)))
    unsteered = run_baseline(model, workload, readouts, cost=Cost())
    plan = make_plan(model, workload, unsteered, jobs, batch_size=None, cost=Cost())
    if compiles and isinstance(plan.runner, BareModel):
        plan.runner.compile_blocks()
    mine = shares(jobs, n_layers, n_workers)[index]
    for some in (jobs, mine):  # to warm up
        list(run_cells(plan, some, cost=Cost()))
    print(json.dumps({"bare": isinstance(plan.runner, BareModel)}), file=answers, flush=True)
    for line in sys.stdin:
        some = jobs if line.strip() == "one" else mine
        cells = run_cells(plan, some, cost=Cost())
        means = {
            job.hook_name: [float(cell.logprob.mean()) for cell in of_job]
            for job, of_job in zip(some, cells, strict=True)
        }
        print(json.dumps(means), file=answers, flush=True)


def main() -> None:
    """Start the workers, time them and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", default="cuda:0,cuda:1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--worker", type=int)
    args = parser.parse_args()
    devices = args.devices.split(",")
    if args.worker is not None:
        # Only its own GPU is to be seen, so that it is "cuda" to the model and to the engine.
        kind = "cpu" if devices[args.worker] == "cpu" else "cuda"
        work(kind, args.worker, len(devices), quick=args.quick, compiles=not args.eager)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    workers = [_start(i, device) for i, device in enumerate(devices)]
    try:
        ready = [json.loads(worker.stdout.readline()) for worker in workers]
        print("ready", ready, flush=True)
        seconds: dict[str, list[float]] = {"one": [], "share": []}
        gap = 0.0
        for _ in range(args.rounds):
            (alone,) = _ask(workers[:1], "one", seconds["one"])
            both: dict[str, Any] = {}
            for answer in _ask(workers, "share", seconds["share"]):
                both |= answer
            gap = max(
                gap, *(abs(a - b) for n in alone for a, b in zip(alone[n], both[n], strict=True))
            )
            if both.keys() != alone.keys():
                raise RuntimeError(f"layers differ: {sorted(both)} and {sorted(alone)}")
        one, two = (statistics.median(seconds[name]) for name in ("one", "share"))
        found = {"one_s": one, "both_s": two, "times": one / two, "largest_gap_nats": gap}
        (args.out / "gpu_pair.json").write_text(json.dumps(found | seconds), encoding="utf-8")
        print(f"one GPU {one:.3f} s, {len(devices)} GPUs {two:.3f} s: {one / two:.2f} times")
        print(f"largest gap {gap:.2g} nats", flush=True)
    finally:
        for worker in workers:
            worker.stdin.close()
            worker.wait(timeout=30)


def _start(index: int, device: str) -> Any:
    number = device.partition(":")[2]
    environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": number} if number else {})
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(index)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def _ask(workers: Sequence[Any], what: str, seconds: list[float]) -> list[dict[str, Any]]:
    started = perf_counter()
    for worker in workers:
        worker.stdin.write(what + "\n")
        worker.stdin.flush()
    answers = [json.loads(worker.stdout.readline()) for worker in workers]
    seconds.append(perf_counter() - started)
    return answers


if __name__ == "__main__":
    main()
