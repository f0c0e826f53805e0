"""What a GPU does with the sweep, the boundary and the gradients: builds, checks and times them.

    python tests/benchmarks/gpu.py --out build/gpu [--device cuda] [--quick] [--parts sweep,profile]

Nothing is fetched: models are random-init ones of real shapes, but for SmolLM2, which is taken from
the cache folder or left out. `OUT/gpu.json` is written anew after every row; a part that fails or
runs out of its time is a row too, and the next one begins. The table is printed in the end.
"""

import argparse
import gc
import json
import platform
import signal
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import generation
import gpu_extra
import torch
from gpu_shapes import (
    Arithmetic,
    build,
    hook_loop,
    make_jobs,
    make_workload,
    matrix_peak,
    timed,
)

from steerlens.engine import backend as bare
from steerlens.engine.backend import BareModel, for_hooks
from steerlens.engine.engine import Engine
from steerlens.engine.plain_loop import run_baseline
from steerlens.engine.plan import Plan, make_plan, run_cells
from steerlens.engine.workload import CellOutput, Job

COEFFICIENTS = (-8.0, -4.0, -2.0, -1.0, 1.0, 2.0, 4.0, 8.0)
N_SAMPLED = 2  # coefficients of the plain loop that are run: its cells all cost the same

# Part -> seconds it may take, in the order of what matters most.
BUDGETS = {
    "card": 30,
    "correct": 75,
    "sweep": 180,
    "boundary": 60,
    "gradients": 75,
    "generation": 90,
    "profile": 30,
    "peers": 40,
    "qwen": 75,
    "llama70b": 90,
    "smol": 60,
    "whole": 300,
    "small": 120,
    "dask": 300,
}


@dataclass
class Session:
    """What the parts share: the options, the peak, the 7B model, and the rows so far."""

    device: str
    quick: bool
    out: Path
    peak: float = float("nan")
    rows: list[dict[str, Any]] = field(default_factory=list)
    models: dict[str, Any] = field(default_factory=dict)

    def row(self, part: str, what: str, **numbers: Any) -> None:
        """Note a row, print it and write all of them."""
        self.rows.append({"part": part, "what": what, **numbers})
        shown = ", ".join(f"{key} {_number(value)}" for key, value in numbers.items())
        print(f"[{part}] {what}: {shown}", flush=True)
        text = json.dumps({"where": where(self.device), "rows": self.rows}, indent=1)
        (self.out / "gpu.json").write_text(text, encoding="utf-8")

    def model(self, name: str) -> Any:
        """A model of that shape in bf16, built once; the one before it is let go."""
        if name not in self.models:
            self.models.clear()
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            started = perf_counter()
            bridge = build(name, device=self.device, dtype=torch.bfloat16, tiny=self.quick)
            built = perf_counter() - started
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                checked = timed(lambda: for_hooks(bridge, []), self.device)
            is_bare = isinstance(for_hooks(bridge, []), BareModel)
            said = "; ".join(str(one.message) for one in caught)[:400]
            self.models[name] = bridge
            self.row("build", name, build_s=built, check_s=checked, bare=is_bare, warned=said)
        return self.models[name]

    def peak_gb(self) -> float:
        """The most memory allocated on the GPU since the last call, GB."""
        if self.device != "cuda":
            return float("nan")
        found = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return found


class OutOfTime(BaseException):
    """A part's time is up; no error that code in between might handle."""


def card(session: Session) -> None:
    """The matrix product that everything is held against."""
    size, seconds = (512, 0.2) if session.quick else (8192, 2.0)
    best, through = matrix_peak(session.device, size=size, seconds=seconds)
    session.peak = best
    session.row("card", f"bf16 {size}^3", tflops=best / 1e12, tflops_sustained=through / 1e12)


def sweep(part: str, name: str, *sizes: tuple[int, int, int]) -> Callable[[Session], None]:
    """A part that sweeps a shape by the plain loop, eager and compiled blocks.

    `sizes`: prompts, tokens a prompt, rounds.
    """

    def run(session: Session) -> None:
        for n_prompts, n_tokens, rounds in ((2, 12, 3), (4, 12, 3)) if session.quick else sizes:
            measure(session, part, name, n_prompts, n_tokens, rounds=rounds)

    return run


def measure(
    session: Session, part: str, name: str, n_prompts: int, n_tokens: int, *, rounds: int
) -> None:
    """The cells of 4 layers x 8 coefficients on unpadded prompts, in every way, interleaved."""
    model, device = session.model(name), session.device
    n_layers = int(model.cfg.n_layers)
    workload = make_workload(model, n_prompts, n_tokens)
    jobs = make_jobs(model, range(0, n_layers, n_layers // 4), COEFFICIENTS)
    floor = Arithmetic.of(model).sweep(n_layers, jobs, n_prompts, n_tokens)
    size = f"{n_prompts} x {n_tokens}"
    readouts = tuple(dict.fromkeys(name for job in jobs for name in (job.hook_name, job.readout)))
    plans: list[Plan] = []

    def planning() -> None:
        engine = Engine(model)
        unsteered = run_baseline(engine, workload, readouts)
        plans.append(make_plan(engine, workload, unsteered, jobs))

    planning_s = timed(planning, device)
    plan = plans[0]
    runner: Any = plan.runner.model
    is_bare = isinstance(runner, BareModel)
    session.row(part, f"{name}, {size}, plan", s=planning_s, bare=is_bare, exact=len(plan.exact))
    plain, blocks = gpu_extra.own(model)
    batch = workload.positive[0]
    sampled = [(job, c) for job in jobs for c in job.coefficients[:N_SAMPLED]]
    cells: dict[str, list[list[CellOutput]]] = {}
    logprobs: list[Any] = []

    def engine_by(way: str) -> Callable[[], None]:
        def run() -> None:
            with compiled(runner, on=way == "compiled"):
                by = replace(plan, runner=Engine(model)) if way == "Bridge" else plan
                cells[way] = list(run_cells(by, jobs))

        return run

    def loop() -> None:
        with compiled(runner, on=False):
            logprobs[:] = hook_loop(plain, blocks, batch, sampled)

    ways: dict[str, tuple[Callable[[], None], float]] = {
        "plain loop": (loop, len(COEFFICIENTS) / N_SAMPLED),
        "Bridge": (engine_by("Bridge"), 1.0),
    }
    if is_bare:
        ways["eager"] = (engine_by("eager"), 1.0)
        ways["compiled"] = (engine_by("compiled"), 1.0)
        if device == "cuda" or gpu_extra.COMPILE_ON_CPU:
            runner.compile_blocks()
    peaks = {}
    for way, (run, _) in ways.items():
        session.peak_gb()
        first = timed(run, device)
        peaks[way] = session.peak_gb()
        session.row(part, f"{name}, {size}, {way}, first run", s=first, peak_gb=peaks[way])
    if is_bare and runner.compiled is not None and runner.compiled.reason is not None:
        session.row(part, f"{name}, not compiled", reason=runner.compiled.reason)
        del ways["compiled"]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(rounds):
        for way, (run, scale) in ways.items():
            if way != "Bridge" or i == 0:  # slow, and not what is looked for
                seconds[way].append(scale * timed(run, device))
    base = statistics.median(seconds["plain loop"])
    for way, values in seconds.items():
        middle = statistics.median(values)
        same: dict[str, Any] = {}
        if way in cells:
            found = [cell for of in cells[way] for cell in of[:N_SAMPLED]]
            both = zip(found, logprobs, strict=True)
            same["largest_gap_nats"] = max(float((a.logprob - b).abs().max()) for a, b in both)
        session.row(
            part,
            f"{name}, {size}, {way}",
            s=middle,
            min_s=min(values),
            max_s=max(values),
            x_plain=base / middle,
            of_peak=floor / middle / session.peak,
            floor_s=floor / session.peak,
            peak_gb=peaks[way],
            **same,
        )


@contextmanager
def compiled(runner: Any, *, on: bool) -> Iterator[None]:
    """The blocks compiled inside the block, or as they are."""
    blocks = getattr(runner, "compiled", None)
    if blocks is None or on:
        yield
        return
    before, blocks.reason = blocks.reason, "off"
    try:
        yield
    finally:
        blocks.reason = before


def profile(session: Session) -> None:
    """Where the time of a compiled sweep goes: the largest kernels, and the GPU's idle share."""
    model = session.model("Llama 7B")
    n_layers = int(model.cfg.n_layers)
    for n_prompts, n_tokens in ((2, 12),) if session.quick else ((8, 48), (64, 128)):
        workload = make_workload(model, n_prompts, n_tokens)
        jobs = make_jobs(model, [n_layers // 2], COEFFICIENTS)
        names = (jobs[0].hook_name, jobs[0].readout)
        engine = Engine(model)
        plan = make_plan(engine, workload, run_baseline(engine, workload, names), jobs)
        runner = plan.runner.model
        if isinstance(runner, BareModel) and session.device == "cuda":
            runner.compile_blocks()

        def run(plan: Plan = plan, jobs: list[Job] = jobs) -> None:
            list(run_cells(plan, jobs))

        run()
        seconds = min(timed(run, session.device) for _ in range(3))
        gpu_extra.kernels(session, f"{n_prompts} x {n_tokens}", seconds, run)


def where(device: str) -> dict[str, Any]:
    """Date, card and versions."""
    names = ("torch", "transformers", "transformer-lens", "steerlens")
    found: dict[str, Any] = {name: version(name) for name in names}
    found |= {"date": date.today().isoformat(), "python": platform.python_version()}
    found["card"] = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return found


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(session: Session) -> str:
    """The rows with a time, in Markdown."""
    lines = [
        "| part | what | s | x plain loop | of peak | peak GB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in session.rows:
        if "s" in row and "first run" not in row["what"]:
            share = f"{100 * row['of_peak']:.0f}%" if "of_peak" in row else ""
            times = f"{row['x_plain']:.2f}" if "x_plain" in row else ""
            memory = f"{row['peak_gb']:.1f}" if "peak_gb" in row else ""
            lines.append(
                f"| {row['part']} | {row['what']} | {row['s']:.3f} | {times} | {share} | {memory} |"
            )
    return "\n".join(lines)


PARTS: dict[str, Callable[[Session], None]] = {
    "card": card,
    "correct": gpu_extra.correct,
    "sweep": sweep("sweep", "Llama 7B", (8, 48, 5), (32, 48, 5), (64, 128, 3)),
    "boundary": gpu_extra.boundary,
    "gradients": gpu_extra.gradients,
    "generation": generation.on_gpu,
    "profile": profile,
    "peers": gpu_extra.peers,
    "qwen": sweep("qwen", "Qwen3 0.6B", (8, 48, 5), (64, 128, 5)),
    "llama70b": sweep("llama70b", "Llama 70B, 8 blocks", (8, 48, 3), (64, 128, 3)),
    "smol": gpu_extra.smol,
    "whole": gpu_extra.whole(("Llama 7B", 16, 48), ("Llama 7B", 128, 48)),
    "small": gpu_extra.whole(("SmolLM2 135M", 32, 48), ("Qwen3 0.6B", 32, 48)),
    "dask": gpu_extra.dask,
}


def main() -> None:
    """Run the parts, each for at most its budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, for a trial on a CPU")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--seconds", type=float, default=900.0, help="begin no part after this")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    started = perf_counter()
    if args.device == "cpu":
        bare.DEVICES.add("cpu")
    session = Session(args.device, args.quick, args.out)

    def out_of_time(signum: int, frame: Any) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, out_of_time)
    for part in args.parts.split(","):
        left = args.seconds - (perf_counter() - started)
        if left < 5:
            session.row(part, "left out: no time")
            continue
        begun = perf_counter()
        signal.setitimer(signal.ITIMER_REAL, min(BUDGETS[part], left))
        try:
            PARTS[part](session)
        except (Exception, OutOfTime) as error:  # the other parts are wanted all the same
            reason = (str(error).strip().splitlines() or [""])[0]
            session.row(part, "failed", why=f"{type(error).__name__}: {reason}"[:500])
            gpu_extra.log_traceback(session.out)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        session.row(part, "part took", seconds=perf_counter() - begun)
    print(json.dumps(where(args.device)))
    text = table(session)
    (args.out / "gpu.md").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)


if __name__ == "__main__":
    main()
