"""Blocks compiled by PyTorch: norms, rotary angles and activations fused into few kernels."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steerlens.models.tolerance import allowed_gap

COMPILE_FROM = 5e16
"""Floating-point operations from which it pays: it saves a fifth of two minutes on a card that does
400e12 a second, and takes up to half a minute."""


class CompiledBlocks:
    """Compiled forward passes of a model's blocks, in place of their own while nothing is trained.

    One compilation serves all blocks of a class and every number of rows and tokens. The first time
    that a shape comes, one block runs both ways, and from a difference beyond rounding on, or where
    it cannot be compiled, blocks run as they are, with a warning. Gradients are not compiled.
    """

    def __init__(self, blocks: Sequence[Any]) -> None:
        self.reason: str | None = None
        self._seen: set[Any] = set()
        self._by_class: dict[Any, Any] = {}
        for block in blocks:
            kind = type(block)
            if kind not in self._by_class:
                self._by_class[kind] = torch.compile(kind.forward, dynamic=True)
            block.__dict__["forward"] = _Compiled(self, block)

    def run(self, block: Any, args: Any, kwargs: Any) -> Any:
        """The block's output, by its compiled forward pass where that holds."""
        kind, given = type(block), args[0] if args else kwargs["hidden_states"]
        # A single row or token would be compiled once more, for itself.
        if self.reason is not None or torch.is_grad_enabled() or min(given.shape[:2]) < 2:
            return kind.forward(block, *args, **kwargs)
        seen = kind, given.shape, given.dtype, kwargs.get("attention_mask") is None
        try:
            output = self._by_class[kind](block, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, or code that it cannot follow
            return self._give_up(f"{type(error).__name__}: {error}", block, args, kwargs)
        if seen not in self._seen:
            gap = _relative(_first(output), _first(kind.forward(block, *args, **kwargs)))
            if not gap <= allowed_gap(given.dtype, roundings=4):
                return self._give_up(f"differs by {gap:.2g}", block, args, kwargs)
            self._seen.add(seen)
        return output

    def _give_up(self, reason: str, block: Any, args: Any, kwargs: Any) -> Any:
        self.reason = (reason.strip().splitlines() or ["unknown"])[0]
        warnings.warn(
            f"compiled blocks are given up ({self.reason}); they run as they are, which is slower",
            RuntimeWarning,
            stacklevel=4,
        )
        return type(block).forward(block, *args, **kwargs)


class _Compiled:
    """The forward pass of one block; a class, so that blocks can still be copied and pickled."""

    def __init__(self, blocks: CompiledBlocks, block: Any) -> None:
        self.blocks, self.block = blocks, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.blocks.run(self.block, args, kwargs)


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _relative(found: Tensor, expected: Tensor) -> float:
    """The difference's norm over the expected norm; 0 where that is not finite."""
    size = expected.float().norm()
    gap = (found.float() - expected.float()).norm() / size
    return float(gap) if bool(size.isfinite()) else 0.0
