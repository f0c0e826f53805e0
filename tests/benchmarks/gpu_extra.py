"""Parts of `gpu.py` beside the sweep: correctness, boundary, gradients, peers, profile, SmolLM2."""

import cProfile
import gc
import json
import os
import statistics
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_shapes import Arithmetic, hook_loop, make_jobs, make_pairs, make_workload, timed
from torch import Tensor

import steerlens as sl
from steerlens.engine import backend as bare
from steerlens.engine.backend import BareModel, for_hooks
from steerlens.engine.batches import make_pair_batches
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.loss import label_logprob
from steerlens.models import verification as fidelity
from steerlens.models.packaged import DEFAULT_MODEL, PACKAGED_MODELS, cache_folder

COMPILE_ON_CPU = bool(os.environ.get("COMPILE_ON_CPU"))
MARGIN_POSITION = -2  # a position that a label follows


def own(model: Any) -> tuple[Any, Any]:
    """Hugging Face's own model under a Bridge, and its blocks."""
    plain = fidelity.own_model(model)
    if plain is None:
        raise RuntimeError("the Bridge is not plain")
    return plain, bare._blocks(model, plain)


def log_traceback(out: Path) -> None:
    """Append what was raised to `OUT/errors.txt`, and print its end."""
    text = traceback.format_exc()
    with (out / "errors.txt").open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    print(text[-1500:], flush=True)


def has_smol() -> bool:
    """Whether SmolLM2 is in the cache folder."""
    packaged = PACKAGED_MODELS[DEFAULT_MODEL]
    folder = cache_folder() / f"{packaged.name}-{packaged.wheel_sha256[:12]}"
    return any(folder.glob("*.safetensors"))


def correct(session: Any) -> None:
    """SmolLM2's cells, gradients and boundaries on the device, against float32 on the CPU."""
    if not has_smol():
        session.row("correct", "left out: SmolLM2 is not in the cache folder")
        return
    n_pairs, layers = (4, [14]) if session.quick else (8, [0, 10, 20, 29])
    pairs = sl.ContrastivePairs.load("sentiment", split="test")[:n_pairs]
    reference = sl.load_model(device="cpu", progress=False)
    # The CPU is the reference, so it goes through the Bridge.
    taken, bare.DEVICES = bare.DEVICES, set()
    try:
        directions = sl.fit_directions(sl.collect_differences(reference, pairs))
        options: dict[str, Any] = {"layers": layers, "coefficients": [-10.0, -3.0, 3.0, 10.0]}
        expected = sl.sweep(reference, pairs, directions, n_bootstrap=2, **options)
        predicted = sl.Study(reference, pairs, directions, layers=layers).predicted_boundary()
    finally:
        bare.DEVICES = taken
    for dtype in (torch.float32, torch.bfloat16):
        model = sl.load_model(device=session.device, dtype=dtype, progress=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = sl.sweep(model, pairs, directions, n_bootstrap=2, **options)
            ahead = sl.Study(model, pairs, directions, layers=layers).predicted_boundary()
        gaps = {
            name: float((found.table[name] - expected.table[name]).abs().max())
            for name in ("projection", "logprob_nats", "degradation_nats")
        }
        ratio = ahead.predicted_boundary_pos / predicted.predicted_boundary_pos
        session.row(
            "correct",
            f"SmolLM2 {dtype}, {len(found.table)} cells",
            projection_gap=gaps["projection"],
            projection_relative=float(gaps["projection"] / expected.table.projection.abs().max()),
            logprob_gap_nats=gaps["logprob_nats"],
            degradation_gap_nats=gaps["degradation_nats"],
            predicted_boundary_off=float((ratio - 1).abs().max()),
            bare=isinstance(for_hooks(model, []), BareModel),
            warned="; ".join(str(one.message) for one in caught)[:300],
        )


def boundary(session: Any) -> None:
    """The boundaries of all layers at the 7B shape: seconds and forward-equivalents.

    The budget is a divergence: a model that knows nothing has no logprob to lose.
    """
    model = session.model("Llama 7B")
    pairs = make_pairs(4, 12) if session.quick else make_pairs(16, 48)
    directions = sl.fit_directions(sl.collect_differences(model, pairs))
    found: list[sl.measure.BoundaryResult] = []

    def run() -> None:
        found.append(sl.find_boundary(model, pairs, directions, budget="kl=0.1", n_bootstrap=200))

    session.peak_gb()
    seconds = timed(run, session.device)
    layers = found[0].layers
    session.row(
        "boundary",
        f"Llama 7B, {len(layers)} layers, both signs, {len(pairs)} pairs",
        s=seconds,
        forward_equivalents=float(layers.attrs["forward_equivalents"]),
        n_finite=int((layers.boundary_pos.abs() < float("inf")).sum()),
        peak_gb=session.peak_gb(),
    )


def gradients(session: Any) -> None:
    """Gradients at all hooks against forward plus backward, extraction against forward passes."""
    model = session.model("Llama 7B")
    for n_pairs, n_tokens in ((4, 12),) if session.quick else ((8, 48), (32, 128)):
        _gradients(session, model, n_pairs, n_tokens)
    plain, _ = own(model)
    many = make_pairs(4, 12) if session.quick else make_pairs(64, 128)
    sides = [
        b for both in make_pair_batches(model, tokenize_pairs(model, many), None) for b in both
    ]

    @torch.no_grad()
    def forward() -> None:
        for batch in sides:
            plain.base_model(batch.tokens, use_cache=False)

    base = fastest(session, f"forward, {len(many)} pairs, no logits", forward)
    taken = fastest(
        session,
        f"differences, all hooks, {len(many)} pairs",
        lambda: sl.collect_differences(model, many),
    )
    session.row("gradients", "extraction", ratio=taken / base)


def _gradients(session: Any, model: Any, n_pairs: int, n_tokens: int) -> None:
    """Medians of interleaved rounds, and the peak memory of each way."""
    plain, _ = own(model)
    pairs = make_pairs(n_pairs, n_tokens)
    tokenized = tokenize_pairs(model, pairs)
    batches = [b for both in make_pair_batches(model, tokenized, None) for b in both]

    def forward_backward(*, weights: bool) -> None:
        plain.requires_grad_(weights)
        with torch.enable_grad():
            for batch in batches:
                hidden = plain.get_input_embeddings()(batch.tokens)
                hidden = hidden if weights else hidden.detach().requires_grad_()
                logits = plain(inputs_embeds=hidden, use_cache=False).logits
                (-label_logprob(logits, batch.tokens, batch.label_mask()).mean()).backward()
        plain.requires_grad_(False)
        plain.zero_grad(set_to_none=True)

    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: sl.loss_gradients(model, pairs, position=MARGIN_POSITION),
        "forward and backward": lambda: forward_backward(weights=False),
        "forward and backward, weights too": lambda: forward_backward(weights=True),
    }
    size, peaks = f"{n_pairs} x {n_tokens}", {}
    for way, run in ways.items():
        run()
        session.peak_gb()
        run()
        peaks[way] = session.peak_gb()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(2 if session.quick else 7):
        for way, run in ways.items():
            seconds[way].append(timed(run, session.device))
    base = statistics.median(seconds["ours"])
    for way, values in seconds.items():
        session.row(
            "gradients",
            f"{size}, {way}",
            s=statistics.median(values),
            min_s=min(values),
            max_s=max(values),
            ours_over_it=base / statistics.median(values),
            peak_gb=peaks[way],
        )


def fastest(session: Any, what: str, run: Callable[[], object]) -> float:
    """The best of three after one to warm up, noted with its peak memory."""
    run()
    session.peak_gb()
    seconds = min(timed(run, session.device) for _ in range(3))
    session.row("gradients", what, s=seconds, peak_gb=session.peak_gb())
    return seconds


def kernels(session: Any, size: str, seconds: float, run: Callable[[], object]) -> None:
    """The largest kernels of `run`, and the share of its time that the GPU is busy."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    kinds = [ProfilerActivity.CPU]
    if session.device == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with profiled(activities=kinds) as seen:
        timed(run, session.device)
    spent = {
        event.key: event.self_device_time_total / 1e6
        for event in seen.key_averages()
        if str(event.device_type).endswith("CUDA")
    }
    busy = sum(spent.values())
    session.row("profile", f"{size}, compiled", seconds=seconds, busy=busy / seconds)
    for name, of in sorted(spent.items(), key=lambda item: -item[1])[:12]:
        session.row("profile", f"{size}: {name[:80]}", share=of / busy)


def peers(session: Any) -> None:
    """The same cells by other packages, 8 x 48 tokens, a sample of them."""
    model, device = session.model("Llama 7B"), session.device
    plain, blocks = own(model)
    n_prompts, n_tokens = (2, 12) if session.quick else (8, 48)
    batch = make_workload(model, n_prompts, n_tokens).positive[0]
    n_layers = int(model.cfg.n_layers)
    jobs = make_jobs(model, range(0, n_layers, n_layers // 4), (-8.0, 8.0))
    cells = [(job, c) for job in jobs for c in job.coefficients]
    expected = hook_loop(plain, blocks, batch, cells)
    n_all = 4 * 8
    contenders: dict[str, Callable[[Any, float], Tensor]] = {
        "TransformerBridge.run_with_hooks": lambda job, c: by_bridge(model, batch, job, c),
        "steering-vectors": lambda job, c: by_steering_vectors(plain, batch, job, c),
        "nnsight": lambda job, c: by_nnsight(plain, batch, job, c),
    }
    for name, one in contenders.items():
        found: list[Tensor] = []

        def run(one: Any = one, found: list[Tensor] = found) -> None:
            with torch.no_grad():
                found[:] = [one(job, c).cpu() for job, c in cells]

        try:
            run()
            seconds = min(timed(run, device) for _ in range(3))
        except Exception as error:  # not installed, or not for this version of transformers
            session.row("peers", f"{name}: none", why=f"{type(error).__name__}: {error}"[:200])
            continue
        gap = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
        session.row(
            "peers",
            f"{name}, {n_prompts} x {n_tokens}",
            s=seconds * n_all / len(cells),
            largest_gap_nats=gap,
        )


def by_bridge(model: Any, batch: Any, job: Any, coefficient: float) -> Tensor:
    """A cell by TransformerLens."""
    kept: list[Tensor] = []
    step = coefficient * job.direction
    logits = model.run_with_hooks(
        batch.tokens,
        fwd_hooks=[
            (job.hook_name, lambda activation, hook: activation + step.to(activation)),
            (job.readout, lambda activation, hook: kept.append(activation[:, -1])),
        ],
        return_type="logits",
    )
    kept[0].cpu()
    return label_logprob(logits, batch.tokens, batch.label_mask())


def by_steering_vectors(plain: Any, batch: Any, job: Any, coefficient: float) -> Tensor:
    """A cell by steering-vectors."""
    from steering_vectors import SteeringVector, record_activations

    block, readout = (int(name.split(".")[1]) for name in (job.hook_name, job.readout))
    vector = SteeringVector({block: job.direction.to(plain.dtype)}, "decoder_block")
    with (
        vector.apply(plain, multiplier=coefficient),
        record_activations(plain, layer_nums=[readout]) as recorded,
    ):
        logits = plain(batch.tokens, use_cache=False).logits
    recorded[readout][0][:, -1].cpu()
    return label_logprob(logits, batch.tokens, batch.label_mask())


def by_nnsight(plain: Any, batch: Any, job: Any, coefficient: float) -> Tensor:
    """A cell by nnsight."""
    from nnsight import NNsight

    block, readout = (int(name.split(".")[1]) for name in (job.hook_name, job.readout))
    step = (coefficient * job.direction).to(plain.dtype)
    traced = NNsight(plain)
    layers: Any = traced.model.layers
    with traced.trace(batch.tokens, use_cache=False):
        layers[block].output = layers[block].output + step
        state = layers[readout].output[:, -1].save()
        logits = traced.output.logits.save()
    state.cpu()
    return label_logprob(logits, batch.tokens, batch.label_mask())


def dask(session: Any) -> None:
    """Two GPUs through Dask, by `gpu_dask.py`; left out where there are not two."""
    if session.device == "cuda" and torch.cuda.device_count() < 2:
        session.row("dask", "left out: there are not two GPUs")
        return
    session.models.clear()
    gc.collect()
    gpus = "0,1" if session.device == "cuda" else "cpu,cpu"
    command = [sys.executable, str(Path(__file__).with_name("gpu_dask.py")), "--gpus", gpus]
    command += ["--rounds", "1", "--out", str(session.out)] + ["--quick"] * session.quick
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    found = json.loads((session.out / "gpu_dask.json").read_text(encoding="utf-8"))
    for way, seconds in found["seconds"].items():
        session.row("dask", f"a sweep of all layers, {way}", s=statistics.median(seconds))
    session.row("dask", "two workers", times=found["times"], same_bytes=found["same_bytes"])


def whole(*sizes: tuple[str, int, int]) -> Callable[[Any], None]:
    """A part that runs `sl.sweep` of all layers: the first run, with what it compiles, and others.

    `sizes`: a shape, pairs, tokens a prompt. Profiles of the processor go to `OUT/NAME.prof`.
    """

    def run(session: Any) -> None:
        for name, n_pairs, n_tokens in sizes:
            _whole(session, name, *((4, 12) if session.quick else (n_pairs, n_tokens)))

    return run


def _whole(session: Any, name: str, n_pairs: int, n_tokens: int) -> None:
    model = session.model(name)
    pairs = make_pairs(n_pairs, n_tokens)
    directions = sl.fit_directions(sl.collect_differences(model, pairs))
    coefficients = [-8.0, -4.0, -2.0, -1.0, 1.0, 2.0, 4.0, 8.0]
    arithmetic = Arithmetic.of(model)
    needed = arithmetic.whole_sweep(int(model.cfg.n_layers), len(coefficients), n_pairs, n_tokens)

    def swept() -> None:
        sl.sweep(model, pairs, directions, coefficients=coefficients)

    session.peak_gb()
    seconds = [timed(swept, session.device)]
    n_more = 2 if seconds[0] < 15 else 1
    seconds += [timed(swept, session.device) for _ in range(n_more)]
    what, peak_gb = f"{name}, {n_pairs} x {n_tokens}", session.peak_gb()
    for way, taken in (("first", seconds[0]), ("after it", statistics.mean(seconds[1:]))):
        session.row(
            "whole",
            f"{what}, {way}",
            s=taken,
            needed_s=needed / session.peak,
            of_peak=needed / taken / session.peak,
            peak_gb=peak_gb,
        )
    profile = cProfile.Profile()
    if n_more > 1:
        profile.runcall(swept)
        profile.dump_stats(session.out / f"{what.replace(' ', '_').replace(',', '')}.prof")


def smol(session: Any) -> None:
    """SmolLM2 as a user runs it: a sweep of all layers and the boundaries."""
    if not has_smol():
        session.row("smol", "left out: SmolLM2 is not in the cache folder")
        return
    pairs = sl.ContrastivePairs.load("sentiment", split="test")[: 4 if session.quick else 32]
    model = sl.load_model(device=session.device, dtype=torch.bfloat16, progress=False)
    layers: Any = [10, 20] if session.quick else "all"
    coefficients = [-40.0, -20.0, -10.0, -5.0, 5.0, 10.0, 20.0, 40.0]
    directions = sl.fit_directions(sl.collect_differences(model, pairs))
    for what, run in {
        "sweep": lambda: sl.sweep(
            model, pairs, directions, layers=layers, coefficients=coefficients
        ),
        "boundary": lambda: sl.find_boundary(model, pairs, directions, layers=layers),
    }.items():
        run()
        seconds = timed(run, session.device)
        session.row("smol", f"SmolLM2 bf16, {what}, {len(pairs)} pairs, layers {layers}", s=seconds)
