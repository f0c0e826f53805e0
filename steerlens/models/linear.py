"""Matrix products in float32 on a CPU, by the library that uses all of the processor.

PyTorch takes MKL for them, which uses half the width of processors that are not Intel's. oneDNN,
which PyTorch has beside it, makes the same sums there in less than half the time. With oneDNN a row
has the same bits whatever the number of threads.
"""

import platform
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad


class OneDnnLinear(torch.nn.Linear):
    """`torch.nn.Linear`, by oneDNN where it is float32 on a CPU and its weight asks no gradient.

    Not inside `torch.func`, `forward_ad`, `torch.compile`, `torch.export` and `torch.jit.trace`.
    """

    def forward(self, input: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row d_out"]:
        """`input @ weight.T + bias`."""
        weight, bias = self.weight, self.bias
        is_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if not (
            input.dtype == weight.dtype == torch.float32
            and input.is_cpu
            and weight.is_cpu
            and not torch.is_autocast_enabled("cpu")
            and not (is_trained and torch.is_grad_enabled())
            and type(weight) in (torch.nn.Parameter, Tensor)  # a quantized one is of another
            and not _is_looked_through()
        ):
            return torch.nn.functional.linear(input, weight, bias)
        if input.requires_grad and torch.is_grad_enabled():
            product: Tensor = _Differentiable.apply(input, weight, bias)  # type: ignore[no-untyped-call]
            return product
        return _product(input, weight, bias)


class _Differentiable(torch.autograd.Function):
    """`_product`, and its gradient at the input."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Float[Tensor, "*row d_in"],
        weight: Float[Tensor, "d_out d_in"],
        bias: Float[Tensor, " d_out"] | None,
    ) -> Float[Tensor, "*row d_out"]:
        ctx.save_for_backward(weight)
        return _product(input, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, gradient: Float[Tensor, "*row d_out"]
    ) -> tuple[Float[Tensor, "*row d_in"], None, None]:
        weight = ctx.saved_tensors[0].t()
        # With create_graph it is differentiated once more.
        product = torch.nn.functional.linear if torch.is_grad_enabled() else _product
        return product(gradient, weight, None), None, None


def _is_looked_through() -> bool:
    """Whether PyTorch follows what is computed, other than backward: it does not know the product.

    A forward-mode derivative through it would be 0, without an error.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _product(
    input: Float[Tensor, "*row d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None,
) -> Float[Tensor, "*row d_out"]:
    op = torch.ops.mkldnn._linear_pointwise.default
    product: Tensor = op(input, weight, bias, "none", [], "")
    return product


def use_one_dnn(module: torch.nn.Module) -> None:
    """Have every `torch.nn.Linear` of a model run by oneDNN, on x86 where PyTorch has it."""
    has_it = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if has_it and is_x86 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for part in module.modules():
            if type(part) is torch.nn.Linear:
                part.__class__ = OneDnnLinear
