"""The linear parts of a loaded model: the same sums by another library, and their gradients."""

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from steerlens.models import linear
from steerlens.models.hooked_model import weight_module
from steerlens.models.linear import OneDnnLinear, use_one_dnn
from steerlens.models.verification import own_model

needs_one_dnn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN"
)
pytestmark = needs_one_dnn


def pair_of(*, bias: bool = True, **options: Any) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    """A linear part as PyTorch has it, and one of the same weights as a loaded model has it."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(33, 7, bias=bias, **options).requires_grad_(False)
    other = torch.nn.Linear(33, 7, bias=bias, **options).requires_grad_(False)
    other.load_state_dict(plain.state_dict())
    use_one_dnn(other)
    assert isinstance(other, OneDnnLinear)
    return plain, other


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for each product that oneDNN makes."""
    made: list[int] = []
    product = linear._product

    def counted(*args: Any) -> Any:
        made.append(1)
        return product(*args)

    monkeypatch.setattr(linear, "_product", counted)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(33,), (4, 33), (2, 3, 33), (0, 33)])
def test_it_gives_what_pytorch_gives(bias: bool, shape: tuple[int, ...], calls: list[int]) -> None:
    plain, other = pair_of(bias=bias)
    values = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(other(values), plain(values))
    assert calls


def test_a_row_has_the_same_bits_in_batches_of_any_size(calls: list[int]) -> None:
    _, other = pair_of()
    values = torch.randn(64, 33)
    with torch.no_grad():
        assert torch.equal(other(values[:5]), other(values)[:5])
    assert len(calls) == 2


def test_gradients_are_those_of_pytorch(calls: list[int]) -> None:
    plain, other = pair_of()
    values = torch.randn(2, 3, 33)
    found = []
    for part in (plain, other):
        given = values.clone().requires_grad_()
        (first,) = torch.autograd.grad(part(given).square().sum(), given, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), given)
        (alone,) = torch.autograd.grad(part(given).square().sum(), given)
        found.append((first.detach(), second, alone))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    # Twice forward, and the two gradients that are not differentiated themselves.
    assert len(calls) == 4


def test_what_it_is_not_for_runs_as_in_pytorch(calls: list[int]) -> None:
    _, other = pair_of()
    other.requires_grad_(True)
    other(torch.randn(2, 33)).sum().backward()
    assert other.weight.grad is not None
    _, double = pair_of(dtype=torch.float64)
    assert double(torch.randn(2, 33, dtype=torch.float64)).dtype == torch.float64
    _, half = pair_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert half(torch.randn(2, 33)).dtype == torch.bfloat16
    assert not calls


def along(part: torch.nn.Linear, values: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        moved: torch.Tensor = forward_ad.unpack_dual(part(forward_ad.make_dual(values, turn)))[1]
    return moved


@pytest.mark.parametrize(
    "derivative",
    [
        along,
        lambda part, values, turn: torch.func.jvp(part, (values,), (turn,))[1],
        lambda part, values, turn: torch.func.grad(lambda x: (part(x) ** 2).sum())(values) * turn,
        lambda part, values, turn: torch.func.vmap(torch.func.jacrev(part))(values) + turn.sum(),
    ],
    ids=["forward_ad", "jvp", "grad", "jacrev"],
)
def test_other_derivatives_are_those_of_pytorch(derivative: Any) -> None:
    plain, other = pair_of()
    values, turn = torch.randn(2, 4, 33)
    found = derivative(other, values, turn)
    torch.testing.assert_close(found, derivative(plain, values, turn))
    assert found.abs().max() > 0


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the checks of shapes
def test_what_is_exported_or_traced_needs_no_one_dnn() -> None:
    _, other = pair_of()
    values = torch.randn(2, 33)
    assert "mkldnn" not in torch.export.export(other, (values,)).graph_module.code
    with torch.no_grad():
        traced = torch.jit.trace(other, values)
        torch.testing.assert_close(traced(values), other(values))


def test_a_weight_of_another_kind_runs_by_its_own_product() -> None:
    class Quantized(torch.Tensor):
        """A weight that can be multiplied in one way, as quantized ones can."""

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.nn.functional.linear:
                return torch.zeros(len(args[0]), 7)
            if func is torch.ops.mkldnn._linear_pointwise.default:
                raise NotImplementedError
            return super().__torch_function__(func, types, args, kwargs or {})

    _, other = pair_of()
    weight = other.weight.detach().as_subclass(Quantized)
    other.weight = torch.nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        assert not other(torch.randn(2, 33)).any()


def test_a_loaded_model_and_the_one_under_it_have_it(loaded: Any, calls: list[int]) -> None:
    own = own_model(loaded)
    for module in (weight_module(loaded), own):
        parts = [part for part in module.modules() if isinstance(part, torch.nn.Linear)]
        assert parts
        assert all(isinstance(part, OneDnnLinear) for part in parts)
    with torch.no_grad():
        loaded(torch.tensor([[1, 4, 5]]))
    assert calls
