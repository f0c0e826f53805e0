"""The steering vector: applying, combining, keeping."""

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import steerlens as sl
from steerlens.errors import HookError, InputError
from steerlens.steering import Calibration, Origin

HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
TOKENS = torch.tensor([[1, 7, 9, 11]])
FILES = Path(__file__).parent / "files"


@pytest.fixture(scope="module")
def layers(llama: Any, many: sl.ContrastivePairs, directions: sl.Directions) -> Any:
    return sl.find_boundary(llama, many, directions, layers=[1, 2], budget="kl=0.5").layers


@pytest.fixture(scope="module")
def vector(llama: Any, directions: sl.Directions, layers: Any) -> sl.SteeringVector:
    return sl.SteeringVector.from_directions(
        llama, directions, layers=[1, 2], layer_table=layers, dataset="many"
    )


def made(*rows: list[float], **fields: Any) -> sl.SteeringVector:
    """A vector from hand numbers, at blocks 0, 1, ..."""
    named = {f"blocks.{i}.hook_resid_post": torch.tensor(row) for i, row in enumerate(rows)}
    return replace(sl.SteeringVector.from_vectors(named), **fields)


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens)


# Made from directions


def test_what_a_fitted_direction_becomes(
    vector: sl.SteeringVector, llama: Any, directions: sl.Directions, layers: Any
) -> None:
    assert vector.hook_names == HOOKS
    assert list(vector) == list(HOOKS)
    for name in HOOKS:
        torch.testing.assert_close(vector[name], directions[name])
    assert vector.scale.tolist() == [1, 1]
    assert vector.calibration.resid_norm.tolist() == pytest.approx(layers.resid_norm.tolist())
    assert vector.calibration.boundary_pos.tolist() == pytest.approx(layers.boundary_pos.tolist())
    assert (vector.calibration.budget, vector.calibration.text) == ("kl=0.5", "positive")
    origin = vector.origin
    assert (origin.method, origin.dataset, origin.position) == ("mean_diff", "many", "-1")
    assert origin.pairs == directions.fingerprint
    assert origin.architecture == "llama"
    assert "torch 2" in origin.versions
    assert "mean_diff on many" in repr(vector)


def test_directions_that_are_missing(llama: Any, directions: sl.Directions, layers: Any) -> None:
    with pytest.raises(InputError, match=r"no direction at blocks\.1\.hook_mlp_out"):
        sl.SteeringVector.from_directions(llama, directions, layers="blocks.1.hook_mlp_out")
    with pytest.raises(InputError, match=r"no row for blocks\.3\.hook_resid_post"):
        sl.SteeringVector.from_directions(llama, directions, layers=[1, 3], layer_table=layers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hook_names": ("a",)}, "1 names, 2 directions and 2 scales"),
        ({"scale": torch.tensor([1.0, 0.0])}, "above 0"),
        ({"scale": torch.tensor([1.0, math.nan])}, "finite"),
        ({"directions": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}, r"block.*1.* norm 1\.41421"),
        ({"directions": torch.tensor([[1.0, 0.0], [math.nan, 1.0]])}, "norm nan"),
        ({"hook_names": ("a", "a")}, "different hooks"),
        ({"hook_names": ()}, "0 names"),
        ({"hook_names": ("hook_embed", "blocks.1.hook_resid_post")}, "inside blocks"),
        ({"calibration": Calibration.unknown(1)}, r"calibration of 2 hooks, got one of \[1\]"),
        ({"condition": sl.Condition("a", torch.ones(1), 0.0)}, "condition's direction has 1"),
    ],
)
def test_what_is_no_vector(fields: dict[str, Any], message: str) -> None:
    good = made([3.0, 4.0], [0.0, 2.0])
    with pytest.raises(InputError, match=message):
        replace(good, **fields)


@pytest.mark.parametrize("row", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_tensors_without_a_direction(row: list[float]) -> None:
    with pytest.raises(InputError, match="no direction"):
        made(row)
    assert made([3.0, 4.0]).scale.tolist() == [5.0]
    torch.testing.assert_close(made([3.0, 4.0]).directions, torch.tensor([[0.6, 0.8]]))


# Applying


def test_fwd_hooks_go_straight_into_transformer_lens(llama: Any, vector: sl.SteeringVector) -> None:
    one = vector.at(1)
    plain, (_, cache) = logits(llama), llama.run_with_cache(TOKENS)
    steered = llama.run_with_hooks(TOKENS, fwd_hooks=one.fwd_hooks(3))
    with llama.hooks(fwd_hooks=one.fwd_hooks(3)):
        _, inside = llama.run_with_cache(TOKENS)
    torch.testing.assert_close(inside[HOOKS[0]], cache[HOOKS[0]] + 3 * one[HOOKS[0]])
    with sl.steer(llama, one, 3):
        assert torch.equal(logits(llama), steered)
    assert not torch.equal(steered, plain)
    assert torch.equal(logits(llama), plain)


@pytest.mark.parametrize(
    "operator", [sl.Add(), sl.Ablate(), sl.Clamp(2.0), sl.Rotate()], ids=lambda o: o.name
)
def test_coefficient_0_is_the_identity_with_every_operator(
    llama: Any, vector: sl.SteeringVector, operator: Any
) -> None:
    other = replace(vector, operator=operator)
    plain = logits(llama)
    for zero in (0, -0.0, "0%", "0 norm"):
        assert other.fwd_hooks(zero) == []
        with sl.steer(llama, other, zero):
            assert torch.equal(logits(llama), plain)
    with sl.steer(llama, other, 0.5):
        assert not torch.equal(logits(llama), plain)


def test_shares_of_the_boundary_and_of_the_norm(
    llama: Any, vector: sl.SteeringVector, layers: Any
) -> None:
    for coefficient, size in (
        ("50%", 0.5 * layers.boundary_pos[0]),
        ("-50%", 0.5 * layers.boundary_neg[0]),
        ("0.1 norm", 0.1 * layers.resid_norm[0]),
    ):
        with sl.steer(llama, vector.at(1), coefficient):
            by_share = logits(llama)
        with sl.steer(llama, vector.at(1), float(size)):
            torch.testing.assert_close(by_share, logits(llama), rtol=1e-4, atol=1e-4)


def test_shares_need_a_vector_that_knows_them(llama: Any, directions: sl.Directions) -> None:
    with (
        pytest.raises(InputError, match="needs a SteeringVector"),
        sl.steer(llama, directions, "80%"),
    ):
        pass
    ablate = made([1.0] * 32, operator=sl.Ablate())
    with pytest.raises(InputError, match="ablate takes a plain number"):
        ablate.fwd_hooks("80%")
    with pytest.raises(InputError, match="from 0 to 1"):
        ablate.fwd_hooks(2)


def test_nested_vectors_act_from_the_outside_in(llama: Any, vector: sl.SteeringVector) -> None:
    one = vector.at(1)
    gone = replace(one, operator=sl.Ablate())

    def component() -> torch.Tensor:
        _, cache = llama.run_with_cache(TOKENS)
        return cache[HOOKS[0]] @ one[HOOKS[0]]

    plain = component()
    with sl.steer(llama, one, 5.0), sl.steer(llama, gone, 1.0):
        torch.testing.assert_close(component(), torch.zeros(1, 4), atol=1e-5, rtol=0)
    with sl.steer(llama, gone, 1.0), sl.steer(llama, one, 5.0):
        torch.testing.assert_close(component(), torch.full((1, 4), 5.0))
    with sl.steer(llama, one, 5.0), sl.steer(llama, one, 2.0):
        torch.testing.assert_close(component(), plain + 7)
    torch.testing.assert_close(component(), plain)


def in_a_thread(action: Any) -> Any:
    """What it returns or the `HookError` that it raises."""
    results: list[Any] = []

    def guarded() -> None:
        try:
            results.append(action())
        except HookError as error:
            results.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    return results[0]


def test_threads_on_one_model(llama: Any, vector: sl.SteeringVector) -> None:
    """While one steers another gets an error; one after the other they may."""

    def steered() -> torch.Tensor:
        with sl.steer(llama, vector, 1.0), sl.steer(llama, vector, 1.0):
            return logits(llama)

    with sl.steer(llama, vector, 1.0):
        inside = logits(llama)
        for action in (steered, lambda: logits(llama)):
            error = in_a_thread(action)
            assert isinstance(error, HookError)
            assert "another thread" in str(error)
        assert torch.equal(logits(llama), inside)
    assert torch.equal(in_a_thread(lambda: logits(llama)), logits(llama))
    expected = steered()
    for _ in range(2):
        assert torch.equal(in_a_thread(steered), expected)


def test_directions_of_another_width_are_refused(llama: Any) -> None:
    for width in (1, 16, 33):
        wrong = sl.SteeringVector.from_vectors({HOOKS[0]: torch.ones(width)})
        with pytest.raises(InputError, match=f"{width} numbers, the activation there 32"):
            llama.run_with_hooks(TOKENS, fwd_hooks=wrong.fwd_hooks(1))
    for bad in (torch.ones(4, 32), torch.full((32,), math.nan)):
        with (
            pytest.raises(InputError, match="one row of finite numbers"),
            sl.steer(llama, {HOOKS[0]: bad}, 1),
        ):
            pass
    with pytest.raises(InputError, match="step of at most"):
        made([1.0] * 32).fwd_hooks(1e39)


def test_a_mask_is_for_one_pass_of_its_shape(llama: Any, vector: sl.SteeringVector) -> None:
    mask = torch.tensor([[True, False, True, True]])
    right = llama.run_with_hooks(TOKENS, fwd_hooks=vector.fwd_hooks(1, mask=mask))
    assert right.shape == logits(llama).shape
    with pytest.raises(InputError, match=r"\(1, 4\), but this pass has \(1, 1\)"):
        llama.run_with_hooks(TOKENS[:, :1], fwd_hooks=vector.fwd_hooks(1, mask=mask))


# Combining

A, B = [3.0, 4.0], [0.0, 2.0]


def rows(vector: sl.SteeringVector) -> list[float]:
    return [round(value, 5) for value in vector.rows[0].tolist()]


@pytest.mark.parametrize("layer", [2, -3, "blocks.2.hook_resid_post"])
def test_a_vector_of_one_tensor(llama: Any, layer: Any) -> None:
    row = torch.full((32,), 2.0)
    vector = sl.SteeringVector.from_tensor(row, layer=layer, model=llama)
    assert vector.hook_names == ("blocks.2.hook_resid_post",)
    assert torch.allclose(vector.rows, row)
    assert vector.origin == Origin.of_model(llama)
    assert sl.SteeringVector.from_tensor(row, layer=2).hook_names == vector.hook_names
    with pytest.raises(InputError, match=r"the tensor has 31 numbers, this model d_model 32"):
        sl.SteeringVector.from_tensor(row[1:], layer=layer, model=llama)
    with pytest.raises(HookError, match="layer 99"):
        sl.SteeringVector.from_tensor(row, layer=99, model=llama)


def test_algebra_by_hand() -> None:
    a, b = made(A), made(B)
    assert rows(a + b) == [3.0, 6.0]
    assert rows(a - b) == [3.0, 2.0]
    assert rows(2 * a) == rows(a * 2) == [6.0, 8.0]
    assert rows(-a) == [-3.0, -4.0]
    assert rows(a.orthogonal_to(b)) == [3.0, 0.0]
    assert rows(a.interpolate(b, 0.25)) == [2.25, 3.5]
    assert rows(a.interpolate(b, 0)) == A
    assert rows(a.interpolate(b, 1)) == B


numbers = arrays("float32", 4, elements=st.floats(-10, 10, width=32)).filter(
    lambda row: float((row**2).sum()) > 1e-2
)


@given(numbers, numbers, st.floats(0.1, 5))
def test_algebra_as_invariants(x: Any, y: Any, factor: float) -> None:
    a, b = made(x.tolist()), made(y.tolist())
    torch.testing.assert_close((a * factor).rows, factor * a.rows)
    torch.testing.assert_close((a * -factor).rows, -factor * a.rows)
    if torch.linalg.norm(a.rows + b.rows) > 1e-3:
        torch.testing.assert_close((a + b).rows, a.rows + b.rows, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close((a + b).rows, (b + a).rows)
    cosine = float(torch.nn.functional.cosine_similarity(a.rows, b.rows))
    if abs(cosine) < 0.99:
        left = a.orthogonal_to(b)
        assert abs(float((left.directions * b.directions).sum())) < 1e-4


def test_scaling_keeps_the_boundary_and_other_combinations_do_not() -> None:
    known = Calibration(
        torch.tensor([50.0]), torch.tensor([-4.0]), torch.tensor([8.0]), "kl=0.1", "neutral"
    )
    a, b = made(A, calibration=known), made(B, calibration=known)
    assert (3 * a).calibration.boundary_pos.tolist() == [8.0]
    assert (-a).calibration.boundary_pos.tolist() == [4.0]
    assert (-a).calibration.boundary_neg.tolist() == [-8.0]
    total = (a + b).calibration
    assert total.boundary_pos.isnan().all()
    assert total.resid_norm.tolist() == [50.0]
    assert total.budget == "unknown"


def test_what_cannot_be_combined() -> None:
    a, b = made(A), made(B)
    ablating = replace(b, operator=sl.Ablate())
    other = replace(b, origin=Origin(model="other", weights="w2", tokenizer="t2"))
    mine = replace(a, origin=Origin(model="mine", weights="w1", tokenizer="t1"))
    condition = sl.Condition("blocks.0.hook_resid_post", torch.tensor([1.0, 0.0]), 0.5)
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: made(A, A) + b, r"only the first has blocks\.1.*second none"),
        (lambda: a + made([1.0, 0.0, 0.0]), "d_model 2 and 3"),
        (lambda: a + ablating, "not for ablate, add"),
        (lambda: 2 * ablating, "not for ablate"),
        (lambda: a - a, "no direction"),
        (lambda: a.orthogonal_to(3 * a), "no direction"),
        (lambda: a * 0, "finite number that is not 0"),
        (lambda: a * math.inf, "factor: expected a finite number"),
        (lambda: a * math.nan, "factor: expected a finite number"),
        (lambda: mine + other, r"other weights .* of 'mine' and of 'other'; tokenizer"),
        (lambda: replace(a, condition=condition) + b, "other conditions"),
    ]
    for combine, message in refused:
        with pytest.raises(InputError, match=message):
            combine()
    both = replace(a, condition=condition) + replace(b, condition=condition)
    assert both.condition == condition


def test_the_origin_of_a_combination() -> None:
    shared = {"dataset": "sentiment", "seed": "0"}
    a = made(A, origin=Origin(method="mean_diff", pair_hashes=("1", "2"), **shared))
    b = made(B, origin=Origin(method="pca", pair_hashes=("2", "3"), **shared))
    origin = (a - b).origin
    assert origin.pair_hashes == ("1", "2", "3")
    assert (origin.method, origin.dataset, origin.seed) == ("(mean_diff - pca)", "sentiment", "0")


def test_a_part_of_a_vector(vector: sl.SteeringVector) -> None:
    assert vector.at(2).hook_names == (HOOKS[1],)
    assert vector.at(HOOKS[1], 1).hook_names == (HOOKS[1], HOOKS[0])
    assert torch.equal(vector.at(2)[HOOKS[1]], vector[HOOKS[1]])
    assert float(vector.at(2).calibration.resid_norm) == float(vector.calibration.resid_norm[1])
    with pytest.raises(InputError, match="there is no direction 7; there are"):
        vector.at(7)
    with pytest.raises(KeyError):
        vector["blocks.7.hook_resid_post"]
