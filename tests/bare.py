"""Oracles of the tests: cells by nothing but Hugging Face forward hooks, logprobs by one call."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

BLOCKS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers")


def _blocks(hf_model: Any) -> Any:
    modules = dict(hf_model.named_modules())
    return next(modules[name] for name in BLOCKS if name in modules)


def run(
    hf_model: Any, ids: tuple[int, ...], *, layer: int, step: torch.Tensor, readout: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations `[token, d_model]` after block `readout`, and logits; `step` added at `layer`."""
    kept: list[torch.Tensor] = []

    def add(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + step, *output[1:])
        return output + step

    def keep(module: Any, args: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).reshape(len(ids), -1))

    handles = [
        _blocks(hf_model)[layer].register_forward_hook(add),
        _blocks(hf_model)[readout].register_forward_hook(keep),
    ]
    try:
        with torch.no_grad():
            logits = hf_model(torch.tensor([ids])).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return kept[0], logits


def cell(
    hf_model: Any,
    positive: list[tuple[int, ...]],
    negative: list[tuple[int, ...]],
    directions: dict[int, torch.Tensor],
    *,
    layer: int,
    coefficient: float,
    position: int,
    n_layers: int,
) -> dict[str, float]:
    """A cell as the design defines it, one unpadded prompt at a time."""
    readout = max(layer, n_layers - 3)
    step, unit = coefficient * directions[layer], directions[readout].double()
    projections, separations, shifts, logprobs, baselines = [], [], [], [], []
    for pos, neg in zip(positive, negative, strict=True):
        h_pos, logits = run(hf_model, pos, layer=layer, step=step, readout=readout)
        h_neg, _ = run(hf_model, neg, layer=layer, step=-step, readout=readout)
        h_zero, unsteered = run(hf_model, pos, layer=layer, step=0 * step, readout=readout)
        difference = (h_pos[position] - h_neg[position]).double()
        projections.append(float(difference @ unit))
        separations.append(float(difference.norm()))
        shifts.append(float((h_pos[position] - h_zero[position]).double() @ unit))
        labels = torch.tensor(pos[1:])[:, None]
        for into, found in ((logprobs, logits), (baselines, unsteered)):
            into.append(float(found[:-1].log_softmax(-1).gather(1, labels).double().mean()))
    logprob, baseline = np.array(logprobs), np.array(baselines)
    penalty = 1e4 * np.mean(np.maximum(0.99 * baseline - logprob, 0) ** 2)
    return {
        "projection": float(np.mean(projections)),
        "separation": float(np.mean(separations)),
        "projection_shift": float(np.mean(shifts)),
        "logprob_nats": float(logprob.mean()),
        "baseline_logprob_nats": float(baseline.mean()),
        "degradation_nats": float((baseline - logprob).mean()),
        "coherence_penalty": float(penalty),
        "loss": float(-np.mean(projections) + penalty),
    }


def mean_logprob(model: Any, ids: Sequence[int], labels: Sequence[int]) -> float:
    """Of the tokens at some places after those before them, by one call of the model."""
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)]), return_type="logits")[0]
    logprobs = logits.double().log_softmax(-1)
    return float(np.mean([float(logprobs[i - 1, ids[i]]) for i in labels]))
