"""What works on which architecture, found by running it: the table in docs/models.md.

`python tests/models_table.py` writes the table; tests/test_architectures.py compares it. The oracle
is Hugging Face's own model with bare PyTorch hooks, one prompt at a time.
"""

import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import bare
import pytest
import torch
from zoo import ZOO, bridged, hugging_face

import steerlens as sl
from steerlens.directions.gradients import loss_gradients
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_pairs
from steerlens.errors import HookError, ModelError, SteerlensError
from steerlens.models.hooks import resid_post
from steerlens.steering import generate_tokens

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
START, END = "<!-- table: make models-table -->", "<!-- end of table -->"
PARTS = {
    "input": "blocks.*.hook_resid_pre",
    "middle": "blocks.*.hook_resid_mid",
    "attention": "blocks.*.hook_attn_out",
    "MLP": "blocks.*.hook_mlp_out",
}
LAYER, N_LAYERS = 0, 3

# Longer than the sliding windows of the zoo, and of different lengths; what differs lies near the
# end, where the last token still sees it.
POSITIVE = [
    "the river was warm and the day is so good you are cheerful and so",
    "I said it was not very cold by the river today it was cheerful today",
    "how was the walk ? it went by and so the night was good and cheerful the walk",
]
NEGATIVE = [text.replace("cheerful", "very gloomy") for text in POSITIVE]


@cache
def pairs() -> sl.ContrastivePairs:
    return sl.ContrastivePairs.from_lists(POSITIVE, NEGATIVE)


@cache
def model_of(kind: str) -> Any:
    """The model in TransformerLens. Raises `ModelError` as `check_model`."""
    model = bridged(kind)
    sl.check_model(model)
    return model


@cache
def oracle(kind: str) -> Any:
    return hugging_face(kind)


@cache
def directions_of(kind: str) -> sl.Directions:
    return sl.fit_directions(sl.collect_differences(model_of(kind), pairs()))


@cache
def tokens_of(kind: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    found = tokenize_pairs(model_of(kind), pairs())
    return [p.prompt for p in found.positive], [p.prompt for p in found.negative]


def logits(kind: str) -> None:
    """The Bridge's logits are Hugging Face's, in a padded batch too."""
    model = model_of(kind)
    for ids in tokens_of(kind)[0]:
        with torch.no_grad():
            found, expected = model(torch.tensor([ids])), oracle(kind)(torch.tensor([ids])).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def cell(kind: str) -> None:
    """A cell by the engine, without falling back to the plain loop, is that of bare hooks."""
    coefficient = 2.0
    directions = directions_of(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(group|were fitted on)")
        found = sl.sweep(
            model_of(kind),
            pairs(),
            directions,
            layers=[LAYER],
            coefficients=[coefficient],
            n_bootstrap=2,
        )
    row = found.table.set_index("coefficient").loc[coefficient]
    positive, negative = tokens_of(kind)
    expected = bare.cell(
        oracle(kind),
        positive,
        negative,
        {i: directions[resid_post(i)].float() for i in range(N_LAYERS)},
        layer=LAYER,
        coefficient=coefficient,
        position=-1,
        n_layers=N_LAYERS,
    )
    for name, value in expected.items():
        assert float(row[name]) == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert abs(expected["degradation_nats"]) > 1e-3


def gradients(kind: str) -> None:
    """The loss's gradient is its five-point difference, in float64, on bare Hugging Face."""
    model = bridged(kind, torch.float64)
    hf_model = hugging_face(kind, torch.float64)
    found = loss_gradients(model, pairs(), layers=[LAYER], position=-2, weight=50.0)
    positive, negative = tokens_of(kind)
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(32, dtype=torch.float64, generator=generator)
    along /= along.norm()
    readout = max(LAYER, N_LAYERS - 3)
    assert found.loss_hooks[0] == resid_post(readout)
    logprob = []

    def loss(ids: tuple[int, ...], other: tuple[int, ...], size: float) -> float:
        step = torch.zeros(len(ids), 32, dtype=torch.float64)
        step[-2] = size * along
        state, out = bare.run(hf_model, ids, layer=LAYER, step=step, readout=readout)
        still, _ = bare.run(hf_model, other, layer=LAYER, step=0 * along, readout=readout)
        labels = torch.tensor(ids[1:])[:, None]
        logprob.append(float(out[:-1].double().log_softmax(-1).gather(1, labels).mean()))
        gap = max(0.0, 0.99 * logprob[0] - logprob[-1])
        return float(-(state[-2] - still[-2]).double().norm() + 50.0 * gap**2)

    # Five points, for many architectures norm or attend in float32 whatever their weights are:
    # there a small step drowns in rounding.
    weights = {-2: 1 / 12, -1: -8 / 12, 1: 8 / 12, 2: -1 / 12}
    size = 1e-2
    for i in range(len(positive)):
        logprob.clear()
        loss(positive[i], negative[i], 0.0)
        slope = sum(
            weight * loss(positive[i], negative[i], n * size) for n, weight in weights.items()
        )
        assert float(found.positive[0, i].double() @ along) == pytest.approx(
            slope / size, rel=1e-3, abs=1e-3
        )
    assert bool((found.coherence[0].norm(dim=-1) > 1e-5).all())


def boundary(kind: str) -> None:
    """The KL divergence at the boundary is the budget, measured on bare Hugging Face.

    Where the boundary is inf, it is less at the end of the range.
    """
    budget = 0.1
    found = sl.find_boundary(
        model_of(kind),
        pairs(),
        directions_of(kind),
        layers=[1],
        budget=f"kl={budget}",
        n_bootstrap=2,
    )
    row = found.layers.iloc[0]
    unit = directions_of(kind)[resid_post(1)].float()
    limit = found.layers.attrs["searched"][resid_post(1)]
    for coefficient in (row.boundary_neg, row.boundary_pos):
        is_beyond = math.isinf(coefficient)
        coefficient = math.copysign(limit, coefficient) if is_beyond else coefficient
        kl = []
        for ids in tokens_of(kind)[0]:
            steered, plain = (
                bare.run(oracle(kind), ids, layer=1, step=c * unit, readout=1)[1][:-1]
                for c in (float(coefficient), 0.0)
            )
            p, q = steered.double().log_softmax(-1), plain.double().log_softmax(-1)
            kl.append(float((q.exp() * (q - p)).sum(-1).mean()))
        mean = sum(kl) / len(kl)
        assert mean < budget if is_beyond else mean == pytest.approx(budget, rel=0.1)


def vector_file(kind: str) -> None:
    """A vector that was saved and loaded gives the same logits, which are those of bare hooks."""
    model, coefficient = model_of(kind), 3.0
    vector = sl.SteeringVector.from_directions(model, directions_of(kind), layers=[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.safetensors"
        vector.save(path)
        loaded = sl.SteeringVector.load(path, model=model)
    ids = tokens_of(kind)[0][0]
    with torch.no_grad():
        outputs = []
        for one in (vector, loaded):
            with sl.steer(model, one, coefficient):
                outputs.append(model(torch.tensor([ids]))[0])
        assert torch.equal(*outputs)
        step = coefficient * float(vector.scale[0]) * vector.directions[0].float()
        _, expected = bare.run(oracle(kind), ids, layer=1, step=step, readout=1)
        torch.testing.assert_close(outputs[1], expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(outputs[1], model(torch.tensor([ids]))[0], atol=1e-2)


def generation(kind: str) -> None:
    """Steered greedy tokens with a KV cache are those of bare hooks without one."""
    model, coefficient, n_new = model_of(kind), 2.0, 6
    unit = directions_of(kind)[resid_post(1)].float()
    prompts = [TokenizedPrompt(ids, (), "prompt") for ids in tokens_of(kind)[0]]
    found = generate_tokens(
        model, prompts, {resid_post(1): unit}, coefficient, max_new_tokens=n_new
    )
    for prompt, generated in zip(prompts, found, strict=True):
        ids: tuple[int, ...] = prompt.prompt
        for _ in range(n_new):
            _, out = bare.run(oracle(kind), ids, layer=1, step=coefficient * unit, readout=1)
            ids += (int(out[-1].argmax()),)
            if ids[-1] == model.tokenizer.eos_token_id:
                ids = ids[:-1]
                break
        assert generated == ids[len(prompt.prompt) :]


CHECKS: dict[str, Callable[[str], None]] = {
    "logits": logits,
    "cells": cell,
    "gradients": gradients,
    "boundary": boundary,
    "vector": vector_file,
    "generation": generation,
}
COLUMNS = ("architecture", "what is particular", *CHECKS, "hooks besides block outputs")


def hooks(kind: str) -> str:
    """Which parts of the blocks have a hook that fires and holds `[prompt, token, width]`."""
    model, there = model_of(kind), []
    assert sl.resolve_hooks(model) == tuple(resid_post(i) for i in range(N_LAYERS))
    for name, pattern in PARTS.items():
        try:
            found = sl.resolve_hooks(model, pattern)
        except HookError:
            continue
        sl.collect_differences(model, pairs(), layers=list(found))
        there.append(name if len(found) == N_LAYERS else f"{name} in some")
    return ", ".join(there)


def row(kind: str) -> tuple[str, ...]:
    """The table's row: "yes" where a check holds, "refused" where steerlens says that it cannot.

    Raises `AssertionError` where a number is wrong.
    """
    found = [_outcome(check, kind) for check in CHECKS.values()]
    try:
        named = hooks(kind)
    except ModelError:
        named = "refused"
    return kind, ZOO[kind][0], *found, named


def _outcome(check: Callable[[str], None], kind: str) -> str:
    try:
        check(kind)
    except SteerlensError:
        return "refused"
    return "yes"


def as_markdown(rows: list[tuple[str, ...]]) -> str:
    """The table, header first."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def committed() -> dict[str, tuple[str, ...]]:
    """Architecture -> its row in docs/models.md."""
    table = PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    assert cells[0] == COLUMNS
    return {line[0]: line for line in cells[2:]}


def main() -> None:
    """Write the table anew."""
    torch.set_num_threads(1)
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    table = as_markdown([row(kind) for kind in ZOO])
    PAGE.write_text(f"{before}{START}\n\n{table}\n\n{END}{after}", encoding="utf-8")
    sys.stdout.write(table + "\n")


if __name__ == "__main__":
    main()
