"""Time a sweep against plain loops over its cells, on the default model.

Every contender measures the same cells from the same token batches; its numbers are compared with
the engine's before any time is taken. Rounds are interleaved, medians are printed. Not a test:
`make bench`.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
import transformers

import steerlens as sl
from steerlens import plain
from steerlens.cells import Cost, Job, forward_equivalents
from steerlens.engine import run_cells
from steerlens.hooks import readout_hook, resid_post
from steerlens.models import cache_folder
from steerlens.plain import Workload, make_workload
from steerlens.tokens import Batch, tokenize_pairs

N_LAYERS = 30
LAYERS = range(0, N_LAYERS, 5)
COEFFICIENTS = (-20.0, -10.0, 10.0, 20.0)
N_PAIRS = 16
ROUNDS = 5
TOLERANCE = 1e-3  # nats per token

Logprobs = dict[tuple[int, float], float]


def by_engine(model: Any, workload: Workload, directions: Any) -> Logprobs:
    jobs = [
        Job(n, directions[n], COEFFICIENTS, readout_hook(n, N_LAYERS))
        for n in map(resid_post, LAYERS)
    ]
    cells = run_cells(model, workload, jobs, rows_per_pass=16, cost=Cost())
    return {
        (layer, cell.coefficient): float(cell.logprob.mean())
        for layer, of_layer in zip(LAYERS, cells, strict=True)
        for cell in of_layer
    }


def by_run_with_hooks(model: Any, workload: Workload, directions: Any) -> Logprobs:
    """Hooked forward passes of the Bridge, one for each side, batch and cell."""
    found = {}
    for layer in LAYERS:
        name = resid_post(layer)
        for cell in plain.run_cells(
            model,
            workload,
            hook_name=name,
            direction=directions[name],
            coefficients=COEFFICIENTS,
            readout=readout_hook(name, N_LAYERS),
        ):
            found[layer, cell.coefficient] = float(cell.logprob.mean())
    return found


def by_hugging_face(hf_model: Any, workload: Workload, directions: Any) -> Logprobs:
    """Forward hooks on the blocks of the plain transformers model."""

    def run(batch: Batch, layer: int, step: torch.Tensor) -> torch.Tensor:
        block = hf_model.model.layers[layer]
        handle = block.register_forward_hook(lambda m, a, output: output + step)
        kept: list[torch.Tensor] = []
        readout = hf_model.model.layers[max(layer, N_LAYERS - 3)]
        reader = readout.register_forward_hook(lambda m, a, output: kept.append(output[:, -1]))
        try:
            logits = hf_model(batch.tokens, attention_mask=batch.attention_mask.long()).logits
        finally:
            handle.remove()
            reader.remove()
        return logits

    found = {}
    for layer in LAYERS:
        for coefficient in COEFFICIENTS:
            step = coefficient * directions[resid_post(layer)]
            logprobs = []
            for batch in workload.positive:
                logits = run(batch, layer, step)
                logprobs.append(sl.label_logprob(logits, batch.tokens, batch.label_mask()))
            for batch in workload.negative:
                run(batch, layer, -step)
            found[layer, coefficient] = float(torch.cat(logprobs).mean())
    return found


def main() -> None:
    model = sl.load_model(progress=False)
    (folder,) = cache_folder().glob("smollm2-135m-instruct-*")
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pairs = sl.ContrastivePairs.load("sentiment", split="test")[:N_PAIRS]
    directions = sl.fit_directions(
        sl.collect_differences(model, sl.ContrastivePairs.load("sentiment")[:32])
    )
    workload = make_workload(
        model, tokenize_pairs(model, pairs), position=-1, steered_positions="all", batch_size=16
    )
    contenders: dict[str, Callable[[], Logprobs]] = {
        "steerlens engine": lambda: by_engine(model, workload, directions),
        "TransformerBridge hooks, plain loop": lambda: by_run_with_hooks(
            model, workload, directions
        ),
        "Hugging Face hooks (sdpa), plain loop": lambda: by_hugging_face(
            hf_model, workload, directions
        ),
    }
    with torch.no_grad():
        expected = contenders["steerlens engine"]()
        for name, run in contenders.items():
            found = run()
            worst = max(abs(found[key] - value) for key, value in expected.items())
            if worst > TOLERANCE:
                raise SystemExit(f"{name} differs by {worst:.2g} nats: nothing is timed")
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(ROUNDS):
            for name, run in contenders.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    cost = Cost()
    jobs = [
        Job(n, directions[n], COEFFICIENTS, readout_hook(n, N_LAYERS))
        for n in map(resid_post, LAYERS)
    ]
    list(run_cells(model, workload, jobs, rows_per_pass=16, cost=cost))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    table = pd.DataFrame(
        {
            "median seconds": {name: f"{median:.1f}" for name, median in medians.items()},
            "times the engine": {
                name: f"{median / medians['steerlens engine']:.2f}"
                for name, median in medians.items()
            },
        }
    )
    print(table.to_string())
    print(
        f"{len(LAYERS)} layers x {len(COEFFICIENTS)} coefficients x {N_PAIRS} pairs, float32, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores ({platform.machine()}), "
        f"medians of {ROUNDS} interleaved rounds; the engine spends "
        f"{forward_equivalents(cost, model, workload):.1f} forward-equivalents"
    )


if __name__ == "__main__":
    main()
