"""Activations and gradients of every writer, in batches, steered or not."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.circuits.answers import Answers
from steerlens.circuits.components import Prompts
from steerlens.errors import InputError
from steerlens.models.hooks import hooked
from steerlens.models.loading import HookedModel, inference
from steerlens.steering import Coefficient, SteeringVector, steer


@dataclass(frozen=True)
class Intervention:
    """A vector at a coefficient, or nothing at all.

    Raises `InputError` for a condition on whole prompts: circuits run prompts padded and in
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


@dataclass(frozen=True)
class Traced:
    """One run: activations and, where asked for, gradients of the metric by hook name.

    `metric` is each prompt's answer logit difference. Gradients are those of its sum over the
    prompts, so each prompt's own: rows do not touch each other.
    """

    activations: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    metric: Float[Tensor, " prompt"]


def trace(
    model: HookedModel,
    prompts: Prompts,
    answers: Answers,
    hook_names: Sequence[str],
    *,
    intervention: Intervention = Intervention(),
    with_gradients: bool = False,
) -> Traced:
    """Run prompts once, and back once where gradients are asked for, all rows together.

    By TransformerLens's `cache_activation_and_gradient`. Raises `InputError` when TransformerLens
    4 is not there, or inside `torch.inference_mode()`, which has no gradients.
    """
    if with_gradients and torch.is_inference_mode_enabled():
        raise InputError("gradients are needed; leave torch.inference_mode() first")
    cache_activation_and_gradient = _analysis()
    seen: list[Tensor] = []

    def metric(logits: Tensor) -> Tensor:
        rows = torch.arange(len(prompts), device=logits.device)
        last = logits[rows, prompts.last.to(logits.device)].float()
        values = answers.logit_difference(last)
        seen.append(values.detach())
        return values.sum()

    def begin(activation: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
        # With frozen parameters nothing would have a gradient.
        needs = with_gradients and not activation.requires_grad
        return activation.detach().requires_grad_() if needs else None

    # `inference` for evaluation mode alone: gradients are switched on again inside it.
    with (
        inference(model),
        torch.set_grad_enabled(with_gradients),
        hooked(model, [("hook_embed", begin)]),
        intervention.on(model),
    ):
        found = cache_activation_and_gradient(
            model,
            prompts.tokens,
            metric,
            names_filter=list(hook_names),
            compute_gradient=with_gradients,
        )
    gradients = {name: g for name, g in found.gradients.items() if g is not None}
    missing = [name for name in hook_names if with_gradients and name not in gradients]
    if missing:
        raise InputError(f"the metric has no gradient at {', '.join(missing)}")
    return Traced(
        {name: found.activations[name] for name in hook_names},
        gradients,
        seen[-1].float(),
    )


def _analysis() -> Any:
    try:
        from transformer_lens.tools.analysis.attribution_patching import (
            cache_activation_and_gradient,
        )
    except ImportError as error:
        raise InputError(
            "circuits are found with the analysis tools of TransformerLens 4; this is an older one"
        ) from error
    return cache_activation_and_gradient
