"""Studies of steering vectors: what is measured is what `steer` does."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import steerlens as sl
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_pairs
from steerlens.errors import InputError
from steerlens.measure.interventions import in_order
from steerlens.models.hooks import resid_post
from steerlens.steering import Ablate, Add, Clamp, Condition, Operator, Rotate, steps
from steerlens.tables import COLUMNS

HOOKS = (resid_post(1), resid_post(3))
FAST: dict[str, Any] = {"n_bootstrap": 2}

Made = Callable[..., sl.SteeringVector]


@pytest.fixture(scope="module")
def made(llama: Any, directions: sl.Directions) -> Made:
    """Vectors of the fitted directions at some layers, with other fields."""

    def make(*layers: int, **fields: Any) -> sl.SteeringVector:
        fitted = sl.SteeringVector.from_directions(llama, directions, layers=list(layers))
        return replace(fitted, **fields)

    return make


def logprob(logits: torch.Tensor, prompt: TokenizedPrompt) -> float:
    wanted = torch.tensor(prompt.ids[1:])[:, None]
    return float(logits[0, :-1].log_softmax(-1).gather(1, wanted).double().mean())


def by_hand(
    model: Any, prompts: tuple[TokenizedPrompt, ...], vector: sl.SteeringVector, c: float, read: str
) -> tuple[torch.Tensor, np.ndarray]:
    """Last activations at `read` and logprobs of all tokens, a prompt at a time, in `steer`."""
    activations: list[torch.Tensor] = []
    logprobs = []
    for prompt in prompts:
        tokens = torch.tensor([prompt.ids])
        with torch.no_grad(), sl.steer(model, vector, c):
            keep = (read, lambda h, hook: activations.append(h[0, -1].clone()))
            logits = model.run_with_hooks(tokens, fwd_hooks=[keep])
        logprobs.append(logprob(logits, prompt))
    return torch.stack(activations).double(), np.array(logprobs)


@pytest.mark.parametrize("layer", [1, 3])  # read elsewhere, and where it adds
def test_a_vector_that_adds_at_one_hook_is_measured_as_its_direction(
    llama: Any, pairs: sl.ContrastivePairs, directions: sl.Directions, made: Made, layer: int
) -> None:
    vector = made(layer)
    of_direction = sl.Study(llama, pairs, directions, layers=[layer], **FAST)
    of_vector = sl.Study(llama, pairs, vector, readout=directions, **FAST)
    assert of_vector.plan.exact == {resid_post(layer)}
    swept = of_vector.sweep([-2, 0, 3])
    expected = of_direction.sweep([-2, 0, 3])
    pd.testing.assert_frame_equal(swept.table, expected.table, check_exact=True)
    pd.testing.assert_frame_equal(swept.points, expected.points, check_exact=True)
    found, bounded = of_vector.boundary(), of_direction.boundary()
    pd.testing.assert_frame_equal(found.layers, bounded.layers, check_exact=True)
    pd.testing.assert_frame_equal(found.curves, bounded.curves, check_exact=True)
    # The record says which vector it was, and what it was fitted on.
    attrs = swept.table.attrs
    assert attrs["vector"]["fingerprint"] == vector.fingerprint
    assert {**expected.table.attrs, "vector": 0, "forward_equivalents": 0} == {
        **attrs,
        "vector": 0,
        "forward_equivalents": 0,
        "directions_seed": directions.seed,
    }


def test_half_the_coefficient_of_a_vector_twice_as_long_does_the_same(
    llama: Any, pairs: sl.ContrastivePairs, made: Made
) -> None:
    studies = [sl.Study(llama, pairs[:4], vector, **FAST) for vector in (made(1), 2 * made(1))]
    once, twice = (
        study.sweep(c).table.drop(columns=["coefficient", "asked"])
        for study, c in zip(studies, ([-2, 3], [-1, 1.5]), strict=True)
    )
    pd.testing.assert_frame_equal(twice, once, rtol=1e-5)
    first, second = (study.boundary().layers.boundary_pos[0] for study in studies)
    assert second == pytest.approx(first / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("operator", "layers", "coefficients"),
    [
        (Add(), (1, 3), [-2.0, 0.0, 1.5]),
        (Ablate(), (2,), [0.0, 0.5, 1.0]),
        (Ablate(), (1, 3), [1.0]),
        (Clamp(-3), (2,), [0.5]),
        (Rotate(), (1, 2), [-20.0, 30.0]),
    ],
    ids=lambda value: str(value),
)
def test_cells_are_what_steer_does(
    llama: Any,
    pairs: sl.ContrastivePairs,
    made: Made,
    operator: Operator,
    layers: tuple[int, ...],
    coefficients: list[float],
) -> None:
    # Unequal scales, which multiply what is added and nothing else.
    vector = made(*layers, operator=operator, scale=torch.tensor([0.5, 2.0][: len(layers)]))
    table = sl.sweep(llama, pairs, vector, coefficients=coefficients, **FAST).table
    tokens, last = tokenize_pairs(llama, pairs), resid_post(layers[-1])
    assert table.hook_name.unique().tolist() == [" + ".join(map(resid_post, layers))]
    assert table.readout_hook.unique().tolist() == [last]
    assert table.layer.unique().tolist() == [layers[0]]
    unit = vector[last].double()
    before, baseline = by_hand(llama, tokens.positive, vector, 0, last)
    is_signed = isinstance(operator, Add | Rotate)
    for row in table.to_dict("records"):
        c = row["coefficient"]
        positive, steered = by_hand(llama, tokens.positive, vector, c, last)
        negative, _ = by_hand(llama, tokens.negative, vector, -c if is_signed else c, last)
        projection = float(((positive - negative) @ unit).mean())
        shift = float(((positive - before) @ unit).mean())
        assert row["projection"] == pytest.approx(projection, abs=1e-4)
        assert row["projection_shift"] == pytest.approx(shift, abs=1e-4)
        assert row["degradation_nats"] == pytest.approx((baseline - steered).mean(), abs=1e-5)
        # To the bit the unsteered model at 0; and something happens elsewhere.
        assert (row["degradation_nats"] == 0) == (row["projection_shift"] == 0) == (c == 0)


def test_the_effect_is_read_along_a_readout_that_is_given(
    llama: Any, pairs: sl.ContrastivePairs, directions: sl.Directions, made: Made
) -> None:
    vector, last = made(0, 1), resid_post(4)
    row = 3 * directions[last]  # of any length

    def swept(**options: Any) -> dict[str, Any]:
        return dict(
            sl.sweep(llama, pairs, vector, coefficients=[2], **FAST, **options).table.iloc[0]
        )

    tokens = tokenize_pairs(llama, pairs)
    sides = [by_hand(llama, tokens.positive, vector, 2, last)[0]]
    sides += [by_hand(llama, tokens.negative, vector, -2, last)[0]]
    expected = float(((sides[0] - sides[1]) @ directions[last].double()).mean())
    found = swept(readout={last: row})
    assert found["readout_hook"] == last
    assert found["projection"] == pytest.approx(expected, abs=1e-4)
    # Directions are read where those of a study are, and without any it is the vector's own hook.
    assert swept(readout=directions)["readout_hook"] == resid_post(2)
    assert swept()["readout_hook"] == resid_post(1)


@pytest.mark.parametrize(
    ("operator", "layers", "signs", "budget"),
    [
        (Add(), (1, 3), (1, -1), "nats=0.1"),
        (Rotate(), (2,), (1, -1), "nats=0.1"),
        (Ablate(), (2, 3), (1,), "nats=0.01"),
        (Clamp(60), (2,), (1,), "nats=0.1"),
    ],
    ids=lambda value: str(value),
)
def test_the_boundary_of_any_operator_is_that_of_brute_force(
    llama: Any,
    many: sl.ContrastivePairs,
    made: Made,
    operator: Operator,
    layers: tuple[int, ...],
    signs: tuple[int, ...],
    budget: str,
) -> None:
    # Text of the model's own, which it predicts best as it is.
    pairs, vector = many[:8], made(*layers, operator=operator)
    found = sl.find_boundary(llama, pairs, vector, budget=budget, **FAST).layers
    (limit,) = found.attrs["searched"].values()
    assert isinstance(operator, Add) or limit == operator.most
    prompts = tokenize_pairs(llama, pairs).positive
    allowance, read = float(budget.split("=")[1]), resid_post(layers[-1])
    _, baseline = by_hand(llama, prompts, vector, 0, read)
    for side, sign in (("pos", 1), ("neg", -1)):
        boundary = found[f"boundary_{side}"][0]
        if sign not in signs:
            assert math.isnan(boundary)
            continue
        grid = np.geomspace(limit * 1e-2, limit, 24)
        losses = []
        for c in grid:
            _, steered = by_hand(llama, prompts, vector, sign * c, read)
            losses.append(float((baseline - steered).mean()))
            if losses[-1] > allowance:
                break
        assert losses[-1] > allowance, "control: the budget is spent within the range"
        expected = np.interp(allowance, losses[-2:], grid[len(losses) - 2 : len(losses)])
        assert sign * boundary == pytest.approx(expected, rel=0.05)
        # Gradients at 0 say something of what is added alone.
        predicted = found[f"predicted_boundary_{side}"][0]
        assert math.isnan(predicted) != isinstance(operator, Add)


@pytest.mark.parametrize("budget", ["kl=0.05", "rollout_kl_p95=1"])
def test_a_second_hook_that_does_nothing_changes_no_boundary(
    llama: Any, many: sl.ContrastivePairs, made: Made, budget: str
) -> None:
    few = many[:2]
    alone = sl.find_boundary(llama, few, made(1), budget=budget, **FAST).layers
    both = made(1, 3, scale=torch.tensor([1.0, 1e-7]))
    study = sl.Study(llama, few, both, budget=budget, **FAST)
    assert study.plan.exact == frozenset()  # the plain loop
    found = study.boundary().layers
    for name in ("boundary_pos", "boundary_neg", "predicted_boundary_pos"):
        assert found[name][0] == pytest.approx(alone[name][0], rel=1e-3)
    of_three = sl.find_boundary(llama, few, made(1, 3), budget=budget, **FAST).layers
    assert of_three.boundary_pos[0] != pytest.approx(alone.boundary_pos[0], rel=1e-2)


def test_the_joint_boundary_ends_at_those_of_each_hook(
    llama: Any, many: sl.ContrastivePairs, made: Made
) -> None:
    pairs = many[:8]
    vector = made(1, 3, scale=torch.tensor([1.0, 2.0]))
    study = sl.Study(llama, pairs, vector, budget="nats=0.1", **FAST)
    table = study.joint_boundary(n_angles=8)
    assert list(table.columns) == [column.name for column in COLUMNS["joint"]]
    assert (table.hook_a[0], table.hook_b[0]) == HOOKS
    at = table.set_index("angle")
    for hook, (outward, inward) in zip(HOOKS, ((0, 180), (90, 270)), strict=True):
        alone = sl.find_boundary(llama, pairs, vector.at(hook), budget="nats=0.1", **FAST).layers
        assert at.boundary[outward] == pytest.approx(alone.boundary_pos[0], rel=1e-3)
        assert -at.boundary[inward] == pytest.approx(alone.boundary_neg[0], rel=1e-3)
        predicted = alone.predicted_boundary_pos[0]
        assert at.predicted_boundary[outward] == pytest.approx(predicted, rel=1e-3)
    # Both alike at 45 degrees: the boundary of the vector as it is, by other evaluations.
    whole = study.boundary().layers
    assert at.coefficient_a[45] == pytest.approx(whole.boundary_pos[0], rel=0.02)
    assert at.coefficient_b[45] == pytest.approx(at.coefficient_a[45])
    assert at.coefficient_a[225] == pytest.approx(whole.boundary_neg[0], rel=0.02)
    assert at.coefficient_a[90] == at.coefficient_b[180] == 0
    # What is read off the curve spends the budget, by `steer`.
    prompts = tokenize_pairs(llama, pairs).positive
    _, baseline = by_hand(llama, prompts, vector, 0, HOOKS[1])
    pushed = replace(
        vector,
        scale=vector.scale * torch.tensor([-at.coefficient_a[135], at.coefficient_b[135]]).float(),
        directions=vector.directions * torch.tensor([[-1.0], [1.0]]),
    )
    assert at.coefficient_a[135] < 0 < at.coefficient_b[135]
    _, steered = by_hand(llama, prompts, pushed, 1, HOOKS[1])
    assert (baseline - steered).mean() == pytest.approx(0.1, rel=0.1)


def test_shares_of_a_joint_boundary(
    llama: Any, many: sl.ContrastivePairs, made: Made, tmp_path: Path
) -> None:
    pairs = many[:8]
    vector = made(1, 3, scale=torch.tensor([1.0, 2.0]))
    found = sl.find_boundary(llama, pairs, vector, budget="nats=0.1", **FAST).layers
    known = vector.calibrated(found)
    assert known.fingerprint == vector.fingerprint
    sizes = [step.amount for step in steps(known, "80%")]
    assert sizes == pytest.approx([0.8 * found.boundary_pos[0], 1.6 * found.boundary_pos[0]])
    prompts = tokenize_pairs(llama, pairs).positive
    _, baseline = by_hand(llama, prompts, known, 0, HOOKS[1])
    for share in ("100%", "-100%"):
        with sl.steer(llama, known, share), torch.no_grad():
            logits = [llama(torch.tensor([prompt.ids])) for prompt in prompts]
        steered = np.array([logprob(*of) for of in zip(logits, prompts, strict=True)])
        assert (baseline - steered).mean() == pytest.approx(0.1, rel=0.1)
    assert [step.amount for step in steps(known, "0.1 norm")] == pytest.approx(
        (0.1 * known.calibration.resid_norm).tolist()
    )
    # It is said, kept in the file, and lost with one of the hooks.
    assert known.describe()["boundary"] == "nats=0.1, on positive text, all hooks pushed at once"
    known.save(tmp_path / "known.safetensors")
    assert sl.SteeringVector.load(tmp_path / "known.safetensors") == known
    assert known.at(*HOOKS).calibration.is_joint
    with pytest.raises(InputError, match="positive coherence boundary is not known"):
        steps(known.at(HOOKS[0]), "80%")
    one = made(1).calibrated(sl.find_boundary(llama, pairs, made(1), budget="nats=0.1").layers)
    assert "at once" not in one.describe()["boundary"]
    steps(one, "80%")
    with pytest.raises(InputError, match="not of this very vector"):
        made(1, 3).calibrated(found)
    with pytest.raises(InputError, match="a share of the boundary is for vectors that are added"):
        made(1, operator=Ablate()).calibrated(found)
    with pytest.raises(InputError, match="not of this very vector"):
        vector.calibrated(sl.Study(llama, pairs, vector).layers)
    found.attrs["settings"] |= {"steered_positions": "prompt"}
    with pytest.raises(InputError, match="steered_positions='prompt'"):
        vector.calibrated(found)


def test_hooks_of_one_block_come_in_the_order_of_a_pass() -> None:
    parts = (
        "resid_pre ln1.hook_scale attn.hook_z ln1_post.hook_scale attn_out resid_mid mlp_in "
        "ln2.hook_scale mlp.hook_out ln2_post.hook_scale mlp_out resid_post else"
    ).split()
    names = [f"blocks.1.{part if '.' in part else f'hook_{part}'}" for part in parts]
    names += ["blocks.2.hook_resid_pre"]
    rows = torch.eye(len(names))
    vector = sl.SteeringVector.from_vectors(dict(zip(names[::-1], rows, strict=True)))
    assert in_order(vector) == tuple(names)


def test_what_a_study_of_a_vector_refuses(
    llama: Any, pairs: sl.ContrastivePairs, directions: sl.Directions, made: Made
) -> None:
    vector = made(1, 3)

    def study(given: Any = vector, **options: Any) -> sl.Study:
        return sl.Study(llama, pairs, given, **FAST, **options)

    table = study(made(1)).boundary().layers
    on_prompt = Condition(resid_post(0), directions[resid_post(0)], 0.0, True, "prompt")
    wide = sl.SteeringVector.from_vectors({resid_post(1): torch.ones(4)})
    early = {resid_post(2): directions[resid_post(2)]}
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("measured as a whole", lambda: study(layers=[1])),
        ("readout= is for a SteeringVector", lambda: study(directions, readout=directions)),
        ("is read at blocks.3", lambda: study(readout={})),
        ("does not come after", lambda: study(readout=early)),
        ("finite numbers, not all 0", lambda: study(readout={HOOKS[1]: torch.zeros(32)})),
        ("finite numbers, not all 0", lambda: study(readout={HOOKS[1]: torch.ones(4)})),
        ("d_model 4", lambda: study(wide)),
        ("condition on the prompt", lambda: study(replace(vector, condition=on_prompt))),
        ("a study of fitted Directions", lambda: study(made(1)).plane(n_angles=3)),
        ("a study of fitted Directions", lambda: study(made(1)).boundary_shape(1, n_angles=3)),
        ("adds at two hooks", lambda: study(made(1)).joint_boundary()),
        ("adds at two hooks", lambda: study(directions).joint_boundary()),
        ("adds at two hooks", lambda: study(made(1, 3, operator=Ablate())).joint_boundary()),
        ("strength from 0 to 1", lambda: study(made(1, operator=Ablate())).sweep([0, 2])),
        ("strength from 0 to 1", lambda: study(made(1, operator=Ablate())).sweep([-1])),
        ("of what is added", lambda: study(made(1, operator=Rotate())).predicted_boundary()),
        (
            "SteeringVector.calibrated",
            lambda: sl.SteeringVector.from_directions(
                llama, directions, layers=[1], layer_table=table
            ),
        ),
    ]
    for match, measure in refused:
        with pytest.raises(InputError, match=match):
            measure()
    # Controls: what is next to these is not refused.
    late = {resid_post(4): directions[resid_post(4)]}
    assert study(readout=late).readouts == {" + ".join(HOOKS): resid_post(4)}
    assert repr(study()) == "Study(1 hooks, 8 pairs, mean_diff)"
    assert study().predicted_boundary().predicted_boundary_pos[0] > 0
    bounded = study().boundary()
    ends = bounded.layers.loc[0, ["boundary_neg", "boundary_pos"]]
    reached = [end for end in ends if math.isfinite(end)]
    assert reached
    assert sorted(study().segments(bounded).coefficient.unique()) == pytest.approx(reached)


def test_a_condition_is_measured_as_it_is_applied(
    llama: Any, pairs: sl.ContrastivePairs, directions: sl.Directions, made: Made
) -> None:
    read = Condition(resid_post(0), directions[resid_post(0)], 0.5, True, "token")
    vector = made(2, condition=read)
    table = sl.sweep(llama, pairs, vector, coefficients=[4], **FAST).table
    always = sl.sweep(llama, pairs, made(2), coefficients=[4], **FAST).table
    prompts = tokenize_pairs(llama, pairs).positive
    _, baseline = by_hand(llama, prompts, vector, 0, resid_post(2))
    _, steered = by_hand(llama, prompts, vector, 4, resid_post(2))
    degradation = (baseline - steered).mean()
    assert table.degradation_nats[0] == pytest.approx(degradation, abs=1e-5)
    assert always.degradation_nats[0] != pytest.approx(degradation, rel=1e-2)
