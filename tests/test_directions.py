"""Directions: planted ones are recovered; sign, norm and seed are fixed."""

import re
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from conftest import bridge, build_llama
from hypothesis import given, settings
from hypothesis import strategies as st

import steerlens as sl
from steerlens.directions.differences import Differences
from steerlens.directions.directions import Directions
from steerlens.directions.methods import Method
from steerlens.errors import InputError
from steerlens.models.loading import inference
from steerlens.steering import steps
from steerlens.steering.apply import step_hooks

HOOK = "blocks.0.hook_resid_post"


def differences_of(values: torch.Tensor, *, base: float = 1.0) -> Differences:
    """Differences at one hook with the given values."""
    negative = torch.full((1, *values.shape), base, dtype=values.dtype)
    return Differences((HOOK,), (), negative + values, negative, -1, "fingerprint")


def planted(n_pairs: int, strength: float, *, seed: int = 0, d_model: int = 64) -> Any:
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(d_model, generator=generator), dim=0)
    noise = torch.randn(n_pairs, d_model, generator=generator)
    return direction, strength * direction + noise


def test_a_direction_by_layer(llama: Any, pairs: sl.ContrastivePairs) -> None:
    hooks = ("blocks.1.hook_resid_post", "blocks.3.hook_mlp_out", "blocks.3.hook_resid_post")
    fitted = sl.fit(llama, pairs, layers=hooks)
    vector = sl.SteeringVector.from_directions(llama, fitted)
    for one in (fitted, vector):
        assert torch.equal(one[1], one[hooks[0]])
        assert 1 in one
        assert 0 not in one
        with pytest.raises(KeyError):
            one[0]
        assert one.at(3).hook_names == hooks[1:]
        assert one.at(hooks[2], 1).hook_names == (hooks[2], hooks[0])
        for missing in ((0,), (), ("blocks.2.hook_resid_post", 1)):
            with pytest.raises(InputError, match=r"there is no direction .*hook_mlp_out"):
                one.at(*missing)
    with pytest.raises(InputError, match=r"layer 3 has 2 directions: name one of .*hook_mlp_out"):
        fitted[3]
    part = fitted.at(3)
    assert set(part.readout_names) == {*fitted.hook_names, *fitted.readout_names} - {*part}
    assert all(torch.equal(part[name], fitted[name]) for name in (*part, *part.readout_names))


def test_centring_subtracts_the_planted_direction() -> None:
    direction, values = planted(80, 4.0)
    centred = float(
        sl.fit_directions(differences_of(values), method="pca_centred")[HOOK] @ direction
    )
    uncentred = float(sl.fit_directions(differences_of(values), method="pca")[HOOK] @ direction)
    print(f"cosine centred {centred:.3f}, uncentred {uncentred:.3f}")
    assert centred < 0.5 < 0.97 < uncentred


def test_planted_direction_in_a_model_is_recovered(pairs: sl.ContrastivePairs) -> None:
    hf_model = build_llama()
    planted_direction = torch.nn.functional.normalize(torch.ones(32).cumsum(0), dim=0)
    tokenizer = bridge(hf_model).tokenizer
    cheerful, gloomy = tokenizer("cheerful gloomy", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        table = hf_model.get_input_embeddings().weight
        table[cheerful] = table[gloomy] + 10 * planted_direction
        for layer in hf_model.model.layers:
            # Nearly silent blocks: what the embedding wrote arrives nearly unchanged.
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
    texts = ["the day was", "you are", "it was very", "the soup is"]
    words = sl.ContrastivePairs.from_lists(
        [f"{text} cheerful" for text in texts], [f"{text} gloomy" for text in texts]
    )
    model = bridge(hf_model)
    fitted = sl.fit_directions(sl.collect_differences(model, words))
    for name, direction in fitted.items():
        cosine = float(direction @ planted_direction)
        print(f"{name}: cosine {cosine:.5f}")
        assert cosine > 0.99


@given(
    seed=st.integers(0, 1000),
    method=st.sampled_from(["mean_diff", "pca", "pca_centred", "pca_pooled", "probe"]),
    n_pairs=st.integers(3, 12),
)
@settings(max_examples=60, deadline=None)
def test_unit_norm_and_positives_project_higher(seed: int, method: str, n_pairs: int) -> None:
    _, values = planted(n_pairs, 1.0, seed=seed, d_model=8)
    fitted = sl.fit_directions(differences_of(values), method=method)[HOOK]
    assert float(fitted.norm()) == pytest.approx(1, abs=1e-5)
    assert float((values @ fitted).mean()) >= -1e-6
    # Exchanging the two sides turns the direction round.
    turned = sl.fit_directions(differences_of(-values), method=method)[HOOK]
    torch.testing.assert_close(turned, -fitted, rtol=1e-3, atol=1e-4)


def test_mean_diff_and_pca_by_hand() -> None:
    values = torch.tensor([[3.0, 0.0], [1.0, 4.0]])
    mean = sl.fit_directions(differences_of(values))[HOOK]
    torch.testing.assert_close(mean, torch.tensor([1.0, 1.0]) / 2**0.5)
    # Two multiples of one vector: their uncentred principal axis is that vector.
    line = torch.tensor([[3.0, 4.0], [-6.0, -8.0]])
    axis = sl.fit_directions(differences_of(line), method="pca")[HOOK]
    torch.testing.assert_close(axis, torch.tensor([-0.6, -0.8]))


def test_random_depends_on_seed_and_hook_only() -> None:
    _, values = planted(5, 1.0)
    first = sl.fit_directions(differences_of(values), method="random", seed=1)[HOOK]
    again = sl.fit_directions(differences_of(3 * values), method="random", seed=1)[HOOK]
    other = sl.fit_directions(differences_of(values), method="random", seed=2)[HOOK]
    torch.testing.assert_close(first, again)
    assert abs(float(first @ other)) < 0.9
    elsewhere = replace(differences_of(values), hook_names=("blocks.1.hook_resid_post",))
    second = sl.fit_directions(elsewhere, method="random", seed=1)["blocks.1.hook_resid_post"]
    assert abs(float(first @ second)) < 0.9


@pytest.mark.parametrize(
    ("values", "method", "reason"),
    [
        (torch.zeros(3, 4), "mean_diff", "same activation at position"),
        (torch.zeros(3, 4), "random", "same activation at position"),
        (torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), "mean_diff", "cancel"),
        (torch.tensor([[1.0, 2.0], [1.0, 2.0]]), "pca_centred", "all equal and were centred"),
        (torch.eye(2), "no_such_method", "there are mean_diff, pca"),
    ],
)
def test_degenerate_differences_are_refused(values: Any, method: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        sl.fit_directions(differences_of(values), method=method)
    sl.fit_directions(differences_of(torch.tensor([[1.0, 2.0], [0.5, 1.0]])), method="pca_centred")


def test_same_token_on_both_sides_is_refused(llama: Any, pairs: sl.ContrastivePairs) -> None:
    """At position 0 both prompts hold BOS: the difference is rounding at most."""
    with pytest.raises(InputError, match="same activation at position 0"):
        sl.fit_directions(sl.collect_differences(llama, pairs, position=0))
    sl.fit_directions(sl.collect_differences(llama, pairs, position=3))


def test_directions_are_a_mapping_with_norm_1(llama: Any, pairs: sl.ContrastivePairs) -> None:
    directions = sl.fit_directions(sl.collect_differences(llama, pairs, layers=[0]))
    assert list(directions) == ["blocks.0.hook_resid_post"]
    # The readout is there to be looked up, but steering by the mapping leaves it alone.
    assert directions["blocks.2.hook_resid_post"].norm() == pytest.approx(1)
    assert [name for name, _ in step_hooks(steps(directions, 1))] == ["blocks.0.hook_resid_post"]
    assert directions.hook_names == ("blocks.0.hook_resid_post",)
    assert directions.fingerprint == pairs.fingerprint
    with pytest.raises(KeyError):
        directions["blocks.1.hook_resid_post"]
    with pytest.raises(InputError, match="has norm 2"):
        replace(directions, vectors=2 * directions.vectors)


def test_fitting_uses_no_gradients(llama: Any, pairs: sl.ContrastivePairs) -> None:
    assert not sl.collect_differences(llama, pairs).positive.requires_grad
    with inference(llama):
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_nothing_changes_directions_or_vectors_through_their_tensors() -> None:
    given = torch.eye(4)[:1]
    made = Directions((HOOK,), (), given, "mean_diff", -1, 0, "fingerprint")
    vector = sl.SteeringVector.from_vectors({HOOK: 2 * torch.eye(4)[0]})
    condition = sl.Condition(HOOK, torch.eye(4)[0], 0.0)
    taken = [given, made.vectors, made[HOOK], vector.directions, vector[HOOK], vector.scale]
    for tensor in (*taken, vector.rows, vector.calibration.resid_norm, condition.direction):
        tensor.fill_(7.0)
        assert bool((tensor == 7).all())  # it can be written to
    assert made[HOOK].tolist() == vector[HOOK].tolist() == condition.direction.tolist()
    assert (made[HOOK].tolist(), vector.scale.tolist()) == ([1, 0, 0, 0], [2.0])
    assert bool(vector.calibration.resid_norm.isnan().all())


def test_equality_and_hash_of_public_values_raise_nothing() -> None:
    """A dataclass that holds tensors or tables must not compare them field by field."""
    rooms = (sl, sl.circuits, sl.steering, sl.measure, sl.directions, sl.runs)
    named = [getattr(room, name) for room in rooms for name in room.__all__]
    kinds = {kind for kind in named if is_dataclass(kind) and isinstance(kind, type)}
    holding = [
        kind
        for kind in kinds
        if any(re.search("Tensor|DataFrame", str(f.type)) for f in fields(kind))
        and kind is not Method  # holds functions of tensors
    ]
    assert {Directions, Differences, sl.measure.SweepResult, sl.SteeringVector} <= set(holding)
    assert [kind for kind in holding if is_generated(kind)] == []
    assert is_generated(Generated)
    for kind in holding:  # results, whose values need not be made for it
        if kind.__eq__ is object.__eq__:
            one, other = object.__new__(kind), object.__new__(kind)
            assert one == one != other
            assert len({one, other}) == 2
        assert kind.__hash__ is not None


@dataclass(frozen=True)
class Generated:
    """What a result must not be."""

    values: torch.Tensor


def is_generated(kind: Any) -> bool:
    """Whether its `__eq__` compares its fields, as `dataclass` writes it."""
    code = getattr(kind.__eq__, "__code__", None)
    return code is not None and not code.co_filename.endswith(".py")


def test_directions_and_vectors_are_equal_by_content() -> None:
    made = Directions((HOOK,), (), torch.eye(4)[:1], "mean_diff", -1, 0, "fingerprint")
    again = replace(made)
    other = replace(made, vectors=torch.eye(4)[1:2])
    assert made == again != other
    assert made in [other, again]
    assert len({made, again, other}) == 2
    vectors = [sl.SteeringVector.from_vectors({HOOK: row}) for row in torch.eye(4)[[0, 0, 1]]]
    assert len(set(vectors)) == 2
    conditions = [sl.Condition(HOOK, row, 0.0) for row in torch.eye(4)[[0, 0, 1]]]
    assert len(set(conditions)) == 2


def test_directions_of_other_weights_warn(llama: Any, pairs: sl.ContrastivePairs) -> None:
    """`filterwarnings = error` is the control: the model that they were fitted on does not warn."""
    directions = sl.fit(llama, pairs, layers=[2])
    other = bridge(build_llama(seed=1))
    uses = {
        "sweep": lambda model: sl.Study(model, pairs, directions),
        "writers": lambda model: sl.circuits.find_writers(
            model, pairs, directions, layer=2, n_bootstrap=2
        ),
        "vector": lambda model: sl.SteeringVector.from_directions(model, directions),
    }
    for use in uses.values():
        use(llama)
        with pytest.warns(UserWarning, match="fitted on other weights"):
            use(other)
    sl.Study(other, pairs, replace(directions, weights_fingerprint="unknown"))
