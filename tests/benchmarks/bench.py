"""steerlens against other ways to the same numbers, and against the cost of its arithmetic.

    python tests/benchmarks/bench.py --out build/bench [--rounds 5] [--threads 2] [--quick]

Writes `OUT/bench.md` and `OUT/bench.json`. Every contender is a process that has loaded its model
before anything is timed; rounds are interleaved, one contender computing at a time. It needs an
environment with steerlens and steering-vectors; repeng and nnsight get their own under OUT.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prepare import COEFFICIENTS, EXTRACTED, write_work
from report import header, markdown, plot
from work import Cell, Work
from workers import NAMES, US, Worker, pythons, running

POSITIONS = ("all", "continuation")
TOLERANCE = 1e-3  # relative for a projection, nats per token for a logprob
WITHOUT_EXTRACTION = ("hf_lean", "hf_cache")  # the same as "hf" there
Answers = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    rounds: int = 5
    extract_rounds: int = 3
    n_pairs: int = 32
    batch_size: int = 32
    n_sampled_cells: int = 2
    # Mean depth 14, where all 30 layers have 14.5: a cell's cost falls with the depth of its hook.
    layers: tuple[int, ...] = (4, 14, 24)
    coefficients: tuple[float, ...] = tuple(COEFFICIENTS)
    extract_pairs: int = EXTRACTED
    memory_coefficients: tuple[int, ...] = (8, 64)
    memory_layers: tuple[int, ...] = (14,)
    growth_layers: tuple[int, ...] = (8, 20)
    growth_pairs: int = 16
    growth_coefficients: int = 4
    grow_pairs: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    grow_layers: tuple[int, ...] = (1, 2, 4, 8, 15, 30)
    grow_coefficients: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    grow_tokens: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    grow_tokens_pairs: int = 8
    full: bool = False

    @property
    def n_cells(self) -> int:
        """The cells that seconds are given for: every layer of 30 at every coefficient."""
        return 30 * len(COEFFICIENTS)


QUICK = {
    "rounds": 1,
    "extract_rounds": 1,
    "n_pairs": 4,
    "n_sampled_cells": 2,
    "layers": (14,),
    "coefficients": (-10.0, 15.0),
    "extract_pairs": 8,
    "memory_coefficients": (2, 4),
    "growth_pairs": 4,
    "growth_coefficients": 2,
    "grow_pairs": (4, 8),
    "grow_layers": (1, 2),
    "grow_coefficients": (1, 2),
    "grow_tokens": (16, 32),
    "grow_tokens_pairs": 2,
}
PARTS = ("sweep", "extract", "memory", "growth")


def main() -> None:
    """Parse, run the parts, write both files (again after each part, should one fail)."""
    args = _arguments()
    plan = Plan(**{**(QUICK if args.quick else {}), **_given(args)})
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    names = [US, *(name for name in NAMES if name != US and name in args.contenders)]
    interpreters = pythons(out, names)
    path = write_work(
        out, n_pairs=plan.n_pairs, n_cells=plan.n_sampled_cells, batch_size=plan.batch_size
    )
    work = Work.read(path)
    found: Answers = {"plan": {**asdict(plan), "n_cells": plan.n_cells}}

    with running(interpreters, path, threads=args.threads) as workers:
        versions = {name: worker.versions for name, worker in workers.items()}
        found["header"] = header(args.threads, versions, quick=args.quick)
        found["agreement"] = {p: agreement(workers, work, p) for p in POSITIONS}
        write(out, found)
        if "sweep" in args.parts:
            found["sweep"] = time_sweeps(workers, work, plan)
            write(out, found)
        if "extract" in args.parts:
            found["extract"] = time_extraction(workers, plan)
            write(out, found)
    if "memory" in args.parts:
        found["memory"] = measure_memory(interpreters, path, plan, threads=args.threads)
        write(out, found)
    if "growth" in args.parts:
        with running({US: interpreters[US]}, path, threads=args.threads) as workers:
            found["growth"] = measure_growth(workers[US], plan)
        found["plot"] = plot(out / "growth.png", found["growth"])
    write(out, found)
    print(markdown(found))


def write(out: Path, found: Answers) -> None:
    """Both files, as far as there are numbers."""
    (out / "bench.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (out / "bench.md").write_text(markdown(found), encoding="utf-8")


def agreement(workers: Mapping[str, Worker], work: Work, positions: str) -> Answers:
    """Largest differences to steerlens over the sampled cells; ends the run beyond `TOLERANCE`.

    This also warms every contender up.
    """
    answers = {
        name: worker.ask("cells", cells=work.sampled_cells, positions=positions)
        for name, worker in workers.items()
    }
    expected = answers[US]["results"]
    found: Answers = {}
    for name, answer in answers.items():
        if "unsupported" in answer:
            found[name] = {"unsupported": answer["unsupported"]}
            continue
        pairs = list(zip(answer["results"], expected, strict=True))
        # A projection may pass through 0, where only its absolute size says something.
        relative = max(abs(a[0] - b[0]) / max(abs(b[0]), 1.0) for a, b in pairs)
        nats = max(abs(a[1] - b[1]) for a, b in pairs)
        found[name] = {"projection": relative, "logprob": nats, "results": answer["results"]}
        print(f"{positions}: {name} differs by {relative:.1e} (projection), {nats:.1e} nats")
        # Not `>`: that is false for NaN.
        if not (relative <= TOLERANCE and nats <= TOLERANCE):
            raise SystemExit(f"{name} computes something else, so it is not timed: {pairs}")
    return found


def time_sweeps(workers: Mapping[str, Worker], work: Work, plan: Plan) -> Answers:
    """Seconds of a whole sweep by each contender, and of a bare forward pass, round by round."""
    found: Answers = {p: {name: [] for name in workers} for p in POSITIONS}
    raw: Answers = {p: {name: [] for name in workers} for p in POSITIONS}
    rates: Answers = {name: [] for name in (US, "hf") if name in workers}
    for round_ in range(plan.rounds):
        for positions in POSITIONS:
            for name in _rotated(list(workers), round_):
                cells = _cells(name, work, plan)
                answer = workers[name].ask("cells", cells=cells, positions=positions)
                if "unsupported" in answer:
                    continue
                del answer["results"]
                if name == US and not plan.full:
                    answer["fixed_seconds"] = _fixed(workers[US], cells, positions, answer)
                raw[positions][name].append(answer)
                found[positions][name].append(_scaled(answer, len(cells), plan))
                print(f"round {round_ + 1}: {positions}: {name} {found[positions][name][-1]:.1f} s")
        for name, into in rates.items():
            forward = workers[name].ask("forward", n_pairs=plan.n_pairs)
            unembed = workers[name].ask("unembed")["seconds"]
            into.append({**forward, "unembed": unembed})
    return {
        "seconds": found,
        "raw": raw,
        "rates": rates,
        "our_cells": len(_cells(US, work, plan)),
        "peer_cells": len(_cells("hf", work, plan)),
    }


def _cells(name: str, work: Work, plan: Plan) -> list[Cell]:
    if plan.full:
        return [(layer, c) for layer in work.layers for c in work.coefficients]
    if name == US:
        return [(layer, c) for layer in plan.layers for c in plan.coefficients]
    return work.sampled_cells


def _scaled(answer: Answers, n_run: int, plan: Plan) -> float:
    """Seconds of all cells from those of `n_run`: what is done once does not scale with them."""
    fixed = float(answer.get("fixed_seconds", 0.0))
    return fixed + (float(answer["seconds"]) - fixed) * plan.n_cells / n_run


def _fixed(worker: Worker, cells: list[Cell], positions: str, whole: Answers) -> float:
    """Seconds of a sweep that do not grow with its coefficients, from one with half of them."""
    coefficients = sorted({c for _, c in cells})
    half = [(layer, c) for layer, c in cells if c in coefficients[::2]]
    seconds = worker.ask("cells", cells=half, positions=positions)["seconds"]
    a_cell = (float(whole["seconds"]) - seconds) / (len(cells) - len(half))
    return max(0.0, float(whole["seconds"]) - a_cell * len(cells))


def _rotated(names: list[str], by: int) -> list[str]:
    """Another one first in every round, as the machine may drift."""
    by %= len(names)
    return names[by:] + names[:by]


def time_extraction(workers: Mapping[str, Worker], plan: Plan) -> Answers:
    """Seconds of the differences at all layers, and of a bare forward pass of both sides."""
    names = [name for name in workers if name not in WITHOUT_EXTRACTION]
    found: Answers = {name: [] for name in names}
    rates: Answers = {name: [] for name in (US, "hf") if name in workers}
    projections: Answers = {}
    for round_ in range(plan.extract_rounds):
        for name in _rotated(names, round_):
            answer = workers[name].ask("extract", n_pairs=plan.extract_pairs)
            found[name].append(answer["seconds"])
            projections[name] = answer["projections"]
            print(f"round {round_ + 1}: extraction: {name} {answer['seconds']:.1f} s")
        for name, into in rates.items():
            into.append(workers[name].ask("forward", n_pairs=plan.extract_pairs, extract=True))
    return {
        "seconds": found,
        "rates": rates,
        "difference": {
            name: max(
                abs(a - b) / max(abs(b), 1.0)
                for a, b in zip(values, projections[US], strict=True)
                if a is not None
            )
            for name, values in projections.items()
        },
    }


def measure_memory(
    interpreters: Mapping[str, str], path: Path, plan: Plan, *, threads: int
) -> list[Answers]:
    """Peak memory of a sweep above the loaded model; a fresh process each, as peaks do not sink."""
    rows = []
    for n_coefficients in plan.memory_coefficients:
        with running({US: interpreters[US]}, path, threads=threads) as workers:
            worker = workers[US]
            worker.ask("grow", n_pairs=2, layers=[plan.memory_layers[0]], coefficients=[10.0])
            before = worker.ask("memory", reset=True)
            worker.ask(
                "grow",
                n_pairs=plan.n_pairs,
                layers=plan.memory_layers,
                coefficients=spread(n_coefficients),
            )
            after = worker.ask("memory")
        rows.append(_memory_row(f"{NAMES[US]}, {n_coefficients} coefficients", before, after))
    if "hf" in interpreters:
        # One cell of a plain loop, for scale: the number of cells does not matter to it.
        cell = [(plan.memory_layers[0], 10.0)]
        with running({"hf": interpreters["hf"]}, path, threads=threads) as workers:
            worker = workers["hf"]
            worker.ask("unembed", n_pairs=2)  # the weights are mapped, and in memory once used
            before = worker.ask("memory", reset=True)
            worker.ask("cells", cells=cell, positions="all")
            after = worker.ask("memory")
        rows.append(_memory_row(NAMES["hf"], before, after))
    return rows


def _memory_row(what: str, before: Answers, after: Answers) -> Answers:
    return {
        "what": what,
        "loaded_mb": before["now_mb"],
        "peak_mb": after["peak_mb"],
        "above_mb": after["peak_mb"] - before["now_mb"],
        "was_reset": before["was_reset"],
    }


def measure_growth(worker: Worker, plan: Plan) -> list[Answers]:
    """A sweep's seconds and forward-equivalents against one size at a time, each once."""
    base = {
        "n_pairs": plan.growth_pairs,
        "layers": plan.growth_layers,
        "coefficients": spread(plan.growth_coefficients),
    }
    worker.ask("grow", **{**base, "n_pairs": 2})  # warm
    changes: list[tuple[str, int, Answers]] = [
        *(("pairs", n, {"n_pairs": n}) for n in plan.grow_pairs),
        *(("layers", n, {"layers": spread_layers(n)}) for n in plan.grow_layers),
        *(("coefficients", n, {"coefficients": spread(n)}) for n in plan.grow_coefficients),
        *(
            ("prompt tokens", n, {"prompt_tokens": n, "n_pairs": plan.grow_tokens_pairs})
            for n in plan.grow_tokens
        ),
    ]
    rows = []
    for varied, size, change in changes:
        answer = worker.ask("grow", **{**base, **change})
        print(f"growth: {size} {varied}: {answer['seconds']:.1f} s")
        rows.append({"varied": varied, "size": size, **answer})
    return rows


def spread(n: int) -> list[float]:
    """`n` distinct coefficients between -20 and 20, without 0, which would cost nothing."""
    return [(-1.0) ** i * 20 * (i // 2 + 1) / ((n + 1) // 2) for i in range(n)]


def spread_layers(n: int) -> list[int]:
    """`n` of 30 layers at even distances, whose mean depth is about 14.5."""
    return [int((i + 0.5) * 30 / n) for i in range(n)]


def _given(args: argparse.Namespace) -> Answers:
    """Settings of the plan that the command line names."""
    names = ("rounds", "n_pairs", "batch_size")
    named = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return {**named, "full": args.full}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    peers = [name for name in NAMES if name != US]
    parser.add_argument("--out", type=Path, required=True, help="folder of tables, logs and venvs")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (5)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each contender")
    parser.add_argument("--n-pairs", type=int, help="pairs in a sweep, 100 at most (32)")
    parser.add_argument("--batch-size", type=int, help="prompts a pass, for all contenders (32)")
    parser.add_argument("--quick", action="store_true", help="a few cells of 4 pairs: does it run?")
    parser.add_argument("--full", action="store_true", help="time all cells; nothing is scaled")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="tables to make")
    parser.add_argument("--contenders", nargs="+", choices=peers, default=peers, help="peers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
