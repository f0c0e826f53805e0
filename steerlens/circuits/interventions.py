"""A vector at a coefficient, and what a model holds at its hooks under it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from steerlens.errors import InputError
from steerlens.models import HookedModel, hooked, inference
from steerlens.models.hooks import HookFunction, keeping
from steerlens.steering import Coefficient, SteeringVector, steer, steps
from steerlens.steering.apply import Step
from steerlens.validation import checked


@checked
@dataclass(frozen=True)
class Intervention:
    """A vector at a coefficient, or nothing at all.

    Args:
        vector: What is applied; None: nothing.
        coefficient: As `steer` takes it; 0: nothing.

    Raises:
        InputError: The vector has a condition on whole prompts: circuits run prompts padded and in
            parts, where it cannot be read.

    Examples:
        >>> from steerlens.circuits import Intervention
        >>> with Intervention(vector, 4).on(model):
        ...     logits = model("the river was")
    """

    vector: SteeringVector | None = None
    coefficient: Coefficient = 0

    def __post_init__(self) -> None:
        condition = None if self.vector is None else self.vector.condition
        if condition is not None and condition.scope == "prompt":
            raise InputError(
                "circuits take vectors without a condition on the prompt; leave the prompts out "
                "that it would not steer"
            )

    def on(self, model: HookedModel) -> AbstractContextManager[None]:
        """The model under it, inside the block."""
        return nullcontext() if self.vector is None else steer(model, self.vector, self.coefficient)

    @property
    def steps(self) -> tuple[Step, ...]:
        """What it does, hook by hook; nothing at coefficient 0."""
        return () if self.vector is None else steps(self.vector, self.coefficient)

    @property
    def decided(self) -> list[Any]:
        """All that decides what it does, as `engine.checkpoint.digest` takes it."""
        condition = None if self.vector is None else self.vector.condition
        holds = [] if condition is None else [*vars(condition).values()]
        acts = [[s.hook_name, repr(s.operator), s.direction, s.amount] for s in self.steps]
        return [acts, holds]

    def share(self, share: float) -> "Intervention":
        """A share of it. It must act at one hook."""
        (step,) = self.steps
        assert self.vector is not None
        return Intervention(replace(self.vector, scale=torch.ones(1)), share * step.amount)


UNSTEERED = Intervention()
Read = Callable[[Shaped[Tensor, "prompt token *rest"]], Shaped[Tensor, "*rest"]]
"""What is kept of an activation."""


def capture(
    model: HookedModel,
    tokens: Int[Tensor, "prompt token"],
    hook_names: Sequence[str],
    intervention: Intervention = UNSTEERED,
    *,
    read: Read = torch.clone,
    n_layers: int | None = None,
) -> dict[str, Tensor]:
    """Hook -> `read` of what is there under the intervention, in `n_layers` blocks (None: all)."""
    captured: dict[str, Tensor] = {}
    keeping_all = keeping(captured, hook_names, read)
    with inference(model), intervention.on(model), hooked(model, keeping_all):
        model(tokens, stop_at_layer=n_layers, return_type=None)
    return {name: captured[name] for name in hook_names}


def replacing(
    hook_name: str, value: Float[Tensor, "*shape"], heads: list[int] | None, *, first: int = 0
) -> tuple[str, HookFunction]:
    """A hook that puts `value` in an activation's place, or some heads', from token `first` on."""
    where: Any = (slice(None), slice(first, None), *([] if heads is None else [heads]))

    def replace_it(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        changed = activation.clone()
        changed[where] = value.to(activation).expand_as(activation)[where]
        return changed

    return hook_name, replace_it
