"""Single heads (`attn.hook_z[h]`): read, fitted, steered and measured."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import zoo
from bare import mean_logprob
from conftest import ATTN_OUT
from torch import Tensor

import steerlens as sl
from steerlens.engine.slopes import label_slopes
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.errors import HookError, InputError
from steerlens.models.hooks import resid_post
from steerlens.runs.record import read_directions, write_directions

LAYER, HEAD = 1, 2
POINT = f"blocks.{LAYER}.attn.hook_z"
NAME = f"{POINT}[{HEAD}]"
TOKENS = torch.tensor([[1, 4, 6, 9, 12], [1, 7, 5, 8, 30]])
FAST: dict[str, Any] = {"n_bootstrap": 2}


@pytest.fixture(scope="module")
def heads(llama: Any, many: sl.ContrastivePairs) -> sl.Directions:
    """Directions at every head of one block and one head of the last."""
    return sl.fit(llama, many, layers=[f"{POINT}[*]", "blocks.4.attn.hook_z[0]"])


def random_vector(model: Any, *names: str) -> sl.SteeringVector:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((len(names), model.cfg.d_head), generator=generator)
    return sl.SteeringVector.from_vectors(dict(zip(names, rows, strict=True)))


def test_steering_a_head_is_a_hook_that_adds_to_it_alone(tiny: Any, tmp_path: Path) -> None:
    other = f"{POINT}[0]"
    vector = random_vector(tiny, NAME, other)
    vector.save(tmp_path / "heads.safetensors")
    assert sl.SteeringVector.load(tmp_path / "heads.safetensors", model=tiny) == vector
    z: list[Tensor] = []

    def by_hand(activation: Tensor, hook: Any) -> Tensor:
        changed = activation.clone()
        for head, name, scale in zip((HEAD, 0), vector, vector.scale.tolist(), strict=True):
            changed[:, :, head] += 3 * scale * vector[name]
        return changed

    def keep(activation: Tensor, hook: Any) -> None:
        z.append(activation.clone())

    with torch.no_grad():
        plain = tiny.run_with_hooks(TOKENS, fwd_hooks=[(POINT, keep)])
        expected = tiny.run_with_hooks(TOKENS, fwd_hooks=[(POINT, by_hand)])
        with sl.steer(tiny, vector, 3):
            steered = tiny.run_with_hooks(TOKENS, fwd_hooks=[(POINT, keep)])
        by_hooks = tiny.run_with_hooks(TOKENS, fwd_hooks=vector.fwd_hooks(3))
        ids = TOKENS[:, :3]
        with tiny.hooks(fwd_hooks=[(POINT, by_hand)]):
            written = tiny.generate(ids, max_new_tokens=4, do_sample=False, verbose=False)
        with sl.steer(tiny, vector, 3):
            generated = tiny.generate(ids, max_new_tokens=4, do_sample=False, verbose=False)
    assert torch.equal(steered, expected)
    assert torch.equal(by_hooks, expected)
    assert torch.equal(generated, written)
    assert not torch.allclose(steered, plain)
    moved = (z[1] - z[0]).abs().amax(dim=(0, 1, 3)) > 0
    assert moved.tolist() == [True, False, True, False]


def test_steering_a_head_writes_its_direction_through_w_o(tiny: Any) -> None:
    vector = random_vector(tiny, NAME)
    written = (vector.rows[0] @ tiny.blocks[LAYER].attn.W_O[HEAD]).detach()
    name = f"blocks.{LAYER}.{ATTN_OUT}"
    with torch.no_grad():
        expected = tiny.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda h, hook: h + 2 * written)])
        with sl.steer(tiny, vector, 2):
            steered = tiny(TOKENS)
    torch.testing.assert_close(steered, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_differences_are_those_of_the_cache(tiny: Any, pairs: sl.ContrastivePairs) -> None:
    found = sl.collect_differences(tiny, pairs, layers=f"{POINT}[*]")
    assert found.hook_names == tuple(f"{POINT}[{head}]" for head in range(tiny.cfg.n_heads))
    assert (found.readout_names, found.values.shape[-1]) == ((), tiny.cfg.d_head)
    tokenized = tokenize_pairs(tiny, pairs)
    for i, sides in enumerate(zip(tokenized.positive, tokenized.negative, strict=True)):
        up, down = (tiny.run_with_cache(torch.tensor([p.ids]))[1][POINT][0, -1] for p in sides)
        torch.testing.assert_close(found.values[:, i], up - down, rtol=1e-4, atol=1e-5)


def test_a_sweep_reads_a_head_at_the_readout_hook(
    llama: Any, many: sl.ContrastivePairs, heads: sl.Directions, tmp_path: Path
) -> None:
    readouts = (resid_post(2), resid_post(4))
    assert heads.readout_names == readouts
    write_directions(heads, tmp_path / "directions.safetensors")
    assert read_directions(tmp_path / "directions.safetensors", heads.hook_names) == heads
    at_readouts = sl.fit(llama, many, layers=[2, 4])
    assert all(torch.equal(heads[name], at_readouts[name]) for name in readouts)
    study = sl.Study(llama, many, heads, **FAST)
    assert study.plan.exact == set(heads.hook_names)
    cells = study.sweep([0, 3]).table
    assert (cells.projection_shift[cells.coefficient == 0] == 0).all()
    cell = cells[(cells.hook_name == NAME) & (cells.coefficient == 3)].iloc[0]
    assert cell.readout_hook == readouts[0]
    vector = sl.SteeringVector.from_directions(llama, heads, layers=NAME)
    projections = []
    for pair in many:
        with torch.no_grad():
            read = []
            for text, sign in ((pair.positive, 1), (pair.negative, -1)):
                with sl.steer(llama, vector, 3 * sign):
                    read.append(llama.run_with_cache(text)[1][readouts[0]][0, -1])
        projections.append(float((read[0] - read[1]) @ heads[readouts[0]]))
    assert cell.projection == pytest.approx(np.mean(projections), rel=1e-4)
    # A vector at that head alone is measured as its direction; at several heads it is one row.
    of_vector = sl.Study(llama, many, vector, readout=heads, **FAST).sweep([0, 3]).table
    expected = cells[cells.hook_name == NAME].reset_index(drop=True)
    pd.testing.assert_frame_equal(of_vector, expected, check_exact=True)
    itself = sl.Study(llama, many, vector, **FAST).sweep([0, 3]).table
    assert itself.projection_shift.tolist() == pytest.approx([0, 3], abs=1e-4)
    several = sl.SteeringVector.from_directions(llama, heads, layers=f"{POINT}[*]")
    rows = sl.Study(llama, many, several, readout=heads, **FAST).sweep([0, 3]).table
    assert len(rows) == 2
    assert abs(float(rows.projection_shift[1])) > 0


def test_a_heads_boundary_is_where_its_budget_is_spent(
    llama: Any, many: sl.ContrastivePairs, heads: sl.Directions
) -> None:
    study = sl.Study(llama, many, heads, layers=NAME, budget="kl=0.05", **FAST)
    found = study.boundary()
    row = found.layers.iloc[0]
    vector = sl.SteeringVector.from_directions(llama, heads, layers=NAME)
    again = sl.find_boundary(llama, many, vector, budget="kl=0.05", **FAST).layers.iloc[0]
    assert again.boundary_pos == row.boundary_pos
    at_boundary = sl.SteeringVector.from_directions(llama, heads, layers=NAME)
    divergences = []
    for prompt in study.tokens.positive:
        tokens = torch.tensor([prompt.ids])
        with torch.no_grad():
            plain = llama(tokens)[0, :-1].double().log_softmax(-1)
            with sl.steer(llama, at_boundary, float(row.boundary_pos)):
                moved = llama(tokens)[0, :-1].double().log_softmax(-1)
        divergences.append(float((plain.exp() * (plain - moved)).sum(-1).mean()))
    assert np.mean(divergences) == pytest.approx(0.05, rel=0.05)


def test_slopes_at_heads_are_those_of_the_logprob(
    llama: Any, many: sl.ContrastivePairs, heads: sl.Directions
) -> None:
    study = sl.Study(llama, many, heads, layers=f"{POINT}[*]", **FAST)
    along = [[(name, heads[name])] for name in study.hook_names]
    slopes = label_slopes(
        study.engine, study.workload.positive, along, steered_positions="all", seed=0
    )
    cells = study.sweep([-0.01, 0.01]).table.logprob_nats.to_numpy().reshape(-1, 2)
    measured = (cells[:, 1] - cells[:, 0]) / 0.02
    assert slopes.logprob.mean(dim=1).numpy() == pytest.approx(measured, rel=0.02, abs=1e-3)


def test_gradients_at_heads_are_those_of_what_they_write(
    llama: Any, many: sl.ContrastivePairs
) -> None:
    at_heads = sl.loss_gradients(llama, many, layers=f"{POINT}[*]")
    written = sl.loss_gradients(llama, many, layers=f"blocks.{LAYER}.{ATTN_OUT}")
    for name in ("separation_positive", "separation_negative", "coherence"):
        there = getattr(written, name)[0]
        expected = torch.einsum("pd,hkd->hpk", there, llama.blocks[LAYER].attn.W_O.detach())
        found = getattr(at_heads, name)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


@pytest.mark.parametrize("method", ["pca", "gradient_mean", "optimised"])
def test_every_kind_of_method_fits_heads_and_their_readouts(
    llama: Any, many: sl.ContrastivePairs, method: str
) -> None:
    found = sl.fit(llama, many, method=method, layers=NAME)
    assert found[NAME].shape == (llama.cfg.d_head,)
    assert found[resid_post(2)].shape == (llama.cfg.d_model,)


def test_what_is_no_single_head_is_refused(
    llama: Any, many: sl.ContrastivePairs, heads: sl.Directions
) -> None:
    with pytest.raises(HookError, match=r"hook_z\[2\] is a head, d_head wide.*by themselves"):
        sl.collect_differences(llama, many, layers=[0, NAME])
    with pytest.raises(InputError, match=r"name one head, such as .*hook_z\[0\], or all"):
        sl.collect_differences(llama, many, layers=POINT)
    alone = sl.fit_directions(sl.collect_differences(llama, many, layers=NAME))
    with pytest.raises(InputError, match=r"no direction was fitted at blocks\.2.*heads: to fit"):
        sl.sweep(llama, many, alone, coefficients=[1])
    vector = random_vector(llama, f"{POINT}[7]")
    with pytest.raises(InputError, match=r"no hook .*hook_z\[7\] .*4 heads"):
        sl.Study(llama, many, vector)
    with pytest.raises(HookError, match=r"expected .*head, d_head"), sl.steer(llama, vector, 1):
        llama(TOKENS)
    with pytest.raises(InputError, match="d_head 4, the model 8"):
        sl.Study(llama, many, sl.SteeringVector.from_vectors({NAME: torch.ones(4)}))


def test_a_hook_point_that_does_not_hold_the_heads_is_refused() -> None:
    # Its values are wider than its queries, which TransformerLens does not know.
    model = zoo.bridged("DeepSeek-V3")
    vector, reason = random_vector(model, NAME), r"shape \(2, 5, 8, 4\).*of 4 heads"
    with pytest.raises(HookError, match=reason), sl.steer(model, vector, 1):
        model(TOKENS)


def test_heads_of_one_layer_are_compared_and_told_apart(
    llama: Any, many: sl.ContrastivePairs
) -> None:
    """The effect by bare hooks; the chosen head by its name, as both are of one layer."""
    items, train = (
        sl.PreferenceItems.load(
            [{"prompt": f"{start} {w}", "positive": " good", "negative": " cold"} for w in words]
        )
        for start, words in (("the", ("sun", "rain", "bread")), ("a", ("walk", "soup", "day")))
    )
    layers = [NAME, f"{POINT}[0]"]
    found = sl.compare(
        *(llama, many, items),
        **{"methods": ["mean_diff", "random"], "layers": layers, "train_items": train},
        **{"on": "positive", "n_null": 2, "n_bootstrap": 10, "off_target": {}},
    )
    assert sorted(found.table.hook_name.unique()) == sorted(layers)
    chosen = found.table[found.table.is_chosen].set_index("method").hook_name
    assert found.summary.set_index("method").hook_name.to_dict() == chosen.to_dict()
    assert found.methods.hook_name.item() == chosen["random"]
    assert found.methods.reference_hook_name.item() == chosen["mean_diff"]

    def gap(item: sl.data.PreferenceItem, vector: Any, c: float) -> float:
        texts = (item.positive, item.negative)
        up, down = (sl.engine.tokenize_prompt(llama, item.prompt, text) for text in texts)
        with sl.steer(llama, vector, c):
            logprobs = [mean_logprob(llama, t.ids, t.label_tokens) for t in (up, down)]
        return logprobs[0] - logprobs[1]

    for row in found.table[found.table.method == "mean_diff"].itertuples():
        vector = {row.hook_name: found.directions["mean_diff"][row.hook_name]}
        changes = [gap(i, vector, row.coefficient) - gap(i, vector, 0.0) for i in items]
        assert row.effect == pytest.approx(float(np.mean(changes)), abs=1e-4)
    with pytest.raises(HookError, match="directions of two widths are not held together"):
        sl.compare(llama, many, items, methods=["mean_diff"], layers=[NAME, 2])
